import io
import os
import zipfile

import numpy as np
import pytest

from sela_ext.data import find_eval_source, npz, open_source
from sela_ext.errors import DataError


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_only_images_are_taken(tmp_path, files, save):
    images, labels = files.pictures(channels=1)
    path = tmp_path / "a.npz"
    save(path, pixels=images[..., 0], label=labels[:, None].astype(np.uint8), weights=np.zeros((24, 5)))
    source = open_source(path)
    np.testing.assert_array_equal(source.array, images)
    assert source.labels.tolist() == labels.tolist()
    assert source.channels == 1
    assert find_eval_source(path) is None


def test_divided_archives_give_train_and_test(tmp_path, files):
    images, labels = files.pictures()
    path = tmp_path / "a.npz"
    parts = {"train": slice(0, 12), "val": slice(12, 18), "test": slice(18, 24)}
    arrays = {f"{name}_images": images[rows] for name, rows in parts.items()}
    arrays |= {f"{name}_labels": labels[rows, None] for name, rows in parts.items()}
    np.savez(path, **arrays)
    assert open_source(path).labels.tolist() == labels[:12].tolist()
    np.testing.assert_array_equal(find_eval_source(path).array, images[18:])
    np.savez(path, **{name: array for name, array in arrays.items() if "test" not in name})
    np.testing.assert_array_equal(find_eval_source(path).array, images[12:18])


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        (
            {"a": np.zeros((3, 4, 4), np.uint8), "b": np.zeros((3, 4, 4), np.uint8)},
            "expected one array of images or vectors, found a, b",
        ),
        ({"a": np.zeros((3, 4, 4))}, r"expected a uint8 array of images .*, found a float64 \[3, 4, 4\]"),
        ({}, "found nothing"),
        ({"a": np.zeros((3, 4, 4, 2), np.uint8)}, "expected 1 or 3 channels"),
        ({"a": np.zeros((0, 4, 4), np.uint8)}, "at least one image"),
        ({"a": np.zeros((2, 4, 4), np.uint8), "y": np.array([0, -3])}, "expected labels in"),
    ],
)
def test_archives_without_images_or_with_several_are_refused(tmp_path, arrays, match):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=match):
        open_source(tmp_path / "a.npz")


def test_labels_that_cannot_be_told_apart_are_left_out(tmp_path):
    images = np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x=images, one=np.array([1, 2]), two=np.array([3, 4]))
    assert open_source(tmp_path / "a.npz").labels is None
    np.savez(tmp_path / "a.npz", x=images, one=np.array([1, 2]), labels=np.array([3, 4]))
    assert open_source(tmp_path / "a.npz").labels.tolist() == [3, 4]


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_objects_are_never_read(tmp_path):
    bad = np.empty((2, 4, 4), object)
    bad[:] = Command(tmp_path / "executed")
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 4), np.uint8), y=bad)
    assert len(open_source(tmp_path / "a.npz")) == 2
    np.savez(tmp_path / "a.npz", x=bad)
    with pytest.raises(DataError, match="found x object"):
        open_source(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", bad)
    with pytest.raises(DataError, match=r"a\.npy: expected a readable \.npy file"):
        open_source(tmp_path / "a.npy")
    assert not (tmp_path / "executed").exists()


def archive(path, name, header, data, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr(name, file.getvalue() + data)
    return path


def test_shapes_that_lie_are_refused(tmp_path):
    for shape in ((2, 4, 5), (2, 4, 3), (1 << 20, 1 << 20, 4)):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        path = archive(tmp_path / "a.npz", "x.npy", header, bytes(32))
        with pytest.raises(DataError, match="the header says"):
            open_source(path)


def test_more_than_the_memory_holds_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    # 64 MB of zeros in 64 kB.
    header = {"descr": "|u1", "fortran_order": False, "shape": (64, 1024, 1024)}
    path = archive(tmp_path / "a.npz", "x.npy", header, bytes(1 << 26))
    assert path.stat().st_size < 1 << 17
    monkeypatch.setattr(npz, "free_memory", lambda: 1 << 26)
    with pytest.raises(
        DataError, match=r"x takes 0\.1 GiB of memory, of which 0\.1 GiB are free; save it with numpy\.save"
    ):
        open_source(path)
    monkeypatch.undo()
    assert len(open_source(path)) == 64


def test_an_archive_cut_anywhere_is_refused(tmp_path, files):
    path = files.write_npz(tmp_path / "a.npz")
    data = path.read_bytes()
    for size in np.linspace(0, len(data) - 1, 150).astype(int):
        path.write_bytes(data[:size])
        with pytest.raises(DataError):
            open_source(path)


def test_a_flipped_bit_in_the_pixels_is_noticed(tmp_path, files):
    path = tmp_path / "a.npz"
    np.savez(path, x=files.pictures()[0])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="CRC"):
        open_source(path)


@pytest.mark.parametrize("name", ["labels", "names"])
def test_labels_or_names_of_another_number_than_rows_are_refused(tmp_path, name):
    np.savez(tmp_path / "a.npz", features=np.zeros((7, 3), np.float32), **{name: np.arange(5)})
    with pytest.raises(DataError, match=f"expected {name} of 7 entries, as many as features has rows, found 5; save"):
        open_source(tmp_path / "a.npz")


def test_want_of_memory_is_not_called_a_fault_of_the_archive(tmp_path, monkeypatch):
    np.savez(tmp_path / "labels.npz", labels=np.arange(3))

    def too_little(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(np.lib.format, "read_array", too_little)
    with pytest.raises(MemoryError):
        npz.read_arrays(tmp_path / "labels.npz", ["labels"], "labels")
