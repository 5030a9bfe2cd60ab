"""What a program switches on around a model, for a whole process or a block of code: modes, patches, devices."""
import contextlib
import copy
import functools

import foreign
import pytest
import timm
import torch
from exact_changes import EXACT
from timm.models import load_checkpoint
from tiny import make
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from timm_rope import analysis, convert_encoding, list_ropes
from timm_rope._tracing import unobserved, writable
from timm_rope.encodings import ENCODINGS, RotaryEncoding
from timm_rope.kernels.cpu import products
from timm_rope.weights.layouts import recognise

SWIN = dict(img_size=56, patch_size=4, window_size=7, embed_dim=24, depths=(1, 1), num_heads=(2, 4), num_classes=5,
            drop_path_rate=0.)


def swin(encoding='mixed', **kwargs):
    torch.manual_seed(0)
    return timm.create_model('swin_tiny_rope_mixed', **SWIN, rope_encoding=encoding, **kwargs).eval()


MODELS = {'vit': make, 'swin': swin}


def image(model):
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


# -- who looks on for the whole process

class Keep(TorchFunctionMode):
    """Keeps the result of every projection, with a copy."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            self.kept.append((out, out.clone()))
        return out


def put(monkeypatch, owner, name):
    """Put a function that keeps results, with copies, into a class or module; returns what it keeps."""
    old, kept = getattr(owner, name), []

    @functools.wraps(old)
    def function(*args, **kwargs):
        out = old(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            kept.append((out, out.detach().clone()))
        return out

    monkeypatch.setattr(owner, name, function)
    return kept


PATCHED = [(nn.Linear, 'forward'), (nn.Module, '__call__'), (nn.Module, '_call_impl'), (nn.functional, 'linear')]
PATCHED_IDS = ['Linear.forward', 'Module.__call__', 'Module._call_impl', 'F.linear']


@pytest.mark.parametrize('family', MODELS)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('owner,name', PATCHED, ids=PATCHED_IDS)
def test_what_a_patch_of_torch_keeps_stays_as_it_was(family, training, owner, name, monkeypatch):
    model = MODELS[family]().train(training)
    x = image(model)
    with torch.set_grad_enabled(training):
        expected = model(x)
        kept = put(monkeypatch, owner, name)
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert len(kept) > 4 and all(torch.equal(out, copy) for out, copy in kept)


@pytest.mark.parametrize('family', MODELS)
@pytest.mark.parametrize('training', [False, True])
def test_what_a_function_mode_keeps_stays_as_it_was(family, training):
    model = MODELS[family]().train(training)
    x = image(model)
    with torch.set_grad_enabled(training):
        expected = model(x)
        with Keep() as mode, torch.device('cpu'):
            assert torch.allclose(model(x), expected, atol=1e-5)
    assert len(mode.kept) > 4 and all(torch.equal(out, copy) for out, copy in mode.kept)


def test_a_patched_identity_is_called(monkeypatch):
    model = make()
    kept = put(monkeypatch, nn.Identity, 'forward')
    model(image(model))
    queries = [out for out, _ in kept if out.shape[:2] == (2, 2)]  # images, heads
    assert len(queries) == 2 * len(model.blocks), 'norms of queries and keys'


def test_where_nobody_looks_on_queries_turn_in_place():
    assert unobserved(nn.Linear(2, 2)) and unobserved(nn.Identity()) and writable(torch.ones(2))
    with torch.device('cpu'):
        assert writable(torch.ones(2)), 'a device as a context keeps nothing'
    nodes = torch.fx.symbolic_trace(make()).graph.nodes
    assert not any(node.target in ('clone', torch.clone) for node in nodes), 'the tracer of FX patches torch, too'


# -- transforms of torch.func

@pytest.mark.parametrize('family', MODELS)
@pytest.mark.parametrize('encoding', list_ropes())
def test_payloads_of_a_transform_do_not_outlive_it(family, encoding):
    model = make(f'vit_tiny_rope_{encoding}') if family == 'vit' else swin(encoding)
    expected, model = model(image(model)).detach(), model.requires_grad_(False)
    x, scale = image(model), torch.ones(())

    def energy(x):
        return model(x).square().sum()

    transforms = [
        lambda: torch.func.grad(energy)(x), lambda: torch.func.jvp(energy, (x,), (x,)),
        lambda: torch.vmap(lambda image: energy(image[None]))(x),
        lambda: torch.func.hessian(lambda scale: energy(scale * x))(scale)]
    for transform in transforms:
        for rope in (module for module in model.modules() if isinstance(module, RotaryEncoding)):
            rope.set_scaling(rope.scaling)  # which forgets what was kept
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no forward derivative on a CPU
            transform()
        assert torch.allclose(model(x), expected, atol=1e-5)


# -- a default device around the use of a model that is on another one

def lives(family, encoding):
    """What happens to a new model, step by step: functions that return tensors."""
    if family == 'vit':
        model = make(f'vit_tiny_rope_{encoding}_ape', patch_drop_rate=0.2, reg_tokens=1, rope_shift=0.1)
        small, large = (32, 32), (48, 40)
    else:
        model, (small, large) = swin(encoding, rel_pos_bias=True), ((56, 56), (112, 84))
    x, y = (torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)) for size in (small, large))

    def evaluate(image):
        with torch.no_grad():
            return [model.eval()(image)]

    def train():
        out = model.train()(x)
        out.square().sum().backward()
        return [out, *(p.grad for p in model.parameters() if p.grad is not None)]

    def load(**kwargs):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(state, **kwargs)
        return list(state.values())

    def convert():
        for target in ('mixed', encoding, *sorted(EXACT[encoding])):
            with contextlib.suppress(ValueError):  # no exact way
                converted = convert_encoding(model, target)
                return [converted.eval()(y), *converted.state_dict().values()]
        return []

    def resize():
        model.set_input_size(large, rope_scaling='interpolate')
        return evaluate(y)

    return [
        lambda: evaluate(x), train, load, lambda: load(assign=True), lambda: evaluate(y), convert, resize,
        lambda: [*copy.deepcopy(model).double().state_dict().values()], lambda: evaluate(x)]


@pytest.mark.parametrize('family', MODELS)
@pytest.mark.parametrize('encoding', list_ropes())
def test_a_default_device_does_not_matter_to_a_model_on_another(family, encoding):
    results = []
    for context in (contextlib.nullcontext(), torch.device('meta')):
        products.row_numbers.cache_clear()
        results.append([])
        for step in lives(family, encoding):
            torch.manual_seed(5)
            with context:
                results[-1].append([t.detach().clone() for t in step()])
    for number, (plain, other) in enumerate(zip(*results)):
        assert len(plain) == len(other) and all(map(torch.equal, plain, other)), f'step {number}'


def test_a_default_device_does_not_matter_to_analysis():
    turn, pixels = analysis.rotary_layers(make())[0], torch.rand(2, 3, 8, 8)

    def numbers():
        matrices = analysis.rotation_matrices(turn, (3, 4))
        return (
            analysis.rotation_error(matrices, (3, 4)), analysis.score_shift_error(matrices, (3, 4), (1, 0)),
            analysis.shuffle_patches(pixels, (2, 2)))

    expected = numbers()
    with torch.device('meta'):
        assert all(map(torch.equal, numbers(), expected))


@pytest.mark.parametrize('make_up', [foreign.naver_vit, foreign.spiral_deit, foreign.liere_lightning])
def test_a_default_device_does_not_matter_to_weights(make_up):
    checkpoint = make_up()
    expected = recognise(checkpoint).tensors
    with torch.device('meta'):
        tensors = recognise(checkpoint).tensors
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[k], v) for k, v in expected.items())


# -- parameters alone, as optimizers, averages and trainers keep them

LEARNED = [name for name in list_ropes() if ENCODINGS[name].learned]


def parameters(model):
    return {k: v.detach().clone() for k, v in model.named_parameters()}


def trained(encoding, img_size=64):
    model = make(f'vit_tiny_rope_{encoding}', img_size=img_size).train()
    model(image(model)).sum().backward()
    return model.eval()


@pytest.mark.parametrize('encoding', LEARNED)
@pytest.mark.parametrize('known', ['trained', 'loaded', 'argument', 'set'])
def test_parameters_alone_do_not_move_a_reference_grid_that_is_known(encoding, known):
    source = trained(encoding)
    model = make(f'vit_tiny_rope_{encoding}', **(dict(rope_reference_grid=(8, 8)) if known == 'argument' else {}))
    if known == 'trained':
        model = trained(encoding)
    elif known == 'loaded':
        model.load_state_dict(source.state_dict())
    elif known == 'set':
        model.rope.set_reference_grid((8, 8))
    model.load_state_dict(parameters(source), strict=False)
    assert model.rope.reference_grid.tolist() == [8, 8]
    assert torch.equal(model(image(source)), source(image(source)))


@pytest.mark.parametrize('encoding', ['mixed', 'axial'])
@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('fresh', [False, True])
def test_parameters_alone_do_not_stir_a_position_embedding_that_is_no_square(encoding, inside, fresh):
    source = trained(f'{encoding}_ape', (16, 64))
    model = make(f'vit_tiny_rope_{encoding}_ape', img_size=(16, 64)) if fresh else copy.deepcopy(source)
    state = {f'0.{k}' if inside else k: v for k, v in parameters(source).items()}
    (nn.Sequential(model) if inside else model).load_state_dict(state, strict=False)
    assert torch.equal(model.pos_embed, source.pos_embed) and model.pos_embed_grid.tolist() == [2, 8]


@pytest.mark.parametrize('how', ['strict', 'inside another module', 'undecided'])
def test_where_a_missing_reference_grid_is_that_of_the_pretrained_cfg(how):
    model = make('vit_tiny_rope_liere') if how == 'undecided' else trained('liere')
    state = {**parameters(model), **({} if how == 'undecided' else {'rope.signature': model.rope.signature})}
    if how == 'inside another module':
        nn.Sequential(model).load_state_dict({f'0.{k}': v for k, v in state.items()})
    else:
        model.load_state_dict(state, strict=how == 'strict')
    assert model.rope.reference_grid.tolist() == [28, 28], 'of 224 pixels and patches of 8'


ASSUMED = 'have no rope.reference_grid: they count as trained on 28 x 28 patches'


@pytest.mark.parametrize('encoding', LEARNED)
@pytest.mark.parametrize('inside', [False, True])
def test_a_reference_grid_that_is_assumed_is_said_once(encoding, inside, caplog):
    source, model = trained(encoding), make(f'vit_tiny_rope_{encoding}', img_size=64)
    for _ in range(2):
        if inside:
            nn.Sequential(model).load_state_dict({f'0.{k}': v for k, v in parameters(source).items()}, strict=False)
        else:
            model.load_state_dict(parameters(source), strict=False)
    said = [record.getMessage() for record in caplog.records if 'patches' in record.getMessage()]
    assert len(said) == 1 and ASSUMED in said[0].replace('0.rope', 'rope') and 'rope_reference_grid=(' in said[0]
    # both ways that it names
    told = make(f'vit_tiny_rope_{encoding}', rope_reference_grid=(8, 8))
    told.load_state_dict(parameters(source), strict=False)
    put = make(f'vit_tiny_rope_{encoding}')
    put.load_state_dict({**parameters(source), 'rope.reference_grid': torch.tensor([8, 8])}, strict=False)
    for other in (told, put):
        assert torch.equal(other(image(source)), source(image(source)))
    assert len([record for record in caplog.records if 'patches' in record.getMessage()]) == 1


@pytest.mark.parametrize('how', ['strict', 'other head', 'pretrained', 'other classes', 'module', 'checkpoint of timm'])
def test_nothing_is_said_where_weights_are_loaded_as_usual(how, caplog, tmp_path):
    state = trained('mixed').state_dict()
    torch.save(foreign.naver_vit() if how == 'checkpoint of timm' else state, tmp_path / 'weights.bin')
    overlay = dict(file=str(tmp_path / 'weights.bin'), num_classes=5, input_size=(3, 64, 64))
    caplog.clear()
    if how in ('pretrained', 'other classes'):
        make('vit_tiny_rope_mixed', pretrained=True, pretrained_cfg_overlay=overlay,
             num_classes=5 if how == 'pretrained' else 7)
    elif how == 'module':
        nn.Sequential(make('vit_tiny_rope_mixed')).load_state_dict({f'0.{k}': v for k, v in state.items()})
    elif how == 'checkpoint of timm':
        model = make('vit_tiny_rope_mixed', embed_dim=128, depth=2)
        load_checkpoint(model, tmp_path / 'weights.bin', strict=False)
    else:
        kept = {k: v for k, v in state.items() if how == 'strict' or not k.startswith('head')}
        make('vit_tiny_rope_mixed').load_state_dict(kept, strict=how == 'strict')
    assert 'rope.reference_grid' not in caplog.text


# -- inputs of other libraries and of other kinds of models

@pytest.mark.parametrize('training', [False, True])
def test_the_children_of_a_model_are_no_chain(training):
    model = make().train(training)
    words = r'grid_size must be .*two integers \(rows, columns\).*got a tensor of shape \(2, 4, 4, 24\).*call the model'
    with pytest.raises(TypeError, match=words):
        nn.Sequential(*model.children())(image(model))
    assert model.rope.undecided and model.rope.reference_grid.tolist() == [4, 4]
    with pytest.raises(TypeError, match=r'grid must be .*two integers \(rows, columns\)'):
        model.rope.set_reference_grid(torch.tensor([4, 4]))
    with pytest.raises(ValueError, match='grid_size must be two positive integers .*got 4'):
        model.rope(4)


NAFLEX = dict(patches=torch.ones(2, 16, 192), patch_coord=torch.ones(2, 16, 2), patch_valid=torch.ones(2, 16))


@pytest.mark.parametrize('family', MODELS)
@pytest.mark.parametrize('given,words', [
    (NAFLEX, 'dict of patches, patch_coord, patch_valid: a ViT that is created with use_naflex=True takes'),
    ({'image': torch.ones(1, 3, 32, 32)}, 'dict of image[.]'),
    ([torch.ones(3, 32, 32)], 'list'), (None, 'NoneType')])
def test_what_is_no_batch_of_images(family, given, words):
    model = MODELS[family]()
    calls = [model, model.forward_features, *([model.forward_intermediates] if family == 'vit' else [])]
    for call in calls:
        with pytest.raises(TypeError, match=fr'takes images, one tensor \(B, C, H, W\), got {words}'):
            call(given)
