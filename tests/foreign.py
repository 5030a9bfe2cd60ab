"""Checkpoints of other projects, made up small, and their models in float64, written from what is known of their keys
and formulas and from nothing of ours."""
import argparse
import math

import torch
import torch.nn.functional as F


def noise(*shape, scale=1.0):
    return scale * torch.randn(*shape)


def blocks_of(depth, width, names, hidden):
    """Random tensors of transformer blocks; `names` maps each part to its key, with {} for the block's number."""
    shapes = dict(
        qkv_weight=(3 * width, width), qkv_bias=(3 * width,), proj_weight=(width, width), proj_bias=(width,),
        fc1_weight=(hidden, width), fc1_bias=(hidden,), fc2_weight=(width, hidden), fc2_bias=(width,),
        norm1_weight=(width,), norm1_bias=(width,), norm2_weight=(width,), norm2_bias=(width,), ls1=(width,),
        ls2=(width,), q_norm=(64,), k_norm=(64,))
    out = {}
    for i in range(depth):
        for part, key in names.items():
            around_one = ('norm1_weight', 'norm2_weight', 'ls1', 'ls2', 'q_norm', 'k_norm')
            centre, scale = (1, 0.2) if part in around_one else (0, 0.2)
            out[key.format(i)] = centre + noise(*shapes[part], scale=scale)
    return out


DEIT = dict(
    qkv_weight='blocks.{}.attn.qkv.weight', qkv_bias='blocks.{}.attn.qkv.bias',
    proj_weight='blocks.{}.attn.proj.weight', proj_bias='blocks.{}.attn.proj.bias',
    fc1_weight='blocks.{}.mlp.fc1.weight', fc1_bias='blocks.{}.mlp.fc1.bias',
    fc2_weight='blocks.{}.mlp.fc2.weight', fc2_bias='blocks.{}.mlp.fc2.bias', norm1_weight='blocks.{}.norm1.weight',
    norm1_bias='blocks.{}.norm1.bias', norm2_weight='blocks.{}.norm2.weight', norm2_bias='blocks.{}.norm2.bias',
    ls1='blocks.{}.gamma_1', ls2='blocks.{}.gamma_2')
SPIRAL = {
    **{k: v for k, v in DEIT.items() if k not in ('norm1_bias', 'norm2_bias')},
    'norm1_weight': 'blocks.{}.norm1.scale', 'norm2_weight': 'blocks.{}.norm2.scale'}
VIT5 = {
    **{k: v for k, v in DEIT.items() if k not in ('norm1_bias', 'norm2_bias', 'qkv_bias')},
    'q_norm': 'blocks.{}.attn.q_norm.weight', 'k_norm': 'blocks.{}.attn.k_norm.weight'}
LIERE = dict(
    qkv_weight='transformer.layers.{}.0.fn.to_qkv.weight', proj_weight='transformer.layers.{}.0.fn.to_out.0.weight',
    proj_bias='transformer.layers.{}.0.fn.to_out.0.bias', fc1_weight='transformer.layers.{}.1.fn.net.0.weight',
    fc1_bias='transformer.layers.{}.1.fn.net.0.bias', fc2_weight='transformer.layers.{}.1.fn.net.3.weight',
    fc2_bias='transformer.layers.{}.1.fn.net.3.bias', norm1_weight='transformer.layers.{}.0.norm.weight',
    norm1_bias='transformer.layers.{}.0.norm.bias', norm2_weight='transformer.layers.{}.1.norm.weight',
    norm2_bias='transformer.layers.{}.1.norm.bias')


def naver_vit(mixed=True, ape=False, depth=2, width=128, patch=8, grid=(4, 4), classes=5, seed=0):
    """{'model': ...} as NAVER saves it; heads of 64 channels."""
    torch.manual_seed(seed)
    state = {
        'cls_token': noise(1, 1, width), 'patch_embed.proj.weight': noise(width, 3, patch, patch, scale=0.1),
        'patch_embed.proj.bias': noise(width), **blocks_of(depth, width, DEIT, 4 * width),
        'norm.weight': 1 + noise(width, scale=0.2), 'norm.bias': noise(width), 'head.weight': noise(classes, width),
        'head.bias': noise(classes)}
    if ape:
        coarse = noise(1, width, 2, 2)  # smooth, as a trained one is
        table = F.interpolate(coarse, grid, mode='bilinear', align_corners=True)
        state['pos_embed'] = table.flatten(2).transpose(1, 2).contiguous()
    if mixed:
        state['freqs'] = noise(2, depth, width // 2, scale=0.5)
        tokens = torch.arange(grid[0] * grid[1])
        state['freqs_t_x'] = (tokens % grid[1]).float()
        state['freqs_t_y'] = (tokens // grid[1]).float()
    return {'model': state}


def spiral_deit(rotate=2, scale=1.5, depth=2, width=128, patch=8, side=4, classes=5, seed=0):
    """A training checkpoint of Spiral RoPE: raw and averaged weights, optimizer, arguments."""
    states = []
    for offset in range(2):
        state = naver_vit(False, True, depth, width, patch, (side, side), classes, seed + offset)['model']
        state = {k: v for k, v in state.items() if not k.startswith(('blocks.', 'norm.'))}
        state.update(blocks_of(depth, width, SPIRAL, 4 * width))
        state['norm.scale'] = 1 + noise(width, scale=0.2)
        for i in range(depth):
            state[f'blocks.{i}.attn.rope.freqs'] = scale * 10000. ** (-torch.arange(16) / 16)
        states.append(state)
    args = argparse.Namespace(
        model='deit_base_patch16_LS_rms_rope', rotate=rotate, max_freq_lang=scale, min_freq_lang=0.,
        same_theta=False, truncate_percentage=0.)
    return {'model': states[0], 'model_ema': states[1], 'optimizer': {'state': {}}, 'epoch': 3, 'args': args}


def vit5(depth=2, width=128, patch=8, side=4, classes=5, registers=4, theta=1e4, seed=0):
    """{'model': ..., 'model_ema': ...} as ViT-5's training saves it."""
    states = []
    for offset in range(2):
        state = naver_vit(False, True, depth, width, patch, (side, side), classes, seed + offset)['model']
        state = {k: v for k, v in state.items() if not k.startswith(('blocks.', 'norm.'))}
        state.update(blocks_of(depth, width, VIT5, 4 * width), reg_token=noise(1, registers, width))
        state['norm.weight'] = 1 + noise(width, scale=0.2)
        for i in range(depth):
            for name, base in (('rope', theta), ('rope_reg', 100.)):
                state[f'blocks.{i}.attn.{name}.freqs'] = 1. / base ** (torch.arange(0, 32, 2).float() / 32)
        states.append(state)
    return {'model': states[0], 'model_ema': states[1], 'epoch': 3, 'args': argparse.Namespace(model='vit5_small')}


def liere_lightning(block=8, layers=None, per_head=True, depth=2, width=128, patch=4, side=4, classes=5, seed=0):
    """A Lightning checkpoint of LieRE; block=None is its absolute baseline."""
    torch.manual_seed(seed)
    state = {
        'pos_embedding': noise(1, side * side + 1, width) if block is None else torch.zeros(1, side * side + 1, width),
        'cls_token': noise(1, 1, width), 'to_patch_embedding.1.weight': noise(width, 3 * patch * patch, scale=0.1),
        'to_patch_embedding.1.bias': noise(width), **blocks_of(depth, width, LIERE, 2 * width),
        'mlp_head.0.weight': 1 + noise(width, scale=0.2), 'mlp_head.0.bias': noise(width),
        'mlp_head.1.weight': noise(classes, width), 'mlp_head.1.bias': noise(classes)}
    if block is not None:
        groups = 64 // block * (width // 64 if per_head else 1)
        state['position_encoder.generator_raw_params'] = 2 * math.pi * torch.rand(
            2, depth if layers is None else layers, groups, block, block)
    return {
        'epoch': 1, 'pytorch-lightning_version': '2.4.0', 'hyper_parameters': {'initialization_factor': 2 * math.pi},
        'state_dict': {f'model.{key}': value for key, value in state.items()}}


# -- the models

def attend(tokens, state, names, i, heads, rotate):
    get = lambda part: state[names[part].format(i)] if part in names else None  # noqa: E731
    batch, count, width = tokens.shape
    qkv = F.linear(tokens, get('qkv_weight'), get('qkv_bias')).view(batch, count, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if 'q_norm' in names:
        q, k = rms_norm_inner(q, get('q_norm')), rms_norm_inner(k, get('k_norm'))
    if rotate is not None:
        q, k = (torch.cat((z[:, :, :1], rotate(z[:, :, 1:], i)), 2) for z in (q, k))
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(width // heads)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, count, width)
    return F.linear(out, get('proj_weight'), get('proj_bias'))


def forward(state, names, tokens, norm, rotate, last_norm, head):
    """Patch tokens with the class token in front (B, 1 + N, C) -> logits, all in float64."""
    heads, i = tokens.shape[-1] // 64, 0
    while names['qkv_weight'].format(i) in state:
        get = lambda part, i=i: state[names[part].format(i)] if part in names else None  # noqa: E731
        scale1, scale2 = (get(part) if part in names else 1. for part in ('ls1', 'ls2'))
        normed = norm(tokens, get('norm1_weight'), get('norm1_bias'))
        tokens = tokens + scale1 * attend(normed, state, names, i, heads, rotate)
        normed = norm(tokens, get('norm2_weight'), get('norm2_bias'))
        hidden = F.gelu(F.linear(normed, get('fc1_weight'), get('fc1_bias')))
        tokens = tokens + scale2 * F.linear(hidden, get('fc2_weight'), get('fc2_bias'))
        i += 1
    out = norm(tokens[:, 0], *last_norm)
    return F.linear(out, *head)


def double(state):
    return {key: value.double() for key, value in state.items()}


def layer_norm(eps):
    return lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x, weight, bias=None):
    return weight * x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)


def rms_norm_inner(x, weight, bias=None):
    """With the epsilon inside the root, as most have it."""
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def turn_pairs(z, angle):
    """(B, H, N, D) by (N, D / 2) or (H, N, D / 2), interleaved pairs."""
    pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def grid_of(x, patch):
    height, width = x.shape[-2] // patch, x.shape[-1] // patch
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    return rows, torch.arange(width, dtype=torch.float64).repeat(height), (height, width)


def convolve(x, state, pos_embed):
    weight = state['patch_embed.proj.weight']
    tokens = F.conv2d(x, weight, state['patch_embed.proj.bias'], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    tokens = tokens if pos_embed is None else tokens + pos_embed
    return torch.cat((state['cls_token'].expand(len(x), -1, -1), tokens), 1)


def forward_naver(checkpoint, x, axial=False):
    """NAVER's ViT at any size (a position embedding: at the size of the checkpoint)."""
    state, x = double(checkpoint['model']), x.double()
    rows, columns, _ = grid_of(x, state['patch_embed.proj.weight'].shape[-1])
    rotate = None
    if 'freqs' in state:
        fx, fy = state['freqs'].unflatten(-1, (-1, 32))  # (depth, heads, 32)
        rotate = lambda z, i: turn_pairs(  # noqa: E731
            z, columns[:, None] * fx[i][:, None] + rows[:, None] * fy[i][:, None])
    elif axial:
        w = 100. ** (-torch.arange(16, dtype=torch.float64) / 16)
        rotate = lambda z, i: turn_pairs(z, torch.cat((columns[:, None] * w, rows[:, None] * w), -1))  # noqa: E731
    return forward(
        state, DEIT, convolve(x, state, state.get('pos_embed')), layer_norm(1e-6), rotate,
        (state['norm.weight'], state['norm.bias']), (state['head.weight'], state['head.bias']))


def forward_spiral(checkpoint, x):
    """Spiral's classification model at its own (square) size, averaged weights, coordinates clamped."""
    state, x = double(checkpoint['model_ema']), x.double()
    rows, columns, (side, _) = grid_of(x, state['patch_embed.proj.weight'].shape[-1])
    turns, theta = checkpoint['args'].rotate, state['blocks.0.attn.rope.freqs']
    angle = (torch.arange(16) // 2 % turns) * (math.pi / 2 / turns)
    centre = (side - 1) / 2
    y, x_ = (rows - centre)[:, None], (columns - centre)[:, None]
    along_rows = (centre + angle.cos() * y + angle.sin() * x_).clamp(0, side - 1) * theta
    along_columns = (centre + angle.cos() * x_ - angle.sin() * y).clamp(0, side - 1) * theta
    angles = torch.cat((along_rows, along_columns), -1)
    return forward(
        state, SPIRAL, convolve(x, state, state['pos_embed']), rms_norm, lambda z, i: turn_pairs(z, angles),
        (state['norm.scale'],), (state['head.weight'], state['head.bias']))


def forward_vit5(checkpoint, x, key='model'):
    """ViT-5 at any size (its position embedding resized, bicubic), registers behind the patches as in its code."""
    state, x = double(checkpoint[key]), x.double()
    rows, columns, grid = grid_of(x, state['patch_embed.proj.weight'].shape[-1])
    side = math.isqrt(state['pos_embed'].shape[1])
    table = state['pos_embed'].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if grid != (side, side):
        table = F.interpolate(table, grid, mode='bicubic', align_corners=False)
    tokens = convolve(x, state, table.flatten(2).transpose(1, 2))
    tokens = torch.cat((tokens, state['reg_token'].expand(len(x), -1, -1)), 1)

    def angles(y, x_, theta):
        w = theta ** (-torch.arange(16, dtype=torch.float64) / 16)
        return torch.cat((y[:, None] * w, x_[:, None] * w), -1)

    small = math.isqrt(state['reg_token'].shape[1])
    number = torch.arange(small, dtype=torch.float64)
    both = torch.cat((angles(rows, columns, 1e4), angles(number.repeat_interleave(small), number.repeat(small), 100.)))
    return forward(
        state, VIT5, tokens, rms_norm_inner, lambda z, i: turn_pairs(z, both), (state['norm.weight'],),
        (state['head.weight'], state['head.bias']))


def forward_liere(checkpoint, x, side=4, first_layer=True):
    """LieRE at any size; `first_layer`: the generators of layer 0 in all layers, as its code computes."""
    state, x = double({k.removeprefix('model.'): v for k, v in checkpoint['state_dict'].items()}), x.double()
    weight = state['to_patch_embedding.1.weight']
    patch = math.isqrt(weight.shape[1] // 3)
    rows, columns, (height, width) = grid_of(x, patch)
    patches = x.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, rows, columns, p, p)
    patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(len(x), height * width, -1)
    tokens = F.linear(patches, weight, state['to_patch_embedding.1.bias'])
    tokens = torch.cat((state['cls_token'].expand(len(x), -1, -1), tokens), 1)
    raw, rotate = state.get('position_encoder.generator_raw_params'), None
    if raw is None:
        tokens = tokens + state['pos_embedding']
    else:
        upper = raw.triu(1)
        skew = upper - upper.transpose(-1, -2)
        y = torch.linspace(0, height / side, height, dtype=torch.float64)[rows.long()]
        x_ = torch.linspace(0, width / side, width, dtype=torch.float64)[columns.long()]

        def rotate(z, i):
            row, column = skew[:, 0 if first_layer or skew.shape[1] == 1 else i]
            matrices = torch.matrix_exp(y[:, None, None, None] * row + x_[:, None, None, None] * column)
            block = raw.shape[-1]
            per_head = 64 // block
            matrices = matrices.unflatten(1, (-1, per_head)).transpose(0, 1)  # (H or 1, N, groups, b, b)
            turned = matrices @ z[..., :per_head * block].unflatten(-1, (per_head, block, 1))
            return torch.cat((turned.flatten(-3), z[..., per_head * block:]), -1)
    return forward(
        state, LIERE, tokens, layer_norm(1e-5), rotate, (state['mlp_head.0.weight'], state['mlp_head.0.bias']),
        (state['mlp_head.1.weight'], state['mlp_head.1.bias']))
