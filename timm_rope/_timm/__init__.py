"""What differs between the releases of timm that this package works with, 1.0.20 and later: the only place that knows.

Everything here has the name and does what it does in the newest timm, and is timm's own wherever timm has it. Older
releases get small stand-ins made of what they have. Features are asked for, not numbers: a checkout between two
releases calls itself by the next one. Which release brought what stands beside each stand-in.

Not bridged, since it is timm's and not our models': timm's own `save_for_hf` and `push_to_hf_hub` note the arguments of
a model from 1.0.31 on (before, give them `model_args`, or take those of this module), its readers refuse pickles with
code in them from 1.0.26 on, and Swin's `prune_intermediate_layers` fits head and norm to what is left from 1.0.31 on.
"""
from .creation import args_of_config as args_of_config
from .creation import create_without_memory as create_without_memory
from .creation import keep_channels as keep_channels
from .creation import push_to_hf_hub as push_to_hf_hub
from .creation import record_model_args as record_model_args
from .creation import resolve_input_data_config as resolve_input_data_config
from .creation import resolve_model_input_args as resolve_model_input_args
from .creation import save_for_hf as save_for_hf
from .swin import SwinTransformer as SwinTransformer
from .swin import WindowAttention as WindowAttention
from .swin import resolve_stage_window_sizes as resolve_stage_window_sizes
from .swin import swin_filter_fn as swin_filter_fn
from .swin import window_sizes_from_ratio as window_sizes_from_ratio
from .vit import Attention as Attention
from .vit import Block as Block
from .vit import VisionTransformer as VisionTransformer
from .vit import resample_abs_pos_embed as resample_abs_pos_embed
from .vit import resolve_self_attn_mask as resolve_self_attn_mask
