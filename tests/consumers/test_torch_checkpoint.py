"""torch.distributed.checkpoint in one process: saved, and loaded into another model, with its optimizer."""
import copy

import pytest
import torch
from backbones import FAMILIES, build, frequencies, image
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def step(model, optimizer):
    optimizer.zero_grad()
    model.train()(image(*model.patch_embed.img_size)).square().mean().backward()
    optimizer.step()


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('how', ['state_dict', 'meta'])
def test_training_continues_from_a_saved_state(family, how, tmp_path):
    model = build(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    save({'model': weights, 'optimizer': moments}, checkpoint_id=tmp_path)
    saved = copy.deepcopy(model)

    other = build(family, **(dict(device='meta') if how == 'meta' else {}))
    if how == 'meta':
        other.to_empty(device='cpu').init_weights()
    else:
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1)
    another = torch.optim.AdamW(other.parameters(), lr=1e-3)
    weights, moments = get_state_dict(other, another)
    state = {'model': weights, 'optimizer': moments}
    load(state, checkpoint_id=tmp_path)
    set_state_dict(other, another, model_state_dict=state['model'], optim_state_dict=state['optimizer'])
    x = image(*model.patch_embed.img_size)
    assert torch.equal(other.eval()(x), saved.eval()(x))

    torch.manual_seed(3)
    step(model, optimizer)
    torch.manual_seed(3)
    step(other, another)
    assert frequencies(model) and all(
        torch.equal(p, frequencies(other)[name]) for name, p in frequencies(model).items())
