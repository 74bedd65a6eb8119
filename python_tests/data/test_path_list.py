import os
from pathlib import Path

import numpy as np
import pytest

from sela_ext.data import open_source
from sela_ext.data.path_list import PathList
from sela_ext.errors import DataError

AWKWARD = ["a.jpg", "", "ä/ö.png", os.fsdecode(b"caf\xe9.jpg"), "b" * 300, "日本/語.jpg", "c\n.gif"]


@pytest.mark.parametrize("repeats", [1, 31, 6000])
def test_paths_come_back_as_they_were(repeats):
    expected = [f"{i}/{path}" if path else path for i in range(repeats) for path in AWKWARD]
    paths = PathList(expected)
    assert len(paths) == len(expected)
    assert list(paths) == expected
    assert [paths[i] for i in range(len(paths))] == expected
    assert paths[-1] == expected[-1]
    assert paths[2:5] == expected[2:5]
    assert paths[::-1] == expected[::-1]
    assert "c\n.gif" not in PathList(["c"])


def test_other_kinds_of_paths_become_strings():
    assert list(PathList([Path("a/b.jpg"), "c.png"])) == ["a/b.jpg", "c.png"]
    assert list(PathList([])) == []


def test_an_index_out_of_range_is_refused():
    paths = PathList(["a", "b"])
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"expected an index below 2, found {index}"):
            paths[index]


@pytest.mark.parametrize("prefix", ["", "/data/ä/"])
def test_paths_are_joined_with_a_prefix_and_a_null_byte(prefix):
    paths = PathList(AWKWARD)
    rows = np.array([6, 1, 3, 3, 0])
    expected = b"".join(os.fsencode(prefix + AWKWARD[row]) + b"\0" for row in rows)
    assert paths.joined(rows, os.fsencode(prefix)) == expected
    assert paths.joined(np.array([1]), os.fsencode(prefix)) == os.fsencode(prefix) + b"\0"
    assert paths.joined(np.zeros(0, np.int64), os.fsencode(prefix)) == b""
    for row in (-1, len(AWKWARD)):
        with pytest.raises(IndexError, match=f"found {row}"):
            paths.joined(np.array([row]))


def test_absolute_paths_are_noticed():
    assert not PathList(AWKWARD).any_absolute()
    assert not PathList(["a", ""]).any_absolute()
    assert not PathList([]).any_absolute()
    assert PathList(["a", "", "/b", ""]).any_absolute()


def test_memory_is_little_more_than_the_letters():
    paths = [f"/data/images/n{i % 1000:08d}/{i:07d}.JPEG" for i in range(20_000)]
    assert PathList(paths).nbytes < sum(map(len, paths)) + 8 * len(paths) + 64


def test_a_null_character_is_an_error_that_says_where():
    with pytest.raises(DataError, match="data: expected paths without null characters, found one at position 20001"):
        open_source([*["a.jpg"] * 20_001, "b\0c.jpg"])


def test_names_are_made_when_they_are_asked_for(tmp_path):
    source = open_source([str(tmp_path / f"{i}.jpg") for i in range(5)])
    assert source.name(3) == str(tmp_path / "3.jpg")
    part = source.subset([4, 2])
    assert part.name(1) == str(tmp_path / "2.jpg")
    assert list(part.iter_names()) == part.names == [source.names[4], source.names[2]]
    labelled = open_source(part, labels=[1, 0])
    assert labelled.name(0) == part.names[0]
    assert list(labelled.iter_names()) == part.names
