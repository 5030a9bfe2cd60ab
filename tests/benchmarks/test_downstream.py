"""Detection and segmentation on our backbones: scenes, measures, folders, and a command that loses nothing."""
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from comparing import without_seconds

pytest.importorskip('torchvision', reason="torchvision is not installed: pip install 'timm_rope[downstream]'")
pytest.importorskip('pycocotools', reason="pycocotools is not installed: pip install 'timm_rope[downstream]'")
pytest.importorskip('segmentation_models_pytorch', minversion='0.5', reason="pip install 'timm_rope[downstream]'")
import downstream
from comparison import budget, jobs, training
from comparison.recipe import Recipe
from downstream_parts import models, opening, scenes
from downstream_parts.measures import Intersections, average_precision
from PIL import Image

from timm_rope.cli._training import set_up

CPU = torch.device('cpu')
TINY = Recipe(sizes=(32, 64), patch_size=8, embed_dim=24, num_heads=1, depth=3, steps=10, batch_size=2,
              learning_rate=2e-3, test_images=4)
DATA_DIR_TASKS = {'coco': 'COCO: annotations', 'ade20k': 'ADE20k: images/training'}


@pytest.fixture(autouse=True)
def tiny_recipes(monkeypatch):
    for scale in ('small', 'large'):
        monkeypatch.setitem(downstream.RECIPES, scale, dict.fromkeys(opening.RECIPES['small'], TINY))
    yield
    opening.open_task.cache_clear()


def command(folder, *args, tasks=('detection',), methods=('mixed_ape',), seeds=1):
    return downstream.main([str(folder), '--device', 'cpu', '--workers', '1', '--tasks', *tasks, '--methods', *methods,
                            '--seeds', str(seeds), *map(str, args)])


def content_of(folder):
    return json.loads((folder / 'downstream.json').read_text())


# -- scenes

def placed(kind, y=.5, x=.5, radius=.25, angle=0.):
    return torch.tensor([[[kind, y, x, radius, angle, 5., 5., 5., kind]]])


@pytest.mark.parametrize('kind, area', [
    ('triangle', 3 ** .5 * 3 / 4), ('square', 2.), ('disc', torch.pi), ('ring', torch.pi * (1 - scenes.HOLE ** 2))])
@pytest.mark.parametrize('angle', [0., .7])
def test_shapes_have_their_area_box_and_label(kind, area, angle):
    number = scenes.CLASSES.index(kind)
    drawn = scenes.render(placed(number, y=.4, angle=angle), 256, 1., 0)
    inside = drawn.labels[0] == number + 1
    assert inside.sum() == pytest.approx(area * (.25 * 256) ** 2, rel=.01) and drawn.labels.max() == number + 1
    assert (drawn.images[0, :, inside] > 4).float().mean() > .97
    assert (drawn.images[0, :, ~inside] < 2).float().mean() > .97
    y, x = inside.nonzero(as_tuple=True)
    assert drawn.boxes[0].tolist() == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
    assert drawn.classes[0].tolist() == [number]
    if kind in ('disc', 'ring'):
        assert drawn.boxes[0][0].tolist() == pytest.approx([64, 38.4, 192, 166.4], abs=1)


def test_larger_images_show_the_same_enlarged_or_more():
    scene = scenes.draw_scenes(3, 1., 5)
    small, large = (scenes.render(scene, size, 1., 0) for size in (64, 128))
    assert all(torch.allclose(2 * a, b, atol=2.1) for a, b in zip(small.boxes, large.boxes))
    assert torch.equal(torch.cat(small.classes), torch.cat(large.classes))
    more = scenes.draw_scenes(400, 2., 5)
    scene = scenes.draw_scenes(400, 1., 5)
    assert more.shape[1] == 4 * scene.shape[1]
    shown = [s[s[..., 0] >= 0] for s in (scene, more)]
    radii = [s[:, 3] for s in shown]
    # larger shapes find less room where much is taken
    assert abs(radii[0].mean() / radii[1].mean() - 1) < .2 and len(radii[1]) > 2.5 * len(radii[0])
    for some, extent in zip(shown, (1., 2.)):
        assert (some[:, 1:3] >= some[:, 3:4] - 1e-5).all() and (some[:, 1:3] <= extent - some[:, 3:4] + 1e-5).all()
    assert not torch.equal(scene, scenes.draw_scenes(400, 1., 6)) and len(set(scene[..., 0].unique().tolist())) == 5


def test_a_shape_in_front_hides_those_behind():
    behind, front = placed(2, radius=.3), placed(1, radius=.1, angle=torch.pi / 4)
    drawn = scenes.render(torch.cat([behind, front], 1), 128, 1., 0)
    assert drawn.labels[0, 64, 64] == 2 and drawn.labels[0, 64, 35] == 3 and drawn.classes[0].tolist() == [2, 1]
    hidden = scenes.render(torch.cat([front, behind], 1), 128, 1., 0)
    assert hidden.classes[0].tolist() == [2], 'what is not seen at all is not to be found'


# -- scenes in which classes are a matter of places

@pytest.mark.parametrize('extent', [1., 2.])
def test_a_disc_has_the_class_of_the_nearest_mark_which_is_far(extent):
    size = round(96 * extent)
    drawn = scenes.render(scenes.draw_placed(8, extent, 1), size, extent, 1, shaded=False)
    shown = set()
    for image, labels, found, classes in zip(*drawn):
        # by what can be seen: pixels of the colours of marks
        marks = [(image == torch.tensor(colour)[:, None, None]).all(0).nonzero() for colour in scenes.COLOURS.values()]
        assert sum(len(mark) > 0 for mark in marks) == (2 if extent == 1 else 3) and (labels >= 0).all()
        for (x0, y0, x1, y1), number in zip(found.tolist(), classes.tolist()):
            middle = torch.tensor([y0 + y1, x0 + x1]) / 2
            away = [(mark + .5 - middle).norm(dim=1).min().item() if len(mark) else size for mark in marks]
            assert away[number] == min(away) > 96 * (scenes.NEAR - scenes.MARK) - 2
            assert sorted(away)[1] - min(away) > 96 * (scenes.MARGIN - .3 * scenes.MARK) - 2
            assert (labels[round(middle[0].item()), round(middle[1].item())] == number + 1) and x1 - x0 < 18
            assert (image[:, round(middle[0].item()), round(middle[1].item())] == 1.5).all(), 'all look alike'
            shown.add(number)
    assert shown == {0, 1, 2}


def test_where_a_disc_or_a_mark_lies_alone_does_not_tell_the_class():
    scene = scenes.draw_placed(4000, 1., 2)
    disc = scene[scene[..., 8] >= 0]
    quarter = (disc[:, 1] > .5) * 2 + (disc[:, 2] > .5)
    for number in range(4):
        shares = torch.bincount(disc[quarter == number, 8].long()) / (quarter == number).sum()
        assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=.05)
    # dealing colours out otherwise, all else the same, exchanges the classes
    marks = scene[:, :2]
    reds = (marks[..., 5:8] == torch.tensor(scenes.COLOURS['red'])).all(2)
    assert reds.float().mean(0).tolist() == pytest.approx([1 / 3] * 2, abs=.03) and reds.sum(1).max() == 1


def test_a_patch_does_not_see_in_the_background_where_it_is():
    for shaded in (False, True):
        image = scenes.render(placed(-1), 96, 1., 5, shaded).images[0]
        halves = image.mean(1).unflatten(1, (2, 48)).mean(2).T
        assert torch.allclose(*halves, atol=.02) == (not shaded)


def test_from_a_disc_the_convolutions_of_a_detector_see_no_mark():
    recipe = replace(TINY, sizes=(96, 192))
    model = opening.open_task('detection_placed', None, 'cpu', 0).build('none', recipe, 0)
    maps = torch.rand(1, recipe.embed_dim, 12, 12, requires_grad=True)
    head = model.head.classification_head
    for part in (model.backbone, head):  # norms are of the whole map, and see no places
        for module in part.modules():
            for name, child in module.named_children():
                if isinstance(child, torch.nn.GroupNorm):
                    setattr(module, name, torch.nn.Identity())
    scale, = model.backbone.scales
    logits = head([scale(maps)]).view(24, 24, 3)
    for cell in (11, 12):
        seen, = torch.autograd.grad(logits[cell, cell].sum(), maps, retain_graph=True)
        tokens = seen.abs().sum(1)[0].nonzero()
        middle = 4 * (cell + .5)
        reach = max(middle - 8 * tokens.min().item(), 8 * (tokens.max().item() + 1) - middle)
        assert 8 <= reach < 24
        # a disc is in the middle of a cell but for 2 pixels; what is seen is a square
        assert 2 ** .5 * (reach + 2) + scenes.MARK * 96 < scenes.NEAR * 96


def test_beyond_a_patch_a_linear_segmenter_sees_nothing_but_by_attention():
    class Encoder(torch.nn.Module):
        feature_info = type('Info', (), dict(channels=lambda self: [12]))()

        def forward(self, x):
            return [torch.nn.functional.avg_pool2d(x, 8).repeat(1, 4, 1, 1)]

    model = models.LinearSegmenter(Encoder(), 8, 3)
    image = torch.rand(1, 3, 32, 48)
    before = model(image)
    image[..., 8:16, 24:32] = 0
    changed = (model(image) != before).any(1)[0]
    assert before.shape == (1, 3, 32, 48) and changed[8:16, 24:32].all() and changed.sum() == 64


# -- measures

def boxes(*rows, **more):
    values = torch.tensor([row[:5] for row in rows], dtype=torch.float64).reshape(-1, 5)
    scores = {'scores': torch.tensor([row[5] for row in rows])} if rows and len(rows[0]) > 5 else {}
    return dict(boxes=values[:, :4], labels=values[:, 4].long(), **scores, **more)


RIGHT = (0, 0, 10, 10, 0)


@pytest.mark.parametrize('found, right, ap, ap50', [
    ([boxes((*RIGHT, .9))], [boxes(RIGHT)], 100, 100),
    # IoU 0.8: right at 0.5 .. 0.8, seven of ten thresholds
    ([boxes((0, 0, 10, 8, 0, .9))], [boxes(RIGHT)], 70, 100),
    ([boxes((0, 0, 10, 4, 0, .9))], [boxes(RIGHT)], 0, 0),
    ([boxes((*RIGHT[:4], 1, .9))], [boxes(RIGHT)], 0, 0),  # another class
    ([boxes()], [boxes(RIGHT)], 0, 0),
    # a wrong one above the right one: precision 1/2 at all recalls; below it, none is lost
    ([boxes((20, 20, 30, 30, 0, .9), (*RIGHT, .8))], [boxes(RIGHT)], 50, 50),
    ([boxes((20, 20, 30, 30, 0, .7), (*RIGHT, .8))], [boxes(RIGHT)], 100, 100),
    # a second box on the same object is wrong, too
    ([boxes((*RIGHT, .9), (*RIGHT, .8)), boxes((*RIGHT, .7))], [boxes(RIGHT), boxes(RIGHT)],
     (51 + 50 * 2 / 3) / 1.01, (51 + 50 * 2 / 3) / 1.01),
    # one of two found: recalls up to 0.5 are 51 of 101
    ([boxes((*RIGHT, .9)), boxes()], [boxes(RIGHT), boxes(RIGHT)], 51 / 1.01, 51 / 1.01),
    # the mean over two classes
    ([boxes((*RIGHT, .9))], [boxes(RIGHT, (20, 20, 30, 30, 3))], 50, 50),
    # to find a crowd is neither right nor wrong
    ([boxes((*RIGHT, .8), (20, 20, 30, 30, 0, .9))],
     [boxes(RIGHT, (20, 20, 30, 30, 0), crowd=torch.tensor([0, 1]))], 100, 100),
])
def test_average_precision_of_cases_by_hand(found, right, ap, ap50):
    assert average_precision(found, right) == pytest.approx(dict(ap=ap, ap50=ap50), abs=1e-6)


def test_average_precision_without_anything_to_find():
    figures = average_precision([boxes((*RIGHT, .9))], [boxes()])
    assert all(value != value for value in figures.values())


def test_intersections_of_a_case_by_hand():
    counts = Intersections(4)
    counts.add(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, -100]]))
    counts.add(torch.tensor([[2, 0]]), torch.tensor([[0, 0]]))
    # class 0: 2 of 4, class 1: 1 of 2, class 2: 0 of 1, class 3 does not occur
    assert counts.mean() == pytest.approx(100 * (2 / 4 + 1 / 2 + 0) / 3)


# -- models

@pytest.mark.parametrize('name', list(opening.MADE_UP))
def test_models_are_those_of_the_method_at_any_size(name):
    task = opening.open_task(name, None, 'cpu', 0)
    for method in downstream.METHODS + downstream.MORE[-1:]:
        model = task.build(method, TINY, 0)
        vit = task.vit_of(model)
        assert len(vit.blocks) == TINY.depth and model.training
        assert (vit.pos_embed is not None) == method.endswith('ape')
        assert (vit.rope is None) == (method in ('ape', 'none'))
        assert vit.rope is None or method.startswith(vit.rope.name)
    model = task.build('mixed_ape', TINY, 0)
    decay = {id(p): group['weight_decay'] for group in set_up(model, 10, 1.)[0].param_groups for p in group['params']}
    vit = task.vit_of(model)
    assert decay[id(vit.rope.freqs)] == decay[id(vit.pos_embed)] == 0 and decay[id(vit.blocks[0].mlp.fc1.weight)] > 0
    images, targets = next(task.train_batches(0, 0, 1, 2, 32))
    loss = task.loss(model, images, targets)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in vit.blocks.parameters())


def test_every_map_of_a_detector_is_taught():
    model = opening.open_task('detection', None, 'cpu', 0).build('none', replace(TINY, sizes=(64, 128)), 0)
    for stride, half in ((4, 6.), (8, 12.), (16, 24.)):
        model.zero_grad()
        box = torch.tensor([[32 - half, 32 - half, 32 + half, 32 + half]])
        losses = model([torch.rand(3, 64, 64)], [dict(boxes=box, labels=torch.tensor([1]))])
        losses['bbox_ctrness'].backward()  # of points within boxes
        taught = [scale[-2].weight.grad for scale in model.backbone.scales]
        assert [grad is not None and bool(grad.any()) for grad in taught] == [stride == 2 ** (2 + i) for i in range(3)]


def test_batches_without_a_label_have_a_loss():
    logits = torch.rand(2, 3, 4, 4)
    assert training.loss_of(lambda x: x, logits, torch.full((2, 4, 4), -100)) == 0
    some = torch.full((2, 4, 4), -100)
    some[0, 1] = 2
    assert torch.allclose(training.loss_of(lambda x: x, logits, some), torch.nn.functional.cross_entropy(logits, some))


def test_the_pyramid_has_its_scales():
    class Body(torch.nn.Module):
        feature_info = type('Info', (), dict(channels=lambda self: [12]))()

        def forward(self, x):
            return [torch.ones(1, 12, 4, 6)]

    maps = models.SimplePyramid(Body(), 32, (4., 2., 1., .5))(torch.zeros(1, 3, 64, 96))
    assert [tuple(y.shape[1:]) for y in maps.values()] == [(32, 16, 24), (32, 8, 12), (32, 4, 6), (32, 2, 3)]


# -- the command

@pytest.mark.parametrize('tasks', [('detection', 'segmentation'), ('detection_placed', 'segmentation_placed')])
def test_both_are_trained_tested_shown_and_not_done_twice(tasks, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'out'
    assert command(folder, tasks=tasks, methods=('ape', 'mixed_ape')) == 0
    out = capsys.readouterr().out
    content = content_of(folder)
    assert content['finished'] and len(content['rows']) == 4 and content['machine']['torch'] == torch.__version__
    kinds = [(64, content, rule) for content in ('same', 'enlarged') for rule in ('extrapolate', 'interpolate')]
    for row in content['rows']:
        rotary = row['method'] != 'ape'
        assert [(t['size'], t['content'], t['rule']) for t in row['tests']] == (
            [(32, 'same', 'extrapolate'), *kinds] if rotary else
            [(32, 'same', None), (64, 'same', None), (64, 'enlarged', None)])
        assert [t['images'] for t in row['tests']] == [4] + [2] * (4 if rotary else 2)
    assert f'**{tasks[0]}**, AP' in out and f'**{tasks[1]}**, mIoU' in out and '| `mixed_ape` |' in out
    heads = ['32 px', '64 px', '64 px, `interpolate`', '64 px, enlarged', '64 px, enlarged, `interpolate`', 'seeds']
    assert f'|  | {" | ".join(heads)} |' in out
    assert (folder / 'figures.png').stat().st_size > 5000 and not os.listdir(folder / 'unfinished')
    monkeypatch.setattr(jobs, 'run', None)
    assert command(folder, tasks=tasks, methods=('ape', 'mixed_ape')) == 0


@pytest.mark.parametrize('name', ['detection', 'segmentation', 'detection_placed'])
def test_an_interruption_loses_nothing(name, tmp_path, monkeypatch, capsys):
    save, saved = training.Training.save, []

    def interrupt(self, path):
        save(self, path)
        saved.append(path)
        if len(saved) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(training.Training, 'save', interrupt)
        assert command(tmp_path, tasks=(name,)) == 130
    assert 'a rerun continues' in capsys.readouterr().err and os.listdir(tmp_path / 'unfinished')
    updates, update = [], training.Training.update
    monkeypatch.setattr(training.Training, 'update', lambda self, *batch: updates.append(1) or update(self, *batch))
    assert command(tmp_path, tasks=(name,)) == 0 and len(updates) == 6
    whole = training.run(opening.open_task(name, None, 'cpu', 0), 'mixed_ape', 0, TINY)
    assert without_seconds(content_of(tmp_path)['rows'][0]) == dict(task=name, **without_seconds(whole))


def test_a_budget_knows_what_a_run_takes(tmp_path):
    job = jobs.Job('segmentation', 'mixed', 0, TINY, 'cpu', tmp_path, None, 0, opener=opening.open_task)
    step, tests = budget.seconds_of(job)
    assert step > 0 and tests > 0


# -- folders

def make_coco(root):
    for split, count in (('train2017', 5), ('val2017', 3)):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            Image.effect_noise((40 + 8 * i, 30), 50).convert('RGB').save(root / split / f'{i}.jpg')
            images.append(dict(id=10 + i, file_name=f'{i}.jpg'))
            annotations += [
                dict(id=2 * i + 1, image_id=10 + i, category_id=7, bbox=[2, 3, 10, 12], iscrowd=0),
                dict(id=2 * i + 2, image_id=10 + i, category_id=90, bbox=[4, 5, 20, 20], iscrowd=int(i == 0))]
        (root / 'annotations').mkdir(exist_ok=True)
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(dict(
            images=images, annotations=annotations, categories=[dict(id=90), dict(id=7)])))
    return root


def make_ade(root):
    for part, count in (('training', 4), ('validation', 3)):
        for kind in ('images', 'annotations'):
            (root / kind / part).mkdir(parents=True)
        for i in range(count):
            Image.effect_noise((50, 40 + i), 50).convert('RGB').save(root / 'images' / part / f'{i}.jpg')
            Image.new('L', (50, 40 + i), i).save(root / 'annotations' / part / f'{i}.png')
    return root


MAKE = {'coco': make_coco, 'ade20k': make_ade}


@pytest.mark.parametrize('name', MAKE)
def test_a_folder_is_trained_on_and_tested_with(name, tmp_path):
    assert command(tmp_path / 'out', '--data-dir', MAKE[name](tmp_path / 'data'), tasks=(name,)) == 0
    row, = content_of(tmp_path / 'out')['rows']
    assert [(t['size'], t['content'], t['images']) for t in row['tests']] == [
        (32, 'enlarged', 3), (64, 'enlarged', 2), (64, 'enlarged', 2)]
    assert all(0 <= t['ap' if name == 'coco' else 'miou'] <= 100 for t in row['tests'])


def test_boxes_of_a_folder_turn_with_its_images(tmp_path):
    task = opening.open_task('coco', make_coco(tmp_path), 'cpu', 0)
    assert task.num_classes == 2 and task.train_count == 5
    for images, targets in task.train_batches(0, 0, 4, 2, 32):
        for image, target in zip(images, targets):
            width = image.shape[-1]
            crowd = len(target['labels']) == 1  # one of two was a crowd, which is no use in training
            assert target['labels'].tolist() == [0, 1][:2 - crowd]
            assert target['boxes'][0].tolist() in ([2, 3, 12, 15], [width - 12, 3, width - 2, 15])
    (images, targets), = task.test_batches(32, 3, 'enlarged', 32)
    assert sorted(int(t['crowd'].sum()) for t in targets) == [0, 0, 1]
    batches = [b[0][0] for b in task.train_batches(0, 0, 6, 2, 32)]
    again = [b[0][0] for b in task.train_batches(0, 4, 6, 2, 32)]
    assert all(map(torch.equal, batches[4:], again)), 'the same where it is taken up'


def test_labels_of_a_folder_count_from_one_and_none_does_not_count(tmp_path):
    task = opening.open_task('ade20k', make_ade(tmp_path), 'cpu', 0)
    assert task.num_classes == 150
    (images, labels), = task.test_batches(32, 3, 'enlarged', 32)
    assert images.shape == (3, 3, 32, 32) and sorted(x.unique().item() for x in labels) == [-100, 0, 1]
    (tmp_path / 'objectInfo150.txt').write_text('Idx Ratio Name\n1 .5 wall\n')
    assert task.num_classes == 1
    with pytest.raises(ValueError, match=r'has the label 2, there are 1 classes: list them in .*objectInfo150\.txt'):
        list(task.test_batches(32, 3, 'enlarged', 32))


# -- the lines for users

@pytest.mark.parametrize('number', [0, 1])
def test_the_lines_of_the_page_run(number, monkeypatch):
    page = (Path(__file__).parents[2] / 'benchmarks' / 'README.md').read_text()
    code = re.findall(r'test_downstream[^\n]*\n```python\n(.*?)```', page, flags=re.S)[number]
    # without weights, and an eighth of the size
    create, sizes = timm.create_model, {'512': '64', '1024': '128', '(32, 32)': '(4, 4)', '480, 640': '60, 80'}
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained, **kwargs: create(
        name.split('.')[0], embed_dim=24, num_heads=1, **kwargs))
    for before, after in sizes.items():
        assert before in code or before == '480, 640'
        code = code.replace(before, after)
    found = {}
    exec(code, found)
    vit = found['body'].model if number == 0 else found['vit']
    assert vit.rope.reference_grid.tolist() == [4, 4] and vit.rope.scaling == 'interpolate'
    assert [group['weight_decay'] for group in found['optimizer'].param_groups] == [0, .05]
    assert id(vit.rope.freqs) in {id(p) for p in found['optimizer'].param_groups[0]['params']}
    assert found['boxes'].shape[-1] == 4 if number == 0 else found['classes'].shape == (1, 128, 128)


# -- bad input

def spoil_coco(root, how):
    file = root / 'annotations' / 'instances_val2017.json'
    content = json.loads(file.read_text())
    if how == 'file':
        file.unlink()
    elif how == 'text':
        file.write_text('hello')
    elif how == 'keys':
        file.write_text(json.dumps({**content, 'annotations': [dict(bbox=[1, 2])]}))
    elif how == 'categories':
        file.write_text(json.dumps({**content, 'categories': [dict(id=7), dict(id=8), dict(id=90)]}))
    elif how == 'empty':
        file.write_text(json.dumps({**content, 'annotations': []}))
    else:
        (root / 'val2017').rename(root / 'other')


def spoil_ade(root, how):
    if how == 'folder':
        (root / 'annotations' / 'validation').rename(root / 'labels')
    elif how == 'label':
        (root / 'annotations' / 'training' / '1.png').unlink()
    else:
        for path in (root / 'images' / 'validation').iterdir():
            path.unlink()


@pytest.mark.parametrize('name, how, message', [
    ('coco', 'file', 'there is no annotations/instances_val*.json.'),
    ('coco', 'text', 'instances_val2017.json is no file of instances (JSONDecodeError'),
    ('coco', 'keys', 'instances_val2017.json is no file of instances ('),
    ('coco', 'categories', 'the categories of instances_val2017.json are not those of the images to train with.'),
    ('coco', 'empty', 'there are no images with annotations for val.'),
    ('coco', 'images', 'there is no val2017/0.jpg.'),
    ('ade20k', 'folder', 'there is no folder annotations/validation.'),
    ('ade20k', 'label', 'there is no annotations/training/1.png.'),
    ('ade20k', 'empty', 'there are no images with annotations for val.'),
])
def test_a_wrong_folder_is_one_sentence(name, how, message, tmp_path, capsys):
    folder = MAKE[name](tmp_path / 'data')
    {'coco': spoil_coco, 'ade20k': spoil_ade}[name](folder, how)
    assert command(tmp_path / 'out', '--data-dir', folder, tasks=(name,)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f'downstream: --data-dir {folder} is not laid out as {DATA_DIR_TASKS[name]}')
    assert message in said and '\n' not in said and os.listdir(tmp_path / 'out') == []


@pytest.mark.parametrize('name', DATA_DIR_TASKS)
def test_no_folder_is_one_sentence(name, tmp_path, capsys):
    assert command(tmp_path / 'out', tasks=(name,)) == 2
    assert f'the task {name} needs --data-dir, a folder laid out as {DATA_DIR_TASKS[name]}' in capsys.readouterr().err
    assert command(tmp_path / 'out', '--data-dir', tmp_path / 'none', tasks=(name,)) == 2
    assert f'{tmp_path / "none"} is no folder. It must be laid out as' in capsys.readouterr().err


@pytest.mark.parametrize('args, message', [
    (['--tasks', 'detection', '--data-dir', '.'], 'exactly one task that reads files'),
    (['--tasks', 'coco', 'ade20k', '--data-dir', '.'], 'exactly one task that reads files'),
    (['--methods', 'mixde'], "invalid choice: 'mixde'"),
])
def test_bad_arguments_are_refused(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        downstream.main([str(tmp_path / 'out'), *args])
    assert message in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_sizes_that_a_decoder_does_not_take_are_refused_before_training():
    task = opening.open_task('segmentation', None, 'cpu', 0)
    with pytest.raises(ValueError, match='multiples of two patches, 16, got 40'):
        task.build('ape', replace(TINY, sizes=(32, 40)), 0)


@pytest.mark.parametrize('library, version, message', [
    ('pycocotools', None, "pycocotools is not installed: run `pip install 'timm_rope[downstream]'`"),
    ('segmentation_models_pytorch', '0.4.0',
     'segmentation_models_pytorch>=0.5 is needed, found 0.4.0: run `pip install -U segmentation_models_pytorch`'),
])
def test_missing_and_old_libraries_are_one_sentence(library, version, message, tmp_path, monkeypatch, capsys):
    found = opening.version_of
    monkeypatch.setattr(opening, 'version_of', lambda name: version if name == library else found(name))
    opening.open_task.cache_clear()
    assert command(tmp_path / 'out') == 2
    assert capsys.readouterr().err.strip() == f'downstream: {message}.'
