"""torch.export and AOTInductor: what is compiled ahead of time takes other batches, and a ViT other sizes."""
import os
import shutil

import pytest
import torch
from backbones import build, image
from torch.export import Dim

pytestmark = [
    pytest.mark.skipif(shutil.which('g++') is None, reason='AOTInductor needs a C++ compiler'),
    pytest.mark.skipif(not os.environ.get('CONSUMERS'), reason='CONSUMERS=1 lets it compile for a minute')]


@torch.no_grad()
@pytest.mark.parametrize('family,options,sizes', [
    ('vit', dict(depth=1), [(64, 96), (128, 32)]),
    ('vit', dict(depth=1, rope_encoding='liere', rope_block=4), [(64, 96), (128, 32)]),
    ('swin', dict(depths=(1,), num_heads=(2,)), [(64, 64), (64, 64)])])
def test_a_compiled_package(family, options, sizes, tmp_path):
    model = build(family, num_classes=5, **options)
    shapes = {0: Dim('batch', min=2, max=16)}
    if family == 'vit':  # a Swin is exported for one size
        shapes |= {2: 8 * Dim('rows', max=16), 3: 8 * Dim('columns', max=16)}
    exported = torch.export.export(model, (image(*sizes[0]),), dynamic_shapes=dict(x=shapes))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / 'model.pt2'))
    package = torch._inductor.aoti_load_package(path)
    for batch, size in zip((2, 5), sizes):
        assert torch.allclose(package(image(*size, batch=batch)), model(image(*size, batch=batch)), atol=1e-5)
