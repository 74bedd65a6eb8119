import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from sela_ext import Augment, Loader, kernels
from sela_ext.data import open_source
from sela_ext.data.fallback import Drawing
from sela_ext.errors import DataError, OptionError, ResourceError

PHOTOS = Path(os.environ.get("SELA_DATA_DIR", Path(__file__).parents[2].parent / "shared" / "data"))


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(path, pixels, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """37 images of different sizes and kinds in two class folders."""
    root = tmp_path_factory.mktemp("images")
    for i in range(37):
        kind = ("PNG", "JPEG", "WEBP")[i % 3]
        put(root / f"{'ab'[i % 2]}/{i:02d}.{kind.lower()}", random_images(9 + i, 40 - i, 3, seed=i), kind)
    return root


@pytest.fixture
def spoiled(tmp_path):
    """30 images, of which 5 is empty, 11 a text and 20 truncated."""
    for i in range(30):
        put(tmp_path / f"{i:02d}.jpg", random_images(20, 20, 3, seed=i), "JPEG")
    (tmp_path / "05.jpg").write_bytes(b"")
    (tmp_path / "11.jpg").write_text("This is not a picture.")
    (tmp_path / "20.jpg").write_bytes((tmp_path / "20.jpg").read_bytes()[:-100])
    return tmp_path


def as_list(loader, epoch=0, **options):
    return list(loader.epoch(epoch, **options))


def assert_equal_batches(batches, others):
    assert len(batches) == len(others) > 0
    for one, other in zip(batches, others, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.images, other.images)
        assert one.position == other.position
        assert one.params.tobytes() == other.params.tobytes()
        assert (one.labels is None) == (other.labels is None)
        assert one.labels is None or torch.equal(one.labels, other.labels)


def test_an_epoch_gives_every_image_once_with_its_label():
    images = random_images(1001, 8, 8, 1)
    loader = Loader(images, batch_size=33, labels=np.arange(1001) * 2, threads=2)
    batches = as_list(loader)
    assert len(batches) == len(loader) == 31
    index = torch.cat([batch.index for batch in batches])
    assert index.dtype == torch.int64
    assert sorted(index.tolist()) == list(range(1001))
    assert index.tolist() != list(range(1001))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), index * 2)
    assert [batch.position for batch in batches] == [*range(33, 1001, 33), 1001]
    assert tuple(batches[0].images.shape) == (33, 1, 8, 8)
    assert tuple(batches[-1].images.shape) == (11, 1, 8, 8)


def test_the_default_changes_no_pixel_but_normalises():
    images = random_images(5, 12, 12, 3)
    augment = Augment.none(12)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (augment.mean, augment.std))
    (batch,) = as_list(Loader(images, shuffle=False))
    expected = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    torch.testing.assert_close(batch.images, expected, atol=1e-5, rtol=1e-5)


def test_the_default_keeps_the_longer_side_of_a_known_size_and_is_224_otherwise(folder):
    assert Loader(random_images(3, 9, 14)).augment == Augment.none(14)
    assert Loader(folder).augment == Augment.eval(224)


def test_the_order_is_that_of_the_permutation_kernel():
    loader = Loader(random_images(100, 4, 4), batch_size=100, seed=5)
    (batch,) = as_list(loader, 3)
    np.testing.assert_array_equal(batch.index.numpy(), kernels.permutation(100, seed=5, epoch=3))
    assert not torch.equal(as_list(loader, 4)[0].index, batch.index)
    assert torch.equal(as_list(loader, 3)[0].index, batch.index)


def test_the_ordered_pass_goes_from_first_to_last():
    loader = Loader(random_images(31, 4, 4), batch_size=7, shuffle=False)
    assert torch.cat([batch.index for batch in loader.epoch(9)]).tolist() == list(range(31))
    shuffled = Loader(random_images(31, 4, 4), batch_size=7)
    assert torch.cat([batch.index for batch in shuffled.epoch(9, shuffle=False)]).tolist() == list(range(31))


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_bits_do_not_depend_on_threads(kind, folder):
    data = random_images(101, 20, 20, 3) if kind == "array" else folder
    runs = [
        as_list(Loader(data, batch_size=10, augment=Augment.sela(16), seed=3, threads=threads), 2)
        for threads in (1, 2, 4)
    ]
    assert_equal_batches(runs[0], runs[1])
    assert_equal_batches(runs[0], runs[2])


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_an_epoch_resumes_bit_for_bit_from_every_position(kind, folder):
    data = random_images(37, 20, 20, 3) if kind == "array" else folder
    make = lambda: Loader(data, batch_size=8, augment=Augment.sela(16), seed=1, threads=2)  # noqa: E731
    whole = as_list(make(), 1)
    for done in range(len(whole)):
        rest = as_list(make(), 1, start=whole[done].position)
        if done == len(whole) - 1:
            assert rest == []
        else:
            assert_equal_batches(rest, whole[done + 1 :])


def test_the_augmentation_follows_seed_epoch_and_view_and_not_the_batch():
    images = random_images(40, 20, 20, 3)

    def by_image(epoch=0, **options):
        loader = Loader(images, **{"augment": Augment.sela(12), "batch_size": 7, **options})
        return {
            int(i): image for batch in loader.epoch(epoch) for i, image in zip(batch.index, batch.images, strict=True)
        }

    base = by_image()
    for same in (by_image(batch_size=40), by_image(shuffle=False)):
        assert all(torch.equal(same[i], base[i]) for i in base)
    for other in (by_image(epoch=1), by_image(seed=1), by_image(view=1)):
        assert sum(torch.equal(other[i], base[i]) for i in base) == 0


def test_batches_hold_the_parameters_that_were_drawn():
    images = random_images(40, 20, 20, 3)
    for batch in Loader(images, augment=Augment.sela(12), batch_size=16).epoch(0):
        again = kernels.augment(images, batch.params, Augment.sela(12), rows=batch.index.numpy(), threads=1)
        assert torch.equal(again, batch.images)


@pytest.mark.parametrize("kind", ["array", "folder", "dataset"])
def test_an_order_with_repeats_draws_each_occurrence_anew_and_resumes_at_every_position(kind, folder):
    images = random_images(37, 20, 20, 3)
    data = {"array": images, "folder": folder, "dataset": Pairs(images)}[kind]
    order = np.random.default_rng(0).integers(0, 5, 31)
    make = lambda: Loader(data, batch_size=8, augment=Augment.sela(16), seed=1, threads=2)  # noqa: E731
    whole = as_list(make(), 3, order=order)
    assert torch.cat([batch.index for batch in whole]).tolist() == order.tolist()
    seen = torch.cat([batch.images for batch in whole])
    usual = {int(i): x for b in make().epoch(3) for i, x in zip(b.index, b.images, strict=True)}
    for image in range(5):
        rows = np.flatnonzero(order == image)
        assert len(rows) > 1
        assert torch.equal(seen[rows[0]], usual[image])  # the first occurrence is that of any epoch
        assert len({seen[row].numpy().tobytes() for row in rows}) == len(rows)
    for done, batch in enumerate(whole[:-1]):
        assert_equal_batches(as_list(make(), 3, start=batch.position, order=order), whole[done + 1 :])
    again = Loader(data, batch_size=8, augment=Augment.sela(16), seed=1, threads=1)
    assert_equal_batches(as_list(again, 3, order=order), whole)


def test_ranks_share_an_order_with_repeats_and_draw_as_one_would():
    images = random_images(10, 12, 12, 3)
    order = np.random.default_rng(1).integers(0, 4, 33)
    options = {"augment": Augment.sela(8), "batch_size": 4}
    alone = torch.cat([batch.images for batch in Loader(images, **options).epoch(1, order=order)])
    for rank in range(3):
        loader = Loader(images, rank=rank, world_size=3, **options)
        batches = as_list(loader, 1, order=order)
        assert torch.cat([batch.index for batch in batches]).tolist() == order[rank::3].tolist()
        assert torch.equal(torch.cat([batch.images for batch in batches]), alone[rank::3])


def test_an_order_may_be_longer_than_the_images_are_many():
    loader = Loader(random_images(3, 4, 4), batch_size=64)
    (whole,) = as_list(loader)
    (batch,) = as_list(loader, order=[0, 1, 2] * 11)
    assert batch.images.shape[0] == batch.position == 33
    assert torch.equal(batch.images[:3][whole.index], whole.images)
    with pytest.raises(OptionError, match=r"start: .*33"):
        loader.epoch(0, 34, order=[0, 1, 2] * 11)
    with pytest.raises(OptionError, match="shuffle and order: expected at most one"):
        loader.epoch(0, shuffle=False, order=[0])


def test_bad_images_of_an_order_are_skipped_each_time(spoiled):
    order = [4, 5, 4, 6, 5, 5, 4]
    options = {"batch_size": 3, "on_bad_image": "skip", "max_bad_fraction": 0.2, "augment": Augment.sela(8)}
    loader = Loader(spoiled, **options)
    whole = as_list(loader, order=order)
    assert [batch.index.tolist() for batch in whole] == [[4, 4], [6], [4]]
    assert [name for _, name, _ in loader.bad_images] == ["05.jpg"]
    assert_equal_batches(as_list(loader, order=order), whole)


@pytest.mark.parametrize("count", [3, 31, 100])
def test_three_ranks_share_an_epoch(count):
    images = random_images(count, 6, 6)
    loaders = [Loader(images, batch_size=4, rank=rank, world_size=3, augment=Augment.flip(6)) for rank in range(3)]
    shares = [[int(i) for batch in loader.epoch(2) for i in batch.index] for loader in loaders]
    assert sorted(i for share in shares for i in share) == list(range(count))
    assert [len(share) for share in shares] == [(count + 2 - rank) // 3 for rank in range(3)]
    assert [len(loader) for loader in loaders] == [-(-len(share) // 4) for share in shares]
    alone = {
        int(i): x
        for b in Loader(images, augment=Augment.flip(6)).epoch(2)
        for i, x in zip(b.index, b.images, strict=True)
    }
    for batch in loaders[1].epoch(2):
        assert all(torch.equal(alone[int(i)], x) for i, x in zip(batch.index, batch.images, strict=True))


def test_drop_last_leaves_the_smaller_batch_out():
    loader = Loader(random_images(31, 4, 4), batch_size=8, drop_last=True)
    batches = as_list(loader)
    assert len(batches) == len(loader) == 3
    assert all(len(batch.index) == 8 for batch in batches)
    assert len(as_list(loader, start=8)) == 2


def test_a_last_batch_of_one_works():
    assert [len(batch.index) for batch in Loader(random_images(9, 4, 4), batch_size=8).epoch(0)] == [8, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtype_and_memory_format_are_as_asked(dtype, channels_last):
    images = random_images(9, 8, 8, 3)
    (batch,) = as_list(Loader(images, dtype=dtype, channels_last=channels_last))
    (plain,) = as_list(Loader(images))
    assert batch.images.dtype == dtype
    order = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.images.is_contiguous(memory_format=order)
    torch.testing.assert_close(batch.images.float(), plain.images, atol=2e-2, rtol=1e-2)


def test_grey_and_thin_images_work_in_a_folder(tmp_path):
    put(tmp_path / "0.png", random_images(1, 1, 3))
    put(tmp_path / "1.png", random_images(1, 3000, 3))
    put(tmp_path / "2.png", random_images(3000, 1, 3))
    put(tmp_path / "3.png", random_images(7, 5))
    for augment in (Augment.sela(16), Augment.eval(16), Augment.none(16)):
        (batch,) = as_list(Loader(tmp_path, augment=augment, shuffle=False))
        assert tuple(batch.images.shape) == (4, 3, 16, 16)
        assert torch.isfinite(batch.images).all()


def test_files_and_the_same_pixels_in_memory_give_the_same_batches(tmp_path):
    images = random_images(21, 10, 10, 3)
    for i, pixels in enumerate(images):
        put(tmp_path / f"{i:02d}.png", pixels)
    options = {"batch_size": 8, "augment": Augment.sela(10), "seed": 4}
    assert_equal_batches(as_list(Loader(tmp_path, **options)), as_list(Loader(images, **options)))


def test_a_memory_map_gives_the_same_batches(tmp_path):
    images = random_images(21, 10, 10, 3)
    np.save(tmp_path / "images.npy", images)
    options = {"batch_size": 8, "augment": Augment.sela(10)}
    assert_equal_batches(as_list(Loader(tmp_path / "images.npy", **options)), as_list(Loader(images, **options)))


class Pairs(Dataset):
    def __init__(self, images):
        self.images = images
        self.threads = set()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.threads.add(threading.current_thread().name)
        return Image.fromarray(self.images[index]), index % 3


def test_a_torch_dataset_gives_the_same_batches_read_by_one_thread():
    images = random_images(21, 10, 10, 3)
    data = Pairs(images)
    options = {"batch_size": 8, "augment": Augment.sela(10), "threads": 4}
    batches = as_list(Loader(data, **options))
    assert data.threads == {"MainThread", "sela-prefetch"}  # the first item is looked at when the source is opened
    assert_equal_batches(batches, as_list(Loader(images, labels=np.arange(21) % 3, **options)))


def test_a_subset_is_numbered_by_itself():
    source = open_source("digits").subset([10, 20, 30])
    (batch,) = as_list(Loader(source, shuffle=False))
    assert batch.index.tolist() == [0, 1, 2]
    assert torch.equal(batch.labels, torch.from_numpy(open_source("digits").labels[[10, 20, 30]]))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_subset_of_a_memory_map_gives_the_batches_of_a_copy_without_reading_one_by_one(
    tmp_path, monkeypatch, threads
):
    images = random_images(50, 10, 12, 3)
    np.save(tmp_path / "images.npy", images)
    rows = np.array([3, 3, 49, 0, *range(40, 7, -1)])
    source = open_source(tmp_path / "images.npy", labels=np.arange(50) % 7).subset(rows)
    monkeypatch.setattr(type(source), "read", None)
    again = source.subset(np.arange(0, 37, 2))
    options = {"batch_size": 5, "augment": Augment.sela(16), "threads": threads}
    for part, picked in ((source, rows), (again, rows[::2])):
        expected = Loader(images[picked], labels=(np.arange(50) % 7)[picked], **options)
        assert_equal_batches(as_list(Loader(part, **options), 2), as_list(expected, 2))


@pytest.mark.parametrize("ahead", [1, 2, 3, 9])
@pytest.mark.parametrize("size", [8, 700])
def test_batches_of_arrays_do_not_depend_on_how_they_share_the_threads(size, ahead):
    images = random_images(23, 8, 8, 3)
    options = {"batch_size": 3, "augment": Augment.aug_plus(size)}
    alone = Loader(images, threads=1, **options)
    shared = Loader(images, threads=4, prefetch=ahead, **options)
    assert_equal_batches(as_list(shared, 1), as_list(alone, 1))
    assert_equal_batches(as_list(shared, 1, start=9), as_list(alone, 1)[3:])


@pytest.mark.parametrize(("side", "workers"), [(32, {"sela-array_0", "sela-array_1"}), (800, {"sela-prefetch"})])
def test_small_batches_of_arrays_have_a_thread_each_and_large_ones_all(side, workers, monkeypatch):
    fill, seen = Drawing.fill, []

    def noted(*arguments, threads, **options):
        seen.append((threading.current_thread().name, threads))
        fill(*arguments, threads=threads, **options)
        time.sleep(0.005)  # the other thread has time to take the next batch

    monkeypatch.setattr(Drawing, "fill", noted)
    loader = Loader(random_images(20, 4, 4, 3), batch_size=4, augment=Augment.sela(side), threads=2)
    assert len(as_list(loader)) == 5
    assert {name for name, _ in seen} == workers
    assert [threads for _, threads in seen] == [2 if side == 800 else 1] * 5


@pytest.mark.parametrize("ahead", [1, 2, 3, 6])
def test_no_more_batches_of_an_array_are_begun_ahead_than_asked_for(ahead, monkeypatch):
    fill, begun = Drawing.fill, []

    def noted(*arguments, **options):
        begun.append(1)
        fill(*arguments, **options)

    monkeypatch.setattr(Drawing, "fill", noted)
    loader = Loader(random_images(60, 4, 4), batch_size=2, prefetch=ahead, threads=2)
    for taken, _ in enumerate(loader.epoch(0), 1):
        time.sleep(0.005)
        assert len(begun) <= taken + ahead
    assert len(begun) == 30


def test_an_error_in_a_batch_of_an_array_comes_at_its_place(monkeypatch):
    fill = Drawing.fill

    def failing(drawing, rows, *arguments, **options):
        if 11 in rows.index:
            raise MemoryError
        fill(drawing, rows, *arguments, **options)

    monkeypatch.setattr(Drawing, "fill", failing)
    before = threading.active_count()
    epoch = Loader(random_images(30, 4, 4), batch_size=5, threads=2, shuffle=False).epoch(0)
    assert [next(epoch).position for _ in range(2)] == [5, 10]
    with pytest.raises(MemoryError):
        next(epoch)
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_leaving_an_epoch_early_leaves_no_thread(kind, folder):
    before = threading.active_count()
    loader = Loader(random_images(400, 8, 8) if kind == "array" else folder, batch_size=4, threads=2)
    for batch in loader.epoch(0):
        assert len(batch.index) == 4
        assert threading.active_count() > before
        break
    assert threading.active_count() == before
    list(loader.epoch(1))
    assert threading.active_count() == before


def test_two_epochs_can_be_read_at_the_same_time(folder):
    loader = Loader(folder, batch_size=4, augment=Augment.sela(16), threads=2)
    pairs = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    assert_equal_batches([pair[0] for pair in pairs], as_list(loader, 0))
    assert_equal_batches([pair[1] for pair in pairs], as_list(loader, 1))


def test_an_error_in_the_background_reaches_the_consumer():
    class Broken(Pairs):
        def __getitem__(self, index):
            if index == 17:
                raise KeyboardInterrupt("as if by hand")
            return super().__getitem__(index)

    before = threading.active_count()
    seen = []
    with pytest.raises(KeyboardInterrupt, match="as if by hand"):
        seen.extend(
            batch.position for batch in Loader(Broken(random_images(21, 4, 4)), batch_size=4, shuffle=False).epoch(0)
        )
    assert seen == [4, 8, 12, 16]
    assert threading.active_count() == before


@pytest.mark.parametrize("threads", [1, 2])
def test_a_bad_image_raises_its_name(spoiled, threads):
    with pytest.raises(DataError, match=r'05\.jpg: empty file.*on_bad_image="skip"') as caught:
        as_list(Loader(spoiled, batch_size=4, threads=threads, shuffle=False))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("threads", [1, 2])
def test_bad_images_are_skipped_and_listed_once(spoiled, threads):
    options = {"batch_size": 4, "augment": Augment.sela(16), "threads": threads, "on_bad_image": "skip"}
    loader = Loader(spoiled, max_bad_fraction=0.2, **options)
    batches = as_list(loader)
    index = [int(i) for batch in batches for i in batch.index]
    assert sorted(index) == [i for i in range(30) if i not in (5, 11, 20)]
    assert batches[-1].position == 30
    assert [len(batch.images) for batch in batches] == [len(batch.index) for batch in batches]
    as_list(loader, 1)
    bad = sorted(loader.bad_images)
    assert [(i, name) for i, name, _ in bad] == [(5, "05.jpg"), (11, "11.jpg"), (20, "20.jpg")]
    assert "empty file" in bad[0][2]
    assert "not an image" in bad[1][2]
    assert "truncated" in bad[2][2]
    # The other images are as if the bad ones had never been there, also after a resume.
    resumed = as_list(Loader(spoiled, max_bad_fraction=0.2, **options), start=batches[2].position)
    assert_equal_batches(resumed, batches[3:])


def test_a_batch_of_bad_images_only_is_not_yielded(spoiled):
    loader = Loader(spoiled, batch_size=1, shuffle=False, on_bad_image="skip", max_bad_fraction=0.2)
    assert [batch.position for batch in loader.epoch(0)] == [i + 1 for i in range(30) if i not in (5, 11, 20)]


def test_too_many_bad_images_are_an_error(spoiled):
    loader = Loader(spoiled, shuffle=False, on_bad_image="skip", batch_size=4)
    with pytest.raises(
        DataError, match=r"1 of 30 images cannot be read, more than max_bad_fraction=0\.01.*05\.jpg.*repair"
    ):
        as_list(loader)


def test_a_pipe_in_the_folder_is_ignored(tmp_path):
    put(tmp_path / "a.png", random_images(4, 4, 3))
    os.mkfifo(tmp_path / "b.png")
    (batch,) = as_list(Loader(tmp_path))
    assert batch.index.tolist() == [0]


def test_waiting_is_counted():
    loader = Loader(random_images(50, 8, 8), batch_size=10)
    assert loader.wait_seconds == loader.wait_share == 0
    for _ in loader.epoch(0):
        time.sleep(0.02)
    assert 0 < loader.wait_seconds < loader.seconds < 60
    assert loader.seconds > 0.1
    assert loader.wait_share == loader.wait_seconds / loader.seconds


@pytest.mark.parametrize("ahead", [1, 2, 3, 6])
def test_no_more_batches_are_begun_ahead_than_asked_for(ahead):
    read = []

    class Counted(Pairs):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    loader = Loader(Counted(random_images(60, 4, 4)), batch_size=2, shuffle=False, prefetch=ahead, threads=1)
    read.clear()  # the first item, which was looked at
    for taken, _ in enumerate(loader.epoch(0), 1):
        time.sleep(0.01)
        assert len(read) <= 2 * (taken + ahead)


def test_several_views_are_those_of_their_numbers(folder):
    views = Augment.multi_crop((24, 12), (2, 3))
    batches = as_list(Loader(folder, batch_size=10, augment=views, seed=3, view=7, threads=2), 2)
    alone = [
        as_list(Loader(folder, batch_size=10, augment=view, seed=3, view=7 + number, threads=2), 2)
        for number, view in enumerate(views)
    ]
    for at, batch in enumerate(batches):
        assert batch.images is batch.views[0]
        assert [view.shape[2] for view in batch.views] == [24, 24, 12, 12, 12]
        assert len(batch.params) == len(batch.effects) == 5
        for number in range(5):
            single = alone[number][at]
            assert torch.equal(batch.views[number], single.images)
            assert single.views == (single.images,)
            assert batch.params[number].tobytes() == single.params.tobytes()
            assert batch.effects[number].tobytes() == single.effects.tobytes()
    one = next(Loader(folder, batch_size=10, augment=views[:1], seed=3, view=7).epoch(2))
    assert isinstance(one.params, tuple)
    assert torch.equal(one.images, batches[0].images)


def test_several_views_of_arrays_are_those_of_the_kernel():
    images = random_images(20, 30, 40, 3)
    views = Augment.multi_crop((16, 8), (1, 2))
    for batch in Loader(images, batch_size=7, augment=views, seed=1, threads=2).epoch(4):
        index = batch.index.numpy()
        expected = kernels.augment_views(images, views, index, seed=1, epoch=4, rows=index)
        assert all(torch.equal(a, b) for a, b in zip(batch.views, expected, strict=True))


def test_files_that_the_reader_does_not_take_come_to_it_once(tmp_path, monkeypatch):
    for i in range(12):
        put(tmp_path / f"{i:02d}.png", random_images(10, 10, 3, seed=i))
    put(tmp_path / "12.jpg", random_images(10, 10, 3, seed=12), "JPEG")
    seen = []
    submit = kernels.Reader.submit

    def counted(reader, items, *arguments, **options):
        seen.append(len(items))
        return submit(reader, items, *arguments, **options)

    monkeypatch.setattr(kernels.Reader, "submit", counted)
    loader = Loader(tmp_path, batch_size=4, augment=Augment.sela(8), shuffle=False)
    first = as_list(loader, 3)
    assert seen == [4, 4, 4, 1]
    assert_equal_batches(as_list(loader, 3), first)
    assert seen == [4, 4, 4, 1, 1]


def test_an_index_is_kept_in_a_folder_and_shared(tmp_path):
    for i in range(9):
        put(
            tmp_path / f"images/{i}.jpg",
            np.kron(random_images(16, 16, 3, seed=i), np.ones((8, 8, 1), np.uint8)),
            "JPEG",
        )
    options = {"batch_size": 4, "augment": Augment.sela(32)}
    loader = Loader(tmp_path / "images", index=tmp_path / "index", **options)
    other = Loader(tmp_path / "images", index=tmp_path / "index", **options)
    expected = as_list(Loader(tmp_path / "images", **options))
    assert not (tmp_path / "index").exists()
    assert_equal_batches(as_list(loader), expected)
    assert_equal_batches(as_list(other), expected)
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["jpeg_index-0.bin"]
    loader.close()
    other.close()
    with kernels.IndexStore(tmp_path / "index") as store:
        assert len(store) == 9
        assert_equal_batches(as_list(Loader(tmp_path / "images", index=store, **options)), expected)
    without = Loader(tmp_path / "images", index=None, **options)
    assert_equal_batches(as_list(without), expected)
    assert_equal_batches(as_list(without), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size: expected >= 1, found 0"),
        ({"batch_size": 2.5}, "batch_size: expected an integer >= 1, found 2.5"),
        ({"seed": -1}, r"seed: expected 0\.\."),
        ({"threads": 0}, "threads"),
        ({"threads": "many"}, "threads"),
        ({"rank": 2, "world_size": 2}, r"rank: expected 0\.\.1, found 2"),
        ({"rank": 0, "world_size": 8}, "every rank, found 7 images, batch_size 256, 8 ranks"),
        ({"drop_last": True, "batch_size": 8}, "full batch for rank 0, found 7 images, batch_size 8, 1 ranks"),
        ({"dtype": torch.float64}, "dtype"),
        ({"augment": "sela"}, "augment: expected a sela_ext.Augment, found str"),
        ({"on_bad_image": "ignore"}, "on_bad_image"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction"),
        ({"device": "tpu"}, "device"),
        ({"device": "mps"}, "device"),
        ({"view": 256}, "view"),
        ({"view": 254, "augment": [Augment.sela(4)] * 3}, "1 to 2 views from number 254 on, found 3"),
        ({"augment": []}, "1 to 256 views from number 0 on, found 0"),
        ({"augment": [Augment.sela(4), None]}, "augment: expected a sela_ext.Augment, found NoneType"),
        ({"exact": 1}, "exact: expected True or False, found 1"),
        ({"exif": "yes"}, "exif: expected True or False, found 'yes'"),
        ({"index": 3}, 'index: expected "auto", a folder, an IndexStore or None, found int'),
        ({"prefetch": 0}, "prefetch: expected >= 1, found 0"),
    ],
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(OptionError, match=match) as caught:
        Loader(random_images(7, 4, 4), **options)
    assert "\n" not in str(caught.value)


def test_flags_must_be_flags():
    for name in ("shuffle", "drop_last", "channels_last", "exact", "exif"):
        with pytest.raises(OptionError, match=f"{name}: expected True or False, found 'no'"):
            Loader("digits", **{name: "no"})
    with pytest.raises(OptionError, match="shuffle: expected True or False, found 'no'"):
        Loader("digits").epoch(0, shuffle="no")
    with pytest.raises(OptionError, match=r"max_bad_fraction: expected a number 0\.\.1, found 'few'"):
        Loader("digits", max_bad_fraction="few")


def test_a_position_out_of_range_is_refused_at_once():
    loader = Loader(random_images(7, 4, 4))
    with pytest.raises(OptionError, match=r"start: expected 0\.\.7, found 8"):
        loader.epoch(0, start=8)
    with pytest.raises(OptionError, match="epoch"):
        loader.epoch(-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_an_absent_gpu_is_an_error():
    with pytest.raises(ResourceError, match='"cuda" is not there'):
        Loader(random_images(7, 4, 4), device="cuda")


@pytest.mark.skipif(not list(PHOTOS.glob("*.JPEG")), reason="no *.JPEG photographs in SELA_DATA_DIR")
def test_photographs_load_and_resume():
    paths = sorted(PHOTOS.glob("*.JPEG"))[:40]
    make = lambda: Loader(paths, batch_size=8, augment=Augment.sela(224), threads=2)  # noqa: E731
    whole = as_list(make())
    assert sum(len(batch.index) for batch in whole) == len(paths)
    assert_equal_batches(as_list(make(), start=8), whole[1:])


@pytest.mark.parametrize("threads", [1, 3])
def test_effects_are_drawn_for_each_image_and_stand_in_the_batch(threads):
    images = random_images(50, 24, 20, 3)
    augment = Augment.aug_plus_more(16)
    loader = Loader(images, batch_size=16, augment=augment, seed=5, threads=threads)
    for batch in loader.epoch(2):
        index = batch.index.numpy()
        effects = kernels.sample_effects(augment, index, seed=5, epoch=2)
        assert np.array_equal(batch.effects, effects)
        expected = kernels.augment(images, batch.params, augment, effects=effects, rows=index)
        assert torch.equal(batch.images, expected)
    assert next(Loader(images, augment=Augment.sela(16)).epoch(0)).effects is None


def test_batches_may_be_bytes_or_gradients(folder):
    batch = next(Loader(folder, batch_size=5, augment=Augment.aug_plus(16), dtype=torch.uint8).epoch(0))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (5, 3, 16, 16)
    batch = next(Loader(folder, batch_size=5, augment=Augment.deepcluster(16), dtype=torch.bfloat16).epoch(0))
    assert batch.images.shape == (5, 2, 16, 16)
    with pytest.raises(OptionError, match="floating-point type with sobel"):
        Loader(folder, augment=Augment.deepcluster(16), dtype=torch.uint8)
