import struct
import zlib

import numpy as np
import pytest
import scipy.io

from sela_ext.data import find_eval_source, open_source
from sela_ext.data.svhn import open_svhn
from sela_ext.errors import DataError


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_images_and_digits_are_those_of_the_file(tmp_path, files, compress, order):
    folder = files.write_svhn(tmp_path / "x", compress=compress, order=order)
    images, labels = files.pictures()
    source = open_source(folder)
    np.testing.assert_array_equal(source.array, images)
    assert source.labels.tolist() == labels.tolist()  # the file's 10 is the digit 0
    assert source.class_names == [str(digit) for digit in range(10)]
    assert len(find_eval_source(folder)) == len(find_eval_source(folder / "train_32x32.mat")) == 6
    # scipy reads the same, so the file is what it should be.
    known = scipy.io.loadmat(folder / "train_32x32.mat")
    np.testing.assert_array_equal(known["X"].transpose(3, 0, 1, 2), images)
    np.testing.assert_array_equal(known["y"][:, 0] % 10, labels)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.float64])
def test_what_scipy_writes_is_read(tmp_path, files, compress, kind):
    images, labels = files.pictures(5000, seed=3)  # more than a piece
    path = tmp_path / "x.mat"
    digits = np.where(labels == 0, 10, labels).astype(kind)[:, None]
    scipy.io.savemat(path, {"y": digits, "X": images.transpose(1, 2, 3, 0)}, do_compression=compress)
    source = open_source(path)
    np.testing.assert_array_equal(source.array, images)
    np.testing.assert_array_equal(source.labels, labels)


def test_labels_may_be_missing(tmp_path, files):
    path = tmp_path / "x.mat"
    scipy.io.savemat(path, {"X": files.pictures()[0].transpose(1, 2, 3, 0), "other": np.zeros((9, 9))})
    assert open_source(path).labels is None


@pytest.mark.parametrize("compress", [True, False])
def test_a_file_cut_anywhere_is_refused(tmp_path, files, compress):
    images, _ = files.pictures(5)
    data = files.mat_file(
        files.mat_matrix("X", (images // 250).transpose(1, 2, 3, 0)),
        files.mat_matrix("y", np.arange(1, 6, dtype=np.uint8)[:, None]),
        compress=compress,
    )
    path = tmp_path / "x.mat"
    path.write_bytes(data)
    open_svhn(path)
    whole_without_y = 128 + 8 + struct.unpack("<I", data[132:136])[0]
    step = 1 if compress else 91
    for size in [*range(0, len(data), step), *range(len(data) - 40, len(data))]:
        if size == whole_without_y:
            continue  # a whole file without labels
        path.write_bytes(data[:size])
        with pytest.raises(DataError):
            open_svhn(path)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((32, 32, 3, 1 << 30), r"expected X of shape \[32, 32, 3, N\], N <= 1048576"),
        ((32, 32, 3, 0), "expected X of shape"),
        ((32, 32, 3, -1), "expected X of shape"),
        ((32, 32, 1, 3), "expected X of shape"),
        ((3, 32, 32, 1), "expected X of shape"),
        ((32, 32, 3, 3), "truncated|more|announced"),
        ((32, 32, 3, 1), "holds more values than its shape says"),
    ],
)
@pytest.mark.parametrize("compress", [True, False])
def test_shapes_that_lie_are_refused(tmp_path, files, shape, match, compress):
    images, _ = files.pictures(2)
    matrix = bytearray(files.mat_matrix("X", images.transpose(1, 2, 3, 0)))
    at = 8 + 16 + 8  # behind the matrix's tag, the flags and the tag of the shape
    matrix[at : at + 16] = struct.pack("<4i", *shape)
    path = tmp_path / "x.mat"
    path.write_bytes(files.mat_file(bytes(matrix), compress=compress))
    with pytest.raises(DataError, match=match):
        open_svhn(path)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (np.array([[1], [2], [11]], np.uint8), r"expected labels in 1\.\.10 in y, found 1\.\.11"),
        (np.array([[1], [2]], np.uint8), "expected 3 labels in y, one per image, found 2"),
        (np.array([[1, 2], [3, 4]], np.uint8), r"expected y of shape \[N, 1\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, files, labels, match):
    images, _ = files.pictures(3)
    path = tmp_path / "x.mat"
    path.write_bytes(
        files.mat_file(
            files.mat_matrix("X", images.transpose(1, 2, 3, 0)),
            files.mat_matrix("y", labels),
        )
    )
    with pytest.raises(DataError, match=match):
        open_svhn(path)


def test_other_matlab_files_are_refused(tmp_path, files):
    path = tmp_path / "x.mat"
    scipy.io.savemat(path, {"Z": np.zeros((50, 50))})
    with pytest.raises(DataError, match="expected X, the images"):
        open_source(path)
    scipy.io.savemat(path, {"X": np.zeros((32, 32, 3, 9))})
    with pytest.raises(DataError, match=r"expected X of shape .*float64"):
        open_source(path)
    scipy.io.savemat(path, {"X": np.array([[{}, "text"]], object)})
    with pytest.raises(DataError, match="expected matrices of numbers"):
        open_source(path)
    head = b"MATLAB 7.3 MAT-file".ljust(116) + bytes(8) + struct.pack("<H", 0x0200) + b"IM"
    path.write_bytes(head + bytes(600))
    with pytest.raises(DataError, match=r"version 2 \(HDF5 if 2\); save it in MATLAB with -v7"):
        open_source(path)


def test_compressed_zeros_take_no_memory_beyond_what_is_expected(tmp_path, files):
    # 256 MB of zeros in 256 kB, said to be one image.
    packer = zlib.compressobj(9)
    images = np.zeros((32, 32, 3, 1), np.uint8)
    packed = packer.compress(files.mat_matrix("X", images))
    zeros = bytes(1 << 24)
    for _ in range(16):
        packed += packer.compress(zeros)
    packed += packer.flush()
    path = tmp_path / "x.mat"
    data = files.mat_file(compress=True) + struct.pack("<II", 15, len(packed)) + packed
    path.write_bytes(data)
    with pytest.raises(DataError, match="holds more values than its shape says"):
        open_svhn(path)


def test_images_beyond_the_memory_are_refused_before_they_are_read(tmp_path, files, monkeypatch):
    folder = files.write_svhn(tmp_path / "x")
    monkeypatch.setattr("sela_ext.data.svhn.free_memory", lambda: 24 * 3072 * 2)
    assert len(open_source(folder)) == 24
    monkeypatch.setattr("sela_ext.data.svhn.free_memory", lambda: 24 * 3072 * 2 - 1)
    with pytest.raises(DataError, match=r"X takes 0\.0 GiB of memory.*memory-mapped"):
        open_source(folder)
