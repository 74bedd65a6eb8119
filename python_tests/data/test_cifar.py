import gzip
import os
import pickle
import tarfile

import numpy as np
import pytest

from sela_ext.data import find_eval_source, open_source
from sela_ext.errors import DataError

VERSIONS = ["cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary"]


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


def test_images_labels_and_class_names_are_those_of_the_files(tmp_path, files, version):
    folder = files.write_files(tmp_path / version, files.cifar_files(version))
    source = open_source(folder)
    ten = version.startswith("cifar-10-")
    seeds = range(5) if ten else [0]
    wanted = [files.pictures(6 if ten else 24, seed=seed) for seed in seeds]
    np.testing.assert_array_equal(source.array, np.concatenate([images for images, _ in wanted]))
    np.testing.assert_array_equal(source.labels, np.concatenate([labels for _, labels in wanted]))
    assert source.class_names == [f"class {i}" for i in range(10 if ten else 100)]
    assert source.array.flags.c_contiguous
    judged = find_eval_source(folder)
    np.testing.assert_array_equal(judged.array, files.pictures(6, seed=5 if ten else 1)[0])


def test_the_folder_around_the_archives_folder_will_do(tmp_path, files, version):
    files.write_files(tmp_path / version, files.cifar_files(version))
    assert open_source(tmp_path).kind == ("cifar-10" if "10-" in version else "cifar-100")
    assert len(find_eval_source(tmp_path)) == 6


def test_single_files_are_opened(tmp_path, files, version):
    written = files.cifar_files(version)
    folder = files.write_files(tmp_path / version, written)
    for name in written:
        if "meta" in name or "names" in name:
            continue
        source = open_source(folder / name)
        assert source.kind == version.rpartition("-")[0].removesuffix("-batches")
        assert len(source) == (6 if "batch" in name or "test" in name else 24)
        assert source.class_names is not None


def test_a_pickle_of_another_name_is_recognised(tmp_path, files):
    (tmp_path / "whatever.pkl").write_bytes(files.cifar_files("cifar-100-python")["train"])
    assert open_source(tmp_path / "whatever.pkl").kind == "cifar-100"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_the_archive_is_read_in_place(tmp_path, files, version, mode):
    written = files.cifar_files(version)
    path = files.write_archive(tmp_path / "archive", version, written, mode)
    folder = files.write_files(tmp_path / version, written)
    for read in (open_source, find_eval_source):
        archive, unpacked = read(path), read(folder)
        np.testing.assert_array_equal(archive.array, unpacked.array)
        np.testing.assert_array_equal(archive.labels, unpacked.labels)
        assert archive.class_names == unpacked.class_names
    assert not any(path.suffix for path in tmp_path.iterdir())


def test_a_missing_batch_is_named(tmp_path, files):
    folder = files.write_files(tmp_path / "x", files.cifar_files("cifar-10-batches-py"))
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="found no data_batch_3; download it again"):
        open_source(folder)


def test_class_names_may_be_missing(tmp_path, files):
    folder = files.write_files(tmp_path / "x", files.cifar_files("cifar-10-batches-py"))
    (folder / "batches.meta").unlink()
    assert open_source(folder).class_names is None


def test_files_called_train_and_test_alone_are_not_cifar(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).write_text("something else")
    with pytest.raises(DataError, match="found none"):
        open_source(tmp_path)


def test_a_file_cut_anywhere_is_refused_and_so_are_surplus_bytes(tmp_path, files, version):
    name = next(iter(files.cifar_files(version)))
    data = files.cifar_files(version, 1)[name]
    image = 3072 + version.count("bin") + ("100-binary" in version)
    path = tmp_path / name
    for size in [*range(1, min(len(data), 400)), *range(len(data) - 60, len(data)), len(data) + 1]:
        if "bin" in version and size % image == 0:
            continue
        path.write_bytes((data + b"\0")[:size])
        with pytest.raises(DataError, match=name):
            open_source(path)


@pytest.mark.parametrize("name", ["data_batch_1.bin", "train.bin"])
def test_labels_out_of_range_are_refused(tmp_path, files, name):
    ten = name.startswith("data")
    data = bytearray(files.cifar_files("cifar-10-batches-bin" if ten else "cifar-100-binary")[name])
    data[0 if ten else 3075] = 10 if ten else 100
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}: expected labels in 0\.\.{9 if ten else 99}, found"):
        open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({b"labels": [0, 1, 10]}, r"expected labels in 0\.\.9, found 0\.\.10"),
        ({b"labels": [0, 1, -1]}, r"expected labels in 0\.\.9"),
        ({b"labels": [0, 1]}, "expected 3 labels, one per image, found 2"),
        ({b"labels": [0, 1, b"x"]}, "a list of integers"),
        ({b"labels": b"abc"}, "a list of integers, found bytes"),
        ({b"data": np.zeros((3, 3071), np.uint8)}, r"expected data of shape \[n, 3072\], found \[3, 3071\]"),
        ({b"data": np.zeros((0, 3072), np.uint8)}, "expected data of shape"),
        ({b"data": np.zeros(9216, np.uint8)}, "expected data of shape"),
        ({b"data": [1, 2]}, "found list"),
    ],
)
def test_batches_that_hold_something_else_are_refused(tmp_path, files, change, match):
    batch = {b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 1, 2], **change}
    (tmp_path / "data_batch_1").write_bytes(files.python2_pickle(batch))
    with pytest.raises(DataError, match=match):
        open_source(tmp_path / "data_batch_1")


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["data_batch_1", "batches.meta", "other.pkl"])
def test_a_batch_that_runs_a_command_is_refused(tmp_path, files, place):
    folder = files.write_files(tmp_path / "x", files.cifar_files("cifar-10-batches-py"))
    (folder / place).write_bytes(pickle.dumps({b"data": Command(tmp_path / "executed")}, 2))
    with pytest.raises(DataError, match=r"asks for (posix|nt)\.system, which no data file needs; nothing was executed"):
        open_source(folder / place if place == "other.pkl" else folder)
    assert not (tmp_path / "executed").exists()


def test_archives_that_are_damaged_or_hold_something_else_are_refused(tmp_path, files):
    path = files.write_archive(tmp_path / "a.tar.gz", "x", {"y": b"z"})
    with pytest.raises(DataError, match="expected CIFAR's archive or IDX files in gzip, found another"):
        open_source(path)
    whole = files.write_archive(tmp_path / "b.tar.gz", VERSIONS[0], files.cifar_files(VERSIONS[0], 1)).read_bytes()
    for size in np.linspace(3, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            open_source(path)
    files.write_archive(path, VERSIONS[0], {"data_batch_1": files.cifar_files(VERSIONS[0])["data_batch_1"]})
    with pytest.raises(DataError, match="found no data_batch_2"):
        open_source(path)


def test_an_archive_that_claims_a_huge_member_is_refused(tmp_path):
    info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    info.size = 1 << 40
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf() + bytes(1 << 16)))
    with pytest.raises(DataError, match="lying header"):
        open_source(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    with path.open("wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(DataError, match="expected at most 268435456 bytes"):
        open_source(path)
