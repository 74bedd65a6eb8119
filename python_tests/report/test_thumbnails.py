import base64
import io

import numpy as np
import pytest
from PIL import Image

from sela_ext.report import thumbnails
from sela_ext.report.thumbnails import Place, data_uri, make_sheets


def decoded(source):
    head, payload = source.split(",", 1)
    return head, np.asarray(Image.open(io.BytesIO(base64.b64decode(payload))))


@pytest.mark.parametrize("shape", [(1, 1), (8, 8, 1), (31, 33, 3), (48, 48)])
def test_tiny_images_are_kept_exactly(shape):
    image = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    source, pixelated = data_uri(image)
    head, back = decoded(source)
    assert head == "data:image/png;base64"
    assert pixelated
    np.testing.assert_array_equal(back, image[..., 0] if shape[-1] == 1 and image.ndim == 3 else image)


@pytest.mark.parametrize("shape", [(375, 500, 3), (1, 3000, 3), (3000, 1, 1), (64, 49)])
def test_larger_images_are_shrunk_to_96_pixels(shape):
    source, pixelated = data_uri(np.full(shape, 77, dtype=np.uint8))
    head, back = decoded(source)
    assert head == "data:image/jpeg;base64"
    assert not pixelated
    assert max(back.shape[:2]) == min(96, max(shape[:2]))
    assert abs(int(back.mean()) - 77) <= 2


@pytest.mark.parametrize("image", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4)), np.zeros((0, 3), np.uint8)])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match="expected uint8"):
        data_uri(image)


def cell(sheets, index, side):
    place = sheets.places[index]
    _, pixels = decoded(sheets.sources[place.sheet])
    return pixels[place.y * side : (place.y + 1) * side, place.x * side : (place.x + 1) * side]


@pytest.mark.parametrize("count", [1, 16, 257, 1001])
def test_tiny_images_come_back_from_their_place_on_a_sheet(count):
    rng = np.random.default_rng(count)
    images = rng.integers(256, size=(count, 9, 7), dtype=np.uint8)
    sheets = make_sheets(range(count), images.__getitem__)
    assert sheets.pixelated
    assert len(sheets.sources) == -(-count // 256)
    assert list(sheets.places) == list(range(count))
    assert sheets.places[count - 1] == Place((count - 1) // 256, (count - 1) % 16, (count - 1) % 256 // 16)
    for index in {0, count // 2, count - 1}:
        found = cell(sheets, index, 9)
        np.testing.assert_array_equal(found[:, 1:8], images[index])
        assert not found[:, 0].any()  # centred in a square


def test_the_middle_square_of_a_large_image_is_shown():
    image = np.zeros((120, 300, 3), np.uint8)
    image[:, 90:210] = 200
    sheets = make_sheets([5, 3], lambda index: image if index == 5 else image[:, ::-1])
    assert not sheets.pixelated
    for index in (5, 3):
        assert np.abs(cell(sheets, index, 96)[1:-1, 1:-1].astype(int) - 200).max() <= 8


def test_images_of_different_sizes_and_channels_share_a_sheet():
    shapes = [(4, 4), (8, 8, 3), (200, 100, 1), (31, 33, 3)]
    sheets = make_sheets(range(4), lambda i: np.full(shapes[i], 50 * (i + 1), np.uint8))
    assert set(sheets.places) == {0, 1, 2, 3}
    for i, (height, width, *_) in enumerate(shapes):
        found = cell(sheets, i, 96)
        assert found.shape == (96, 96, 3)
        middle = found[48 - min(height, 96) // 4 : 49, 48 - min(width, 96) // 4 : 49]
        assert abs(int(np.median(middle)) - 50 * (i + 1)) <= 4


def test_images_that_cannot_be_read_are_counted_and_have_no_place():
    def read(index):
        if index == 1:
            raise OSError("broken")
        return np.zeros((4, 4), np.float32) if index == 2 else np.zeros((4, 4), np.uint8)

    sheets = make_sheets(range(4), read)
    assert sheets.unreadable == 2
    assert list(sheets.places) == [0, 3]
    assert make_sheets([1], read).sources == []


def test_sheets_of_noise_are_compressed_until_they_fit(monkeypatch):
    monkeypatch.setattr(thumbnails, "_MOST_BYTES", 60_000)
    noise = np.random.default_rng(0).integers(256, size=(300, 32, 32, 3), dtype=np.uint8)
    sheets = make_sheets(range(300), noise.__getitem__)
    assert all(source.startswith("data:image/jpeg") for source in sheets.sources)
    assert sum(map(len, sheets.sources)) <= 80_000


def test_after_many_pixels_the_other_images_are_left(monkeypatch):
    monkeypatch.setattr(thumbnails, "_MOST_PIXELS", 100 * 100 * 3)
    sheets = make_sheets(range(9), lambda _: np.zeros((100, 100), np.uint8))
    assert (list(sheets.places), sheets.left) == ([0, 1, 2, 3], 5)


def test_without_a_reader_there_are_no_sheets():
    assert make_sheets([0, 1], None).places == {}
    assert make_sheets([], lambda _: np.zeros((4, 4), np.uint8)).sources == []
