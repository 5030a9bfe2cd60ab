"""`python -m timm_rope convert`: what it says, `--check`, and that a folder is whole or not there at all."""
import hashlib
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from converting import CASES, SIZES, load, naver, refused, save_torch, snapshot
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save, save_file

import timm_rope.cli.convert.command as command
from timm_rope.cli.convert.hub_folder import CheckFailed
from timm_rope.cli.convert.originals import _resized

# --

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path / 'work'


# -- what it says

def test_card(convert):
    name = 'a |`<b>` [x](y)\n# heading.pth'
    save_torch(CASES['spiral'][0], name)
    status, out, _ = convert(name, 'my_model')
    card = ModelCard.load('my_model/README.md')
    assert card.data.library_name == 'timm' and card.data.license is None
    assert {'timm', 'timm_rope', 'image-classification'} <= set(card.data.tags)
    assert card.data.pipeline_tag == 'image-classification'
    assert hashlib.sha256(Path(name).read_bytes()).hexdigest() in card.text
    assert name.replace('\n', ' ') in card.text.replace('\\', ''), 'on one line'
    assert '# my_model' in card.text.replace('\\', '') and '\n# heading' not in card.text and '<b>' not in card.text
    for said in ('Spiral RoPE', 'directions=4', 'averaged', '4 x 4 patches', '424,197', 'blocks.*.attn.rope.freqs',
                 "timm.create_model('hf-hub:<you>/<name>', pretrained=True)", "'local-dir:"):
        assert said in card.text.replace('\\', ''), said
    assert status == 0 and 'averaged' in out and out.count('blocks.*.attn.rope.freqs') == 1


def test_parameters_and_averages_of_the_card(convert):
    checkpoint = {**naver(), 'model_ema': naver(seed=1)['model']}
    _, out, _ = convert(save_torch(checkpoint), 'out')
    assert 'the raw ones' in out and torch.equal(load().head.weight, checkpoint['model']['head.weight'])
    assert f'{sum(p.numel() for p in load().parameters()):,}' in Path('out/README.md').read_text()


def test_published_weights_keep_their_licence(convert):
    source = save_torch(CASES['ape'][0])
    assert convert(source, 'out', '--model', 'vit_small_ape.naver_in1k')[0] == 0
    cfg = json.loads(Path('out/config.json').read_text())['pretrained_cfg']
    assert cfg['license'] == 'bsd-3-clause' and cfg['tag'] == 'naver_in1k' and 'hf_hub_id' not in cfg
    assert ModelCard.load('out/README.md').data.license == 'bsd-3-clause'


def test_from_the_hub(convert, monkeypatch, tmp_path):
    """Published repositories tell what their files do not."""
    weights = CASES['ape'][0]['model']
    with HubServer() as server:
        hub = server.serve(monkeypatch, tmp_path / 'cache')
        hub.add('naver-ai/deit_small_patch16_LS', {'model.safetensors': save(weights), 'config.json': b'{}'})
        hub.add('me/mine', {'sub/w.safetensors': save(naver()['model'])})
        assert convert('hf-hub:naver-ai/deit_small_patch16_LS', 'out')[0] == 0
        hub.add('me/damaged', {'model.safetensors': save(weights), 'config.json': b'{"architecture": "vit_tiny"}'})
        hub.fault('GET /me/damaged/resolve', body=lambda data: data.replace(b'tiny', b'base'))
        refused(convert, ['config.json of me/damaged', 'corrupt'], 'hf-hub:me/damaged', 'other')
        refused(convert, ['me/mine', 'no file'], 'hf-hub:me/mine', 'other')
        assert convert('hf-hub:me/mine@main', 'mine', '--filename', 'sub/w.safetensors')[0] == 0
    config = json.loads(Path('out/config.json').read_text())
    assert config['architecture'] == 'vit_small_ape' and config['pretrained_cfg']['license'] == 'bsd-3-clause'
    assert 'naver-ai/deit_small_patch16_LS' in Path('out/README.md').read_text()
    assert torch.equal(load().head.weight, weights['head.weight'])
    assert 'hf-hub:me/mine@main, w.safetensors' in Path('mine/README.md').read_text()
    assert ModelCard.load('mine/README.md').data.license is None


# -- --check

@pytest.mark.parametrize('name', ['mixed', 'mixed_ape', 'axial', 'axial_ape', 'ape'])
def test_check_against_timm(name, convert):
    checkpoint, args, _, _ = CASES[name]
    status, out, _ = convert(save_torch(checkpoint), 'out', '--check', *args)
    lines = [line for line in out.splitlines() if "logits differ from timm's Eva" in line]
    assert status == 0 and len(lines) == 2 and '32 x 32' in lines[0] and '48 x 40' in lines[1]
    assert all(float(line.split(' by ')[1].split()[0]) < 1e-5 for line in lines)
    assert 'much of the code' not in out


@pytest.mark.parametrize('other', [0, 1])
def test_check_compares_the_weights_that_are_used(other, convert):
    theirs = [timm.create_model('deit3_small_patch16_224', **SIZES).state_dict() for _ in range(2)]
    source = save_torch({'state_dict': theirs[other], 'state_dict_ema': theirs[1 - other]})
    status, _, err = convert(source, 'out', '--check', '--model-args', 'num_heads=2')
    assert status == 0, err
    assert torch.equal(load().head.weight, theirs[1 - other]['head.weight'])


@pytest.mark.parametrize('name', ['spiral', 'liere, one layer'])
def test_check_says_what_it_did_not_check(name, convert):
    checkpoint, args, _, _ = CASES[name]
    _, out, _ = convert(save_torch(checkpoint), 'out', '--check', *args)
    assert 'only that what was written is what was read' in out and 'logits' not in out


@pytest.mark.parametrize('key,change', [
    ('blocks.1.attn.proj.weight', lambda t: 1.001 * t), ('rope.freqs', lambda t: t.flip(0)),
    ('head.bias', lambda t: t * float('nan')), ('pos_embed', lambda t: t.flip(1))])
def test_check_finds_a_wrong_conversion(key, change, convert, monkeypatch):
    fit = command.fit
    monkeypatch.setattr(command, 'fit', lambda *args: {k: change(v) if k == key else v for k, v in fit(*args).items()})
    source = save_torch(CASES['mixed_ape'][0])
    refused(convert, ['logits differ', 'nothing was written'], source, 'out', '--check', status=1)
    assert convert(source, 'out')[0] == 0, 'only --check can find it'


def test_an_embedding_is_resized_as_the_original_does():
    table = torch.randn(1, 17, 3)
    got = _resized(table, (4, 4), (6, 5), 1, False)
    image = table[0, 1:].T.view(1, 3, 4, 4)
    expected = F.interpolate(image, (6, 5), mode='bicubic', align_corners=False, antialias=False)
    assert torch.equal(got[:, :1], table[:, :1]) and torch.equal(got[0, 1:].T.view(1, 3, 6, 5), expected)


def damaged(save_for_hf, change):
    def save(model, folder, **kwargs):
        save_for_hf(model, folder, **kwargs)
        change(Path(folder))
    return save


def flip(folder):
    data = bytearray((folder / 'model.safetensors').read_bytes())
    data[-1] ^= 1
    (folder / 'model.safetensors').write_bytes(data)


def other_args(folder):
    config = json.loads((folder / 'config.json').read_text())
    config['model_args']['depth'] = 3
    (folder / 'config.json').write_text(json.dumps(config))


def less(folder):
    tensors = load_file(folder / 'model.safetensors')
    tensors.pop('head.bias')
    save_file(tensors, folder / 'model.safetensors')


@pytest.mark.parametrize('change,words', [
    (flip, ['not read back']), (other_args, ['config.json', 'blocks.2']), (less, ['other keys', 'head.bias'])])
def test_what_was_written_is_read_back(change, words, convert, monkeypatch):
    monkeypatch.setattr(timm.models, 'save_for_hf', damaged(timm.models.save_for_hf, change))
    refused(convert, words, save_torch(naver()), 'out', status=1)


def test_nan_weights_are_equal_to_themselves(convert):
    model = naver()['model']
    model['head.bias'][0] = float('nan')
    assert convert(save_torch({'model': model}), 'out')[0] == 0
    assert load().head.bias.isnan().sum() == 1


# -- whole or not at all

@pytest.fixture(params=['new', 'empty', 'replaced'])
def target(request, convert):
    """A target in one of the states it may have, and the arguments that allow it."""
    if request.param == 'empty':
        Path('out').mkdir()
    if request.param == 'replaced':
        convert(save_torch(naver(seed=5), 'old.pth'), 'out')
        Path('out/notes.txt').write_text('mine')
    return ['--force'] if request.param == 'replaced' else []


def fail(*args, **kwargs):
    raise OSError(28, 'No space left on device')


@pytest.mark.parametrize('step', ['write_card', 'verify', 'timm.models.save_for_hf'])
def test_failures_leave_everything_as_it_was(step, target, convert, monkeypatch):
    source = save_torch(naver())
    with monkeypatch.context() as patch:
        patch.setattr(step if '.' in step else f'timm_rope.cli.convert.command.{step}', fail)
        refused(convert, ['No space left'], source, 'out', *target)
    assert convert(source, 'out', *target)[0] == 0
    assert torch.equal(load().head.weight, naver()['model']['head.weight'])
    assert {p.name for p in Path('out').iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    assert not list(Path('.').glob('.out*')), 'nothing is left beside it'


def test_a_full_disk(target, convert):
    """What safetensors raises then is no OSError; a limit on the size of files stands in for the disk."""
    source = save_torch(naver())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        refused(convert, ['could not be written'], source, 'out', *target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_cleans_up(number, target, convert, monkeypatch):
    source = save_torch(naver())
    before, handler = snapshot(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command, 'write_card', lambda *args: os.kill(os.getpid(), number))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        convert(source, 'out', *target)
    assert snapshot() == before and signal.getsignal(signal.SIGTERM) == handler


def test_the_old_folder_comes_back_if_it_cannot_be_replaced(convert, monkeypatch):
    convert(save_torch(naver(seed=5), 'old.pth'), 'out')
    source, rename = save_torch(naver()), Path.rename

    def stubborn(self, new):
        if self.name.endswith('.partial'):
            raise PermissionError(13, 'not today')
        return rename(self, new)

    monkeypatch.setattr(Path, 'rename', stubborn)
    refused(convert, ['not today'], source, 'out', '--force')


def test_targets_that_are_refused(convert):
    source = save_torch(naver())
    convert(source, 'out')
    refused(convert, ['must not exist or be empty', '--force'], source, 'out')
    Path('mine').mkdir()
    Path('mine/thesis.txt').write_text('dear')
    refused(convert, ['not replaced', 'config.json'], source, 'mine', '--force')
    refused(convert, ['is a file'], source, source)
    refused(convert, ['existing folder'], source, 'no/out')
    refused(convert, ['folder of the weights'], 'out', 'out', '--force')


def test_leftovers_and_links(convert):
    Path('.out.00000000.partial').mkdir()
    Path('.out.00000000.partial/model.safetensors').write_text('half')
    Path('elsewhere').mkdir()
    Path('link').symlink_to('elsewhere')
    source = save_torch(naver())
    assert convert(source, 'out')[0] == 0 and convert(source, 'link')[0] == 0
    assert Path('link').is_symlink() and (Path('elsewhere') / 'config.json').is_file()
    assert Path('.out.00000000.partial/model.safetensors').read_text() == 'half'
    modes = {p.stat().st_mode & 0o777 for p in Path('out').iterdir()}
    assert len(modes) == 1 and Path('out').stat().st_mode & 0o666 in modes


def test_in_python(folder):
    lines = []
    source = save_torch(naver())
    out = command.convert(source, folder / 'out', img_size=64, model_args=dict(norm_eps=1e-5), say=lines.append)
    assert out == folder / 'out' and load(out).norm.eps == 1e-5 and any('verified' in line for line in lines)
    with pytest.raises(ValueError, match='img_size must be an integer of at least 1, got True'):
        command.convert('weights.pth', 'other', img_size=True)
    assert not issubclass(CheckFailed, (ValueError, RuntimeError, OSError)), 'it has an exit status of its own'
