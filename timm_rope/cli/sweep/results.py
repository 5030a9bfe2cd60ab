"""The results file of a sweep, from which an interrupted run continues.

It holds the arguments that change an accuracy, and one row for each evaluation that is done. The file is replaced as a
whole after each of them, and refused when it is read with other arguments or other weights.
"""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from .._common import write_whole

# without rules and with them: versions that know no rules must not read rows that have one
FORMATS = ('timm_rope sweep 1', 'timm_rope sweep 2')
NUMBERS = ('height', 'width', 'top1', 'top5', 'right_top1', 'right_top5', 'images', 'images_per_second')


class Results:
    """Rows of results by model, size and rule; in a file, if a path is given.

    Args:
        path: File, read if it exists; None keeps the results in memory.
        arguments: All that changes an accuracy beside model, size and rule, plain JSON values.

    Raises:
        ValueError: The file is none of this command, or was written with other arguments. It is not touched.
    """

    def __init__(self, path: Optional[Path], arguments: Dict[str, Any]) -> None:
        self.path = path
        self.arguments = json.loads(json.dumps(arguments))
        self.rows: List[Dict[str, Any]] = []
        self._seen: Optional[bytes] = None
        if path is not None and path.exists():
            self._seen = path.read_bytes()
            self.rows = self._parse(path, self._seen)

    def _parse(self, path: Path, content: bytes) -> List[Dict[str, Any]]:
        advice = 'It was not touched: name another file.'
        try:
            found = json.loads(content)
            rows = found['results']
            whole = found['format'] in FORMATS and isinstance(found['arguments'], dict) and all(
                isinstance(row['model'], str) and isinstance(row.get('rope_scaling'), (str, type(None)))
                and all(isinstance(row[key], (int, float)) for key in NUMBERS) for row in rows)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'{path} is no results file of sweep ({error!r}). {advice}') from None
        if not whole:
            raise ValueError(f'{path} is no results file of this version of sweep. {advice}')
        there, here = found['arguments'], self.arguments
        differ = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        if differ:
            listed = '; '.join(f'{key} {there.get(key)!r}, now {here.get(key)!r}' for key in differ)
            raise ValueError(f'{path} was written with other arguments: {listed}. {advice}')
        return rows

    def find(
            self, model: str, rule: Optional[str], size: Tuple[int, int], sha256: Optional[str],
    ) -> Optional[Dict[str, Any]]:
        """The row of a model at a size by a rule, None if there is none yet.

        Raises:
            ValueError: There is one, but the weights have changed since.
        """
        for row in self.rows:
            if (row['model'], row.get('rope_scaling'), row['height'], row['width']) == (model, rule, *size):
                if row.get('sha256') != sha256:
                    raise ValueError(
                        f'{model}: the weights have changed since {self.path} was written. Name another results file.')
                return row
        return None

    def takes_rules(self, model: str, sha256: Optional[str]) -> Optional[bool]:
        """Whether there are rules for a model, None if no row of these weights says so."""
        return next((
            row['takes_rules'] for row in self.rows
            if (row['model'], row.get('sha256')) == (model, sha256) and 'takes_rules' in row), None)

    def add(self, row: Dict[str, Any]) -> None:
        """Add a row, and write the file.

        Raises:
            RuntimeError: Somebody else has changed the file, which is left as it is.
        """
        self.rows.append(row)
        if self.path is None:
            return
        now = self.path.read_bytes() if self.path.exists() else None
        if now != self._seen:
            raise RuntimeError(
                f'{self.path} was changed by another program and was left as it is. Lost: {json.dumps(row)}')
        with_rules = any(row.get('rope_scaling') is not None for row in self.rows)
        content = dict(format=FORMATS[with_rules], arguments=self.arguments, results=self.rows)
        self._seen = (json.dumps(content, indent=1) + '\n').encode()
        write_whole(self.path, self._seen)
