"""transformers: the TimmWrapper classes, TimmBackbone, the image classification pipeline and Trainer."""
import json

import pytest
import torch
from backbones import FAMILIES, assert_learns, build, frequencies, image, loud
from timm.models import save_for_hf

pytest.importorskip('transformers', minversion='4.48')  # the first with TimmWrapper
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

SIZES = {'vit': [(32, 32), (48, 24)], 'swin': [(64, 64), (96, 160)]}


def wrapped(family, **kwargs):
    """A classifier of three classes made from a config, with loud weights."""
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    config = TimmWrapperConfig(architecture=name, model_args={**options, **kwargs}, num_labels=3)
    return loud(TimmWrapperForImageClassification(config))


def saved(model, folder, family):
    """A folder as timm writes it, with the number of classes told once, as transformers wants it."""
    save_for_hf(model, folder, model_args=FAMILIES[family][1])
    config = json.loads((folder / 'config.json').read_text())
    config['model_args'].pop('num_classes', None)  # timm 1.0.31 writes it twice: a TypeError for each of its models
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_a_folder_of_timm_is_loaded(family, tmp_path):
    model = build(family, num_classes=3)
    folder = saved(model, tmp_path, family)
    classifier = AutoModelForImageClassification.from_pretrained(folder).eval()
    backbone = AutoModel.from_pretrained(folder).eval()
    for size in SIZES[family]:
        x = image(*size)
        assert torch.equal(classifier(x).logits, model(x))
        assert torch.equal(backbone(x).last_hidden_state, model.forward_features(x))
    assert AutoImageProcessor.from_pretrained(folder).data_config['mean'] == model.pretrained_cfg['mean']


@torch.no_grad()
def test_hidden_states():
    model, x = wrapped('vit'), image(48, 24)
    found = model(x, output_hidden_states=[0, 2])
    expected = model.timm_model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert all(map(torch.equal, found.hidden_states, expected)) and torch.equal(found.logits, model(x).logits)


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_saved_and_loaded_by_transformers(family, tmp_path):
    model, x = wrapped(family), image(*SIZES[family][1])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(x).logits, model(x).logits)
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert all(p.dtype == torch.float32 for p in frequencies(half).values()), 'frequencies stay exact'
    assert torch.allclose(half(x).logits.float(), model(x).logits, atol=0.1)
    other = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert other(x).logits.shape == (2, 7)


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_backbone(family):
    indices, size = ([0, 2], (64, 48)) if family == 'vit' else ([1, 3], (64, 96))
    config = TimmBackboneConfig(backbone=FAMILIES[family][0], use_pretrained_backbone=False, out_indices=indices)
    model = AutoBackbone.from_config(config).eval()
    assert model.channels == ([192, 192] if family == 'vit' else [192, 768])
    maps = model(image(*size)).feature_maps
    assert all(map(torch.equal, maps, model._backbone(image(*size))))
    # TimmBackbone passes on what timm gives: maps of any Swin have their channels last
    shapes = [(192, 4, 3), (192, 4, 3)] if family == 'vit' else [(8, 12, 192), (2, 3, 768)]
    assert [tuple(y.shape[1:]) for y in maps] == shapes


class Images(torch.utils.data.Dataset):
    def __init__(self, size):
        self.images = image(*size, batch=8)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return dict(pixel_values=self.images[i], labels=i % 3)


@pytest.mark.parametrize('family,checkpointing', [('vit', False), ('vit', True), ('swin', False)])
def test_two_steps_of_trainer(family, checkpointing, tmp_path):
    model = wrapped(family)
    before = {name: p.detach().clone() for name, p in frequencies(model).items()}
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        gradient_checkpointing=checkpointing, save_strategy='steps', save_steps=2, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=Images(SIZES[family][1]), eval_dataset=Images(SIZES[family][0]))
    assert trainer.train().training_loss > 0
    after = frequencies(model)
    assert after and all(not torch.equal(p, before[name]) for name, p in after.items())
    measured = trainer.evaluate()['eval_loss']
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / 'checkpoint-2')
    again = Trainer(loaded, arguments, eval_dataset=Images(SIZES[family][0])).evaluate()['eval_loss']
    assert abs(measured - again) < 1e-5


def test_the_loss_reaches_the_frequencies():
    model = wrapped('vit').train()
    assert_learns(model, model(image(32, 48), labels=torch.tensor([0, 2])).loss)


def test_upernet_on_a_vit_takes_images_of_any_size():
    # on timm's own ViT: "Input height doesn't match model"; on any Swin: channels last
    backbone = TimmBackboneConfig(
        backbone=FAMILIES['vit'][0], use_pretrained_backbone=False, out_indices=[2, 5, 8, 11])
    torch.manual_seed(0)
    model = loud(UperNetForSemanticSegmentation(UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=192, auxiliary_channels=8, num_labels=3)))
    for size in ((64, 64), (64, 96)):
        assert_learns(model.train(), model(image(*size), labels=torch.randint(3, (2, *size))).loss)
        assert model.eval()(image(*size)).logits.shape == (2, 3, *size)
