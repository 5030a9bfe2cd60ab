"""A small Swin that several test modules use, and how to look into it."""
import math

import timm
import torch
import torch.nn.functional as F

SMALL = dict(img_size=32, embed_dim=32, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5)


def loud(model):
    """Weights for which attention is far from uniform and every bias counts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(('qkv.weight', 'relative_position_bias_table')):
                value.mul_(20)
            elif name.endswith('.bias'):
                value.normal_(0, 0.2)
    return model.eval()


def make(encoding='mixed', name='swin_tiny_rope_mixed', **kwargs):
    torch.manual_seed(0)
    return loud(timm.create_model(name, **{**SMALL, **kwargs}, rope_encoding=encoding))


def blocks(model):
    return [block for stage in model.layers for block in stage.blocks]


def windows(model):
    return [(block.window_size, block.shift_size) for block in blocks(model)]


def ropes(model):
    return [block.attn.rope for block in blocks(model)]


def attend(x, weights, heads, window, shift, matrices, table=None):
    """Window attention of x (B, rows, columns, C) in float64.

    `matrices` are (heads, N, D, D), one rotation for each place in the window, row-major. A token is in the window of
    its place after a cyclic shift to the top left; what came in from the other side attends only to its like.
    """
    batch, height, width, channels = x.shape
    qkv = F.linear(x, weights['attn.qkv.weight'], weights.get('attn.qkv.bias'))
    q, k, v = qkv.reshape(batch, height, width, 3, heads, -1).unbind(3)
    windows = {}
    for row in range(height):
        for column in range(width):
            down, right = (row - shift[0]) % height, (column - shift[1]) % width
            place = down % window[0], right % window[1]
            side = row < shift[0], column < shift[1]
            windows.setdefault((down // window[0], right // window[1]), []).append((place, side, row, column))
    out = torch.zeros_like(q)
    for members in windows.values():
        assert len(members) == window[0] * window[1]
        rows, columns = [m[2] for m in members], [m[3] for m in members]
        index = [place[0] * window[1] + place[1] for place, *_ in members]
        turned = [torch.einsum('hnij,bnhj->bnhi', matrices[:, index], part[:, rows, columns]) for part in (q, k)]
        scores = torch.einsum('bnhd,bmhd->bhnm', *turned) / math.sqrt(q.shape[-1])
        for n, (place, side, *_) in enumerate(members):
            for m, (other, other_side, *_) in enumerate(members):
                if table is not None:
                    offset = (place[0] - other[0] + window[0] - 1) * (2 * window[1] - 1)
                    scores[:, :, n, m] += table[offset + place[1] - other[1] + window[1] - 1]
                if side != other_side:
                    scores[:, :, n, m] = -math.inf
        out[:, rows, columns] = torch.einsum('bhnm,bmhd->bnhd', scores.softmax(-1), v[:, rows, columns])
    return F.linear(out.flatten(3), weights['attn.proj.weight'], weights['attn.proj.bias'])


def norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f'{name}.weight'], weights[f'{name}.bias'], 1e-5)


def forward_block(x, weights, *args):
    x = x + attend(norm(x, weights, 'norm1'), weights, *args)
    hidden = F.gelu(F.linear(norm(x, weights, 'norm2'), weights['mlp.fc1.weight'], weights['mlp.fc1.bias']))
    return x + F.linear(hidden, weights['mlp.fc2.weight'], weights['mlp.fc2.bias'])


def double(state, prefix=''):
    return {k[len(prefix):]: v.double() for k, v in state.items() if k.startswith(prefix)}


def load(checkpoint, tmp_path, name='swin_tiny_rope_mixed', **kwargs):
    torch.save(checkpoint, tmp_path / 'weights.bin')
    overlay = dict(file=str(tmp_path / 'weights.bin'), num_classes=5, input_size=(3, 128, 128))
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs}).eval()


def same(model, other, size=(32, 32)):
    torch.manual_seed(4)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        return torch.equal(model(x), other(x))
