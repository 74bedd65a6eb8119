import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext.data import Loader, VectorLoader, VectorSource, open_source
from sela_ext.errors import DataError
from sela_ext.kernels import VectorView


def rows_of(count, width, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(dtype)


def view_of(width, noise=0.3, dropout=0.2):
    mean = np.linspace(-1, 1, width).astype(np.float32)
    return VectorView(mean, np.full(width, noise, np.float32), dropout)


# --- The source


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_float_matrix_is_a_source_without_a_copy(dtype):
    rows = rows_of(31, 5, dtype)
    source = open_source(rows)
    assert source.vectors is source
    assert (len(source), source.width) == (31, 5)
    assert np.shares_memory(source.stored, rows)
    assert len(set(source.names)) == 31
    np.testing.assert_array_equal(source.take([30, 0]), rows[[30, 0]].astype(np.float32))
    assert "31 rows of 5 numbers" in source.describe()


def test_tensors_memory_maps_and_odd_layouts_are_sources(tmp_path):
    rows = rows_of(33, 4)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "swapped.npy", rows.astype(">f4"))
    mapped = open_source(tmp_path / "rows.npy")
    assert isinstance(mapped.stored, np.memmap) or isinstance(mapped.stored.base, np.memmap)
    several = (
        mapped,
        open_source(tmp_path / "swapped.npy"),
        open_source(torch.from_numpy(rows)),
        open_source(torch.from_numpy(rows).double()),
        open_source(np.asfortranarray(rows)),
        open_source(np.repeat(rows, 2, 0)[::2]),
    )
    for source in several:
        np.testing.assert_array_equal(source.take(np.arange(33)), rows)
    halves = open_source(torch.from_numpy(rows).bfloat16())
    np.testing.assert_array_equal(halves.take(np.arange(33)), torch.from_numpy(rows).bfloat16().float().numpy())


def test_an_archive_holds_vectors_labels_and_names(tmp_path):
    rows, names = rows_of(7, 3), [f"photo {i}.jpg" for i in range(7)]
    np.savez(tmp_path / "a.npz", features=rows, labels=np.arange(7) % 2, names=np.asarray(names))
    source = open_source(tmp_path / "a.npz")
    np.testing.assert_array_equal(source.take(np.arange(7)), rows)
    assert source.names == names
    np.testing.assert_array_equal(source.labels, np.arange(7) % 2)
    np.savez(tmp_path / "b.npz", train_x=rows, test_x=rows[:2], train_y=np.arange(7), test_y=np.arange(2))
    assert len(open_source(tmp_path / "b.npz")) == 7
    assert len(sela_ext.data.find_eval_source(tmp_path / "b.npz")) == 2
    np.savez(tmp_path / "c.npz", one=rows, other=rows)
    with pytest.raises(DataError, match="one array of images or vectors, found one, other"):
        open_source(tmp_path / "c.npz")


def test_a_subset_copies_nothing_and_keeps_names_and_labels():
    rows = rows_of(20, 3)
    source = open_source(rows, labels=np.arange(20))
    part = source.subset([19, 4, 4])
    assert np.shares_memory(part.vectors.stored, rows)
    np.testing.assert_array_equal(part.vectors.take([0, 1, 2]), rows[[19, 4, 4]])
    assert part.names == [source.names[i] for i in (19, 4, 4)]
    np.testing.assert_array_equal(part.labels, [19, 4, 4])
    np.testing.assert_array_equal(part.subset([2, 0]).vectors.take([0, 1]), rows[[4, 19]])


def test_fingerprints_tell_data_apart():
    rows = rows_of(50, 3)
    one = open_source(rows).fingerprint()
    assert one == open_source(rows.copy()).fingerprint()
    assert json.loads(json.dumps(one)) == one
    others = [rows[:49], rows.astype(np.float64), rows + 1, rows[:, :2], rows[::-1]]
    assert all(open_source(np.ascontiguousarray(other)).fingerprint() != one for other in others)
    assert (
        open_source(rows).subset(np.arange(25)).fingerprint()
        != open_source(rows).subset(np.arange(25, 50)).fingerprint()
    )


@pytest.mark.parametrize("count", [1, 4096, 9001])
def test_statistics_are_those_of_all_rows(count):
    rows = rows_of(count, 3) * [1, 2, 0] + [1000, 0, 5]
    known = open_source(rows).statistics()
    exact = rows.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(known.mean, exact.mean(0), atol=1e-4)
    np.testing.assert_allclose(known.deviation, exact.std(0), rtol=1e-4, atol=1e-5)
    expected = np.sqrt(exact.var(0).mean()) or 1.0
    assert known.spread == pytest.approx(expected, rel=1e-4)
    assert len(known.bad) == 0


def test_bad_rows_are_found_and_left_out_of_the_statistics():
    rows = rows_of(9000, 3)
    clean = np.delete(rows, [0, 5000], 0)
    rows[0, 1], rows[5000, 2] = np.nan, np.inf
    known = open_source(rows).statistics()
    assert known.bad.tolist() == [0, 5000]
    np.testing.assert_allclose(known.mean, clean.mean(0), atol=1e-5)
    with pytest.raises(DataError, match="NaN or infinity in all of them"):
        open_source(np.full((3, 2), np.nan)).statistics()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (np.zeros((3, 4), np.int64), r"astype\('float32'\)"),
        (np.zeros((0, 4)), "at least one row"),
        (np.zeros((4, 0)), "at least one row"),
        (np.zeros((3, 4, 5)), "expected uint8 pixels"),
    ],
)
def test_other_arrays_are_refused(data, match):
    with pytest.raises(DataError, match=match):
        open_source(data)


def test_what_needs_images_refuses_vectors(tmp_path):
    rows = rows_of(20, 3)
    for call in (
        lambda: Loader(rows),
        lambda: sela_ext.pack(rows, tmp_path / "pack"),
        lambda: sela_ext.doctor(rows),
        lambda: sela_ext.embed("random:small-resnet", rows),
        lambda: sela_ext.embed("pixels", rows),
        lambda: open_source(rows).read(0),
    ):
        with pytest.raises(DataError, match=r"expected (an )?image"):
            call()
    with pytest.raises(DataError, match="expected feature vectors"):
        VectorLoader(open_source("digits"))


# --- The loader


def epoch_of(loader, epoch, start=0, **given):
    return [(b.images.clone(), b.index.tolist(), b.position) for b in loader.epoch(epoch, start, **given)]


def test_batches_hold_every_row_once_and_depend_on_neither_threads_nor_batch():
    source = VectorSource(rows_of(1001, 7, "float16"), labels=np.arange(1001))
    view, seen = view_of(7), {}
    for batch_size, threads in ((33, 1), (256, 2), (1001, 1)):
        loader = VectorLoader(source, batch_size=batch_size, view=view, seed=3, threads=threads)
        batches = list(loader.epoch(2))
        assert len(batches) == len(loader)
        index = torch.cat([batch.index for batch in batches])
        assert sorted(index.tolist()) == list(range(1001))
        assert torch.equal(torch.cat([batch.labels for batch in batches]), index)
        seen[batch_size] = torch.cat([batch.images for batch in batches])[index.argsort()]
        assert batches[-1].position == 1001
    assert torch.equal(seen[33], seen[256])
    assert torch.equal(seen[33], seen[1001])


def test_epochs_rows_seeds_and_views_differ():
    source = VectorSource(np.zeros((65, 9), np.float32))
    loader = VectorLoader(source, batch_size=65, view=view_of(9), views=2, seed=1, shuffle=False, threads=1)
    first, second = next(loader.epoch(0)), next(loader.epoch(1))
    other = next(VectorLoader(source, batch_size=65, view=view_of(9), seed=2, shuffle=False, threads=1).epoch(0))
    assert torch.equal(first.images, first.views[0])
    noisy = [*first.views, second.images, other.images]
    assert len({tuple(one.flatten().tolist()) for one in noisy}) == 4
    assert len({tuple(row.tolist()) for row in first.images}) == 65


def test_an_epoch_goes_on_from_any_position_with_the_same_bits():
    loader = VectorLoader(VectorSource(rows_of(101, 5)), batch_size=16, view=view_of(5), seed=9, threads=1)
    whole = epoch_of(loader, 4)
    rest = epoch_of(loader, 4, start=whole[2][2])
    assert [index for _, index, _ in rest] == [index for _, index, _ in whole[3:]]
    assert all(torch.equal(a, b) for (a, _, _), (b, _, _) in zip(rest, whole[3:], strict=True))


def test_an_order_of_ones_own_is_followed():
    loader = VectorLoader(VectorSource(rows_of(10, 5)), batch_size=4, threads=1)
    order = np.array([3, 3, 1, 9, 0], np.int64)
    assert [index for _, index, _ in epoch_of(loader, 0, order=order)] == [[3, 3, 1, 9], [0]]


def test_a_row_that_comes_again_comes_with_other_noise():
    source = VectorSource(rows_of(5, 9))
    loader = VectorLoader(source, batch_size=2, view=view_of(9), seed=1, threads=1)
    plain = {index[0]: row for rows, index, _ in epoch_of(loader, 3, order=np.arange(5)) for row in rows[:1]}
    batches = [images for images, _, _ in epoch_of(loader, 3, order=np.array([2, 2, 2, 4]))]
    assert torch.equal(batches[0][0], plain[2])
    assert not torch.equal(batches[0][1], batches[0][0])
    assert not torch.equal(batches[1][0], batches[0][1])
    assert torch.equal(next(iter(loader.epoch(3, 2, order=np.array([2, 2, 2, 4])))).images, batches[1])


def test_bad_rows_are_an_error_or_left_out_and_listed():
    rows = rows_of(200, 3)
    rows[[7, 100]] = np.nan
    with pytest.raises(DataError, match=r"row/00007: holds NaN or infinity; remove the row, or use on_bad_image"):
        VectorLoader(open_source(rows))
    loader = VectorLoader(open_source(rows), batch_size=64, on_bad_image="skip", threads=1)
    index = [i for _, batch, _ in epoch_of(loader, 0) for i in batch]
    assert sorted(index) == sorted(set(range(200)) - {7, 100})
    assert [(row, name) for row, name, _ in loader.bad_images] == [(7, "row/00007"), (100, "row/00100")]
    with pytest.raises(DataError, match="more than max_bad_fraction"):
        VectorLoader(open_source(rows), on_bad_image="skip", max_bad_fraction=0.005)


def test_a_mapped_file_is_not_copied_into_memory(tmp_path):
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float16, (100_000, 128)).flush()  # 26 MB, 51 in float32
    code = f"""
import resource
from sela_ext.data import VectorLoader, open_source
source = open_source({str(tmp_path / "x.npy")!r})
def private():
    return int(open("/proc/self/statm").read().split()[5]) * 4096  # data and stack, without mapped files
for batch in VectorLoader(source, batch_size=256, threads=1).epoch(0):
    first = private()
    break
for batch in VectorLoader(source, batch_size=4096, threads=1).epoch(0):
    pass
print(private() - first)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30e6
