import numpy as np
import pytest

from sela_ext.doctor import hamming
from sela_ext.doctor.hamming import count_bits, near_pairs
from sela_ext.doctor.near import Union, groups_of


def random_hashes(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(2)


def brute(hashes, queries, distance):
    bits = count_bits(hashes[np.newaxis, np.newaxis, :] ^ queries[:, :, np.newaxis])
    return {(q, v, m) for q, v, m in np.argwhere(bits <= distance).tolist() if q != m}


def triples(pairs):
    return list(zip(pairs.query.tolist(), pairs.column.tolist(), pairs.match.tolist(), strict=True))


@pytest.mark.parametrize("count", [0, 1, 2, 31, 1001])
def test_all_pairs_up_to_three_bits_are_found(count):
    hashes = random_hashes(count)
    rng = np.random.default_rng(1)
    for row in range(0, count - 1, 2):  # neighbours that differ in 0 .. 3 bits
        flips = rng.choice(64, rng.integers(0, 4), replace=False).astype(np.uint64)
        hashes[row + 1] = hashes[row] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=np.uint64(0))
    queries = np.stack([hashes, random_hashes(count, 2)], axis=1)
    found = near_pairs(hashes, queries, 3)
    assert set(triples(found)) == brute(hashes, queries, 3)
    assert len(triples(found)) == len(set(triples(found)))
    assert found.left_out == 0


def test_most_pairs_of_seven_bits_are_found_and_none_beyond():
    hashes = random_hashes(2000)
    rng = np.random.default_rng(1)
    for row in range(0, 2000, 2):
        flips = rng.choice(64, 7, replace=False).astype(np.uint64)
        hashes[row + 1] = hashes[row] ^ np.bitwise_or.reduce(np.uint64(1) << flips)
    found = set(triples(near_pairs(hashes, hashes[:, np.newaxis], 7)))
    wanted = brute(hashes, hashes[:, np.newaxis], 7)
    assert found <= wanted
    assert len(found) > 0.3 * len(wanted)


def test_parts_do_not_change_what_is_found(monkeypatch):
    hashes = random_hashes(500) & np.uint64(0x00FF_00FF_00FF_00FF)
    whole = triples(near_pairs(hashes, hashes[:, np.newaxis], 9))
    monkeypatch.setattr(hamming, "_AT_ONCE", 7)
    assert triples(near_pairs(hashes, hashes[:, np.newaxis], 9)) == whole
    assert whole


def test_too_many_pairs_lower_the_distance():
    hashes = random_hashes(800) & np.uint64(0x0303_0303_0303_0303)
    free = near_pairs(hashes, hashes[:, np.newaxis], 8)
    held = near_pairs(hashes, hashes[:, np.newaxis], 8, most_pairs=len(free.query) // 10)
    assert held.distance < free.distance == 8
    assert len(held.query) <= len(free.query) // 10
    assert set(triples(held)) <= set(triples(free))


def test_too_many_comparisons_are_left_out_and_counted():
    hashes = np.concatenate([np.zeros(300, np.uint64), random_hashes(300)])
    hashes[-1] = hashes[-2]
    found = near_pairs(hashes, hashes[:, np.newaxis], 0, most_comparisons=4 * 5000)
    assert found.left_out == 4 * 300 * 300
    assert triples(found) == [(598, 0, 599), (599, 0, 598)]


def test_bits_are_counted_alike_with_and_without_numpy_2():
    values = np.concatenate([random_hashes(1001), np.array([0, 1, 2**64 - 1, 1 << 63], np.uint64)])
    expected = [bin(int(value)).count("1") for value in values]
    assert count_bits(values).tolist() == expected
    assert hamming._count_bits_by_halves(values).tolist() == expected


def test_unions_and_groups():
    union = Union(7)
    for pair in [(6, 2), (3, 5), (5, 2)]:
        union.join(*pair)
    assert [group.tolist() for group in union.groups()] == [[2, 3, 5, 6]]
    assert groups_of(np.array([], np.int64)) == []
    assert groups_of(np.arange(5)) == []


@pytest.mark.timeout(60)
def test_equal_hashes_beyond_the_limit_are_dropped_and_counted():
    hashes = np.full(120, 0x123456789ABCDEF0, np.uint64)
    found = near_pairs(hashes, np.repeat(hashes[:, np.newaxis], 19, axis=1), 10, most_pairs=1001)
    assert len(found.query) == 1001
    assert found.distance == 0
    assert found.left_out >= 120 * 119 * 19 - 1001
