"""Small sets of real images: Fashion-MNIST from the disk or the network, else scikit-learn's handwritten digits.

Nothing is taken for data that may be half there: downloads appear under their name only when complete and checked, and
files are compared with the sizes in their own headers.
"""
import gzip
import math
import os
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional, Tuple

import torch
from torch import Tensor

SOURCES = ('auto', 'fashion_mnist', 'digits')
DEBIAN_FOLDER = Path('/usr/share/datasets/fashion-mnist')  # of Debian's package dataset-fashion-mnist
FILES = {
    'train_images': 'train-images-idx3-ubyte',
    'train_labels': 'train-labels-idx1-ubyte',
    'test_images': 't10k-images-idx3-ubyte',
    'test_labels': 't10k-labels-idx1-ubyte',
}
INSTALL = (
    "Run `pip install 'timm_rope[demo]'` for scikit-learn's digits, or `apt-get install dataset-fashion-mnist` "
    '(Debian, Ubuntu), or name a folder with Fashion-MNIST: --data-dir DIR.')

DOWNLOAD_SECONDS = 60.
# Runs in a process of its own, the only thing that can be stopped in the middle of a name look-up or a slow transfer.
# torchvision compares the checksums.
DOWNLOAD = '''
import socket, sys
socket.setdefaulttimeout(10)
from torchvision.datasets import FashionMNIST
FashionMNIST(sys.argv[1], download=True)
'''


class NoImages(Exception):
    """No images could be found; the message says what to do."""


@dataclass(frozen=True)
class Images:
    """Grey images (N, 1, height, width) as uint8 and their labels (N), 0 to 9."""
    name: str
    origin: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_images(source: str = 'auto', folder: Optional[Path] = None) -> Images:
    """Find small images.

    Args:
        source: 'fashion_mnist', 'digits', or 'auto' for the first that can be had, in this order.
        folder: Where Fashion-MNIST must be, instead of the usual places and the network.

    Raises:
        NoImages: There are none; says how to get some.
        ValueError: `folder` is wrong, or a file is damaged.
    """
    if source not in SOURCES:
        raise ValueError(f'The data must be one of {", ".join(SOURCES)}, got {source!r}.')
    if folder is not None:
        if source == 'digits':
            raise ValueError('The digits are part of scikit-learn: a folder can only be given for Fashion-MNIST.')
        if not folder.is_dir():
            raise ValueError(f'There is no folder {folder}.')
        files = find_fashion_mnist(folder)
        if files is None:
            raise ValueError(
                f'{folder} does not hold Fashion-MNIST: neither it nor its FashionMNIST/raw has all of '
                f'{", ".join(FILES.values())}, each as it is or with .gz.')
        return read_fashion_mnist(files)
    if source == 'digits':
        return load_digits()
    try:
        return read_fashion_mnist(get_fashion_mnist())
    except NoImages as error:
        if source == 'fashion_mnist':
            raise NoImages(f'{error} {INSTALL}') from None
        print(f'{error} Taking the digits instead.', file=sys.stderr)
        return load_digits()


# -- Fashion-MNIST

def get_fashion_mnist() -> Dict[str, Path]:
    """The four files: from Debian's package, from an earlier download or from a download now."""
    cache = cache_folder()
    files = find_fashion_mnist(DEBIAN_FOLDER) or find_fashion_mnist(cache)
    if files is None:
        print(f'Fashion-MNIST is not on this disk. Downloading it (30 MB) to {cache}, for at most '
              f'{DOWNLOAD_SECONDS:.0f} s ...', file=sys.stderr, flush=True)
        download_fashion_mnist(cache, DOWNLOAD_SECONDS)
        files = find_fashion_mnist(cache)
    if files is None:
        raise NoImages(f'The download left no Fashion-MNIST in {cache}.')
    return files


def cache_folder() -> Path:
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_rope'


def find_fashion_mnist(folder: Path) -> Optional[Dict[str, Path]]:
    """The four files in `folder` or, as torchvision lays them out, in its FashionMNIST/raw; None if one is missing."""
    for place in (folder / 'FashionMNIST' / 'raw', folder):
        # where both forms are there the compressed one counts: it has a checksum
        found = {
            part: path for part, stem in FILES.items() for path in (place / stem, place / f'{stem}.gz')
            if path.is_file()}
        if len(found) == len(FILES):
            return found
    return None


def download_fashion_mnist(folder: Path, seconds: float) -> None:
    """Put Fashion-MNIST into FashionMNIST/raw of `folder`, completely or not at all.

    Raises:
        NoImages: It did not work; says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.unfinished-', dir=folder) as unfinished:
            subprocess.run(
                [sys.executable, '-c', DOWNLOAD, unfinished], check=True, capture_output=True, text=True,
                errors='replace', timeout=seconds)
            os.rename(Path(unfinished) / 'FashionMNIST', folder / 'FashionMNIST')
    except subprocess.TimeoutExpired:
        reason = f'not finished after {seconds:g} s'
    except subprocess.CalledProcessError as error:
        said = [line.strip() for line in error.stderr.splitlines() if line.strip()]
        reason = said[-1] if said else f'exit status {error.returncode}'
    except OSError as error:
        reason = str(error)
    else:
        return
    raise NoImages(f'Fashion-MNIST could not be downloaded: {reason}.')


def read_fashion_mnist(files: Dict[str, Path]) -> Images:
    """Read and check the four files.

    Raises:
        ValueError: A file is damaged or not of Fashion-MNIST; names the file.
    """
    parts = {part: read_idx(path) for part, path in files.items()}
    for split in ('train', 'test'):
        images, labels = parts[f'{split}_images'], parts[f'{split}_labels']
        if images.dim() != 3 or images.shape[1:] != (28, 28) or len(images) == 0:
            raise ValueError(f'{files[f"{split}_images"]} does not hold images of 28x28: its shape is '
                             f'{tuple(images.shape)}.')
        if labels.shape != images.shape[:1] or labels.max() > 9:
            raise ValueError(f'{files[f"{split}_labels"]} does not hold one label from 0 to 9 for each of the '
                             f'{len(images)} images.')
    return Images(
        'Fashion-MNIST', str(files['train_images'].parent),
        parts['train_images'].unsqueeze(1), parts['train_labels'].long(),
        parts['test_images'].unsqueeze(1), parts['test_labels'].long())


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of bytes, compressed if it is called *.gz.

    The format: two zero bytes, the type (8 is uint8), the number of axes, the length of each as a big-endian uint32,
    then the values.

    Raises:
        ValueError: The file is damaged or holds something else.
    """
    try:
        with gzip.open(path) if path.suffix == '.gz' else open(path, 'rb') as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f'{path} is damaged ({error}): delete it and get it anew.') from None
    if len(content) < 4 or content[:3] != b'\0\0\x08':
        raise ValueError(f'{path} is not an IDX file of bytes.')
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i:i + 4], 'big') for i in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f'{path} is damaged ({len(content)} bytes instead of {start + math.prod(shape)}): delete it and get it '
            f'anew.')
    if len(content) == start:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


# -- digits

def load_digits() -> Images:
    """The digits of scikit-learn; a fifth of them, the same in every run and balanced, is the test set."""
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise NoImages(f'There are no images: scikit-learn cannot be imported ({error}). {INSTALL}') from None
    digits = datasets.load_digits()
    splits: Tuple = train_test_split(
        (digits.images * (255 / 16)).round().astype('uint8'), digits.target, test_size=.2, random_state=0,
        stratify=digits.target)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, splits)
    return Images(
        'digits', 'scikit-learn', train_images.unsqueeze(1), train_labels.long(), test_images.unsqueeze(1),
        test_labels.long())
