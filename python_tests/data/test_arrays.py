import json

import numpy as np
import pytest
import torch

from sela_ext.data import open_source
from sela_ext.errors import DataError


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("shape", "channels"), [((1, 5, 7), 1), ((31, 4, 4, 1), 1), ((33, 3, 9, 3), 3)])
def test_an_array_is_a_source_without_a_copy(shape, channels):
    images = random_images(*shape)
    source = open_source(images)
    assert len(source) == shape[0]
    assert source.channels == channels
    assert source.image_size == (shape[1], shape[2])
    assert np.shares_memory(source.array, images)
    np.testing.assert_array_equal(source.read(0), images[0].reshape(shape[1], shape[2], channels))
    assert source.labels is None
    assert len(set(source.names)) == shape[0]


def test_a_tensor_is_a_source_without_a_copy():
    images = torch.from_numpy(random_images(6, 4, 4, 3))
    source = open_source(images, labels=torch.arange(6))
    assert source.array.__array_interface__["data"][0] == images.data_ptr()
    np.testing.assert_array_equal(source.labels, np.arange(6))


def test_a_memory_map_stays_a_memory_map(tmp_path):
    images = random_images(9, 8, 8, 3)
    np.save(tmp_path / "images.npy", images)
    for data in (
        np.load(tmp_path / "images.npy", mmap_mode="r"),
        tmp_path / "images.npy",
        str(tmp_path / "images.npy"),
    ):
        source = open_source(data)
        assert isinstance(source.array, np.memmap)
        part = source.subset([7, 2])
        assert part.array is None  # not copied into memory
        np.testing.assert_array_equal(part.read(0), images[7])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (np.zeros((5, 128), np.int64), r"or feature vectors, floats \[N, D\], found int64"),
        (torch.zeros(5, 128, dtype=torch.uint8), r"or feature vectors, floats \[N, D\], found torch.uint8"),
        (np.zeros((5, 4, 4, 3), np.float32), "expected uint8 pixels"),
        (torch.zeros(5, 4, 4), "expected uint8 pixels"),
        (np.zeros((5, 4, 4, 4), np.uint8), "found 4.*alpha"),
        (np.zeros((5, 4, 4, 2), np.uint8), "1 or 3 channels"),
        (np.zeros((5, 3, 16, 16), np.uint8), "channels come last"),
        (np.zeros((0, 4, 4), np.uint8), "at least one image"),
        (np.zeros((4, 0, 4), np.uint8), "at least one image"),
        (np.zeros(5, np.uint8), "found 1 axes"),
        (np.zeros((1, 1, 1, 1, 3), np.uint8), "found 5 axes"),
        (17, "found int"),
        ([], "empty list"),
        ([1, 2], "found int at position 0"),
    ],
)
def test_what_is_no_image_is_refused(data, match):
    with pytest.raises(DataError, match=match) as caught:
        open_source(data)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_array_is_refused(tmp_path):
    (tmp_path / "images.npy").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"images\.npy: expected a readable \.npy"):
        open_source(tmp_path / "images.npy")


def test_labels_come_from_a_list_or_a_file(tmp_path):
    images = random_images(4, 3, 3)
    np.save(tmp_path / "labels.npy", np.array([3, -1, 0, 1], np.int32))
    for labels in ([3, -1, 0, 1], np.array([3, -1, 0, 1]), tmp_path / "labels.npy", str(tmp_path / "labels.npy")):
        source = open_source(images, labels=labels)
        assert source.labels.tolist() == [3, -1, 0, 1]
        assert source.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([1, 2, 3], "expected one per image, 4, found 3"),
        ([0.5, 1, 2, 3], "expected integers"),
        ([[1], [2], [3], [4]], r"of shape \[4\]"),
        ([[1], [2, 3], [3], [4]], "ragged"),
        ([0, 1, 2, -2], "found -2"),
        ("nowhere.npy", "nowhere.npy: expected labels, a readable"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, match):
    with pytest.raises(DataError, match=match):
        open_source(random_images(4, 3, 3), labels=labels)


def test_labels_given_replace_those_of_the_source():
    source = open_source("digits", labels=np.zeros(1797, int))
    assert source.array is not None
    assert not source.labels.any()
    assert source.class_names is None
    part = source.subset([3, 4])
    assert part.labels.tolist() == [0, 0]
    assert part.array.shape == (2, 32, 32, 1)


def test_equal_arrays_have_equal_fingerprints_and_different_ones_differ():
    images = random_images(40, 4, 4)
    print_ = open_source(images).fingerprint()
    assert json.loads(json.dumps(print_)) == print_
    assert print_["count"] == 40
    assert open_source(images.copy()).fingerprint() == print_
    assert open_source(images[:39]).fingerprint() != print_
    images[0] ^= 1
    assert open_source(images).fingerprint() != print_


@pytest.mark.parametrize(("indices", "match"), [([], "non-empty"), ([4], "0..3"), ([-1], "0..3"), ([0.0], "integers")])
def test_a_subset_out_of_range_is_refused(indices, match):
    with pytest.raises(DataError, match=match):
        open_source(random_images(4, 3, 3)).subset(indices)


def test_a_subset_of_a_subset_counts_twice():
    images = random_images(10, 3, 3)
    part = open_source(images, labels=range(10)).subset([9, 5, 5, 1]).subset(np.array([3, 1]))
    np.testing.assert_array_equal(part.array[..., 0], images[[1, 5]])
    assert part.labels.tolist() == [1, 5]
    assert part.names == ["array/00001", "array/00005"]


def test_a_single_vector_is_told_how_it_becomes_a_row():
    with pytest.raises(DataError, match=r"floats \[N, D\], found float32 \[8\]; a single vector needs \[None\]"):
        open_source(np.zeros(8, np.float32))
