"""More of what the resident augmentation guarantees; each test here is the one that notices some planted fault."""

import numpy as np
import pytest

from sela_ext.kernels import PARAMETERS, Augment
from sela_ext.kernels.augment import option_fields


@pytest.mark.parametrize("count", [1, 127, 128, 129, 257])
def test_parameters_of_any_number_of_images_are_drawn_by_a_block_per_128(simt, count):
    simt.set_device(2, 2)
    options = simt.AugmentOptions(**option_fields(Augment.sela(8), 3))
    index = np.arange(count)
    drawn, expected = np.zeros(count, PARAMETERS), np.zeros(count, PARAMETERS)
    sides = np.full(count, 9, np.int32)
    simt.sample_parameters(options, sides, sides, index, 3, 2, 1, expected)
    before = simt.statistics()["blocks"]
    simt.sample_parameters_cuda(options, 9, 9, index.ctypes.data, count, 3, 2, 1, drawn.ctypes.data, 0)
    assert drawn.tobytes() == expected.tobytes()
    assert simt.statistics()["blocks"] - before == (count + 127) // 128
