"""Nothing is computed twice in eval on a fixed grid, and nothing stale is ever returned."""
import copy
import pickle

import pytest
import torch

import timm_rope
from timm_rope.encodings import ENCODINGS
from timm_rope.encodings import _cache as cache

NAMES = timm_rope.list_ropes()
LEARNED = [name for name, encoding in ENCODINGS.items() if encoding.learned]


class Counter:
    """Counts the calls of `rotation.table`, where every sine and exponential is made."""

    def __init__(self, rope):
        self.calls = 0
        table = rope.rotation.table

        def counted(*args):
            self.calls += 1
            return table(*args)

        rope.rotation.table = counted

    def __call__(self, function):
        before = self.calls
        function()
        return self.calls - before


def make(name='mixed', **kwargs):
    torch.manual_seed(0)
    return timm_rope.create_rope(name, head_dim=16, num_heads=2, depth=2, **kwargs).eval()


def fresh(rope, grid, prefix=0):
    """What an encoding without a cache would return."""
    with torch.no_grad():
        return rope._payloads(list(grid), prefix)


def assert_current(rope, grid=(3, 4), prefix=1):
    with torch.no_grad():
        got = rope(grid, prefix)
    for a, b in zip(got, fresh(rope, grid, prefix)):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@pytest.mark.parametrize('name', NAMES)
def test_one_computation_per_grid(name):
    rope = make(name)
    count = Counter(rope)
    with torch.no_grad():
        first = count(lambda: rope((3, 4), 1))
        assert first > 0
        assert count(lambda: rope((3, 4), 1)) == 0
        with torch.inference_mode():
            assert count(lambda: rope((3, 4), 1)) == 0
        assert count(lambda: rope((4, 3), 1)) == first, 'another grid of as many patches'
        assert count(lambda: rope((4, 3), 2)) == first, 'another number of prefix tokens'
    assert_current(rope, (4, 3), 2)


@pytest.mark.parametrize('name', NAMES)
def test_training_recomputes_only_what_is_learned(name):
    rope = make(name).train()
    count = Counter(rope)
    rope((3, 4))
    again = count(lambda: rope((3, 4)))
    assert (again > 0) == (name in LEARNED)
    if name in LEARNED:
        assert rope((3, 4))[0].requires_grad
        rope.requires_grad_(False)
        rope((3, 4))
        assert count(lambda: rope((3, 4))) == 0, 'frozen frequencies are fixed'


def optimizer_step(rope):
    rope.train()
    sum(p.square().sum() + p.sum() for p in rope((3, 4))).backward()
    torch.optim.SGD(rope.parameters(), lr=0.5).step()
    rope.eval()


def in_place(rope):
    with torch.no_grad():
        rope.freqs.add_(0.5)


def through_data(rope):
    rope.freqs.data.add_(0.5)


def new_data(rope):
    rope.freqs.data = rope.freqs.data + 0.5


def new_parameter(rope):
    rope.freqs = torch.nn.Parameter(rope.freqs.detach() + 0.5)


def load(rope):
    rope.load_state_dict({**rope.state_dict(), 'freqs': rope.freqs.detach() + 0.5})


def assign(rope):
    rope.load_state_dict({**rope.state_dict(), 'freqs': rope.freqs.detach() + 0.5}, assign=True)


def to_double(rope):
    rope.double()


@pytest.mark.parametrize('name', LEARNED)
@pytest.mark.parametrize('change', [
    optimizer_step, in_place, through_data, new_data, new_parameter, load, assign, to_double])
def test_a_change_of_the_frequencies_is_seen(name, change):
    rope = make(name)
    assert_current(rope)
    before = fresh(rope, (3, 4), 1)
    change(rope)
    assert_current(rope)
    assert not torch.equal(fresh(rope, (3, 4), 1)[0].double(), before[0].double()) or change is to_double


@pytest.mark.parametrize('change', [optimizer_step, in_place, new_data, new_parameter, load, assign, to_double])
def test_a_change_is_seen_without_comparing_values(change, monkeypatch):
    # as on an accelerator, where comparing would wait for the device
    monkeypatch.setattr(cache, '_can_compare', lambda tensors: False)
    rope = make('mixed')
    count = Counter(rope)
    with torch.no_grad():
        rope((3, 4), 1)
        assert count(lambda: rope((3, 4), 1)) == 0
    change(rope)
    assert_current(rope)


@pytest.mark.parametrize('name', NAMES)
def test_a_change_of_the_reference_grid_is_seen(name):
    rope = make(name)
    assert_current(rope)
    rope.load_state_dict({**rope.state_dict(), 'reference_grid': torch.tensor([5, 9])})
    assert_current(rope)
    rope.reference_grid.fill_(3)
    assert_current(rope)


@pytest.mark.parametrize('name', NAMES)
def test_dtype_and_device_moves(name):
    rope = make(name)
    assert_current(rope)
    rope.double()
    assert_current(rope)
    assert rope((3, 4))[0].dtype == torch.float64
    rope.float()
    assert_current(rope)
    rope.to('meta')
    with torch.no_grad():
        assert rope((3, 4))[0].is_meta


@pytest.mark.parametrize('name', NAMES)
def test_inference_mode_then_training(name):
    rope = make(name)
    with torch.inference_mode():
        payload = rope((3, 4))[0]
    assert not payload.is_inference()
    x = torch.randn(1, 2, 12, 16, requires_grad=True)
    rope.train().rotate(x, rope((3, 4))[0]).square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize('name', LEARNED)
def test_gradients_flow_in_eval_mode_too(name):
    rope = make(name)
    with torch.no_grad():
        rope((3, 4))  # fills the cache
    sum(p.sum() for p in rope((3, 4))).backward()
    assert rope.freqs.grad is not None


@pytest.mark.parametrize('name', LEARNED)
def test_copies_are_independent(name):
    rope = make(name)
    with torch.no_grad():
        rope((3, 4), 1)
    for twin in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert twin._cache._entries == (), 'a copy does not carry the payloads'
        in_place(twin)
        assert_current(twin)
        assert_current(rope)
    rope((3, 4), 1)[0].sum().backward()  # with a graph around, a copy must still be possible
    copy.deepcopy(rope)


@pytest.mark.parametrize('name', NAMES)
def test_data_parallel_replicas_share_no_cache(name):
    rope = make(name)
    with torch.no_grad():
        rope((3, 4), 1)
    replica = rope._replicate_for_data_parallel()
    assert replica._cache is not rope._cache and replica._cache._entries == ()


def test_functional_call_and_transforms_see_their_own_frequencies():
    rope = make('mixed')
    with torch.no_grad():
        rope((3, 4))
        other = torch.func.functional_call(rope, {'freqs': rope.freqs * 2}, ((3, 4),))
        assert not torch.equal(other[0], rope((3, 4))[0])
        batch = rope.freqs.expand(3, -1, -1, -1, -1)
        stacked = torch.vmap(lambda f: torch.func.functional_call(rope, {'freqs': f}, ((3, 4),))[0])(batch)
        assert torch.allclose(stacked[2], rope((3, 4))[0], atol=1e-6)
    assert_current(rope)


def test_a_returned_list_is_the_callers():
    rope = make('axial')
    payloads = rope((3, 4))
    payloads.clear()
    assert len(rope((3, 4))) == 2


def test_frequencies_made_in_inference_mode():
    with torch.inference_mode():
        rope = make('mixed')
        assert_current(rope)
        rope.freqs.mul_(1.5)
        assert_current(rope)


@pytest.mark.parametrize('name', NAMES)
def test_images_of_several_sizes_take_turns(name, monkeypatch):
    rope = make(name)
    counted = []
    compute = type(rope)._payloads
    monkeypatch.setattr(type(rope), '_payloads', lambda self, *args: counted.append(args) or compute(self, *args))
    sizes = [(3, 4), (5, 6), (14, 14)]
    first = {size: rope(size) for size in sizes}
    with torch.no_grad():
        first = {size: rope(size) for size in sizes}
        counted.clear()
        for size in sizes * 3:
            assert all(a is b for a, b in zip(rope(size), first[size]))
        assert not counted
        rope.freqs.mul_(1.5)
        for size in sizes:
            assert_current(rope)
            rope(size)
        assert len(counted) >= len(sizes)


def test_no_more_is_kept_than_there_is_room_for(monkeypatch):
    rope = make('spherical')
    with torch.no_grad():
        sizes = [(n, n) for n in range(2, 12)]
        room = sum(rope(size)[0].numel() * 4 for size in sizes[-3:])
        monkeypatch.setattr('timm_rope.encodings._cache.BYTES', room)
        rope.set_scaling('extrapolate')  # begins anew
        for size in sizes:
            rope(size)
        kept = [entry.key[0] for entry in rope._cache._entries]
        assert kept == sizes[:-4:-1]
        monkeypatch.setattr('timm_rope.encodings._cache.BYTES', 1)
        large = rope((20, 20))
        assert rope((20, 20))[0] is large[0] and len(rope._cache._entries) == 1
