import gzip
import resource
import struct
from pathlib import Path

import numpy as np
import pytest

from sela_ext.data import find_eval_source, open_source
from sela_ext.errors import DataError

FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx_bytes(values, kind=0x08):
    return bytes((0, 0, kind, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write(path, content):
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (33, 5, 7), dtype=np.uint8)


@pytest.fixture(params=["", ".gz"])
def folder(tmp_path, images, request):
    labels = np.arange(33, dtype=np.uint8) % 10
    suffix = request.param
    write(tmp_path / f"train-images-idx3-ubyte{suffix}", idx_bytes(images))
    write(tmp_path / f"train-labels-idx1-ubyte{suffix}", idx_bytes(labels))
    write(tmp_path / f"t10k-images-idx3-ubyte{suffix}", idx_bytes(images[:3]))
    write(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", idx_bytes(labels[:3]))
    return tmp_path


def test_a_folder_in_mnists_naming_gives_train_and_test(folder, images):
    source = open_source(folder)
    np.testing.assert_array_equal(source.array[..., 0], images)
    assert source.labels.tolist() == [i % 10 for i in range(33)]
    assert source.channels == 1
    test = find_eval_source(folder)
    np.testing.assert_array_equal(test.array[..., 0], images[:3])
    assert test.labels.tolist() == [0, 1, 2]


def test_nothing_is_looked_for_beside_a_test_file(folder):
    (path,) = folder.glob("t10k-images*")
    assert find_eval_source(path) is None


def test_an_images_file_finds_its_labels_and_its_test_images(folder, images):
    path = next(folder.glob("train-images*"))
    source = open_source(str(path))
    np.testing.assert_array_equal(source.array[..., 0], images)
    assert source.labels is not None
    assert len(find_eval_source(path)) == 3


def test_images_without_a_labels_file_are_unlabelled(folder):
    for path in folder.glob("*-labels-*"):
        path.unlink()
    assert open_source(folder).labels is None
    assert open_source(folder, labels=np.zeros(33, int)).labels.tolist() == [0] * 33


def test_an_uncompressed_file_is_memory_mapped(tmp_path, images):
    write(tmp_path / "pictures", idx_bytes(images))
    source = open_source(tmp_path / "pictures")
    assert isinstance(source.array, np.memmap)
    assert find_eval_source(tmp_path / "pictures") is None


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: b[:-1], "truncated: the header says"),
        (lambda b: b[:9], "truncated in the header"),
        (lambda b: b + b"\0", "found more"),
        (lambda b: b[:4] + struct.pack(">I", 2**21) + b[8:], "truncated: the header says"),
        (lambda b: b[:2] + b"\x0d" + b[3:], "expected IDX uint8 with 3 axes"),
        (lambda b: b[:3] + b"\x01" + b[4:], "expected IDX uint8 with 3 axes"),
        (lambda b: b[:4] + struct.pack(">I", 0) + b[8:16], "at least one image"),
        (lambda b: b"", "empty file"),
    ],
)
def test_a_damaged_images_file_is_named(tmp_path, images, suffix, change, match):
    write(tmp_path / f"train-images-idx3-ubyte{suffix}", change(idx_bytes(images)))
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte.*{match}"):
        open_source(tmp_path)


@pytest.mark.parametrize("count", [3, 1 << 31])
def test_compressed_zeros_take_no_memory(tmp_path, count):
    # 256 MB of zeros in 256 kB.
    head = bytes((0, 0, 8, 3)) + struct.pack(">3I", count, 1 << 10, 1 << 10)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", 9) as file:
        file.write(head)
        for _ in range(16):
            file.write(bytes(1 << 24))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="found more" if count == 3 else "gunzip it first"):
        open_source(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_file_cut_anywhere_is_refused(tmp_path, images):
    for suffix in ("", ".gz"):
        path = tmp_path / f"images{suffix}"
        write(path, idx_bytes(images[:2]))
        data = path.read_bytes()
        for size in range(len(data)):
            path.write_bytes(data[:size])
            with pytest.raises(DataError):
                open_source(path)


def test_a_cut_gzip_stream_is_named(folder):
    path = next(folder.glob("train-images*"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="train-images"):
        open_source(folder)


def test_another_number_of_labels_is_an_error(folder):
    path = next(folder.glob("train-labels*"))
    write(path, idx_bytes(np.zeros(32, np.uint8)))
    with pytest.raises(DataError, match=r"train-labels.*expected 33 labels.*found 32"):
        open_source(folder)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("nothing here")
    with pytest.raises(DataError, match=r"notes\.md: expected.*found a file of another kind"):
        open_source(tmp_path / "notes.md")
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(tmp_path / "absent")


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"Fashion-MNIST is not in {FASHION}")
def test_fashion_mnist_is_read():
    source = open_source(FASHION)
    assert source.array.shape == (60000, 28, 28, 1)
    assert np.bincount(source.labels).tolist() == [6000] * 10
    assert find_eval_source(FASHION).array.shape == (10000, 28, 28, 1)
