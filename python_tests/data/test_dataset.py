import errno

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from sela_ext.data import open_source
from sela_ext.errors import DataError


class Items(Dataset):
    """Items from a list, counting how often each is asked for."""

    def __init__(self, items, **attributes):
        self.items = items
        self.asked = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.items[index]


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255,
        torch.from_numpy(PIXELS).permute(2, 0, 1).double() / 255,
    ],
    ids=["pil", "array", "uint8 tensor", "float tensor", "double tensor"],
)
@pytest.mark.parametrize("in_tuple", [True, False])
def test_every_form_of_an_rgb_image_gives_its_pixels(image, in_tuple):
    source = open_source(Items([(image, 3) if in_tuple else image]))
    assert source.channels == 3
    np.testing.assert_array_equal(source.read(0), PIXELS)
    assert (source.labels is not None) == in_tuple


@pytest.mark.parametrize(
    "image",
    [Image.fromarray(PIXELS[..., 0]), PIXELS[..., 0], PIXELS[..., :1], torch.from_numpy(PIXELS[..., 0])[None]],
    ids=["pil", "array", "array with channel", "tensor"],
)
def test_every_form_of_a_grey_image_stays_grey(image):
    source = open_source(Items([image]))
    assert source.channels == 1
    np.testing.assert_array_equal(source.read(0), PIXELS[..., :1])


def test_grey_items_among_rgb_ones_are_repeated_but_not_the_reverse():
    grey = PIXELS[..., :1]
    np.testing.assert_array_equal(open_source(Items([PIXELS, grey])).read(1), np.repeat(grey, 3, axis=2))
    with pytest.raises(DataError, match="item 1: expected a grey image like item 0, found RGB"):
        open_source(Items([grey, PIXELS])).read(1)


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_labels_come_from_an_attribute_without_reading_items(name, kind):
    data = Items([(PIXELS, 0)] * 3, **{name: kind([2, 0, 1])}, classes=["a", "b", "c"])
    source = open_source(data)
    assert source.labels.tolist() == [2, 0, 1]
    assert source.class_names == ["a", "b", "c"]
    assert data.asked == [0]
    part = open_source(Subset(data, [2, 1]))
    assert part.labels.tolist() == [1, 0]


def test_labels_come_from_the_items_as_they_are_read():
    data = Items([(PIXELS, torch.tensor(i % 3)) for i in range(6)])
    source = open_source(data)
    source.read(4)
    assert source.labels_of(np.array([4, 0])).tolist() == [1, 0]
    assert data.asked == [0, 4]
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert sorted(data.asked) == list(range(6))


def test_labels_that_are_no_integers_are_ignored():
    assert open_source(Items([(PIXELS, "a caption")], targets=["a caption"])).labels is None
    assert open_source(Items([(PIXELS, 1), (PIXELS, 2)]), labels=[7, 8]).labels.tolist() == [7, 8]


def test_a_tensor_dataset_works():
    source = open_source(TensorDataset(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor([1, 2, 3])))
    assert source.channels == 1
    assert source.read(2).shape == (4, 4, 1)
    assert source.labels.tolist() == [1, 2, 3]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([PIXELS])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (Stream(), "map-style"),
        (Items([]), "empty Dataset"),
        (Items([torch.full((3, 4, 4), 1.5)]), r"floating-point pixels in 0\.\.1, found 1.5"),
        (Items([torch.full((3, 4, 4), float("nan"))]), r"floating-point pixels in 0\.\.1"),
        (Items([np.zeros((4, 4, 3))]), "expected uint8"),
        (Items([np.zeros((3, 4, 5), np.uint8)]), r"found uint8 \[3, 4, 5\]"),
        (Items(["a string"]), "found str"),
        (Items([None]), "found NoneType"),
    ],
)
def test_what_is_no_dataset_of_images_is_refused(data, match):
    with pytest.raises(DataError, match=match):
        open_source(data)


def test_an_error_inside_the_dataset_names_the_item():
    class Broken(Items):
        def __getitem__(self, index):
            if index == 2:
                raise ValueError("no such thing")
            return super().__getitem__(index)

    source = open_source(Broken([PIXELS] * 3))
    with pytest.raises(DataError, match="dataset item 2: ValueError: no such thing"):
        source.read(2)


class Failing(Items):
    """Items of which some cannot be read, and labels that come with them."""

    def __init__(self, bad, error):
        super().__init__([(PIXELS + i, i % 3) for i in range(31)])
        self.bad, self.error = bad, error

    def __getitem__(self, index):
        if index in self.bad:
            raise self.error
        return super().__getitem__(index)


def test_items_that_cannot_be_read_have_no_label_and_stop_nobody_else():
    source = open_source(Failing({0, 7, 30}, OSError("gone")))
    assert source.channels == 3
    assert source.labels.tolist() == [-1 if i in (0, 7, 30) else i % 3 for i in range(31)]
    assert source.fingerprint() == open_source(Failing({0, 7, 30}, OSError("gone"))).fingerprint()
    assert source.fingerprint() != open_source(Failing({7}, OSError("gone"))).fingerprint()
    with pytest.raises(DataError, match="dataset item 7: OSError: gone"):
        source.read(7)
    with pytest.raises(DataError, match="dataset item 0: OSError: gone"):
        open_source(Failing(set(range(31)), OSError("gone")))


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_running_out_of_handles_or_memory_is_no_unknown_label(error):
    source = open_source(Failing({7}, error))
    with pytest.raises((MemoryError, DataError), match=r"^$|Too many open files"):
        _ = source.labels
