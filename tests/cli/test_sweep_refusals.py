"""Bad input of `python -m timm_rope sweep`: the reason in one line, nothing is evaluated and nothing written."""
import os
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from sweeping import SPHERICAL, make, save, sweep

from timm_rope.cli._models import load, parse_source


class Trap:
    def __reduce__(self):
        return os.system, ('touch trapped',)


@pytest.fixture
def bad(data, tmp_path, monkeypatch):
    """A folder with all kinds of things that do not fit; also the working directory."""
    monkeypatch.chdir(tmp_path)
    with_images = ('one/n0', 'three/n0', 'three/n1', 'three/n2', 'trained/train/n0', 'trained/train/n1')
    for folder in ('empty', 'bare', *with_images):
        Path(folder).mkdir(parents=True)
    for folder in with_images:
        Image.new('RGB', (50, 50)).save(f'{folder}/0.png')
    save('good.pth', SPHERICAL, 48)
    save('liere.pth', 'vit_tiny_rope_liere', 48)
    Path('trap.pth').write_bytes(pickle.dumps({'state_dict': Trap()}))
    Path('text.pth').write_text('no weights')
    torch.save({'state_dict': make(SPHERICAL, 48, rope_order='xy').state_dict()}, 'order.pth')
    Path('there.csv').write_text('a,b\n')
    Image.new('RGB', (5, 5)).save('there.png')
    return data


@pytest.mark.parametrize('args, said', [
    (['nowhere', 'GOOD'], 'nowhere is no folder'),
    (['empty', 'GOOD'], 'empty holds no images'),
    (['one', 'GOOD'], "a single class, 'n0'"),
    (['three', 'GOOD'], 'has 7 classes, three has 3'),
    (['trained', 'GOOD'], 'trained holds train and no val or validation: name the folder'),
    (['DATA', 'GOOD', '--sizes', '48', '50'], 'at 50x50: img_size must be a multiple of the patch 8x8'),
    (['DATA', 'GOOD', 'vit_tiny_rope_sferical=good.pth'], "nearest name is 'vit_tiny_rope_spherical'"),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical.best=good.pth'], 'best'),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical'], "no weights of 'vit_tiny_rope_spherical' are published"),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical=none.pth'], 'There is no weight file none.pth'),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical='], 'the checkpoint after = is empty'),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical=empty'], 'is a folder; one of save_for_hf is named local-dir:'),
    (['DATA', 'GOOD', 'vit_tiny_rope_mixed=good.pth'], "weights of 'vit_tiny_rope_spherical', not of"),
    (['DATA', 'GOOD', 'good.pth'], 'NAME=good.pth'),
    (['DATA', 'GOOD', 'local-dir:bare'], 'bare must hold one weight file'),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical=trap.pth'], 'trap.pth is refused'),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical=text.pth'], 'is no weight file'),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical=order.pth', '--model-kwargs', 'patch_size=8', 'embed_dim=24', 'depth=2',
      'num_heads=2'], 'order'),
    (['DATA', 'GOOD', '--use-ema'], 'holds no averaged (EMA) weights'),
    (['DATA', 'GOOD', '--crop-pct', '0'], '--crop-pct must be above 0 and at most 1, got 0.0'),
    (['DATA', 'GOOD', '--crop-pct', 'nan'], '--crop-pct must be'),
    (['DATA', 'GOOD', '--model-kwargs', 'num_classes=3'], 'it is that of the weights'),
    (['DATA', 'GOOD', '--model-kwargs', 'rope_wings=3'], "takes no option 'wings'"),
    (['DATA', 'GOOD', 'vit_tiny_rope_liere=liere.pth', '--rope-scaling', 'extrapolate', 'ntk+log_n'],
     "vit_tiny_rope_liere=liere.pth [ntk+log_n] at 48x48: scaling must be one of 'extrapolate', 'interpolate' for"),
    (['DATA', 'GOOD', '--rope-scaling', 'yarn', '--model-kwargs', 'rope_scaling=yarn'],
     '--rope-scaling and --model-kwargs rope_scaling contradict each other'),
    (['DATA', 'GOOD', '--rope-scaling', 'yarn', '--model-kwargs', 'rope_log_n=True'],
     '--rope-scaling and --model-kwargs rope_log_n contradict each other'),
    (['DATA', 'GOOD', '--device', 'toaster'], 'toaster'),
    (['DATA', 'GOOD', '--csv', 'there.csv'], 'there.csv is no table of sweep'),
    (['DATA', 'GOOD', '--csv', 'no/r.csv'], '--csv must be a file *.csv in a folder'),
    (['DATA', 'GOOD', '--plot', 'r.jpg'], '--plot must be a file *.png'),
    (['DATA', 'GOOD', '--plot', 'there.png'], 'there.png is no plot of sweep'),
])
def test_refused(args, said, bad, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path().rglob('*')}
    replaced = [{'DATA': str(bad), 'GOOD': f'{SPHERICAL}=good.pth'}.get(arg, arg) for arg in args]
    if '--sizes' not in args:
        replaced += ['--sizes', '48']
    assert sweep(*replaced, '--results', 'r.json') == 2
    out, err = capsys.readouterr()
    assert said in err and out == '' and 'img/s' not in err, err
    assert {path: path.stat().st_mtime_ns for path in Path().rglob('*')} == before


@pytest.mark.parametrize('args, said', [
    (['--sizes', '48', '0'], "N or HEIGHTxWIDTH in pixels, got '0'"), (['--sizes', '48,64'], "got '48,64'"),
    (['--sizes', '-48'], '--sizes'), (['-b', '0'], 'integer of at least 1'), (['-b', 'x'], "got 'x'"),
    (['--amp-dtype', 'float8'], 'float8'), (['--rope-scaling'], 'expected at least one argument'),
    (['--rope-scaling', 'yarn', 'linear'], "one of extrapolate, interpolate, ntk, yarn, with or without +log_n, got "),
    (['--rope-scaling', 'yarn+log_n+log_n'], "got 'yarn+log_n+log_n'"), (['--rope-scaling', '+log_n'], "got '+log_n'")])
def test_refused_by_the_parser(args, said, data, spherical, capsys):
    with pytest.raises(SystemExit, match='2'):
        sweep(data, spherical, *args)
    assert said in capsys.readouterr().err


def test_logits_that_are_not_finite_are_no_result(data, tmp_path, capsys):
    source = save(tmp_path / 'w.pth', SPHERICAL, 48)
    checkpoint = torch.load(tmp_path / 'w.pth', weights_only=False)
    checkpoint['state_dict']['head.bias'][0] = float('nan')
    torch.save(checkpoint, tmp_path / 'w.pth')
    assert sweep(data, source, '--sizes', '48', '--results', tmp_path / 'r.json') == 1
    assert '56 logits are not finite' in capsys.readouterr().err
    assert not (tmp_path / 'r.json').exists()


def test_a_checkpoint_cannot_ask_for_other_weights(data, tmp_path):
    source = save(tmp_path / 'w.pth', SPHERICAL, 48, model_kwargs={})
    checkpoint = torch.load(tmp_path / 'w.pth', weights_only=False)
    checkpoint['args'].model_kwargs.update(
        pretrained=True, pretrained_cfg=dict(file='/etc/passwd'), checkpoint_path='/etc/passwd', rope_warm_start=True)
    torch.save(checkpoint, tmp_path / 'w.pth')
    loaded = load(parse_source(source), {}, False).model
    assert torch.equal(loaded.head.weight, checkpoint['state_dict']['head.weight'])
