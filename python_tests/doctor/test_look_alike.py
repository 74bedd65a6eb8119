import io

import numpy as np
import pytest
from PIL import Image

from sela_ext.doctor.hamming import count_bits
from sela_ext.doctor.look_alike import (
    CROPS,
    grid_of,
    hashes_of,
    rough_similarity,
    similarity,
    thumbs_of,
    usual_similarity,
)
from sela_ext.doctor.near import near_groups


def grids(pictures):
    return np.stack([grid_of(np.asarray(picture)) for picture in pictures])


def compressed(picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=50)
    return Image.open(file).convert("RGB")


def without_margin(picture, share, seed):
    rng = np.random.default_rng(seed)
    width, height = picture.size
    w, h = round(width * (1 - share)), round(height * (1 - share))
    left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    return picture.crop((left, top, left + w, top + h))


CHANGES = {
    "resized": lambda picture, seed: picture.resize((96, 80), Image.Resampling.BICUBIC),
    "compressed": lambda picture, seed: compressed(picture),
    "lighter": lambda picture, seed: picture.point(lambda v: min(255, int(v * 1.2))),
    "darker": lambda picture, seed: picture.point(lambda v: int(v * 0.7)),
    "grey": lambda picture, seed: picture.convert("L").convert("RGB"),
    "cropped": lambda picture, seed: without_margin(picture, 0.04, seed),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_and_nothing_else(pictures, change):
    copies = [CHANGES[change](picture, seed) for seed, picture in enumerate(pictures)]
    both = grids(pictures + copies)
    found = near_groups(hashes_of(both), thumbs_of(both)).groups
    expected = {(i, i + len(pictures)) for i in range(len(pictures))}
    pairs = {tuple(group.tolist()) for group in found}
    assert pairs <= expected
    assert len(pairs) >= 0.95 * len(expected)


def test_unrelated_pictures_are_no_duplicates(pictures):
    both = grids(pictures)
    assert near_groups(hashes_of(both), thumbs_of(both)).groups == []


def test_the_hash_does_not_see_brightness_and_contrast(pictures):
    some = grids(pictures[:5]).astype(np.float64)
    hashes = hashes_of(some.astype(np.uint8))
    changed = hashes_of((some // 2 + 40).astype(np.uint8))
    assert count_bits(hashes[:, 0] ^ changed[:, 0]).max() <= 4


def test_the_hash_of_a_crop_is_that_of_the_cut_picture():
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).resize((640, 640), Image.Resampling.BICUBIC)
    whole = hashes_of(grid_of(np.asarray(coarse)[..., np.newaxis])[np.newaxis])[0]
    for crop in (1, 5, 9, 10, 18):
        row, column = ((span - 1) % 3 for span in CROPS[crop])
        side = round(640 * (0.95 if crop < 10 else 0.9))
        top, left = (round(place * (640 - side) / 2) for place in (row, column))
        cut = np.asarray(coarse)[top : top + side, left : left + side, np.newaxis]
        assert count_bits(hashes_of(grid_of(cut)[np.newaxis])[:, 0] ^ whole[crop])[0] <= 4


def test_alignment_never_lowers_the_similarity(pictures):
    some = thumbs_of(grids(pictures[:8]))
    for crop in range(len(CROPS)):
        rough = rough_similarity(some[:4], some[4:], crop)
        assert all(similarity(some[i], some[i + 4], crop) >= rough[i] - 1e-5 for i in range(4))


def test_a_picture_is_like_itself_and_a_flat_one_like_nothing(pictures):
    thumb = thumbs_of(grids(pictures[:1]))[0]
    flat = np.full((16, 16), 128, np.uint8)
    assert similarity(thumb, thumb, 0) == pytest.approx(1, abs=1e-5)
    assert similarity(thumb, flat, 0) == 0
    assert similarity(flat, flat, 3) == 0


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 3000, 3), (3000, 1, 1), (31, 33, 1), (64, 64, 3)])
def test_pictures_of_any_shape_have_hashes(shape):
    grid = grid_of(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    assert grid.shape == (64, 64)
    assert hashes_of(grid[np.newaxis]).shape == (1, 19)


def test_pictures_with_one_ground_are_alike(pictures):
    ground = grids([pictures[0]] * 20).astype(int) + np.random.default_rng(0).integers(-9, 10, (20, 64, 64))
    assert usual_similarity(thumbs_of(np.clip(ground, 0, 255).astype(np.uint8))) > 0.9
    assert usual_similarity(thumbs_of(grids(pictures))) < 0.5


def test_more_is_asked_where_unrelated_pictures_are_alike(pictures):
    rng = np.random.default_rng(0)
    base = grids([pictures[0]]).astype(int)
    noise = np.kron(rng.integers(-40, 41, (300, 16, 16)), np.ones((1, 4, 4), int))
    alike = np.clip(base + noise, 0, 255).astype(np.uint8)
    found = near_groups(hashes_of(alike), thumbs_of(alike))
    assert found.threshold > 0.85
    assert sum(map(len, found.groups)) < 30


@pytest.mark.timeout(60)
def test_thousands_of_pictures_with_one_hash_are_one_group_and_found_soon(pictures):
    """The frames of a camera that stands still: all pairs would be twenty-five million, times four bands."""
    still, other = grids(pictures[:2])
    count = 5001
    many = np.repeat(still[np.newaxis], count, axis=0)
    many[np.arange(count), np.arange(count) % 64, 7] ^= 1
    many[77], many[4999] = other, other
    many[77, 5, 5] ^= 1
    hashes, thumbs = hashes_of(many), thumbs_of(many)
    assert len(np.unique(hashes[:, 0])) == 2
    found = near_groups(hashes, thumbs)
    assert found.proposed < 3 * count
    assert found.left_out == 0
    assert [len(rows) for rows in found.groups] == [count - 2, 2]
    assert found.groups[1].tolist() == [77, 4999]
