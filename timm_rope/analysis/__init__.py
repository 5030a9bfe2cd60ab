"""What an encoding does: functions from models and tensors to numbers, and no pictures (those are `plot`'s).

    maps = analysis.attention_maps(model, images)         # exact, of any block and any kernel
    waves = analysis.wave_vectors(model)                  # radians per patch
    logged = analysis.frequency_summary(model)            # a flat dict for wandb or tensorboard

In come models (ours, and timm's own where the quantity has a meaning), images or tensors; out come tensors on the
device they were computed on. Shapes: B images, L layers, H heads, N tokens, G groups of channels, b channels a group.
"""
from .attention import AttentionMap as AttentionMap
from .attention import attention_maps as attention_maps
from .attention import cls_map as cls_map
from .attention import mean_distance as mean_distance
from .attention import mean_entropy as mean_entropy
from .attention import query_map as query_map
from .equivariance import accuracy_drop as accuracy_drop
from .equivariance import logit_shift_error as logit_shift_error
from .equivariance import pattern_map as pattern_map
from .equivariance import rotation_error as rotation_error
from .equivariance import score_shift_error as score_shift_error
from .equivariance import shift_patches as shift_patches
from .equivariance import shuffle_patches as shuffle_patches
from .fourier import encodable_bins as encodable_bins
from .fourier import reconstruct as reconstruct
from .fourier import ssim as ssim
from .fourier import test_pattern as test_pattern
from .frequencies import commutator_ratio as commutator_ratio
from .frequencies import directed_waves as directed_waves
from .frequencies import frequency_summary as frequency_summary
from .frequencies import isotropy as isotropy
from .frequencies import spectrum as spectrum
from .frequencies import wave_vectors as wave_vectors
from .turns import Turn as Turn
from .turns import generators as generators
from .turns import rotary_layers as rotary_layers
from .turns import rotation_matrices as rotation_matrices
