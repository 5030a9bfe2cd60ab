"""Exact changes of encoding: some encodings are special cases of others, with the same function of every image.

    uniform, axial -> axial_learned -> mixed -> string -> liere,   spiral, golden, nd -> mixed,
    spherical -> spherical_learned -> quatro,   comrope -> liere,   one turn of a triplet -> liere with blocks of 3

Only the encoding changes, no other weight: channel pairs stay where they are. The exception is LieRE with generators
that commute, which is mixed in another basis of the channels (arXiv 2511.08368, theorem 3, and theorem 1 where one axis
has generators): the basis goes into the weights and biases of queries and keys. Prefix tokens do not turn, so where
there are some, the origin of the coordinates is part of the function, even if the score of two patches does not see it.
"""
import copy
import re
from typing import Any, Dict, List, Optional, Tuple, cast

import torch
from torch import Tensor, nn

from .._tracing import unobserved
from ..encodings import RotaryEncoding
from ..encodings._exact import convert_rope
from ..encodings._saved import encoding_prefix, read_encoding
from ..encodings._usage import USAGE
from ..rotations import Rotation

SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'custom_load')


def convert_encoding(source: Any, name: str, *, num_heads: Optional[int] = None, **options: Any) -> Any:
    """Express a rotary encoding as a more general one with the same function.

    Queries and keys turn by the same angles on every grid, so logits agree to rounding. The frequencies become
    parameters: in the converted model they learn, an optimizer has to be made anew.

    Args:
        source: Model with a rotary encoding, the state dict of a ViT, or an encoding alone (`create_rope`). Not
            changed. A model is also any module with a `rope`, `blocks` with `attn.qkv`, and `num_prefix_tokens` if it
            has some, as one of sequences.
        name: Encoding to change to, a learned one of `list_ropes()`.
        num_heads: Attention heads; only for state dicts, which do not tell them where all heads share frequencies.
        **options: Options of the target, with or without the prefix `rope_`. Default: those of the source where both
            encodings know them, else the target's own.

    Returns:
        What `source` is, with the other encoding: a copy of the model on its device and in its mode, which
        `timm.models.save_for_hf` saves under the name of its new architecture and without the source's weights as its
        origin; a new dict that shares all other tensors; or an encoding. Learned frequencies stay frozen where they
        were; fixed ones become trainable.

    Raises:
        ValueError: The target has no frequencies with this function, says why and which encodings have (of generators
            of LieRE, how far they are from commuting); a change of basis that norms of queries and keys do not allow; a
            state dict without the signature of its encoding; tensors on the meta device; an option out of range.
        TypeError: `source` is something else, as a wrapped, compiled or scripted model, or an option is unknown.
    """
    if isinstance(source, dict):
        return _convert_state_dict(source, name, num_heads, options)
    ropes = [source] if isinstance(source, RotaryEncoding) else _ropes_of(source)
    if num_heads not in (None, ropes[0].num_heads):
        raise ValueError(f'num_heads is {ropes[0].num_heads} in this model, got {num_heads!r}; it need not be given.')
    alone = ropes[0] is source
    prefix = alone or getattr(source, 'num_prefix_tokens', 0) > 0  # a Swin has none
    found = {id(rope): convert_rope(rope, name, options, not alone, prefix) for rope in ropes}
    targets = {key: rope for key, (rope, _) in found.items()}
    target = targets[id(ropes[0])]
    if alone:
        return target
    bases = [(attn, layer, found[id(rope)][1]) for attn, layer, rope in _attentions(source)]
    for attn, _, basis in bases:
        if basis is not None:
            _check_basis(dict(attn.named_children()))
    with torch.inference_mode(False):
        # the memo puts the targets wherever the copy would refer to an encoding
        model = copy.deepcopy(source, {**targets})
    for module in model.modules():
        if isinstance(dict(module.named_children()).get('rotation'), Rotation) and module not in targets.values():
            module.rotation = target.rotation
    folded: Dict[int, Any] = {}
    for (attn, _, _), (_, layer, basis) in zip(_attentions(model), bases):
        if basis is not None:
            _fold_once(attn.qkv, basis, layer, folded)
    _record(model, target)
    return model


def _ropes_of(model: Any) -> List[RotaryEncoding]:
    """The encoding of a ViT, or those of all blocks of a Swin."""
    children = dict(model.named_children()) if isinstance(model, nn.Module) else {}
    modules = model.modules() if _is_swin(model) else [children.get('rope')]
    ropes = [module for module in modules if isinstance(module, RotaryEncoding)]
    if not ropes:
        if isinstance(model, nn.Module) and getattr(model, 'rope', model) is None:
            raise ValueError('The model has no rotary encoding (rope_encoding="none"), so there is none to convert.')
        inner = ' or '.join(f'its .{key}' for key in ('module', '_orig_mod', 'model') if key in children)
        raise TypeError(
            f'source must be a plain model with a rotary encoding, a state dict or a RotaryEncoding, got '
            f'{type(model).__name__}' + (f': pass {inner}.' if inner else '.'))
    if any(hasattr(parameter, 'device_mesh') for parameter in model.parameters()):
        raise TypeError('The parameters of the model are sharded: convert before fully_shard.')
    return ropes


def _attentions(model: nn.Module) -> List[Tuple[Any, int, Any]]:
    """Every attention that turns, with its layer in its encoding and the encoding."""
    if _is_swin(model):
        own = [m for m in model.modules() if isinstance(dict(m.named_children()).get('rope'), RotaryEncoding)]
        return [(attn, 0, attn.rope) for attn in own]
    return [(block.attn, layer, model.rope) for layer, block in enumerate(cast(Any, model.blocks))]


def _is_swin(model: Any) -> bool:
    from .swin import RopeSwinTransformer

    return isinstance(model, RopeSwinTransformer)


# -- another basis of queries and keys

def _check_basis(children: Dict[str, nn.Module]) -> None:
    """Refuse what does not commute with a change of basis, and projections that are no plain weights."""
    for name in ('q_norm', 'k_norm'):
        if not isinstance(children.get(name, nn.Identity()), nn.Identity):
            raise ValueError(
                f'The channels of queries and keys need another basis, and {name} scales each by itself: this model '
                f'has no exact form without it (qk_norm=False).')
    qkv = children.get('qkv', nn.Linear(1, 1))
    # `torch.nn.utils.prune` and the older weight norm compute the weight anew in a hook
    plain = type(qkv) is nn.Linear
    if not plain or qkv._forward_pre_hooks or not unobserved(qkv):
        what = 'has hooks or another forward' if plain else f'is a {type(qkv).__name__} and not nn.Linear'
        raise ValueError(
            f'The channels of queries and keys need another basis, which goes into the weights of qkv, but that '
            f'{what}: merge, remove or unwrap it first.')


def _fold_once(projection: Any, basis: Tensor, layer: int, folded: Dict[int, Any]) -> None:
    """Put a basis into a projection; `folded` says which one is in a tensor already, since blocks may share some."""
    which = id(basis), min(layer, len(basis) - 1)
    for tensor in (projection.weight, projection.bias):
        if tensor is not None and id(tensor) not in folded:
            _fold(tensor, basis, layer)
        if tensor is not None and folded.setdefault(id(tensor), which) != which:
            raise ValueError(
                'The channels of queries and keys need another basis in every block, which goes into the weights of '
                'qkv, but blocks share these weights: give each block its own first.')


def _fold(tensor: Tensor, basis: Tensor, layer: int) -> None:
    """Q^T times queries and keys, in place, by the weight (3 H D, C) or bias (3 H D) of their projection."""
    q = basis[min(layer, len(basis) - 1)].to(tensor.device)  # (H or 1, D, D); one layer stands for all that share
    with torch.no_grad():
        heads = tensor.shape[0] // (3 * q.shape[-1])
        parts = tensor.detach().double().reshape(3, heads, q.shape[-1], -1)
        parts[:2] = q.mT @ parts[:2]
        tensor.copy_(parts.reshape(tensor.shape))


# -- models

def _record(model: nn.Module, target: RotaryEncoding) -> None:
    """Make timm save the model as what it is now, and no longer as the weights that were published."""
    cfg: Any = getattr(model, 'pretrained_cfg', None)
    if not cfg:
        return  # made by the constructor: timm cannot save it either
    from . import rope_swin, rope_vit
    from .swin import DEFAULTS

    swin = _is_swin(model)
    models = rope_swin.MODEL_ARGS if swin else rope_vit.MODEL_ARGS
    args = {k: v for k, v in getattr(model, '_model_args', {}).items()
            if not k.startswith('rope_') or k == 'rope_reference_grid'}
    name = _twin(cfg.get('architecture'), target.name, models)
    if name is None:
        name, args['rope_encoding'] = cfg.get('architecture'), target.name
    defaults = {**target.option_defaults(), **(DEFAULTS.get(target.name, {}) if swin else {})}
    preset = {**{f'rope_{k}': v for k, v in defaults.items()}, **models.get(name, {})}
    args.update({f'rope_{k}': v for k, v in target.options.items() if preset[f'rope_{k}'] != v})
    args.update({f'rope_{k}': v for k, v in target.usage.items() if v != USAGE[k]})
    cfg = {**{k: v for k, v in cfg.items() if k not in SOURCES}, 'architecture': name}
    for key, value in dict(pretrained_cfg=cfg, default_cfg=cfg, pretrained_model_args={}, _model_args=args).items():
        setattr(model, key, value)


def _twin(architecture: Any, encoding: str, models: Dict[str, Dict[str, Any]]) -> Optional[str]:
    """The registered model that differs from `architecture` in its encoding alone."""
    def others(args: Dict[str, Any]) -> Dict[str, Any]:
        return {k: v for k, v in args.items() if not k.startswith('rope_')}

    if architecture not in models:
        return None
    wanted = others(models[architecture])
    twins = (n for n, args in models.items() if args['rope_encoding'] == encoding and others(args) == wanted)
    return next(twins, None)


# -- state dicts

def _convert_state_dict(
        state_dict: Dict[str, Any], name: str, num_heads: Optional[int], options: Dict[str, Any]) -> Dict[str, Any]:
    prefix = encoding_prefix(state_dict)
    root = prefix.removesuffix('rope.')
    tokens = any(root + name in state_dict for name in ('cls_token', 'reg_token'))
    target, basis = convert_rope(read_encoding(state_dict, prefix, num_heads), name, options, True, tokens)
    device = state_dict[f'{prefix}signature'].device
    tensors = {f'{prefix}{k}': v.detach().to(device) for k, v in target.state_dict().items()}
    out = copy.copy(state_dict)  # keeps torch's `_metadata`
    out.clear()
    for key, value in state_dict.items():
        out.update(tensors if key.startswith(prefix) else {key: value})
    if basis is not None:
        _fold_all(out, root, basis)
    return out


def _fold_all(state_dict: Dict[str, Any], root: str, basis: Tensor) -> None:
    """Put a basis into copies of the projections of a state dict of a ViT."""
    blocks = re.compile(re.escape(root) + r'blocks\.(\d+)\.attn\.(.+)')
    places = {key: blocks.fullmatch(key) for key in state_dict}
    norms = [key for key, place in places.items() if place and place[2].startswith(('q_norm.', 'k_norm.'))]
    weights = {key: int(place[1]) for key, place in places.items() if place and place[2] == 'qkv.weight'}
    more = [key for key, place in places.items() if place and re.match(r'qkv\.(?!weight$|bias$)', place[2])]
    if more:
        raise ValueError(
            f'The channels of queries and keys need another basis, which goes into the weights of qkv, but there is '
            f'more to it, {more[0]}: merge or remove it first.')
    if norms or not weights:
        raise ValueError(
            'The channels of queries and keys need another basis, ' + (
                f'and {norms[0]} scales each by itself: there is no exact form.' if norms else
                f'but the state dict has no {root}blocks.0.attn.qkv.weight that it could go into.'))
    for key, layer in weights.items():
        for name in (key, key.removesuffix('weight') + 'bias'):
            if name in state_dict:
                state_dict[name] = state_dict[name].detach().clone()
                _fold(state_dict[name], basis, layer)
