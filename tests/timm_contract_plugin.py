"""pytest plugin that turns timm's own test files into tests of our models; loaded by `timm_contract.py` with `-p`.

timm's test files run as they are. This plugin changes only which models they are given:

- `timm.list_models` returns the models under test, whatever module is asked for, so that lists built from it, also
  those of hard-coded module names, hold our models;
- tests whose model names are written in a `parametrize` mark get a mark with ours (REPARAMETRISED);
- tests whose model name is written in the body have it replaced where it reaches `create_model` (RENAMED).

Everything that is not about a model under test is deselected. The models are named by the environment variable
TIMM_ROPE_CONTRACT_MODELS, separated by spaces.

`vit_test_rope_<encoding>[_ape]` and `vit_test_ape` are made here from the table of the real models: small, and not
square, so that rows cannot be taken for columns. `swin_test_rope_<encoding>[_rpb]` are Swin models for 128 pixels in
windows of 4 patches, a 32nd as in the real ones, which timm's tests of the Swin family take for granted.
"""
import functools
import os
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import pytest
import timm
from timm.models import generate_default_cfgs

from timm_rope.encodings import list_ropes
from timm_rope.models import rope_swin, rope_vit
from timm_rope.models.entrypoints import register

# -- small models, built by the code of the real ones

rope_vit.SIZES['test'] = dict(embed_dim=48, depth=4, num_heads=3)
for _name, _args in rope_vit._model_args().items():
    if _name.startswith('vit_test_'):
        # with the real LayerScale of 1e-4 the attention would be too small to be missed in any comparison
        rope_vit.MODEL_ARGS[_name] = dict(_args, patch_size=8, init_values=0.5)
for _encoding in list_ropes():
    for _bias in (False, True):
        rope_swin.MODEL_ARGS[f'swin_test_rope_{_encoding}{"_rpb" if _bias else ""}'] = dict(
            embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), patch_size=4, window_size=4,
            rope_encoding=_encoding, rel_pos_bias=_bias)
STAND_INS = [
    name for name in (*rope_vit.MODEL_ARGS, *rope_swin.MODEL_ARGS) if name.startswith(('vit_test_', 'swin_test_'))]

default_cfgs = generate_default_cfgs({f'{name}.untrained': (
    rope_swin._cfg(input_size=(3, 128, 128), pool_size=(4, 4)) if name.startswith('swin_')
    else rope_vit._cfg(input_size=(3, 32, 48))) for name in STAND_INS})
for _name in STAND_INS:
    _family = rope_swin if _name.startswith('swin_') else rope_vit
    register(__name__, _name, _family._create, 'a model class', 'Small stand-in.')

MODELS = os.environ.get('TIMM_ROPE_CONTRACT_MODELS', '').split() or STAND_INS


# -- tests of test_models.py and others whose marks name a model

SMALL = dict(embed_dim=32, depth=1, num_heads=2)

Values = Dict[str, Tuple[str, Callable[[str], List[Any]]]]

# test -> (names of the parameters, values for one ViT); other marks of the test stay
REPARAMETRISED: Values = {
    # features
    'test_model_forward_features': ('model_name', lambda m: [m]),
    'test_features_only_feature_cls_class': ('model_name', lambda m: [m]),
    'test_pruned_features_torchscript': ('model_name', lambda m: [m]),
    'test_feature_getter_stage_ends_torchscript': ('model_name', lambda m: [m]),
    # pruning
    'test_prune_intermediate_layers_params_used': ('model_name', lambda m: [m]),
    'test_forward_after_prune_intermediate_layers': ('model_name', lambda m: [m]),
    # head and pool
    'test_reset_classifier_keeps_pool': ('model_name', lambda m: [m]),
    'test_head_hidden_size': ('model_name, model_kwargs', lambda m: [
        (m, {}), (m, dict(global_pool='avg')), (m, dict(class_token=False, global_pool='avg', reg_tokens=4))]),
    'test_catavgmax_unsupported': ('model_name', lambda m: [m]),
    # weights
    'test_headless_checkpoint_reload': ('model_name,kwargs', lambda m: [(m, {}), (m, dict(global_pool='avg'))]),
    'test_model_init_weights_after_to_empty': ('model_name, kwargs', lambda m: [
        (m, {}), (m, dict(weight_init='jax', reg_tokens=4)), (m, dict(weight_init='naver'))]),
    'test_swin_family_reinit_after_to_empty': ('model_name,img_size', lambda m: [(m, 64)]),
    'test_freeze_unfreeze_root_parameters': ('model_name', lambda m: [m]),
    # size; the encodings keep their frequencies in float32, which this test of bfloat16 buffers does not allow
    'test_relpos_family_set_input_size': ('model_name,kwargs,img_size,new_size', lambda m: (
        [(m, {}, 64, 96)] if '_rope' not in m else [])),
    # round trips through an exported folder
    'test_default_resize_hub_roundtrip': ('name,kwargs,img_size,new_size', lambda m: [
        (m, {}, 32, 48), (m, SMALL, 64, 96), (m, dict(SMALL, dynamic_img_size=False), 64, 96)]),
    'test_export_tracks_reset_pool_in_head': ('model_name,num_classes,pool', lambda m: [
        (m, 3, 'max'), (m, 3, 'avgmax'), (m, 0, '')]),
    'test_export_tracks_reset_classifier_structure': ('model_name,kwargs,pool,reload_naflex', lambda m: [
        (m, SMALL, 'avg', None),
        (m, dict(SMALL, global_pool='avg'), 'token', None),
        (m, dict(SMALL, global_pool='map'), 'map', None),
        (m, dict(SMALL, global_pool='max', fc_norm=False), '', None),
        (m, dict(SMALL, global_pool='max', fc_norm=False), None, True),
        (m, dict(SMALL, use_naflex=True), 'max', None),
    ]),
}

SWIN_SMALL = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


def _size(model: str) -> int:
    """Size of a Swin model for which its window is a 32nd of the image."""
    return 128 if model.startswith('swin_test_') else 224


# the same for one Swin
SWIN: Values = {
    **{test: ('model_name', lambda m: [m]) for test in (
        'test_model_forward_features', 'test_features_only_feature_cls_class', 'test_pruned_features_torchscript',
        'test_feature_getter_stage_ends_torchscript', 'test_prune_intermediate_layers_params_used',
        'test_forward_after_prune_intermediate_layers', 'test_reset_classifier_keeps_pool',
        'test_freeze_unfreeze_root_parameters')},
    'test_head_hidden_size': ('model_name, model_kwargs', lambda m: [
        (m, dict(img_size=64)), (m, dict(img_size=64, global_pool='max'))]),
    'test_forward_intermediates_stop_early_final_norm': ('model_name,model_kwargs', lambda m: [(m, SWIN_SMALL)]),
    'test_headless_checkpoint_reload': ('model_name,kwargs', lambda m: [(m, SWIN_SMALL)]),
    'test_model_init_weights_after_to_empty': ('model_name, kwargs', lambda m: [
        (m, dict(img_size=64)), (m, dict(img_size=64, weight_init='jax'))]),
    # the Swin family
    **{test: ('model_name,img_size', lambda m: [(m, _size(m))]) for test in (
        'test_swin_family_reinit_after_to_empty', 'test_swin_family_set_input_size',
        'test_swin_family_set_input_size_stage_windows', 'test_swin_family_set_input_size_invalid_and_min_windows',
        'test_swin_family_dynamic_mask_trace')},
    **{test: ('model_name', lambda m: [m]) for test in (
        'test_swin_family_set_input_size_window_ratios', 'test_swin_family_resize_metadata',
        'test_swin_family_resize_odd_stage_sizes', 'test_swin_family_set_input_size_after_pruning',
        'test_swin_family_script_after_resize', 'test_swin_family_compile_resize_guards',
        'test_swin_family_window_padding')},
    'test_relpos_non_square_checkpoint_reload': ('model_name,kwargs', lambda m: [(m, SWIN_SMALL)]),
    'test_relpos_non_square_set_input_size': ('model_name,kwargs', lambda m: [(m, SWIN_SMALL)]),
    # round trips through an exported folder
    'test_windowed_model_resize_roundtrip': ('name', lambda m: [m]),
    'test_default_resize_hub_roundtrip': ('name,kwargs,img_size,new_size', lambda m: [
        (m, dict(window_size=(7, 7, 14, 7)), 112, 224), (m, dict(window_ratio=8), 64, 96),
        (m, dict(window_rule='naver', window_size=4), (64, 96), 128)]),
    'test_export_tracks_reset_pool_in_head': ('model_name,num_classes,pool', lambda m: [
        (m, 3, 'max'), (m, 3, 'avgmax'), (m, 0, '')]),
}

# tests that take it for granted that a Swin has one size, which ours has only if told so
ONE_SIZE = ('test_windowed_model_resize_roundtrip', 'test_swin_family_window_padding')

# parameters beside the model for which a test says nothing about ours -> values kept
KEPT_VALUES: Dict[str, Tuple[str, List[Any]]] = {
    'test_flexible_model_export_keeps_nominal_grid_and_preprocessing_separate': ('use_naflex', [False]),
    'test_export_does_not_inherit_training_regularization': ('vit', [True]),
}


# -- tests whose body names a model

class Renamed(NamedTuple):
    name: str = 'vit_tiny_patch16_224'  # in timm's test
    defaults: Dict[str, Any] = {}  # arguments of the model that the named one has by default
    constants: Dict[str, Any] = {}  # of the test's module


_FIXED = dict(dynamic_img_size=False)  # timm's ViT takes one size unless told otherwise, ours any
_HEADS_OF_16 = {'_CUSTOM_LOAD_MODEL_KWARGS': {
    'vit_tiny_patch16_224': dict(img_size=8, patch_size=4, embed_dim=32, depth=1, num_heads=2)}}

RENAMED: Dict[str, Renamed] = {
    # test_models.py
    'test_convit_dtype_change_after_forward': Renamed('convit_tiny'),
    'test_resnet_pruned_grad_checkpointing': Renamed('test_resnet'),
    'test_hybrid_vit_set_input_size_dtype': Renamed('vit_tiny_r_s16_p8_224'),
    # test_model_input.py
    'test_script_resolution_preserves_source_config_and_legacy_resolver': Renamed(
        defaults=dict(pretrained_cfg_overlay=dict(input_size=(3, 224, 224)))),
    'test_script_construction_rejects_conflicting_inputs': Renamed(),
    'test_script_resolution_defaults_to_multispectral_source': Renamed('resnet18'),
    'test_flexible_model_uses_test_size_and_explicit_data_overrides': Renamed(),
    'test_runtime_resolution_rejects_incompatible_explicit_requests': Renamed(defaults=_FIXED),
    'test_adapted_resized_model_hub_roundtrip': Renamed(defaults=_FIXED),
    'test_export_requires_serializable_architecture_options': Renamed(),
    'test_export_rejects_conflicting_model_metadata': Renamed(),
    'test_flexible_model_export_keeps_nominal_grid_and_preprocessing_separate': Renamed(),
    'test_model_traits_are_independent_and_follow_resize_and_head_reset': Renamed(defaults=_FIXED),
    'test_export_data_config_test_size_roundtrip': Renamed('test_resnet'),
    'test_efficientvit_msra_rectangular_resize_roundtrip': Renamed('efficientvit_m0'),
    'test_export_does_not_inherit_training_regularization': Renamed(),
    # test_utils.py
    'test_vit_linear_probe_freezes_backbone': Renamed(),
    # test_checkpoint_loading.py
    'test_native_checkpoint_file_adapts_head_for_custom_load_source': Renamed(constants=_HEADS_OF_16),
    'test_explicit_custom_load_file_uses_model_loader': Renamed(constants=_HEADS_OF_16),
}
# constants of the modules, for tests that are reparametrised to a ViT
CONSTANTS = {'test_swin_family_reinit_after_to_empty': {'_SWIN_KWARGS': {}}}


@pytest.fixture
def renamed_model(request, monkeypatch):
    """Give the test of RENAMED the model of the parameter instead of the one its body names."""
    rule = RENAMED[request.function.__name__]

    def replace(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(model_name, *args, **kwargs):
            if model_name != rule.name:
                return function(model_name, *args, **kwargs)
            return function(request.param, *args, **{**rule.defaults, **kwargs})
        return wrapper

    for module in (timm, request.module):
        for function in ('create_model', 'resolve_model_input_args'):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, replace(getattr(module, function)))


def _create_one_size(create: Callable, model: str, name: str, **kwargs):
    return create(name, **({'strict_img_size': True, **kwargs} if name == model else kwargs))


@pytest.fixture
def changed_constants(request, monkeypatch):
    name = request.function.__name__
    model = next((v for v in request.node.callspec.params.values() if v in MODELS), '')
    if model.startswith('swin_'):
        if name in ONE_SIZE:
            for module in (timm, request.module):
                create = getattr(module, 'create_model', None)
                if create is not None:
                    monkeypatch.setattr(module, 'create_model', functools.partial(_create_one_size, create, model))
        return
    for key, value in {**CONSTANTS.get(name, {}), **getattr(RENAMED.get(name), 'constants', {})}.items():
        monkeypatch.setattr(request.module, key, value)


# -- hooks

seen = set()  # tests of the tables that timm still has


def pytest_configure(config) -> None:
    real = timm.list_models

    def list_models(filter='', module='', *args, **kwargs):
        return [name for name in real(filter, '', *args, **kwargs) if name.split('.')[0] in MODELS]

    timm.list_models = timm.models.list_models = list_models


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector, name, obj) -> None:
    """Change the marks of a test function before pytest makes items of it."""
    marks = list(getattr(obj, 'pytestmark', []))
    swins = [model for model in MODELS if model.startswith('swin_')]
    vits = [model for model in MODELS if model not in swins]
    if name in REPARAMETRISED or name in SWIN:
        parameters = (REPARAMETRISED.get(name) or SWIN[name])[0]
        cases = [
            case for table, models in ((REPARAMETRISED, vits), (SWIN, swins)) if name in table
            for model in models for case in table[name][1](model)]
        marks = _without(marks, parameters)
        marks.append(pytest.mark.parametrize(parameters, cases).mark)
    elif name in RENAMED:
        marks.append(pytest.mark.usefixtures('renamed_model').mark)
        marks.append(pytest.mark.parametrize('renamed_model', vits, indirect=True).mark)
    else:
        return
    seen.add(name)
    if name in KEPT_VALUES:
        parameters, kept = KEPT_VALUES[name]
        marks = [*_without(marks, parameters), pytest.mark.parametrize(parameters, kept).mark]
    marks.append(pytest.mark.usefixtures('changed_constants').mark)
    obj.pytestmark = marks


def _without(marks: List[Any], parameters: str) -> List[Any]:
    return [m for m in marks if m.name != 'parametrize' or m.args[0].replace(' ', '') != parameters.replace(' ', '')]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    missing = (set(REPARAMETRISED) | set(SWIN) | set(RENAMED)) - seen
    if missing:
        raise pytest.UsageError(f'The tests of timm {timm.__version__} have no {", ".join(sorted(missing))} any more.')
    ours = []
    for item in items:
        values = getattr(getattr(item, 'callspec', None), 'params', {}).values()
        model = next((v.split('.')[0] for v in values if isinstance(v, str) and v.split('.')[0] in MODELS), None)
        if model is not None:
            item.user_properties.append(('model', model))  # for the report
            ours.append(item)
    config.hook.pytest_deselected(items=[i for i in items if i not in ours])
    items[:] = ours
