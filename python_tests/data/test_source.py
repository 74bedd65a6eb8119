import numpy as np
import pytest
from PIL import Image

from sela_ext.data import open_source
from sela_ext.data.folder import FileSource
from sela_ext.data.source import Located, Source
from sela_ext.errors import DataError
from sela_ext.kernels import JoinedPaths


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


def test_the_paths_of_a_batch_come_together(folder):
    source = open_source(open_source(folder), labels=[3, 2, 1, 0])
    paths = [f"{folder}/{i}.png\0".encode() for i in range(4)]
    found = source.locate_all(np.array([2, 0, 2]))
    assert found.items == JoinedPaths(paths[2] + paths[0] + paths[2])
    assert len(found.items) == 3
    assert found.indexes is None
    assert source.subset([3, 1]).locate_all(np.array([1, 0])).items.text == paths[1] + paths[3]
    with pytest.raises(IndexError, match=r"expected rows in 0\.\.3, found 1\.\.4"):
        source.locate_all(np.array([1, 4]))


def test_paths_that_are_absolute_keep_their_beginning(folder):
    source = FileSource(["1.png", str(folder / "2.png"), "3.png"], kind="paths", root="/elsewhere")
    found = source.locate_all(np.array([1, 2]))
    assert found.items == [str(folder / "2.png"), "/elsewhere/3.png"] == [source.locate(i).path for i in (1, 2)]


class Encoded(Source):
    encoded, names = True, ["a", "b", "c"]

    def __len__(self):
        return 3

    def read(self, index):
        raise NotImplementedError

    def locate(self, index):
        if index == 0:
            return Located(path="a.jpg")
        return Located(data=b"x" * index, index=b"i" if index == 2 else None)


def test_other_sources_are_asked_for_one_image_after_the_other():
    found = Encoded().locate_all(np.array([2, 0, 1]))
    assert found.items == [b"xx", "a.jpg", b"x"]
    assert found.indexes == [b"i", None, None]
    assert Encoded().locate_all(np.array([0, 1])).indexes is None


def test_a_subset_of_an_array_is_the_array_and_its_rows(tmp_path):
    images = np.arange(5 * 48, dtype=np.uint8).reshape(5, 4, 4, 3)
    np.save(tmp_path / "images.npy", images)
    source = open_source(tmp_path / "images.npy")
    array, rows = source.array_rows
    assert array is source.array
    assert rows is None
    part = open_source(source.subset([4, 1, 1, 0]), labels=[0, 1, 2, 3]).subset([3, 0])
    array, rows = part.array_rows
    assert array is source.array
    assert rows.tolist() == [0, 4]
    assert part.array is None
    for i in range(2):
        np.testing.assert_array_equal(array[rows[i]], part.read(i))


def test_images_of_no_array_have_no_rows(folder):
    assert open_source(folder).array_rows is None
    assert open_source(folder).subset([2]).array_rows is None


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
