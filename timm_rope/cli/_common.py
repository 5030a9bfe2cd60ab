"""What several commands and benchmarks share: types of arguments, and files that are written whole or not at all."""
import argparse
import os
from pathlib import Path
from typing import Callable, Union


def integer_from(minimum: int) -> Callable[[str], int]:
    """A type of argument: an integer of at least `minimum`."""
    def parse(text: str) -> int:
        if not text.isdecimal() or not minimum <= int(text) < 2 ** 63:
            raise argparse.ArgumentTypeError(f'must be an integer of at least {minimum}, got {text!r}')
        return int(text)

    return parse


def output_file(text: str) -> Path:
    """A type of argument: a file that can be written, asked before the work begins and not after it."""
    path = Path(text)
    if not can_write(path):
        raise argparse.ArgumentTypeError(f'must be a file in a folder that exists and can be written, got {text!r}')
    return path


def can_write(path: Path) -> bool:
    """Whether a file may be made there: it is no folder, and lies in one that can be written to."""
    return not path.is_dir() and os.access(path.absolute().parent, os.W_OK)


def write_whole(path: Path, content: Union[str, bytes]) -> None:
    """Write a file, so that a reader finds all of it or the one before."""
    unfinished = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
