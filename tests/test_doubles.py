"""Float32 numbers moved in pairs."""
import pytest
import torch

from timm_rope.doubles import in_doubles


def test_the_same_memory_in_larger_elements():
    x = torch.tensor([[1.0, -0.0, float('nan'), float('inf')], [2.0, 3.0, 4.0, 5.0]])
    seen, = in_doubles(x)
    assert seen.dtype == torch.float64 and seen.shape == (2, 2) and seen.data_ptr() == x.data_ptr()
    to = torch.zeros(2, 3, 8)
    target, source = in_doubles(to[:, 1, 2:6], x)
    target.copy_(source)  # every bit arrives, those that are no number as float64 too
    assert torch.equal(to[:, 1, 2:6].contiguous().view(torch.int32), x.view(torch.int32))
    assert to.count_nonzero() == 7


@pytest.mark.parametrize('other', [
    torch.zeros(4, 4, dtype=torch.float64),
    torch.zeros(4, 4, dtype=torch.bfloat16),
    torch.zeros(4, 5),  # rows of an odd length
    torch.zeros(4, 5)[:, :4],  # that do not begin at the same place
    torch.zeros(17)[1:].view(4, 4),
    torch.zeros(4, 4).mT,
    torch.zeros(4, 4, device='meta'),
])
def test_all_or_none(other):
    fits = torch.zeros(4, 4)
    assert [a is b for a, b in zip(in_doubles(fits, other), (fits, other))] == [True, True]
    assert in_doubles(other)[0] is other and in_doubles(fits)[0] is not fits
