"""`python -m timm_rope sweep --rope-scaling`: each rule as a model built with it, models without rules once."""
import argparse
import csv
import io
import json
from contextlib import redirect_stdout

import pytest
import timm
import torch
from sweeping import CLASSES, KWARGS, at_sizes, count, counts_of, rows_of, save, sweep
from timm.models import save_for_hf

RULES = {
    'extrapolate': {}, 'interpolate+log_n': dict(rope_scaling='interpolate', rope_log_n=True),
    'yarn': dict(rope_scaling='yarn')}


def by_rule(rows):
    """Counts by (model, rule), then by size."""
    found = {}
    for row in rows:
        found.setdefault((row['model'], row['rope_scaling']), []).append(row)
    return {key: counts_of(some) for key, some in found.items()}


@pytest.fixture(scope='module')
def compared(data, tmp_path_factory):
    """A run with a model that has rules and its baseline, which has none: sources, folder, what it printed."""
    folder = tmp_path_factory.mktemp('compared')
    mixed, ape = (save(folder / f'{name}.pth', name, 48) for name in ('vit_tiny_rope_mixed', 'vit_tiny_ape'))
    with redirect_stdout(io.StringIO()) as out:
        assert sweep(
            data, mixed, ape, '--sizes', '48', '96', '40x72', '--rope-scaling', 'extrapolate', 'interpolate+log-n',
            'yarn', 'yarn', '--results', folder / 'r.json', '--csv', folder / 'r.csv') == 0
    return mixed, ape, folder, out.getvalue()


def test_counts_are_those_of_models_built_with_each_rule(compared, data):
    mixed, ape, folder, _ = compared
    found, sizes = by_rule(rows_of(folder / 'r.json')), [(48, 48), (96, 96), (40, 72)]
    expected = {(mixed, rule): at_sizes(mixed, sizes, data, options=options) for rule, options in RULES.items()}
    assert found == {**expected, (ape, None): at_sizes(ape, sizes, data)}
    counts = [expected[mixed, rule] for rule in RULES]
    for size in sizes[1:]:
        assert len({each[size] for each in counts}) == 3, 'rules differ on larger grids'
    assert len({each[48, 48] for each in counts}) == 1, 'and not on that of training'


def test_every_rule_is_a_line(compared):
    mixed, ape, folder, out = compared
    rows = {(row['model'], row['rope_scaling'], row['height']): row for row in rows_of(folder / 'r.json')}
    lines = [(mixed, rule) for rule in RULES] + [(ape, None)]
    table = out.splitlines()
    assert len(table) == 5 and table[0].split() == ['top-1,', '%', '48', '96', '40x72']
    for text, (model, rule) in zip(table[1:], lines):
        label = f'{model} [{rule}]' if rule else model
        assert text.startswith(f'{label}  ')
        assert text[len(label):].split() == [f'{rows[model, rule, height]["top1"]:.2f}' for height in (48, 96, 40)]
    with open(folder / 'r.csv') as file:
        found = [(row['model'], row['rope_scaling'], row['height'], row['right_top1']) for row in csv.DictReader(file)]
    assert found == [
        (model, rule or '', str(height), str(rows[model, rule, height]['right_top1']))
        for model, rule in lines for height in (48, 96, 40)]


def test_rules_in_windows(data, tmp_path):
    swin = dict(embed_dim=16, depths=(1, 2), num_heads=(2, 2), patch_size=4)
    torch.manual_seed(0)
    model = timm.create_model('swin_tiny_rope_axial', img_size=64, window_size=4, num_classes=CLASSES, **swin).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=.5 if 'qkv' not in key else 1.)
    args = argparse.Namespace(img_size=64, model_kwargs=dict(swin, window_size=4))
    torch.save(dict(arch='swin_tiny_rope_axial', state_dict=model.state_dict(), args=args), tmp_path / 'w.pth')
    source = f'swin_tiny_rope_axial={tmp_path / "w.pth"}'
    assert sweep(data, source, '--sizes', '128', '--results', tmp_path / 'r.json', '--rope-scaling', *RULES) == 0
    expected = {}
    for rule, options in RULES.items():
        larger = timm.create_model(
            'swin_tiny_rope_axial', img_size=128, window_size=8, num_classes=CLASSES, **swin, **options).eval()
        larger.load_state_dict(model.state_dict())
        expected[source, rule] = {(128, 128): count(larger, data, (128, 128), crop_pct=.875)}
    assert by_rule(rows_of(tmp_path / 'r.json')) == expected
    assert len({str(counts) for counts in expected.values()}) == 3


def test_a_rule_goes_before_that_of_the_checkpoint(data, tmp_path):
    built = dict(rope_scaling='interpolate', rope_log_n=True)
    source = save(tmp_path / 'w.pth', 'vit_tiny_rope_mixed', 48, 1, model_kwargs=built)
    for given, rule, options in (([], None, built), (['--rope-scaling', 'yarn'], 'yarn', RULES['yarn'])):
        file = tmp_path / f'{rule}.json'
        assert sweep(data, source, '--sizes', '96', '--results', file, *given) == 0
        assert by_rule(rows_of(file)) == {(source, rule): at_sizes(source, [(96, 96)], data, options=options)}
    other = at_sizes(source, [(96, 96)], data, options=dict(rope_scaling='yarn', rope_log_n=True))
    assert counts_of(rows_of(file)) != other, 'and the comparison can tell a temperature that stayed'


@pytest.mark.parametrize('name, kwargs', [
    ('test_vit', {}), ('vit_small_patch16_rope_224', dict(img_size=160, embed_dim=48, depth=1, num_heads=2)),
    ('vit_tiny_rope_mixed', dict(KWARGS, img_size=160, rope_encoding='none')),
    ('swin_tiny_rope_axial', dict(img_size=128, embed_dim=16, depths=(1,), num_heads=(1,), rope_encoding='none'))])
def test_what_has_no_rotation_of_ours_is_evaluated_once(name, kwargs, data, tmp_path, capsys):
    model = timm.create_model(name, num_classes=CLASSES, **kwargs)
    save_for_hf(model, str(tmp_path / 'peer'), model_config=dict(num_classes=CLASSES, model_args=kwargs))
    source = f'local-dir:{tmp_path / "peer"}'
    assert sweep(data, source, '--sizes', '160', '--results', tmp_path / 'r.json', '--rope-scaling', *RULES) == 0
    row, = rows_of(tmp_path / 'r.json')
    assert row['rope_scaling'] is None
    assert capsys.readouterr().out.splitlines()[1:] == [f'{source}  {row["top1"]:.2f}']


def test_other_weights_are_asked_anew_for_rules(data, tmp_path):
    file = tmp_path / 'r.json'
    for size, kwargs in (('96', dict(rope_encoding='none')), ('72', {})):
        source = save(tmp_path / 'w.pth', 'vit_tiny_rope_mixed', 48, model_kwargs=kwargs)
        assert sweep(data, source, '--sizes', size, '--results', file, '--rope-scaling', 'yarn') == 0
    assert [(row['height'], row['rope_scaling']) for row in rows_of(file)] == [(96, None), (72, 'yarn')]


def test_a_complete_run_with_rules_loads_nothing(compared, data, monkeypatch, capsys):
    mixed, ape, folder, out = compared
    before = (folder / 'r.json').read_bytes()
    monkeypatch.setattr(timm, 'create_model', None)
    assert sweep(data, ape, mixed, '--sizes', '96', '--results', folder / 'r.json', '--rope-scaling', 'yarn') == 0
    words = [line.rsplit(maxsplit=1)[0] for line in capsys.readouterr().out.splitlines()]
    assert words == ['top-1, %', ape, f'{mixed} [yarn]']
    assert (folder / 'r.json').read_bytes() == before


def test_a_rerun_adds_rules_to_results_of_before_there_were_any(data, tmp_path, monkeypatch):
    file, table, built = tmp_path / 'r.json', tmp_path / 'r.csv', []
    mixed, ape = (save(tmp_path / f'{name}.pth', name, 48) for name in ('vit_tiny_rope_mixed', 'vit_tiny_ape'))
    assert sweep(data, mixed, ape, '--sizes', '96', '--results', file) == 0
    content = json.loads(file.read_text())
    for row in content['results']:
        del row['rope_scaling'], row['takes_rules']
    assert content['format'] == 'timm_rope sweep 1', 'as before'
    file.write_text(json.dumps(content))
    table.write_text('model,height,width,top1,top5,right_top1,right_top5,images,images_per_second,crop_pct,'
                     'interpolation,parameters\n')
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: built.append(1) or create(*args, **kwargs))
    args = (data, mixed, ape, '--sizes', '96', '--results', file, '--csv', table)
    assert sweep(*args) == 0
    assert json.loads(file.read_text()) == content and not built
    assert sweep(*args, '--rope-scaling', 'yarn') == 0
    after = json.loads(file.read_text())
    assert after['results'][:2] == content['results'], 'the baseline is not evaluated again'
    row, = after['results'][2:]
    assert (row['model'], row['rope_scaling']) == (mixed, 'yarn')
    # versions of before there were rules tell rows by model and size alone, and refuse another format
    assert after['format'] == 'timm_rope sweep 2'
    assert len(table.read_text().splitlines()) == 3
