"""Reading a weight file runs nothing of it, maps its tensors, and says what is wrong with a damaged one."""
import argparse
import io
import json
import os
import pickle
import struct
import threading
import zipfile

import numpy as np
import pytest
import timm
import torch
from planted import KINDS, NAME, PLACES, Planted, saved, trap
from safetensors.torch import save, save_file
from tiny import TINY

from timm_rope.weights.files import read_weights

# -- no code is run

@pytest.mark.parametrize('where', PLACES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.safetensors'])
def test_read_weights_refuses(tmp_path, marker, weights, name, kind, where):
    path = tmp_path / name
    path.write_bytes(trap(kind, where, weights, marker))
    with pytest.raises(RuntimeError, match='refused') as caught:
        read_weights(path)
    message = str(caught.value)
    assert str(path) in message and 'posix.mkdir' in message and 'Nothing in it was run' in message
    assert 'safetensors' in message and 'weights_only' not in message
    shown = caught.value.__cause__ or (not caught.value.__suppress_context__ and caught.value.__context__)
    assert not shown, "torch's advice is not shown"


def test_environment_is_no_escape(tmp_path, marker, weights, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    (tmp_path / 'x.pth').write_bytes(trap('zip', 'hidden', weights, marker))
    with pytest.raises(RuntimeError, match='refused'):
        read_weights(tmp_path / 'x.pth')


class Subclass(argparse.Namespace):
    pass


@pytest.mark.parametrize('zipped', [True, False])
def test_only_namespace_is_allowed(tmp_path, zipped):
    path = tmp_path / 'checkpoint.pth'
    args = argparse.Namespace(lr=.1, model=NAME)
    torch.save({'model': {'w': torch.ones(2)}, 'args': args}, path, _use_new_zipfile_serialization=zipped)
    read = read_weights(path)
    assert read['args'] == args and torch.equal(read['model']['w'], torch.ones(2))
    torch.save({'args': Subclass(lr=.1)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RuntimeError, match=r'test_weight_files\.Subclass'):
        read_weights(path)
    with pytest.raises(pickle.UnpicklingError, match='Namespace'):
        torch.save(args, path)
        torch.load(path, weights_only=True)  # what is allowed here is allowed nowhere else


def test_numpy_archives(tmp_path, marker, weights):
    np.savez(tmp_path / 'jax.npz', **{'embedding/kernel': np.zeros((8, 8, 3, 24), 'float32')})
    np.savez(tmp_path / 'evil.npz', **{'embedding/kernel': np.array([Planted(marker)], dtype=object)})
    for name in ('jax.npz', 'evil.npz'):
        with pytest.raises(ValueError, match=f'{name} is a NumPy archive .* model of timm'):
            read_weights(tmp_path / name)
    evil = str(tmp_path / 'evil.npz')
    for kwargs in (
            dict(pretrained=True, pretrained_cfg_overlay=dict(file=evil, num_classes=5, custom_load=True)),
            dict(checkpoint_path=evil)):
        with pytest.raises(ValueError, match='allow_pickle=False'):
            timm.create_model(NAME, **TINY, **kwargs)


def test_threads_do_not_take_the_permission_from_each_other(tmp_path, monkeypatch):
    """torch keeps what may be unpickled in a global, which the first thread that is done sets back."""
    torch.save({'w': torch.ones(2), 'args': argparse.Namespace(lr=.1)}, tmp_path / 'x.pth')
    allowed, inside, others = set(torch.serialization.get_safe_globals()), threading.Event(), []
    real = torch.load

    def slow(*args, **kwargs):
        if not inside.is_set():
            inside.set()
            others[0].join(.3)  # the other one is done first, if it is let in
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, 'load', slow)
    read = []
    others.append(threading.Thread(target=lambda: inside.wait(60) and read.append(read_weights(tmp_path / 'x.pth'))))
    others[0].start()
    read.append(read_weights(tmp_path / 'x.pth'))
    others[0].join()
    assert [r['args'].lr for r in read] == [.1, .1]
    assert set(torch.serialization.get_safe_globals()) == allowed


# -- formats

def test_all_formats_agree_and_stay_as_they_are(tmp_path, weights):
    save_file(weights, tmp_path / 'a')
    torch.save(weights, tmp_path / 'b')
    torch.save(weights, tmp_path / 'c', _use_new_zipfile_serialization=False)
    torch.save(weights, tmp_path / 'd.safetensors')  # a wrong name is no harm
    for name in ('a', 'b', 'c', 'd.safetensors'):
        before = (tmp_path / name).read_bytes()
        read = read_weights(tmp_path / name)
        assert read.keys() == weights.keys()
        for key, value in read.items():
            assert value.device.type == 'cpu' and torch.equal(value, weights[key])
            value.zero_()
        assert (tmp_path / name).read_bytes() == before, 'writing to a mapped tensor leaves the file alone'


def rss_of(kind):
    with open('/proc/self/smaps_rollup') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(kind)) * 1024


@pytest.mark.skipif(not os.path.exists('/proc/self/smaps_rollup'), reason='reads memory from /proc')
@pytest.mark.parametrize('kind', ['safetensors', 'zip'])
def test_tensors_are_mapped(tmp_path, kind):
    size = 64 << 20
    tensors = {'w': torch.zeros(size // 4)}
    (save_file if kind == 'safetensors' else torch.save)(tensors, tmp_path / 'x')
    del tensors
    before = rss_of('Rss')
    read = read_weights(tmp_path / 'x')
    assert rss_of('Rss') - before < size / 4
    assert read['w'].shape == (size // 4,)


def test_a_safetensors_file_that_begins_like_a_pickle_is_none(tmp_path):
    path, tensor = tmp_path / 'model.safetensors', torch.arange(3.)
    for padding in range(300):
        save_file({'weight': tensor}, path, metadata={'note': 'x' * padding})
        if path.read_bytes()[:1] == b'\x80':  # a header of 128, 384, ... bytes
            assert torch.equal(read_weights(path)['weight'], tensor)
            return
    raise AssertionError('no padding gave such a header')


# -- damaged and hostile files

def broken_files(weights):
    out = io.BytesIO()
    torch.save(weights, out)
    zipped, out = out.getvalue(), io.BytesIO()
    torch.save(weights, out, _use_new_zipfile_serialization=False)
    legacy, safe, archive, script = out.getvalue(), save(weights), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as file:
        file.writestr('numpy.npy', b'')
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    return {
        'empty': b'', 'one byte': b'\x80', 'zip, half': zipped[:len(zipped) // 2], 'zip, head': zipped[:40],
        'legacy, half': legacy[:len(legacy) // 2], 'legacy, head': legacy[:60], 'legacy, 300': legacy[:300],
        'safetensors, half': safe[:len(safe) // 2], 'safetensors, head': safe[:20],
        'safetensors, tail': safe + b'\0', 'text': b'epoch,loss\n' * 20, 'page': b'<!doctype html><p>404',
        'pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:00\n', 'other zip': archive.getvalue(),
        'script': script.getvalue(), 'not a dict': bytes(io.BytesIO(saved([torch.ones(2)])).getvalue()),
    }


@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
def test_broken_files(tmp_path, weights):
    path = tmp_path / 'model.bin'
    for what, data in broken_files(weights).items():
        path.write_bytes(data)
        error = RuntimeError if what == 'one byte' else ValueError
        with pytest.raises(error) as caught:
            read_weights(path)
        assert str(path) in str(caught.value), what
        assert 'weights_only' not in str(caught.value), what
        assert path.read_bytes() == data, what


def safetensors_of(header, body=b'', length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(header) if length is None else length) + header + body


def entry(begin, end, **changes):
    return {'dtype': 'F32', 'shape': [(end - begin) // 4], 'data_offsets': [begin, end], **changes}


BOMBS = {
    'header longer than the file': safetensors_of({'a': entry(0, 4)}, bytes(4), 2 ** 20),
    'header of 4 EB': safetensors_of({'a': entry(0, 4)}, bytes(4), 2 ** 62),
    'header of all bits': safetensors_of({'a': entry(0, 4)}, bytes(4), 2 ** 64 - 1),
    'one tensor in another': safetensors_of({'a': entry(0, 8), 'b': entry(4, 12)}, bytes(12)),
    'the same bytes twice': safetensors_of({'a': entry(0, 8), 'b': entry(0, 8)}, bytes(8)),
    'bytes of no tensor': safetensors_of({'a': entry(0, 4), 'b': entry(8, 12)}, bytes(12)),
    'beyond the end': safetensors_of({'a': entry(0, 400)}, bytes(12)),
    'backwards': safetensors_of({'a': entry(0, 4, data_offsets=[4, 0])}, bytes(4)),
    'negative shape': safetensors_of({'a': entry(0, 4, shape=[-1])}, bytes(4)),
    'shape of 2 ** 64': safetensors_of({'a': entry(0, 0, shape=[2 ** 62, 4])}),
    'shape of more than its bytes': safetensors_of({'a': entry(0, 4, shape=[10 ** 9])}, bytes(4)),
    'unknown dtype': safetensors_of({'a': entry(0, 4, dtype='PY')}, bytes(4)),
    'nested too deep': safetensors_of(b'{"a":' + b'[' * 100_000 + b']' * 100_000 + b'}'),
    'no header': safetensors_of(b'{"a": ', b''),
}


@pytest.mark.parametrize('what', BOMBS)
def test_hostile_safetensors(tmp_path, what):
    (tmp_path / 'model.safetensors').write_bytes(BOMBS[what])
    with pytest.raises(ValueError, match='model.safetensors is a truncated or damaged safetensors file'):
        read_weights(tmp_path / 'model.safetensors')


def packed_anew(data, compression=zipfile.ZIP_STORED, bomb=0, copies=0, extra=''):
    """A file of torch.save as another program would pack it, or an attacker."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, 'w', compression) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name) + bytes(bomb) * name.endswith('/data.pkl'))
        if extra:
            packed.writestr(extra, b'')
        packed.filelist += packed.filelist * copies  # the same bytes, listed again
    return out.getvalue()


@pytest.mark.parametrize('name', ['x.pth', 'model.safetensors'])
def test_packed_archives(tmp_path, weights, name):
    """torch would take packed bytes for weights, without a word, and unpack whatever it is told to."""
    path, data = tmp_path / name, saved(weights)
    path.write_bytes(packed_anew(data))
    read = read_weights(path)
    assert all(torch.equal(read[key], value) for key, value in weights.items()), 'packed anew as it was'
    for hostile in (
            packed_anew(data, zipfile.ZIP_DEFLATED),
            packed_anew(data, zipfile.ZIP_BZIP2),
            packed_anew(data, zipfile.ZIP_DEFLATED, bomb=1 << 24),
            packed_anew(data, zipfile.ZIP_DEFLATED, bomb=1 << 24, extra='archive/code/constants.pkl'),
            packed_anew(data, copies=9),
    ):
        path.write_bytes(hostile)
        with pytest.raises(ValueError, match=f'{name} is a compressed archive .* pack it anew without compression'):
            read_weights(path)
    folder = zipfile.ZipFile(io.BytesIO(data)).namelist()[0].partition('/')[0]
    path.write_bytes(packed_anew(data, zipfile.ZIP_DEFLATED, bomb=1 << 24, extra=f'{folder}/constants.pkl'))
    # torch 2.5 does not tell TorchScript from a damaged file
    with pytest.raises(ValueError, match='TorchScript' if hasattr(torch.compiler, 'is_exporting') else 'damaged'):
        read_weights(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='model.bin'):
        read_weights(tmp_path / 'model.bin')
    with pytest.raises(ValueError, match='directory'):
        read_weights(tmp_path)
