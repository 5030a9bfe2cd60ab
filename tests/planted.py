"""Weight files with an object that would run code, and honest ones, as torch.save and pickle write them."""
import io
import os
import pickle

import torch

NAME = 'vit_tiny_rope_mixed'
KINDS = ['zip', 'legacy', 'pickle']
PLACES = ['alone', 'hidden', 'beside']


class Planted:
    """What an attacker would pickle: unpickling it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def trap(kind, where, weights, marker):
    """Bytes of a checkpoint with a planted object, as torch.save and pickle write them."""
    planted = Planted(marker)
    content = {'alone': planted, 'hidden': {**weights, 'zz': planted}, 'beside': {'model': weights, 'args': planted}}
    out = io.BytesIO()
    if kind == 'pickle':
        pickle.dump(content[where], out)
    else:
        torch.save(content[where], out, _use_new_zipfile_serialization=kind == 'zip')
    return out.getvalue()


def saved(what):
    out = io.BytesIO()
    torch.save(what, out)
    return out.getvalue()
