"""Arguments of encodings: a bad one is refused by its name, value and remedy, weights of another encoding too."""
import math

import pytest
import torch
from rotating import make


@pytest.mark.parametrize('call,error,words', [
    (lambda: make('spherica'), ValueError, "'spherica'.*axial"),
    (lambda: make('axial', {'order': 'xy'}), ValueError, "'axial' takes no option 'order'.*temperature"),
    (lambda: make('axial', {'colour': 1}), TypeError, "'colour'"),
    (lambda: make('spherical', {'order': 'zx'}), ValueError, "order must be one of 'yx', 'xy', got 'zx'"),
    (lambda: make('liere', {'block': 1}), ValueError, 'block must be an integer of at least 2, got 1'),
    (lambda: make('liere', {'block': 8.}), ValueError, 'block must be an integer'),
    (lambda: make('comrope', {'variant': 'xy'}), ValueError, "variant must be one of 'ld', 'ap', got 'xy'"),
    (lambda: make('comrope', {'block': 1}), ValueError, 'block must be an integer of at least 2, got 1'),
    (lambda: make('comrope', {'variant': 'ap'}, head_dim=15), ValueError, 'head_dim must be at least 16 for'),
    (lambda: make('geope', head_dim=2), ValueError, "head_dim must be at least 3 for 'geope', got 2"),
    (lambda: make('quatro', head_dim=2), ValueError, "head_dim must be at least 3 for 'quatro', got 2"),
    (lambda: make('quatro', {'order': 'zx'}), ValueError, "order must be one of 'yx', 'xy', got 'zx'"),
    (lambda: make('liere', {'block': 65}), ValueError, 'head_dim must be at least 65'),
    (lambda: make('spherical', head_dim=2), ValueError, "head_dim must be at least 3 for 'spherical', got 2"),
    (lambda: make('axial', head_dim=3), ValueError, 'head_dim must be at least 4'),
    (lambda: make('mixed', head_dim=0), ValueError, 'head_dim must be an integer of at least 1, got 0'),
    (lambda: make('axial', {'temperature': 0}), ValueError, 'temperature must be a positive finite number, got 0'),
    (lambda: make('axial', {'temperature': math.nan}), ValueError, 'temperature.*nan'),
    (lambda: make('axial', {'coords': 'pixels'}), ValueError, "coords of 'axial' must be one of.*'pixels'"),
    (lambda: make('uniform', {'coords': 'index'}), ValueError, "coords of 'uniform'"),
    (lambda: make('nd', head_dim=5), ValueError, "head_dim must be at least 6 for 'nd', got 5"),
    (lambda: make('nd', {'seed': -1}), ValueError, 'seed must be an integer of at least 0, got -1'),
    (lambda: make('nd', {'seed': 2 ** 31}), ValueError, 'seed must be at most 2147483647, got 2147483648'),
    (lambda: make('string', {'basis': 'fourier'}), ValueError, "basis must be .*'cayley', 'circulant', got 'f"),
    (lambda: make('string', {'block': 1}), ValueError, 'block must be an integer of at least 2, got 1'),
    (lambda: make('string', {'block': 2, 'basis': 'circulant'}), ValueError, 'block must be .* at least 3, got 2'),
    (lambda: make('string', {'block': 65}), ValueError, "head_dim must be at least 65 for 'string', got 64"),
    (lambda: make('golden', {'coords': 'index'}), ValueError, "coords of 'golden'"),
    (lambda: make('golden', {'max_freq': 0.1}), ValueError, 'max_freq must be at least min_freq, got 0.1 and 0.2'),
    (lambda: make('golden', {'min_freq': -1}), ValueError, 'min_freq must be a positive finite number, got -1'),
    (lambda: make('golden', {'p_zero_freqs': 1.5}), ValueError, 'p_zero_freqs must be a number from 0 to 1, got 1.5'),
    (lambda: make('golden', {'p_zero_freqs': True}), ValueError, 'p_zero_freqs must be a number from 0 to 1'),
    (lambda: make('mixed', {'share_heads': 'yes'}), ValueError, "share_heads must be True or False, got 'yes'"),
    (lambda: make('axial', reference_grid=()), ValueError, r'reference_grid must be one to three positive.*\(\)'),
    (lambda: make('axial', reference_grid=(4, 4, 4, 4)), ValueError, r'must be one to three positive .*\(4, 4, 4, 4\)'),
    (lambda: make('spiral', reference_grid=(14,)), ValueError, 'must be two positive.*directions go around in the pl'),
    (lambda: make('axial', {'registers': 4}, reference_grid=(14,)), ValueError, 'registers must be .* 0 where'),
    (lambda: make('spherical', {'order': 'yx'}, reference_grid=(4, 4, 4)), ValueError, "order.* 'zyx', 'zxy'.*'yx'"),
    (lambda: make('axial', reference_grid=(14,))((3, 4)), ValueError, r'grid_size must be one positive .*\(3, 4'),
    (lambda: make('axial', reference_grid=(14,))(3), ValueError, 'grid_size must be one positive integer.*got 3'),
    (lambda: make('axial', reference_grid=(4, 4, 4))((3, 4)), ValueError, 'three positive integers .frames, rows'),
    (lambda: make('axial')((3,)), ValueError, r'two positive integers .*\(3,\)'),
    (lambda: torch.jit.script(make('axial', reference_grid=(14,))), ValueError, 'TorchScript takes .* images only'),
    (lambda: make('axial', reference_grid=(0, 14)), ValueError, r'reference_grid.*\(0, 14\)'),
    (lambda: make('axial', reference_grid=14), ValueError, 'reference_grid.*14'),
    (lambda: make('axial', reference_grid=(14., 14.)), ValueError, 'reference_grid'),
    (lambda: make('axial', num_heads=0), ValueError, 'num_heads'),
    (lambda: make('axial', depth=-1), ValueError, 'depth'),
    (lambda: make('axial')((0, 3)), ValueError, r'grid_size must be two positive integers.*\(0, 3\)'),
    (lambda: make('axial')((3, -1)), ValueError, 'grid_size'),
    (lambda: make('axial')((3, 3), -1), ValueError, 'num_prefix_tokens must be at least 0, got -1'),
    (lambda: make('axial').at(torch.zeros(3, 2), -1), ValueError, 'num_prefix_tokens must be at least 0, got -1'),
    (lambda: make('axial').at(torch.ones(200, 2).long(), -1), ValueError, 'num_prefix_tokens must be at least 0'),
    (lambda: make('axial').rotate(torch.ones(1, 2, 4, 64), make('axial')((2, 2))), TypeError, r'payloads\[i\], got'),
    (lambda: make('axial').rotate(torch.ones(1, 2, 4, 64).long(), make('axial')((2, 2))[0]), TypeError, 'torch.int64'),
    (lambda: make('axial').rotate(torch.ones(1, 2, 5, 64), make('axial')((2, 2))[0]), ValueError, '5 tokens'),
    (lambda: make('axial').rotate(torch.ones(1, 2, 4, 32), make('axial')((2, 2))[0]), ValueError, 'head_dim 64'),
    (lambda: make('axial', {'rope_coords': 'cells', 'coords': 'cells'}), TypeError, 'twice'),
])
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_options_may_carry_the_prefix_of_the_models():
    assert make('spherical', {'rope_order': 'xy'}).options['order'] == 'xy'


def test_a_name_is_defined_once():
    from timm_rope.encodings._base import RotaryEncoding
    with pytest.raises(ValueError, match="'axial' is already defined"):
        class Other(RotaryEncoding, name='axial'):
            pass


def test_loading_without_a_model_is_checked_too():
    saved = make('axial').state_dict()
    make('axial').load_state_dict(saved)
    with pytest.raises(RuntimeError, match="'axial' is not 'uniform'"):
        make('uniform').load_state_dict(saved)
    foreign = make('mixed').state_dict()
    del foreign['signature']  # weights from elsewhere have none
    make('mixed').load_state_dict(foreign)
    foreign['freqs'][0, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match='freqs of the checkpoint has 1 non-finite of 256 values'):
        make('mixed').load_state_dict(foreign)
