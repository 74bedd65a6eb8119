import numpy as np
import pytest
from PIL import Image

from sela_ext.data import open_source
from sela_ext.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        Image.new("RGB", (6, 4), (i, i, i)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_files_are_located_by_their_paths(folder):
    source = open_source(folder)
    assert source.encoded
    assert [source.locate(i).path for i in range(4)] == [str(folder / f"{i}.png") for i in range(4)]
    assert source.locate(0).data is None
    assert source.locate(0).index is None


def test_labels_and_subsets_pass_locations_through(folder):
    source = open_source(open_source(folder), labels=[3, 2, 1, 0])
    assert source.encoded
    part = source.subset([3, 1])
    assert part.encoded
    assert [part.locate(i).path for i in range(2)] == [str(folder / "3.png"), str(folder / "1.png")]
    assert part.subset([1]).locate(0).path == str(folder / "1.png")


def test_pixels_in_memory_have_no_location():
    source = open_source(np.zeros((3, 4, 4), np.uint8))
    assert not source.encoded
    assert not source.subset([1]).encoded
    with pytest.raises(DataError, match="expected encoded images, found pixels of image 2"):
        source.locate(2)


def test_paths_that_name_nothing_are_errors_that_say_so(tmp_path):
    with pytest.raises(DataError, match=r'found an empty path; give "." for this folder'):
        open_source("")
    with pytest.raises(DataError, match="aaa: cannot be opened: File name too long"):
        open_source("a" * 5000)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match=r"loop: (no such file|cannot be opened)"):
        open_source(tmp_path / "loop")
