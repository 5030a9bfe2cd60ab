"""Where pretrained weights come from: found, verified and read before the model is built, and checked against it.

timm builds a model, then reads its weights. Here they are read first, so that what they say of their own structure
(Spiral's number of directions, LieRE's missing LayerScale) reaches the constructor, no pickle is read that was not
verified, and a model that cannot take them is not built in vain. Hashing runs beside the building.
"""
import dataclasses
import logging
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

from timm.layers import trunc_normal_
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from .._checks import check_flag
from .._timm import args_of_config, keep_channels, record_model_args
from .hub_cache import verify_cached
from .layouts import Weights, recognise
from .source import WeightFile, open_folder, open_repository

_logger = logging.getLogger(__name__)

# given to timm as the state dict of the cfg, which it prefers to every other source, so that it reads nothing itself
PLACEHOLDER = {'read by timm_rope': True}


def build(
        model_cls: Callable[..., Any],
        fit: Callable[[Weights, Any, bool], Dict[str, Tensor]],
        name: str,
        model_args: Dict[str, Any],
        feature_cfg: Dict[str, Any],
        pretrained: bool,
        **kwargs: Any,
) -> Any:
    """timm's build_model_with_cfg, but with weights that are found, verified and read here.

    Args:
        model_cls: Class of the model.
        fit: Makes a state dict of the model of recognised weights; its third argument is whether to start warm.
        name: Model name.
        model_args: Constructor arguments of that name.
        feature_cfg: As build_model_with_cfg.
        pretrained: Whether to load weights.
        **kwargs: What create_model passes on. `rope_warm_start=True` takes over everything but the rotation from
            weights of another encoding.

    Raises:
        ValueError: `rope_warm_start` without weights, or not asked for by the caller; see also `PretrainedSource`.
        RuntimeError: The weights do not fit; see `PretrainedSource` and `fit`.
    """
    if 'rope_warm_start' in args_of_config(kwargs):
        raise ValueError('rope_warm_start in the model_args of a config.json: only the caller may ask for it.')
    warm_start = check_flag(kwargs.pop('rope_warm_start', False), 'rope_warm_start')
    if warm_start and not pretrained:
        raise ValueError('rope_warm_start=True needs pretrained=True and weights to start from.')
    if not pretrained:
        model = build_model_with_cfg(model_cls, name, False, feature_cfg=feature_cfg, **{**model_args, **kwargs})
        record_model_args(model, kwargs)
        return model
    source = PretrainedSource(
        name, kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None), kwargs.get('cache_dir'),
        lambda weights, model: fit(weights, model, warm_start))
    implied = source.model_args(kwargs, model_args['rope_encoding'])
    # random weights take longer than real ones; `fit` refuses weights that would leave some of them, but for the head
    replaced = source.weights is not None and not warm_start and 'weight_init' not in kwargs
    model = build_model_with_cfg(
        model_cls, name, True, pretrained_filter_fn=source.filter_fn, feature_cfg=feature_cfg, **source.build_args(),
        **{**model_args, **implied, **(dict(weight_init='skip') if replaced else {}), **kwargs})
    source.restore_cfg(model)
    record_model_args(model, kwargs)
    model._model_args = {**getattr(model, '_model_args', {}), **implied}
    if replaced:
        _finish_init(getattr(model, 'model', model), kwargs.get('num_classes'), source.cfg.get('num_classes'))
    return model


def _finish_init(model: Any, num_classes: Optional[int], pretrained_classes: Optional[int]) -> None:
    """Initialise what the weights did not: a head of another number of classes, as timm does by default."""
    if not hasattr(model, 'get_classifier'):
        return  # timm took the model apart for its features, and has no head
    model.weight_init_mode = ''
    head = model.get_classifier()
    if num_classes not in (None, pretrained_classes) and isinstance(head, nn.Linear):
        trunc_normal_(head.weight, std=.02)
        if head.bias is not None:
            nn.init.zeros_(head.bias)


class PretrainedSource:
    """Weights that `timm.models.build_model_with_cfg` is about to load.

    Args:
        name: Model name.
        pretrained_cfg: As create_model passes it: a tag, a dict, a PretrainedCfg or None.
        overlay: As create_model passes it.
        cache_dir: Cache of the Hub.
        fit: Makes a state dict of a model of recognised weights.

    Raises:
        ValueError: A folder without weights, or with several files that could be meant; a malformed name.
        RuntimeError: The weights cannot be had, are corrupt, or are of no known layout.
    """

    def __init__(
            self,
            name: str,
            pretrained_cfg: Any,
            overlay: Any,
            cache_dir: Any,
            fit: Callable[[Weights, Any], Dict[str, Tensor]],
    ) -> None:
        self.fit = fit
        self.cfg, state_dict = _without_state_dict(name, pretrained_cfg, overlay)
        self.weights: Optional[Weights] = None
        self.file = self._open(cache_dir) if state_dict is None else None
        if self.file is not None:
            state_dict = self.file.read()
        if state_dict is None:
            return  # timm downloads a url and reads formats of its own itself, and complains if there is nothing
        try:
            self.weights = recognise(state_dict)
        except Exception:
            self._wait()  # if the hash is wrong, that error is the cause of this one
            raise

    def _open(self, cache_dir: Any) -> Optional[WeightFile]:
        source, file, hub_id = (self.cfg.get(key) for key in ('source', 'file', 'hf_hub_id'))
        if source == 'local-dir':
            return open_folder(str(file))
        if file and source != 'hf-hub':
            # files with `custom_load`, such as .npz, are read by timm
            return None if self.cfg.get('custom_load') else WeightFile(Path(file))
        if not hub_id:
            return None
        if source == 'hf-hub':
            verify_cached(hub_id, 'config.json', cache_dir)  # timm has read it, but built nothing from it yet
        return open_repository(hub_id, self.cfg.get('hf_hub_filename'), cache_dir)

    def _wait(self) -> None:
        if self.file is not None:
            self.file.wait()

    def model_args(self, given: Dict[str, Any], encoding: str) -> Dict[str, Any]:
        """Constructor arguments that the weights need and the caller did not give.

        Args:
            given: Arguments of the caller, which go first.
            encoding: Encoding of the model.

        Raises:
            ValueError: The weights leave open what only the caller can choose.
        """
        if self.weights is None:
            return {}
        same = self.weights.encoding in (None, given.get('rope_encoding', encoding))
        if same:
            for key, why in self.weights.ask.items():
                if key not in given:
                    raise ValueError(f'{key} must be chosen for these {self.weights.layout} weights: {why}.')
        # of weights with another encoding only the blocks are used, so what says where patches are is left out
        position = () if same else ('rope_', 'pos_embed', 'img_size', 'no_embed_class')
        args = {
            key: value for key, value in self.weights.model_args.items()
            if key not in given and not key.startswith(position or ('\0',))}
        if args:
            listed = ', '.join(f'{key}={value!r}' for key, value in args.items())
            _logger.info(f'{self.weights.layout} weights: the model is built with {listed}.')
        return args

    def build_args(self) -> Dict[str, Any]:
        """Arguments of build_model_with_cfg that make it take these weights."""
        if self.weights is None:
            return dict(pretrained_cfg=self.cfg)
        return dict(pretrained_cfg={**self.cfg, 'source': None, 'state_dict': PLACEHOLDER})

    def filter_fn(self, state_dict: Dict[str, Any], model: Any) -> Dict[str, Tensor]:
        """timm's filter hook: what the model's state dict shall be."""
        weights = self.weights or recognise(state_dict)
        try:
            tensors = self.fit(weights, model)
            keep_channels(model, tensors)
        finally:
            self._wait()
        return tensors

    def restore_cfg(self, model: Any) -> None:
        """Give a built model (or feature wrapper) the cfg that the placeholder stood in for."""
        for module in (model, getattr(model, 'model', None)):
            cfg = getattr(module, 'pretrained_cfg', None)
            if isinstance(cfg, dict) and 'first_conv' in cfg:
                cfg['first_conv'] = self.cfg.get('first_conv')
            if isinstance(cfg, dict) and cfg.pop('state_dict', None) is not None and self.cfg.get('source'):
                cfg['source'] = self.cfg['source']


def _without_state_dict(name: str, cfg: Any, overlay: Any) -> Tuple[Dict[str, Any], Optional[Dict[str, Any]]]:
    """The cfg as timm resolves it, and apart from it a state dict given in it, which timm would copy."""
    overlay = dict(overlay or {})
    given = overlay.pop('state_dict', None)
    if isinstance(cfg, PretrainedCfg):
        given = given or cfg.state_dict
        cfg = dataclasses.replace(cfg, state_dict=None)
    elif isinstance(cfg, dict):
        given = given or cfg.get('state_dict')
        cfg = {key: value for key, value in cfg.items() if key != 'state_dict'}
    resolved = resolve_pretrained_cfg(name, cfg, overlay).to_dict()
    elsewhere = resolved.get('source') in ('hf-hub', 'local-dir')  # which timm prefers to a state dict
    return resolved, None if elsewhere else given
