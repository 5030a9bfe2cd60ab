"""What the tests of downloads share: weights of a few bytes and how they are fetched."""
import subprocess
import sys

import torch
from fresh_python import clean_env
from safetensors.torch import save

REPO = 'org/vit'


SAFE = save({'w': torch.arange(5000.)})


OTHER = save({'w': torch.arange(5000.) + 1})


FLIPPED = SAFE[:-1] + bytes([SAFE[-1] ^ 1])


def leftovers(cache):
    """Files of weights in a cache, whole or not."""
    return [p for p in cache.rglob('*') if p.is_file() and ('blobs' in p.parts or 'snapshots' in p.parts)]


def in_process(hub, cache, script, **kwargs):
    env = clean_env(
        HF_ENDPOINT=hub.url, HF_HUB_CACHE=cache, HF_HUB_DISABLE_XET=1, HF_HUB_DISABLE_PROGRESS_BARS=1,
        PYTHONDONTWRITEBYTECODE=1)  # where files are limited, half a .pyc would stay
    return subprocess.Popen(
        [sys.executable, '-c', script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
