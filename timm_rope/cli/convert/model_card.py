"""The README.md of a converted model, which the Hub shows as its model card.

In comes what `convert` found out about the weights, out comes the text: where they come from, what they are, and how to
load them. Nothing is written that is not known.
"""
import re
from typing import Dict, List, Optional

from ..._version import __version__

LICENSE = re.compile(r'[a-z0-9][a-z0-9.+-]*')


def check_license(name: Optional[str]) -> Optional[str]:
    """An identifier as the Hub uses them, such as 'apache-2.0'; None is none.

    Raises:
        ValueError: Something else.
    """
    if name is not None and not LICENSE.fullmatch(name):
        raise ValueError(f"license must be an identifier of the Hub such as 'apache-2.0' or 'other', got {name!r}.")
    return name


def write_card(
        name: str,
        license: Optional[str],
        classifier: bool,
        source: Dict[str, str],
        facts: Dict[str, str],
        assumed: Dict[str, str],
        left_out: Dict[str, str],
) -> str:
    """Text of the card.

    Args:
        name: Of the model.
        license: Identifier, None if it is not known.
        classifier: Whether the model has a head.
        source: What the weights were converted from.
        facts: What the model is.
        assumed: What no source says -> what was taken instead.
        left_out: Keys of the checkpoint -> why they are not here.
    """
    task = 'image-classification' if classifier else 'image-feature-extraction'
    head = ['---', 'library_name: timm', f'pipeline_tag: {task}', 'tags:', f'- {task}', '- timm', '- timm_rope',
            *([f'license: {license}'] if license else []), '---']
    body = [
        f'# {_plain(name)}', '',
        f'Converted by `timm_rope` {__version__}, the plugin for timm that has its architecture. With both installed '
        f'(the plugin need not be imported):', '',
        '```python', 'import timm', '',
        "model = timm.create_model('hf-hub:<you>/<name>', pretrained=True)",
        "model = timm.create_model('local-dir:<folder>', pretrained=True)",
        'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))', '```', '',
        '## Model', '', *_table(facts),
        '## Origin of the weights', '', *_table(source)]
    if assumed:
        body += ['The files do not say, and this was assumed:', '', *_table(assumed)]
    if left_out:
        body += ['## Left out', '', *_table(grouped(left_out))]
    return '\n'.join([*head, *body]).rstrip() + '\n'


def grouped(left_out: Dict[str, str]) -> Dict[str, str]:
    """Keys of blocks that differ only in the number once."""
    return {re.sub(r'\.\d+\.', '.*.', key): why for key, why in sorted(left_out.items())}


def _table(rows: Dict[str, str]) -> List[str]:
    return ['| | |', '|---|---|', *(f'| {_plain(key)} | {_plain(value)} |' for key, value in rows.items()), '']


def _plain(text: str) -> str:
    """One line that Markdown shows as it is, whatever a file name or a key holds."""
    line = ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())
    return re.sub(r'([\\`*\[\]<>|#])', r'\\\1', line)
