"""What a weight file holds, without running anything that is in it.

Which format a file has is told from its first bytes, not from its name: a pickle called model.safetensors is treated
as a pickle. Pickles go through torch's restricted unpickler, and there is no switch that turns it off.
"""
import argparse
import hashlib
import pickle
import pickletools
import re
import threading
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

ZIP, PICKLE = b'PK\x03\x04', b'\x80'
# bytes 4 to 8 of a safetensors file: the upper half of the length of its header, and the first character of that. The
# lower half may begin like a pickle
SAFETENSORS = b'\0\0\0\0{'
# torch.save writes this number first in the format it used up to torch 1.5
LEGACY = pickle.dumps(0x1950a86a20f9469cfc6c, protocol=2)
# torch keeps the list of what may be unpickled in a global: a thread that is done would reset it for another one
UNPICKLING = threading.Lock()


def sha256_of(*paths: Path) -> str:
    """Hash of the contents of files one after the other, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open('rb') as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def is_safetensors(path: Union[str, Path]) -> bool:
    """Whether a file begins as a safetensors file does, so that nothing in it is unpickled."""
    with Path(path).open('rb') as file:
        return _is_safetensors(file.read(64))


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b'{' and not head.startswith(ZIP) and (head[:1] != PICKLE or head[4:9] == SAFETENSORS)


def read_weights(path: Union[str, Path]) -> Dict[str, Any]:
    """Read a safetensors file or one that torch.save wrote.

    Tensors are on the CPU. Those of safetensors and of torch's zip format are mapped from the file: they are read when
    they are used, and writing to them leaves the file as it is. Beside tensors and plain Python values, a torch file
    may hold argparse.Namespace, as the training checkpoints of DeiT and its forks do.

    Args:
        path: File; its name does not matter.

    Returns:
        What the file holds, nested as it was saved.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A directory, an empty, truncated, damaged or compressed file, no weight file, or no dictionary in
            it.
        RuntimeError: The file asks for Python objects that could run code. Nothing of it was run.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f'{path} is a directory, not a weight file: name a file in it.')
    if not path.is_file():
        raise FileNotFoundError(f'There is no weight file {path}.')
    with path.open('rb') as file:
        head = file.read(64)
    if head.startswith(ZIP):
        _refuse_other_archives(path)
        # by this name torch.load would expect safetensors; it is given the opened file instead, which it cannot map
        out = _torch_load(path, mmap=path.suffix != '.safetensors')
    elif _is_safetensors(head):
        try:
            out = load_file(path)
        except (SafetensorError, ValueError) as e:
            raise ValueError(f'{path} is a truncated or damaged safetensors file ({e}): get it again.') from e
    elif head.startswith(PICKLE):
        if not head.startswith(LEGACY):
            raise _refusal(path, _named_globals(path))
        out = _torch_load(path, mmap=False)
    else:
        raise ValueError(f'{path} {_what_else(head)}')
    if not isinstance(out, dict):
        raise ValueError(f'{path} holds a {type(out).__name__}, expected a dictionary of tensors.')
    return out


def _refuse_other_archives(path: Path) -> None:
    """torch maps the records of an archive as they lie there: packed bytes would become weights, without an error."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception:  # torch will say what is wrong with it
        return
    if records and all(record.filename.endswith('.npy') for record in records):
        raise ValueError(
            f'{path} is a NumPy archive (.npz): load it into the model of timm that it is of, and save that one.')
    if any(record.filename.partition('/')[2] == 'constants.pkl' for record in records):
        return  # TorchScript, which does compress, and which torch refuses before it reads anything
    # an archive whose records point to the same bytes unpacks to more than the file holds, without compression
    unpacked = sum(record.file_size for record in records)
    if any(record.compress_type != zipfile.ZIP_STORED for record in records) or unpacked > path.stat().st_size:
        raise ValueError(
            f'{path} is a compressed archive of {unpacked} bytes, which torch.save never writes: pack it anew without '
            f'compression, or get the original.')


def _torch_load(path: Path, mmap: bool) -> Any:
    try:
        with UNPICKLING, torch.serialization.safe_globals([argparse.Namespace]):
            if mmap:
                return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
            with path.open('rb') as file:
                return torch.load(file, map_location='cpu', weights_only=True)
    except MemoryError:
        raise
    except Exception as e:  # a damaged pickle can fail in any way
        # `from None`: torch's message advises to switch the protection off
        asked = _blocked_globals(path, e) if isinstance(e, pickle.UnpicklingError) else []
        if asked:
            raise _refusal(path, asked) from None
        if 'TorchScript' in str(e):
            raise ValueError(f'{path} is a TorchScript archive: save the state_dict instead.') from None
        reason = '' if isinstance(e, pickle.UnpicklingError) else f' ({type(e).__name__}: {str(e)[:200]})'
        raise ValueError(f'{path} is truncated, damaged or no file of torch.save{reason}: get it again.') from None


def _refusal(path: Path, asked: List[str]) -> RuntimeError:
    return RuntimeError(
        f'{path} is refused: it is a pickle that asks for {", ".join(asked) or "more than tensors"}, which could run '
        f'any code. Nothing in it was run. Ask its author for safetensors, or for a plain dictionary of tensors.')


def _blocked_globals(path: Path, error: Exception) -> List[str]:
    """Names of what torch refused, all of them where the format lets them be listed without unpickling."""
    try:
        with UNPICKLING, torch.serialization.safe_globals([argparse.Namespace]):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # legacy format, or opcodes torch does not know
        names = []
    return sorted(names) or re.findall(r'GLOBAL ([\w.]+)', str(error))[:1]


def _named_globals(path: Path) -> List[str]:
    """Names in a pickle that torch.save did not write, found by reading its opcodes."""
    names, strings = set(), ['', '']
    try:
        with path.open('rb') as file:
            for opcode, arg, _ in pickletools.genops(file):
                if opcode.name in ('GLOBAL', 'INST'):
                    names.add(str(arg).replace(' ', '.'))
                elif opcode.name == 'STACK_GLOBAL':
                    names.add('.'.join(strings[-2:]))
                elif isinstance(arg, str):
                    strings.append(arg)
    except Exception:  # the pickle is damaged, but what was found so far is worth telling
        pass
    return sorted(names)


def _what_else(head: bytes) -> str:
    """Why a file with these first bytes holds no weights."""
    if not head:
        return 'is empty: get it again.'
    if head.startswith(b'version https://git-lfs'):
        return 'is a Git LFS pointer, not the file itself: run `git lfs pull`.'
    if head.lstrip()[:1] == b'<':
        return 'is a web page, not a weight file: it was probably saved in place of an error message.'
    return f'is no weight file: expected safetensors or a file of torch.save, it begins with {head[:16]!r}.'
