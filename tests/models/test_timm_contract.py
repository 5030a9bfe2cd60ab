"""timm's own tests on small models of every encoding, and what those tests cannot ask of a Vision Transformer."""
import copy
from collections import Counter

import pytest
import timm
import timm_contract
import torch
from torch.testing import assert_close

from timm_rope import list_ropes
from timm_rope.weights.fit_vit import checkpoint_filter_fn

# `python tests/timm_contract.py --models 'vit_test_*'` runs the rest of them
MODELS = [f'vit_test_rope_{name}' for name in [*list_ropes(), 'mixed_ape', 'vit5']] + ['vit_test_ape']
SWIN = 'swin_test_rope_mixed_rpb'
TOO_SLOW = ('test_swin_family_compile_resize_guards', 'test_swin_family_script_after_resize')  # half of a Swin's time

# of test_models.py: what timm asks of each registered model, without the download of weights
PER_MODEL = {
    'test_model_forward', 'test_model_backward', 'test_model_forward_torchscript',
    'test_model_forward_intermediates_features', 'test_model_forward_intermediates',
    'test_prune_intermediate_layers_contract', 'test_model_forward_fx', 'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
}
CFG_TEST = {'vit': 'test_model_default_cfgs_non_std', 'swin': 'test_model_default_cfgs'}
FUNCTIONS = {'vit': 45, 'swin': 37}  # of timm that a model runs
RUNS = {'vit': 69, 'swin': 49}  # of these, counting their parameters


@pytest.fixture(scope='module')
def report():
    """All outcomes of one pytest run; what it printed is shown with the first failure."""
    try:
        outcomes, status, output = timm_contract.run(
            [*MODELS, SWIN], ' and '.join(f'not {test}' for test in TOO_SLOW), quiet=True)
    except timm_contract.TestsUnavailable as error:
        pytest.skip(str(error))
    print(output)
    print(timm_contract.table(outcomes))
    assert outcomes, f'pytest ended with status {status} and no report'
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize('model', [*MODELS, SWIN])
def test_contract(report, model):
    outcomes = [outcome for outcome in report if outcome.model == model]
    failed = [f'{outcome.name}: {outcome.message}' for outcome in outcomes if outcome.result == 'failed']
    assert not failed, '\n'.join(failed)
    # nothing may pass by not being run
    results = Counter(outcome.result for outcome in outcomes)
    family = model.split('_')[0]
    assert results['skipped'] == 0 and results['passed'] >= RUNS[family], results
    functions, needed = {outcome.test for outcome in outcomes}, PER_MODEL | {CFG_TEST[family]}
    assert len(functions) >= FUNCTIONS[family] and not needed - functions, needed - functions


# -- timm's tests of these need feature maps with two axes, or buffers of the model's dtype

ENCODINGS = ['none', 'axial', 'mixed', 'liere']


def create(encoding: str, **kwargs):
    name = 'vit_tiny_ape' if encoding == 'none' else f'vit_tiny_rope_{encoding}'
    torch.manual_seed(0)
    defaults = dict(img_size=(32, 48), patch_size=8, embed_dim=48, depth=4, num_heads=3, init_values=0.5, num_classes=5)
    return timm.create_model(name, **{**defaults, **kwargs})


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_last_layer_is_pruned_only_with_head_and_norm(encoding):
    """As test_prune_intermediate_layers_last_feature, whose last line averages over two spatial axes."""
    model = create(encoding).eval()
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tap = model.forward_intermediates(x, indices=[3], intermediates_only=True)[0]
        final, _ = model.forward_intermediates(x, indices=[3], stop_early=True)
        assert_close(final, model.forward_features(x), rtol=0, atol=0)

        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([3], prune_head=False)
        assert_close(pruned(x), model(x), rtol=0, atol=0)

        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([3], prune_norm=True)
        selected = pruned.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True)
        assert_close(selected[0], tap, rtol=0, atol=0)

        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([2])
        pruned.reset_classifier(0, 'avg')
        assert_close(pruned(x), pruned.forward_features(x)[:, 1:].mean(1))


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_stop_early_takes_the_features_of_the_full_run(encoding):
    """As test_forward_intermediates_stop_early_final_norm, which knows only models that norm their last stage alone."""
    model = create(encoding).eval()
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        for norm in (False, True):
            _, expected = model.forward_intermediates(x, norm=norm)
            _, selected = model.forward_intermediates(x, indices=[0], norm=norm, stop_early=True)
            assert_close(selected[0], expected[0], rtol=0, atol=0)


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_resized_is_built_at_the_new_size_and_loaded(encoding):
    """As test_relpos_family_set_input_size, which wants all buffers in bfloat16; frequencies stay float32."""
    model, expected = create(encoding, img_size=64).eval(), create(encoding, img_size=96).eval()
    expected.load_state_dict(checkpoint_filter_fn(model.state_dict(), expected))
    model.load_state_dict(model.state_dict())  # weights keep their reference grid, a model without any does not
    model.set_input_size(img_size=(96, 96))
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert_close(model(x), expected(x))
    model = model.to(torch.bfloat16)
    model.set_input_size(img_size=64)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    low = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    assert set(tensors) - low <= {'rope.freqs', 'rope.reference_grid', 'rope.signature', 'pos_embed_grid'}
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_features_train_with_checkpointing(encoding):
    """As test_features_only_grad_checkpointing_backward; timm's wrapper of a ViT has no set_grad_checkpointing."""
    x = torch.randn(2, 3, 32, 48)
    grads = []
    for enable in (False, True):
        model = create(encoding, features_only=True).train()
        model.model.set_grad_checkpointing(enable)
        sum(feature.pow(2).mean() for feature in model(x)).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(grad is not None for grad in grads[0])
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_loading_all_but_the_head(encoding):
    """strict=False takes a checkpoint without head, strict=True refuses it before it copies anything."""
    source, target = create(encoding), create(encoding, num_classes=7)
    state = {key: value for key, value in source.state_dict().items() if not key.startswith('head.')}
    torch.nn.init.ones_(target.patch_embed.proj.weight)
    with pytest.raises(RuntimeError, match=r'missing head\.weight'):
        target.load_state_dict(state)
    assert bool((target.patch_embed.proj.weight == 1).all())
    missing = target.load_state_dict(state, strict=False).missing_keys
    assert missing == ['head.weight', 'head.bias']
    for key, value in state.items():
        assert_close(target.state_dict()[key], value, rtol=0, atol=0)
    state['norm.weight'] = torch.ones(49)
    with pytest.raises(RuntimeError, match=r'norm\.weight is \(49,\)'):
        target.load_state_dict(state, strict=False)
