"""Which route turns queries and keys on this machine: found out by turning some, not by looking at versions."""
from typing import Dict

import torch

from ..kernels import find_route, guard, rotate, unpack
from ..rotations import BlockRotation, PairRotation, TripletRotation

IMAGES, HEAD_DIM, HEADS, TOKENS = 4, 64, 2, 5
ROTATIONS = {
    'pairs': PairRotation(HEAD_DIM, HEAD_DIM // 2),
    'triplets': TripletRotation(HEAD_DIM, HEAD_DIM // 3),
    'blocks of 8': BlockRotation(HEAD_DIM, 8),
}


def survey(device: str) -> Dict[str, str]:
    """Turn a few tokens by every kind of rotation and compare them with the plain formula.

    Args:
        device: Name of a device, such as 'cpu' or 'cuda'.

    Returns:
        'pairs float32' and the like -> the route.

    Raises:
        ValueError: TIMM_ROPE_KERNEL names no route.
        RuntimeError: It names one that cannot run here, or one gives a wrong result.
    """
    out = {}
    generator = torch.Generator().manual_seed(0)
    for name, rotation in ROTATIONS.items():
        for dtype in (torch.float32, torch.bfloat16):
            qkv = torch.randn(IMAGES, TOKENS, 3 * HEADS * HEAD_DIM, generator=generator).to(device, dtype)
            freqs = torch.rand(2, 1, HEADS, rotation.groups, *([28] if rotation.size == 8 else []), generator=generator)
            axes = torch.zeros(1), torch.arange(float(TOKENS))
            payload = rotation.table(freqs, *axes)[0].to(device)
            route = find_route(qkv, payload, rotation, HEADS)
            expected = [rotation(x.float(), payload) for x in unpack(qkv, HEADS)[:2]]
            turned = rotate(qkv, payload, rotation, HEADS)
            near = all(torch.allclose(a.float(), b, rtol=1e-2, atol=1e-2) for a, b in zip(turned, expected))
            result = 'formula' if route is None else route.NAME
            if not near:
                raise RuntimeError(f'{result} turns {name} in {str(dtype)[6:]} wrong; please report it.')
            out[f'{name} {str(dtype)[6:]}'] = result
    return out


def summary(results: Dict[str, str]) -> str:
    """One line of a survey: the route, if it is the same for all, else which for what; and what does not work."""
    routes = sorted(set(results.values()))
    parts = routes
    if len(routes) > 1:
        parts = [f'{route} ({", ".join(k for k, v in results.items() if v == route)})' for route in routes]
    return '; '.join([*parts, *guard.switched_off()])
