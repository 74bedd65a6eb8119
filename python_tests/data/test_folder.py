import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from sela_ext.data import find_eval_source, open_source
from sela_ext.errors import DataError


def put(path, colour=(200, 30, 60), size=(6, 4), kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, kind)


def test_images_directly_in_the_folder_make_it_unlabelled(tmp_path):
    for name in ("b.png", "a.png", "deep/er/c.png", "other/d.png"):
        put(tmp_path / name)
    source = open_source(tmp_path)
    assert source.names == ["a.png", "b.png", "deep/er/c.png", "other/d.png"]
    assert source.labels is None
    assert source.class_names is None
    assert source.array is None
    assert source.image_size is None
    assert source.read(0).shape == (4, 6, 3)
    assert "4 images" in source.describe()


def test_first_level_folders_are_classes(tmp_path):
    for name in ("dog/2.png", "cat/x/1.png", "dog/10.png", "cat-big/3.png"):
        put(tmp_path / name)
    source = open_source(str(tmp_path))
    assert source.class_names == ["cat", "cat-big", "dog"]
    assert source.names == ["cat/x/1.png", "cat-big/3.png", "dog/10.png", "dog/2.png"]
    assert source.labels.tolist() == [0, 1, 2, 2]


def test_a_single_folder_is_not_a_class(tmp_path):
    put(tmp_path / "all/a.png")
    assert open_source(tmp_path).labels is None


def test_labels_given_replace_the_class_folders(tmp_path):
    put(tmp_path / "a/1.png")
    put(tmp_path / "b/1.png")
    assert open_source(tmp_path, labels=[5, -1]).labels.tolist() == [5, -1]
    with pytest.raises(DataError, match="one per image, 2, found 3"):
        open_source(tmp_path, labels=[1, 2, 3])


def test_train_and_test_folders_are_divided(tmp_path):
    for name in (
        "train/cat/1.png",
        "train/dog/1.png",
        "train/dog/2.png",
        "test/dog/9.png",
        "test/emu/9.png",
        "val/7.png",
    ):
        put(tmp_path / name)
    source = open_source(tmp_path)
    assert source.names == ["cat/1.png", "dog/1.png", "dog/2.png"]
    assert source.class_names == ["cat", "dog"]
    held_out = find_eval_source(tmp_path)
    assert held_out.names == ["dog/9.png", "emu/9.png"]
    assert held_out.class_names == ["cat", "dog", "emu"]
    assert held_out.labels.tolist() == [1, 2]


def test_labelled_evaluation_images_are_preferred(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "test/1.png", "val/cat/3.png", "val/dog/4.png"):
        put(tmp_path / name)
    assert find_eval_source(tmp_path).names == ["cat/3.png", "dog/4.png"]


def test_a_folder_with_images_of_its_own_is_not_divided(tmp_path):
    for name in ("train/a.png", "test/b.png", "c.png"):
        put(tmp_path / name)
    assert len(open_source(tmp_path)) == 3
    assert find_eval_source(tmp_path) is None


def test_an_empty_test_folder_gives_no_evaluation_images(tmp_path):
    put(tmp_path / "train/a.png")
    (tmp_path / "test").mkdir()
    assert len(open_source(tmp_path)) == 1
    assert find_eval_source(tmp_path) is None


def test_content_decides_where_the_suffix_is_unknown(tmp_path):
    put(tmp_path / "a.dat")
    put(tmp_path / "b")
    put(tmp_path / "c.jpg", kind="PNG")  # a PNG under a wrong name
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "empty.csv").touch()
    source = open_source(tmp_path)
    assert source.names == ["a.dat", "b", "c.jpg"]
    for i in range(3):
        assert source.read(i)[0, 0].tolist() == [200, 30, 60]


def test_a_damaged_image_is_listed_and_named_when_read(tmp_path):
    put(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("text")
    (tmp_path / "c.jpeg").touch()
    source = open_source(tmp_path)
    assert source.names == ["a.png", "b.jpg", "c.jpeg"]
    with pytest.raises(DataError, match=r"b\.jpg: not an image"):
        source.read(1)
    with pytest.raises(DataError, match=r"c\.jpeg: empty file"):
        source.read(2)


def test_hidden_files_and_folders_are_ignored(tmp_path):
    for name in ("a.png", ".b.png", ".cache/c.png", "sub/._d.png"):
        put(tmp_path / name)
    assert open_source(tmp_path).names == ["a.png"]


def test_a_pipe_is_not_opened(tmp_path):
    put(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "c")
    assert open_source(tmp_path).names == ["a.png"]
    listed = open_source([tmp_path / "a.png", tmp_path / "b.png"])
    with pytest.raises(DataError, match="not a regular file"):
        listed.read(1)


def test_want_of_file_handles_is_an_error_and_no_image_is_missed(tmp_path, monkeypatch):
    put(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a")

    def refuse(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("sela_ext.data.folder.open_regular", refuse)
    with pytest.raises(DataError, match="cannot be listed: Too many open files"):
        open_source(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path / "data/real/a.png")
    put(tmp_path / "elsewhere/b.png")
    (tmp_path / "data/real/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/self").symlink_to(tmp_path / "data/self")
    (tmp_path / "data/dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "data/aa").symlink_to(tmp_path / "data/real")  # visited under its own name
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/one.png").symlink_to(tmp_path / "elsewhere/b.png")
    assert open_source(tmp_path / "data").names == ["linked/b.png", "one.png", "real/a.png"]


# D7
def test_no_image_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path.name}: expected JPEG.*found none"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="found none"):
        open_source(tmp_path)


def test_a_name_that_is_not_utf8_is_made_printable(tmp_path):
    put(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xe9.png")
    source = open_source(tmp_path)
    assert source.names == ["\\xe9.png"]
    assert source.read(0).shape == (4, 6, 3)
    assert source.fingerprint()["first_names"] == ["\\xe9.png"]


def test_a_list_of_paths_keeps_its_order_and_names(tmp_path):
    put(tmp_path / "a.png", (1, 2, 3))
    put(tmp_path / "b.png", (4, 5, 6))
    paths = [tmp_path / "b.png", str(tmp_path / "a.png"), tmp_path / "b.png"]
    source = open_source(paths, labels=[1, 0, 1])
    assert source.names == [str(path) for path in paths]
    assert [source.read(i)[0, 0].tolist() for i in range(3)] == [[4, 5, 6], [1, 2, 3], [4, 5, 6]]
    assert source.labels.tolist() == [1, 0, 1]


def test_the_fingerprint_follows_names_and_sizes_and_not_times(tmp_path):
    put(tmp_path / "a/1.png")
    put(tmp_path / "a/2.png")
    first = open_source(tmp_path).fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert first["count"] == 2
    assert first["first_names"] == ["a/1.png", "a/2.png"]
    os.utime(tmp_path / "a/1.png", (1, 1))
    assert open_source(tmp_path).fingerprint() == first
    put(tmp_path / "a/2.png", size=(50, 70))
    resized = open_source(tmp_path).fingerprint()
    assert resized != first
    os.rename(tmp_path / "a/2.png", tmp_path / "a/3.png")
    assert open_source(tmp_path).fingerprint()["names"] != resized["names"]


def test_a_subset_of_a_folder_reads_through(tmp_path):
    for i in range(4):
        put(tmp_path / f"{'ab'[i % 2]}/{i}.png", (i, i, i))
    source = open_source(tmp_path)
    part = source.subset([3, 0])
    assert part.names == [source.names[3], source.names[0]]
    assert part.labels.tolist() == [1, 0]
    assert part.class_names == ["a", "b"]
    np.testing.assert_array_equal(part.read(1), source.read(0))


def test_small_images_are_decoded_once_and_large_ones_every_time(tmp_path):
    put(tmp_path / "large.png", size=(200, 200))
    put(tmp_path / "small.png", size=(100, 100))
    source = open_source(tmp_path)
    small, large = source.read(1), source.read(0)
    assert source.read(1) is small
    assert not small.flags.writeable
    np.testing.assert_array_equal(source.read(0), large)
    assert source.read(0) is not large


def test_the_room_for_decoded_images_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("sela_ext.data.folder.CACHE_BYTES", 200)
    for i in range(4):
        put(tmp_path / f"{i}.png")  # 72 bytes each
    source = open_source(tmp_path)
    first = [source.read(i) for i in range(4)]
    assert [source.read(i) is first[i] for i in range(4)] == [True, True, False, False]
