import numpy as np
import pytest

from sela_ext import kernels
from sela_ext.errors import OptionError
from sela_ext.kernels import VectorView, reference


def rows_of(count, width, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(dtype)


def view_of(width, noise=0.3, dropout=0.2):
    mean = np.linspace(-1, 1, width).astype(np.float32)
    return VectorView(mean, np.full(width, noise, np.float32), dropout)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("width", [1, 7, 8, 33])
@pytest.mark.parametrize(("noise", "dropout"), [(0.3, 0.2), (0.0, 0.5), (0.7, 0.0), (0.0, 0.0)])
def test_a_view_has_the_bits_of_its_twin(dtype, width, noise, dropout):
    rows = rows_of(101, width, dtype) * 3
    rows[5, 0], rows[6, -1], rows[7, 0] = np.nan, -np.inf, 6e-8  # the last is below float16's normal numbers
    index = np.random.default_rng(1).permutation(101)[:63]
    options = {"seed": 2**63 + 5, "epoch": 2**31 + 3, "view_number": 255, "number": index + 2**33}
    for view in (None, view_of(width, noise, dropout)):
        found, finite = kernels.vector_rows(rows, index, view, **options, threads=2)
        wanted, wanted_finite = reference.vector_rows(rows, index, view, **options)
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(finite, wanted_finite)
        np.testing.assert_array_equal(finite, ~np.isin(index, [5, 6]))


def test_every_float16_is_widened_exactly():
    every = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, 8)
    found, _ = kernels.vector_rows(every, np.arange(len(every)))
    np.testing.assert_array_equal(found, every.astype(np.float32))


def test_noise_has_the_deviation_asked_for_and_features_are_left_out_as_often_as_asked_for():
    rows = np.zeros((2001, 33), np.float32)
    noisy, _ = kernels.vector_rows(rows, np.arange(2001), VectorView(rows[0], np.full(33, 2.0, np.float32)))
    assert noisy.std() == pytest.approx(2.0, rel=0.01)
    assert abs(noisy.mean()) < 0.03
    assert abs(np.corrcoef(noisy[:, 0], noisy[:, 1])[0, 1]) < 0.08
    left, _ = kernels.vector_rows(rows + 1, np.arange(2001), VectorView(rows[0], rows[0], 0.25))
    assert set(np.unique(left).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert (left == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert left.mean() == pytest.approx(1.0, abs=0.02)


def test_a_left_out_feature_becomes_its_mean():
    mean = np.array([5.0, -3.0], np.float32)
    found, _ = kernels.vector_rows(np.full((501, 2), 9.0), np.arange(501), VectorView(mean, mean * 0, 0.5))
    for column, (value, kept) in enumerate(((5.0, 13.0), (-3.0, 21.0))):
        assert set(np.unique(found[:, column]).tolist()) == {value, kept}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"rows": np.zeros((3, 2), np.int32)}, "float16, float32, float64"),
        ({"rows": np.zeros((3, 4), np.float32)[:, ::2]}, "C order"),
        ({"index": [3]}, "0 .. 2"),
        ({"index": [-1]}, "0 .. 2"),
        ({"view": view_of(3)}, "expected 2 features, found 3"),
        ({"view_number": 256}, "0 .. 255"),
        ({"number": [0, 1]}, "expected 1 numbers"),
        ({"out": np.zeros((1, 2))}, "expected float32"),
        ({"epoch": 2**32}, "epoch"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_take(given, match):
    with pytest.raises(OptionError, match=match):
        kernels.vector_rows(**{"rows": np.zeros((3, 2), np.float32), "index": [0], **given})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"dropout": 1.0}, "below 1"),
        ({"dropout": -0.1}, "below 1"),
        ({"noise": np.full(2, -1, np.float32)}, "at least 0"),
        ({"mean": np.full(2, np.nan, np.float32)}, "finite"),
        ({"noise": np.zeros(3, np.float32)}, "expected 2"),
    ],
)
def test_a_view_refuses_what_it_cannot_be(given, match):
    with pytest.raises(OptionError, match=match):
        VectorView(**{"mean": np.zeros(2, np.float32), "noise": np.zeros(2, np.float32), **given})
