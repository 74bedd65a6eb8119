import base64
import io

import numpy as np
import pytest
from PIL import Image

from sela_ext.report.contact_sheet import contact_sheet, data_uri


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


@pytest.mark.parametrize("n", [1, 31, 1001])
def test_the_most_confident_images_come_first(n):
    rng = np.random.default_rng(n)
    labels = rng.integers(-1, 5, size=n).astype(np.int32)
    confidence = rng.integers(0, 9, size=n).astype(np.float32) / 8
    sheet = contact_sheet(labels, confidence, 5, str, None)
    assert {c.number for c in sheet.clusters} == set(labels[labels >= 0].tolist())
    assert sheet.empty == 5 - len(sheet.clusters)
    for cluster in sheet.clusters:
        members = np.flatnonzero(labels == cluster.number)
        best = sorted(members.tolist(), key=lambda i: (-confidence[i], i))[:12]
        assert [image.index for image in cluster.images] == best
        assert cluster.size == members.size
        assert cluster.confidence == pytest.approx(confidence[members].mean())
    means = [cluster.confidence for cluster in sheet.clusters]
    assert means == sorted(means, reverse=True)


def test_of_many_clusters_clear_and_muddled_ones_are_shown():
    labels = np.arange(1003, dtype=np.int32).repeat(2)
    confidence = (labels / 1003).astype(np.float32)
    sheet = contact_sheet(labels, confidence, 1010, str, None)
    shown = [cluster.number for cluster in sheet.clusters]
    assert len(set(shown)) == 40
    assert (shown[0], shown[-1]) == (1002, 0)
    assert (sheet.left_out, sheet.empty) == (963, 7)
    assert sorted(number for number, _, _ in sheet.all_clusters) == list(range(1010))
    assert {number: size for number, size, _ in sheet.all_clusters if size != 2} == dict.fromkeys(range(1003, 1010), 0)


def test_images_that_cannot_be_read_are_counted_and_named():
    def read(index):
        if index == 1:
            raise OSError("broken")
        return np.zeros((4, 4), np.float32) if index == 2 else np.zeros((4, 4), np.uint8)

    sheet = contact_sheet(np.zeros(4, np.int32), np.ones(4, np.float32), 1, lambda i: f"n{i}", read)
    images = sheet.clusters[0].images
    assert sheet.unreadable == 2
    assert [image.name for image in images if not image.source] == ["n1", "n2"]


def test_unknown_confidence_is_no_error():
    sheet = contact_sheet(np.array([1, 0, 1], np.int32), np.full(3, np.nan, np.float32), 2, str, None)
    assert [cluster.number for cluster in sheet.clusters] == [0, 1]
    assert np.isnan(sheet.clusters[0].confidence)


def test_no_labelled_image_makes_an_empty_sheet():
    sheet = contact_sheet(np.full(3, -1, np.int32), np.zeros(3, np.float32), 4, str, None)
    assert (sheet.clusters, sheet.left_out, sheet.empty) == ([], 0, 4)
