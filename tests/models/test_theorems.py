"""Theorems of arXiv 2511.08368 as conversions: LieRE whose generators commute is Mixed, in another basis."""
import copy

import pytest
import tiny_swin
import torch
from tiny import make
from torch.nn.utils import prune

import timm_rope
from timm_rope import convert_encoding
from timm_rope.encodings._planes import planes
from timm_rope.models.attention import RopeBlock
from timm_rope.rotations import BlockRotation, PairRotation

WIDE = dict(embed_dim=48)  # heads of 24 channels


def commuting(size, seed, dtype=torch.float64, rank=None):
    """Strict upper triangles (2, b (b - 1) / 2) of two random generators that turn the same planes, all or `rank`."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    row, column = torch.triu_indices(size, size, 1)
    out = []
    for _ in range(2):
        planar = torch.zeros(size, size, dtype=torch.float64)
        for k in range(size // 2 if rank is None else rank):
            planar[2 * k, 2 * k + 1] = 0.5 * torch.randn((), generator=generator)
        out.append((q @ (planar - planar.T) @ q.T)[row, column])
    return torch.stack(out).to(dtype)


def fill(rope, make_block):
    """Give every block of an encoding the generators (2, b (b - 1) / 2) of `make_block(size, number of the block)`."""
    with torch.no_grad():
        shape = rope.frequencies().shape
        blocks = [make_block(rope.rotation.size, i) for i in range(shape[1:4].numel())]
        rope.freqs.copy_(rope.freqs_for(torch.stack(blocks, dim=1).view(shape)))


def one_axis(size, seed):
    triangle = 0.3 * torch.randn(size * (size - 1) // 2, generator=torch.Generator().manual_seed(seed))
    return torch.stack((triangle, torch.zeros_like(triangle)))


def model_of(**kwargs):
    model = make('vit_tiny_rope_liere', **{**WIDE, 'qkv_bias': True, 'rope_coords': 'index', **kwargs})
    fill(model.rope, commuting)
    with torch.no_grad():
        for block in model.blocks:
            if block.attn.qkv.bias is not None:
                block.attn.qkv.bias.normal_()
    return model


def error(a, b, *size):
    x = torch.randn(2, 3, *size, dtype=next(a.parameters()).dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = a(x)
        assert expected.std() > 0.05
        return float((expected - b(x)).abs().max() / expected.abs().max())


@pytest.mark.parametrize('kwargs', [
    {}, dict(rope_block=24), dict(rope_block=7), dict(rope_block=3), dict(rope_share_heads=True), dict(reg_tokens=2),
    dict(rope_share_layers=True), dict(qkv_bias=False), dict(pos_embed='learn')], ids=str)
def test_commuting_generators_are_mixed(kwargs):
    model = model_of(**kwargs)
    mixed = convert_encoding(model, 'mixed')
    assert mixed.rope.name == 'mixed' and not isinstance(mixed.rope.rotation, BlockRotation)
    for size in ((32, 32), (48, 24)):
        assert error(model, mixed, *size) < 2e-5  # each rotation is within 5e-6, in each of the blocks
    exact = model.double()
    fill(exact.rope, commuting)  # not rounded to float32
    assert error(exact, convert_encoding(exact, 'mixed'), 48, 40) < 1e-10, 'only rounding differs'


@pytest.mark.parametrize('coords,options', [
    ('cells', {}), ('index', dict(coords='cells')), ('cells', dict(coords='index'))])
def test_without_prefix_tokens_the_origin_is_free(coords, options):
    kwargs = dict(class_token=False, global_pool='avg', rope_coords=coords, img_size=(32, 48))
    model = model_of(**kwargs)
    mixed = convert_encoding(model, 'mixed', **options)
    assert mixed.rope.coords == options.get('coords', coords)
    assert error(model, mixed, 32, 48) < 1e-5 and error(model, mixed, 64, 24) < 1e-5
    again = copy.deepcopy(mixed)
    again.load_state_dict(convert_encoding(model.state_dict(), 'mixed', num_heads=2, **options))
    assert error(mixed, again, 32, 48) < 1e-6
    with pytest.raises(ValueError, match='prefix tokens, which do not turn, see the origin'):
        convert_encoding(model_of(rope_coords='cells'), 'mixed')
    if coords != 'index':
        with pytest.raises(ValueError, match="'cells' and 'ends' differ in origin or step"):
            convert_encoding(model, 'mixed', coords='ends')


def test_one_axis_is_rope_with_learned_frequencies():
    """Theorem 1: whatever the generator."""
    model = model_of(rope_block=8)
    fill(model.rope, one_axis)
    mixed = convert_encoding(model, 'mixed')
    assert error(model, mixed, 32, 48) < 1e-5
    assert float(mixed.rope.freqs[1].abs().max()) < 1e-6 < float(mixed.rope.freqs[0].abs().max())


class Sequences(torch.nn.Module):
    """A model of sequences: blocks of this package, an encoding of one dimension or of three, a head."""

    def __init__(self, name, grid=(9,), prefix=0, qkv_bias=True, **options):
        super().__init__()
        self.rope = timm_rope.create_rope(name, 24, 2, 2, grid, **options)
        self.num_prefix_tokens, self.grid = prefix, grid
        self.blocks = torch.nn.ModuleList(
            RopeBlock(48, 2, qkv_bias=qkv_bias, rotation=self.rope.rotation) for _ in range(2))
        for parameter in self.blocks.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, x, payloads=None):
        for block, payload in zip(self.blocks, payloads or self.rope(self.grid, self.num_prefix_tokens)):
            x = block(x, payload=payload)
        return x


def difference(a, b, tokens=9, at=None):
    """On the grid, and at points."""
    x = torch.randn(2, tokens + a.num_prefix_tokens, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = [m(x, None if at is None else m.rope.at(at, m.num_prefix_tokens)) for m in (a, b)]
    return float((out[0] - out[1]).abs().max() / out[0].abs().max())


@pytest.mark.parametrize('options', [{}, dict(block=3), dict(block=24), dict(block=7, share_heads=True)], ids=str)
@pytest.mark.parametrize('prefix', [0, 2])
def test_sequences(options, prefix):
    """Theorem 1 in one dimension: whatever LieRE learns there is RoPE with learned frequencies."""
    torch.manual_seed(0)
    model = Sequences('liere', prefix=prefix, coords='index', **options)
    mixed = convert_encoding(model, 'mixed')
    assert type(mixed.rope.rotation) is type(mixed.blocks[0].attn.rotation) is PairRotation
    assert mixed.rope.freqs.shape[0] == 1 and not torch.equal(
        mixed.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    places = 9 * torch.rand(9, 1, generator=torch.Generator().manual_seed(2))
    assert difference(model, mixed) < 1e-5 and difference(model, mixed, at=places) < 1e-5


def test_sequences_of_spherical_are_rope_too():
    """One turn is one exponential, and without prefix tokens its origin is free."""
    for name in ('spherical', 'spherical_learned', 'quatro'):
        torch.manual_seed(0)
        model = Sequences(name)
        liere = convert_encoding(model, 'liere', block=3)
        assert liere.rope.coords == model.rope.coords and liere.rope.centered != model.rope.centered
        assert difference(model, liere) < 1e-5
        mixed = convert_encoding(liere, 'mixed', coords='index')
        assert mixed.rope.coords == 'index' and difference(model, mixed) < 1e-5
        with pytest.raises(ValueError, match='prefix tokens, which do not turn, see the origin'):
            convert_encoding(Sequences(name, prefix=1), 'liere', block=3)
        with pytest.raises(ValueError, match=r'differ by up to (0\.[1-9]|[12])'):
            convert_encoding(Sequences(name, (2, 2, 3)), 'liere', block=3)


def test_a_triplet_of_which_one_axis_turns_is_a_block():
    model = make('vit_tiny_rope_spherical_learned', **WIDE, class_token=False, global_pool='avg')
    with torch.no_grad():
        model.rope.freqs[0, ..., ::2] = 0  # every triplet turns about another one
        model.rope.freqs[1, ..., 1::2] = 0
    liere = convert_encoding(model, 'liere', block=3)
    assert error(model, liere, 32, 48) < 1e-5 and error(model, liere, 64, 24) < 1e-5


def test_videos():
    """Of three generators any two have to commute."""
    torch.manual_seed(0)
    model = Sequences('liere', (2, 2, 3), coords='index')
    fill(model.rope, lambda size, i: torch.cat((commuting(size, i), commuting(size, i)[:1] / 3)))
    assert difference(model, convert_encoding(model, 'mixed'), 12) < 1e-5
    with torch.no_grad():
        model.rope.freqs[2, 1, 3] += torch.randn(28) / 100
    words = r'layer 1, head 1, block 0 do not commute: \|A_[xy] A_z - A_z A_[xy]\| is 0\.0'
    with pytest.raises(ValueError, match=words):
        convert_encoding(model, 'mixed')


def test_a_state_dict():
    model = model_of()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    converted = convert_encoding(model.state_dict(), 'mixed', num_heads=2)
    mixed = make('vit_tiny_rope_mixed', **WIDE, qkv_bias=True)
    mixed.load_state_dict(converted)
    assert error(model, mixed, 32, 40) < 1e-5
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), 'the source as it was'
    same = [key for key in before if key in converted and torch.equal(before[key], converted[key])]
    assert 'blocks.0.attn.proj.weight' in same and 'blocks.0.attn.qkv.weight' not in same


def test_windows_of_a_swin():
    model = tiny_swin.make('liere')
    for rope in tiny_swin.ropes(model):
        fill(rope, commuting)
    assert error(model, convert_encoding(model, 'mixed'), 32, 32) < 1e-5


def test_equal_angles_and_planes_that_rest():
    """Planes that no direction tells apart, and a block that does not turn at all."""
    model = model_of(rope_block=8)

    def alike(size, seed):
        q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).double())[0]
        planar = torch.zeros(8, 8).double()
        if seed % 3:
            planar[0, 1] = planar[2, 3] = 0.7  # and two planes rest
        generator = (q @ (planar - planar.T) @ q.T)[tuple(torch.triu_indices(8, 8, 1))]
        return torch.stack((generator, -0.5 * generator))

    fill(model.rope, alike)
    assert error(model, convert_encoding(model, 'mixed'), 32, 40) < 1e-5


def test_generators_that_do_not_commute_are_refused_with_how_far_they_are():
    model = make('vit_tiny_rope_liere', **WIDE, rope_coords='index')
    fill(model.rope, lambda size, i: commuting(size, i) + (i == 8) * torch.randn(2, 28) / 100)
    words = r"from 'liere' to 'mixed': the generators of layer 1, head 0, block 2 do not commute: .* is 0\.0"
    with pytest.raises(ValueError, match=words):
        convert_encoding(model, 'mixed')


def test_what_a_change_of_basis_cannot_pass_is_refused():
    with pytest.raises(ValueError, match='q_norm scales each by itself'):
        convert_encoding(model_of(qk_norm=True), 'mixed')
    with pytest.raises(ValueError, match=r'blocks\.0\.attn\.[qk]_norm.weight scales each'):
        convert_encoding(model_of(qk_norm=True).state_dict(), 'mixed', num_heads=2)
    model = model_of()
    with pytest.raises(ValueError, match='generators commute, but in another basis .* convert the model'):
        convert_encoding(model.rope, 'mixed')
    wrapped = type('Lora', (torch.nn.Linear,), {})(48, 144)
    model.blocks[1].attn.qkv = wrapped
    with pytest.raises(ValueError, match='that is a Lora and not nn.Linear'):
        convert_encoding(model, 'mixed')


@pytest.mark.parametrize('change', [
    lambda qkv: prune.random_unstructured(qkv, 'weight', .5),
    lambda qkv: torch.nn.utils.weight_norm(qkv),
    lambda qkv: qkv.register_forward_hook(lambda module, args, out: out.tanh()),
], ids=['pruned', 'weight norm', 'hook'])
def test_projections_that_are_more_than_their_weights_are_refused(change):
    model = model_of()
    change(model.blocks[1].attn.qkv)
    with pytest.raises(ValueError, match='into the weights of qkv, but that has hooks'):
        convert_encoding(model, 'mixed')
    parameters = {**model_of().state_dict(), 'blocks.1.attn.qkv.lora_A': torch.randn(2, 48)}  # as loralib's
    with pytest.raises(ValueError, match='there is more to it, blocks.1.attn.qkv.lora_A'):
        convert_encoding(parameters, 'mixed', num_heads=2)


def test_projections_that_blocks_share():
    model = model_of()
    model.blocks[2].attn.qkv = model.blocks[0].attn.qkv
    with pytest.raises(ValueError, match='but blocks share these weights'):
        convert_encoding(model, 'mixed')
    model = model_of(rope_share_layers=True)
    model.blocks[2].attn.qkv = model.blocks[0].attn.qkv
    assert error(model, convert_encoding(model, 'mixed'), 32, 40) < 1e-5


def test_planes():
    """The basis is orthogonal, planes turn counter-clockwise, and what rests comes last."""
    triangles = torch.stack([commuting(7, seed, rank=2) for seed in range(6)], 1).view(2, 1, 2, 3, 21)
    vectors, basis = planes(triangles, 23, 7)
    eye = torch.eye(23, dtype=torch.float64)
    assert float((basis.mT @ basis - eye).abs().max()) < 1e-12
    assert vectors.shape == (2, 1, 2, 11) and not vectors[..., 6:].any() and vectors[..., :6].any(0).all()
