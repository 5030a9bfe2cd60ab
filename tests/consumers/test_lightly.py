"""lightly: MaskedVisionTransformerTIMM around our ViTs, steps of DINO, iBOT and MAE."""
import copy

import pytest
import torch
from backbones import assert_learns, build, image
from torch import nn

pytest.importorskip('lightly')
from lightly import loss
from lightly.models import utils
from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

APE = dict(pos_embed='learn')


class Rotary(MaskedVisionTransformerTIMM):
    """For models without a position embedding, which lightly takes for granted, and for kept patches (MAE)."""

    def add_pos_embed(self, x):
        return self.vit.pos_drop(x) if self.vit.pos_embed is None else super().add_pos_embed(x)

    def encode(self, images, idx_mask=None, idx_keep=None, mask=None):
        x = self.vit.norm_pre(self.preprocess(images, idx_mask, idx_keep, mask))
        keep = None if idx_keep is None else idx_keep[:, self.vit.num_prefix_tokens:] - self.vit.num_prefix_tokens
        grid = self.vit.patch_embed.dynamic_feat_size(images.shape[-2:])
        for block, payload in zip(self.vit.blocks, self.vit.rope_payloads(grid, keep)):
            x = block(x, payload=payload)
        return self.vit.norm(x)


def masked(cls=MaskedVisionTransformerTIMM, **kwargs):
    vit = build('vit', **kwargs)
    return cls(vit, weight_initialization='skip', pos_embed_initialization='skip', antialias=False)


CASES = [(MaskedVisionTransformerTIMM, APE), (Rotary, APE), (Rotary, {}), (Rotary, dict(reg_tokens=2))]


@torch.no_grad()
@pytest.mark.parametrize('cls,options', CASES)
@pytest.mark.parametrize('size', [32, 48, 16])
def test_without_a_mask_it_is_the_model(cls, options, size):
    model, x = masked(cls, **options), image(size, size)
    assert torch.allclose(model.encode(x), model.vit.forward_features(x), atol=1e-5)
    if cls is Rotary:
        assert torch.allclose(model(x), model.vit.forward_features(x)[:, 0], atol=1e-5)
    else:
        _, found = model.forward_intermediates(x)
        expected = model.vit.forward_intermediates(x, output_fmt='NLC', intermediates_only=True)
        assert all(torch.allclose(a[:, 1:], b, atol=1e-5) for a, b in zip(found, expected))


@torch.no_grad()
def test_its_own_initialisation_keeps_the_frequencies():
    model, source = MaskedVisionTransformerTIMM(build('vit', **APE, no_embed_class=False)), build('vit', **APE)
    assert torch.equal(model.vit.rope.freqs, source.rope.freqs) and not model.vit.pos_embed.requires_grad
    x = image(32, 32)
    assert torch.allclose(model(x), model.vit.forward_features(x)[:, 0], atol=1e-5)
    with pytest.raises(RuntimeError, match='must match'):  # as in timm's deit3, which has no_embed_class too
        MaskedVisionTransformerTIMM(build('vit', **APE))


@torch.no_grad()
def test_crops_of_several_sizes_in_turn():
    model, crops = masked(**APE), [image(size, size) for size in (48, 16, 32, 48)]
    expected = [model.vit.forward_features(x) for x in crops]
    assert all(torch.allclose(model.encode(x), y, atol=1e-5) for x, y in zip(crops, expected))


@torch.no_grad()
@pytest.mark.parametrize('options', [APE, {}])
def test_kept_patches_keep_their_places(options):
    model, x = masked(Rotary, **options), image(48, 48)
    order = torch.stack([torch.randperm(36), torch.randperm(36)]) + 1
    index = torch.cat((torch.zeros(2, 1, dtype=torch.int64), order), dim=1)
    assert torch.allclose(model.encode(x, idx_keep=index), utils.get_at_index(model.encode(x), index), atol=1e-5)
    kept = model.encode(x, idx_keep=index[:, :10])
    turned = model.encode(x, idx_keep=index[:, :10].flip(1).roll(1, dims=1))
    assert torch.allclose(kept[:, 1:], turned[:, 1:].flip(1), atol=1e-5)


def test_kept_patches_without_positions_are_refused():
    # lightly runs model.blocks(tokens): nothing tells them which patches these are
    model, (keep, _) = masked(**APE), utils.random_token_mask((2, 17), mask_ratio=0.75)
    with pytest.raises(ValueError, match='rope_payloads'):
        model.encode(image(32, 32), idx_keep=keep)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_step_of_dino(checkpointing):
    student = masked(**APE).train()
    student.set_grad_checkpointing(checkpointing)
    teacher = copy.deepcopy(student)
    assert all(block.attn.positions.model is teacher.vit for block in teacher.vit.blocks)
    heads = [DINOProjectionHead(24, 32, 16, 8) for _ in range(2)]
    crops = [image(size, size, seed=seed) for seed, size in enumerate((48, 48, 16, 16))]
    with torch.no_grad():
        targets = [heads[1](teacher(x)) for x in crops[:2]]
    criterion = loss.DINOLoss(output_dim=8)
    assert_learns(student, criterion(targets, [heads[0](student(x)) for x in crops], epoch=0))
    gradients = [p.grad.clone() for p in student.vit.blocks.parameters()]
    student.zero_grad()
    pooled = [student.vit.forward_features(x)[:, 0] for x in crops]
    loss.DINOLoss(output_dim=8)(targets, [heads[0](x) for x in pooled], epoch=0).backward()
    for a, b in zip(gradients, student.vit.blocks.parameters()):
        assert torch.allclose(a, b.grad, rtol=1e-3, atol=1e-5)


def test_a_step_of_ibot():
    student, x = masked(**APE).train(), image(48, 48)
    head, mask = nn.Linear(24, 8), torch.zeros(2, 37, dtype=torch.bool)
    mask[:, 1:] = torch.rand(2, 36) < 0.4
    with torch.no_grad():
        target = head(student.encode(x)[mask])
        student.mask_token.normal_()
    out = student.encode(x, mask=mask)
    assert not torch.allclose(out, student.encode(x), atol=1e-3)
    assert_learns(student, loss.IBOTPatchLoss(output_dim=8)(target, head(out[mask]), mask[:, 1:].reshape(2, 6, 6)))


@pytest.mark.parametrize('options', [APE, {}])
def test_a_step_of_mae(options):
    encoder, x = masked(Rotary, **options).train(), image(48, 48)
    keep, mask = utils.random_token_mask((2, 37), mask_ratio=0.75)
    decoder = MaskedVisionTransformerDecoderTIMM(36, 24, 1, 2)
    known = encoder.encode(x, idx_keep=keep)
    tokens = utils.set_at_index(utils.repeat_token(decoder.mask_token, (2, 37)), keep, known)
    predicted = nn.Linear(24, 192)(utils.get_at_index(decoder(tokens), mask))
    target = utils.get_at_index(utils.patchify(x, 8), mask - 1)
    assert_learns(encoder, nn.functional.mse_loss(predicted, target))
