import errno
import os
import resource
import tarfile
import time
import tracemalloc

import numpy as np
import pytest

from sela_ext.data import find_eval_source, open_source, webdataset
from sela_ext.data.decode import decode_image
from sela_ext.data.webdataset import expand_braces
from sela_ext.errors import DataError, ResourceError


def write(path, files, members, **options):
    path.write_bytes(files.tar_bytes(members, **options))
    return path


@pytest.fixture
def image(files):
    return files.encode(files.pictures(1)[0][0])


def test_images_are_slices_of_the_archive(tmp_path, files):
    members = files.samples(5, kind="PNG") | files.samples(4, 1, 100)
    source = open_source(write(tmp_path / "a.tar", files, members))
    assert source.encoded
    assert source.names == [name for name in members if not name.endswith(".cls")]
    assert source.labels.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3]
    for i, name in enumerate(source.names):
        found = source.locate(i)
        assert found.path is None
        assert isinstance(found.data, memoryview)
        assert found.data.readonly
        assert bytes(found.data) == members[name]
        np.testing.assert_array_equal(source.read(i), decode_image(members[name], name))


def test_shards_follow_one_another(tmp_path, files):
    folder = files.write_shards(tmp_path / "shards")
    source = open_source(folder)
    assert len(source) == 24
    assert source.names[0] == "train-000.tar/000000.jpg"
    assert source.names[-1] == "train-001.tar/001011.jpg"
    assert source.name(12) == "train-001.tar/001000.jpg"
    judged = find_eval_source(folder)
    assert judged.names[0] == "002000.jpg"
    pattern = open_source(str(folder / "train-{000..001}.tar"))
    assert pattern.fingerprint() == source.fingerprint()
    assert find_eval_source(str(folder / "train-{000..001}.tar")).names == judged.names
    assert len(open_source(str(folder / "{train-000,test-002}.tar"))) == 24
    (folder / "test-002.tar").unlink()
    assert find_eval_source(folder) is None
    assert len(open_source(folder)) == 24


def test_shards_may_lie_in_folders_of_their_split(tmp_path, files):
    files.write_shards(tmp_path / "x" / "train", ("a", "b"))
    assert len(open_source(tmp_path / "x")) == 24
    assert find_eval_source(tmp_path / "x") is None
    files.write_shards(tmp_path / "x" / "val", ("c",))
    assert len(open_source(tmp_path / "x")) == 24
    assert len(find_eval_source(tmp_path / "x")) == 12
    files.write_shards(tmp_path / "y" / "data")
    assert len(open_source(tmp_path / "y")) == 24
    assert len(find_eval_source(tmp_path / "y")) == 12


def test_patterns_are_expanded():
    assert expand_braces("a.tar") == ["a.tar"]
    assert expand_braces("{a,b}-{9..11}.tar") == [f"{w}-{n}.tar" for w in "ab" for n in (9, 10, 11)]
    for pattern in ("{3..1}.tar", "{0..999999999}.tar", "{0..999}{0..999}.tar"):
        with pytest.raises(DataError, match="expected"):
            expand_braces(pattern)


def test_a_pattern_with_a_missing_archive_names_it(tmp_path, files):
    folder = files.write_shards(tmp_path / "shards")
    with pytest.raises(DataError, match=r"train-002\.tar: cannot be read: No such file"):
        open_source(str(folder / "train-{000..002}.tar"))


def test_archives_beside_images_or_folders_are_not_the_data(tmp_path, files):
    folder = files.write_shards(tmp_path / "shards")
    files.write_images(folder / "unpacked", 3)
    assert open_source(folder).kind == "folder"


@pytest.mark.parametrize(
    ("labels", "wanted", "names"),
    [
        ({"a.cls": b"3", "b.cls": b" 12\n"}, [3, 12], None),
        ({"a.cls": b"dog", "b.cls": b"cat"}, [1, 0], ["cat", "dog"]),
        ({"a.cls": b"7"}, [7, -1], None),
        ({"a.json": b'{"label": 4}', "b.json": b'{"cls": 5}'}, [4, 5], None),
        ({"a.json": b'{"class": "dog", "width": 3}', "b.json": b'{"caption": "x"}'}, [0, -1], ["dog"]),
        ({"a.cls": b"1", "a.json": b'{"label": 9}', "b.json": b'{"label": 2}'}, [1, 2], None),
        ({"a.json": b"[1]", "b.json": b'{"label": [1]}'}, None, None),
        ({"a.txt": b"a dog"}, None, None),
    ],
)
def test_labels_stand_beside_the_images(tmp_path, files, image, labels, wanted, names):
    members = {"a.jpg": image, "b.jpg": image, **labels}
    source = open_source(write(tmp_path / "a.tar", files, dict(sorted(members.items()))))
    assert (None if source.labels is None else source.labels.tolist()) == wanted
    assert source.class_names == names


def test_folders_are_classes_where_no_label_stands_beside(tmp_path, files, image):
    source = open_source(write(tmp_path / "a.tar", files, {"./dog/1.png": image, "./cat/x/2.png": image}))
    assert source.labels.tolist() == [1, 0]
    assert source.class_names == ["cat", "dog"]
    source = open_source(write(tmp_path / "b.tar", files, {"all/1.png": image, "all/2.png": image}))
    assert source.labels is None


def test_several_images_of_a_sample_share_its_label(tmp_path, files, image):
    members = {"a.left.jpg": image, "a.right.png": image, "a.cls": b"2", "b.jpg": image, "b.cls": b"1"}
    source = open_source(write(tmp_path / "a.tar", files, members))
    assert source.names == ["a.left.jpg", "a.right.png", "b.jpg"]
    assert source.labels.tolist() == [2, 2, 1]


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"a.cls": b"1"}, "expected the image of a.cls beside it, found none; write the files"),
        ({"a.jpg": b"x", "b.jpg": b"x", "a.cls": b"1"}, "expected the image of a.cls beside it"),
        ({"a.jpg": b"x", "a.cls": b""}, "a.cls: expected a label"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, "a.cls: expected a label, an integer >= 0"),
        ({"a.jpg": b"x", "a.cls": b"\xff"}, "a.cls: expected UTF-8"),
        ({"a.jpg": b"x", "a.cls": b"1" * 5000}, "a.cls: expected at most 4096 bytes, found 5000"),
        ({"a.jpg": b"x", "a.cls": b"99999999999"}, "expected labels in 0..2147483647"),
        ({"a.jpg": b"x", "a.json": b"{"}, "a.json: expected JSON"),
        ({"a.jpg": b"x", "a.json": b'{"label": 1' + b"0" * 30 + b"}"}, "expected labels in 0..2147483647"),
        ({"a.jpg": b"x", "a.json": b"[" * 100_000}, "a.json: expected JSON"),
        ({"a.txt": b"x", "b.tar": b"x"}, r"expected images .* in the archive, found none; archives within"),
        ({}, "found none|expected"),
    ],
)
def test_archives_that_make_no_sense_are_refused(tmp_path, files, members, match):
    with pytest.raises(DataError, match=match):
        webdataset.open_tars([write(tmp_path / "a.tar", files, members)])


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_hostile_names_are_refused_and_nothing_is_written(tmp_path, files, name):
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    path = write(folder / "a.tar", files, {"a.jpg": b"x", name: b"root::0:0"})
    with pytest.raises(DataError, match="expected names within the archive"):
        open_source(path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.tar"]


def test_links_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"found a symbolic link, a\.jpg; write the archive without"):
        open_source(path)


def test_a_compressed_archive_is_refused_with_advice(tmp_path, files):
    files.write_archive(tmp_path / "a.tar.gz", "x", {"a.jpg": b"x"})
    with pytest.raises(DataError, match=r"gunzip for a \.tar of images"):
        open_source(tmp_path / "a.tar.gz")


def test_damaged_images_are_named_when_they_are_read(tmp_path, files):
    source = open_source(write(tmp_path / "a.tar", files, {"a.jpg": b"text", "b.jpg": b""}))
    with pytest.raises(DataError, match=r"a\.tar: a\.jpg: not an image"):
        source.read(0)
    with pytest.raises(DataError, match=r"a\.tar: b\.jpg: empty file"):
        source.read(1)


def test_an_archive_that_changed_is_noticed(tmp_path, files, image):
    path = write(tmp_path / "a.tar", files, {"a.jpg": image})
    source = open_source(path)
    write(path, files, {"a.jpg": image * 100})
    with pytest.raises(DataError, match="changed while it is in use"):
        source.read(0)


def test_want_of_file_handles_is_no_fault_of_an_archive(tmp_path, files, image, monkeypatch):
    source = open_source(write(tmp_path / "a.tar", files, {"a.jpg": image}))

    def none_left(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(webdataset.mmap, "mmap", none_left)
    with pytest.raises(ResourceError, match=r"a\.tar: cannot be read again: Too many open files; raise the limit"):
        source.read(0)


def test_many_shards_need_few_file_handles(tmp_path, files, monkeypatch):
    monkeypatch.setattr(webdataset, "MOST_MAPPED", 4)
    images, _ = files.pictures(40)
    for i in range(40):
        write(tmp_path / f"{i:03d}.tar", files, {f"{i}.png": files.encode(images[i])})
    source = open_source(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    kept = source.locate(0).data
    for i in np.random.default_rng(0).permutation(40):
        np.testing.assert_array_equal(source.read(int(i)), images[i])
    assert len(os.listdir("/proc/self/fd")) <= before + 6
    assert bytes(kept) == files.encode(images[0])  # a slice outlives its map's turn
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > webdataset.MOST_MAPPED


def test_names_that_are_not_utf8_are_made_printable(tmp_path, files, image):
    source = open_source(write(tmp_path / "a.tar", files, {"\udce9.png": image}, format=tarfile.GNU_FORMAT))
    assert source.names == ["\\xe9.png"]
    assert source.read(0).shape == (32, 32, 3)


@pytest.mark.slow
def test_a_hundred_thousand_images_are_indexed_in_little_time_and_memory(tmp_path):
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        for i in range(100_000):
            for suffix, size in (("jpg", 600), ("cls", 1)):
                info = tarfile.TarInfo(f"{i:07d}.{suffix}")
                info.size = size
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
                file.write(b"7".ljust(-(-size // 512) * 512, b"\0"))
        file.write(bytes(1024))
    begin = time.process_time()
    source = open_source(path)
    seconds = time.process_time() - begin
    assert len(source) == 100_000
    assert (source.labels == 7).all()
    assert seconds < 10
    tracemalloc.start()
    again = webdataset.open_tars([path])
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(again) == 100_000
    assert kept < 6e6
    assert most < 30e6
