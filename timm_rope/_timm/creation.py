"""How models are created, loaded and saved, and how scripts ask for sizes and images, as in the newest release."""
from typing import Any, Callable, Dict

import timm
import timm.data
import timm.layers
import timm.models
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import nn

from ._common import LinspaceOnCpu, takes
from .vit import VisionTransformer

# -- 1.0.31

def _model_input_args(model_name: str, args: Dict[str, Any], **model_kwargs: Any) -> Dict[str, Any]:
    """Arguments of `create_model` for a registered model, where `args` of a script ask for nothing."""
    return {'model_name': model_name, **{key: value for key, value in model_kwargs.items() if value is not None}}


def _input_data_config(model: Any, args: Dict[str, Any], use_test_size: bool) -> Dict[str, Any]:
    """How images are prepared; where a colour has no mean or deviation of its own, it is that of all colours."""
    channels, config = args['input_size'][0], dict(args, in_chans=args['input_size'][0])
    for key, default in (('mean', IMAGENET_DEFAULT_MEAN), ('std', IMAGENET_DEFAULT_STD)):
        values = args.get(key) or model.pretrained_cfg.get(key) or default
        config[key] = tuple(values) if len(values) in (1, channels) else (sum(values) / len(values),)
    return timm.data.resolve_data_config(config, model=model, use_test_size=use_test_size)


# how scripts ask for an image size or channels
resolve_input_data_config = getattr(timm.data, 'resolve_input_data_config', _input_data_config)
resolve_model_input_args = getattr(timm.models, 'resolve_model_input_args', _model_input_args)


def record_model_args(model: Any, args: Dict[str, Any]) -> None:
    """Note the arguments that a model is created with where `create_model` does not, for `save_for_hf` below."""
    if not hasattr(timm.models, 'get_model_args'):
        runtime = ('device', 'dtype', 'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir')
        model._model_args = {key: value for key, value in args.items() if key not in runtime}


def args_of_config(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments that a config.json, not the caller, gave to a model; before, timm mixed them with the caller's."""
    cfg = kwargs.get('pretrained_cfg')
    if hasattr(timm.models, 'get_model_args') or not isinstance(cfg, dict):
        return kwargs.get('pretrained_model_args') or {}
    if cfg.get('source') == 'local-dir':
        return load_model_config_from_path(cfg['file'])[2] or {}
    if cfg.get('source') == 'hf-hub':
        return load_model_config_from_hf(cfg['hf_hub_id'], kwargs.get('cache_dir'))[2] or {}
    return {}


def save_for_hf(model: Any, folder: Any, **kwargs: Any) -> Any:
    """timm's `save_for_hf`, which writes into config.json by which arguments the model is built again."""
    return _export(timm.models.save_for_hf, model, folder, **kwargs)


def push_to_hf_hub(model: Any, repo_id: str, **kwargs: Any) -> Any:
    """timm's `push_to_hf_hub`, with the same config.json."""
    return _export(timm.models.push_to_hf_hub, model, repo_id, **kwargs)


def _export(save: Callable[..., Any], model: Any, target: Any, **kwargs: Any) -> Any:
    if hasattr(timm.models, 'get_model_args') or not hasattr(model, '_model_args'):
        return save(model, target, **kwargs)
    cfg, size = model.pretrained_cfg, tuple(model.patch_embed.img_size)
    args = {key: value for key, value in model._model_args.items() if not key.endswith('_rate')}
    args.update(num_classes=model.num_classes, img_size=size, patch_size=tuple(model.patch_embed.patch_size))
    if isinstance(model, VisionTransformer):  # `reset_classifier` changes them
        args.update(global_pool=model.global_pool, fc_norm=not isinstance(model.fc_norm, nn.Identity))
    model.pretrained_cfg = {**cfg, 'num_classes': model.num_classes, 'input_size': (model.in_chans, *size)}
    try:
        return save(model, target, **{**kwargs, 'model_args': {**args, **(kwargs.get('model_args') or {})}})
    finally:
        model.pretrained_cfg = cfg


def keep_channels(model: Any, state_dict: Dict[str, Any]) -> None:
    """Leave a stem alone that has the channels of the model; before, timm took all weights for those of RGB images."""
    name = model.pretrained_cfg.get('first_conv')
    if not takes(timm.models.adapt_input_conv, 'base_chans') and name is not None:
        weight = state_dict.get(f'{name}.weight')
        if weight is not None and weight.shape == model.get_submodule(name).weight.shape:
            model.pretrained_cfg['first_conv'] = None  # what timm reads next; the caller restores it


# -- 1.0.21: `device` is an argument of every model

def create_without_memory(name: str, **kwargs: Any) -> Any:
    """Any model of timm on the meta device."""
    if takes(timm.layers.Attention.__init__, 'device'):
        return timm.create_model(name, device='meta', **kwargs)
    with torch.device('meta'), LinspaceOnCpu():
        return timm.create_model(name, **kwargs)
