"""`Loader(device="cuda")`: the CPU's batches, on the device, in time."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from sela_ext import Augment, Loader
from sela_ext.errors import ResourceError
from sela_ext.kernels.check_cases import augment_difference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """37 images of different sizes in two class folders, one of them damaged."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(37):
        path = root / f"{'ab'[i % 2]}/{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9 + i, 50 - i, 3), dtype=np.uint8)).save(path)
    (root / "a" / "20.png").write_bytes(b"no image")
    return root


def assert_same_batches(found, expected, card, made_there=None):
    """Equal; or within 0.01 of 255 where the card has augmented the images, as the Augment `made_there` says."""
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert one.images.device == card.place
        assert one.images.stride() == other.images.stride()
        if made_there is None:
            assert torch.equal(one.images.cpu(), other.images)
        else:
            assert augment_difference(made_there, one.images.cpu(), other.images) is None
        assert one.index.device.type == "cpu"
        assert torch.equal(one.placed.cpu(), one.index)
        assert one.placed.device == card.place
        assert torch.equal(one.index, other.index)
        assert one.params.tobytes() == other.params.tobytes()
        assert one.position == other.position
        assert (one.labels is None) == (other.labels is None)
        if other.labels is not None:
            assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("resident", ["auto", False])
def test_batches_equal_those_on_the_cpu(card, folder, dtype, channels_last, resident):
    images = np.random.default_rng(0).integers(0, 256, (333, 32, 32, 3), dtype=np.uint8)
    for data, augment in ((images, Augment.cifar(32)), (folder, Augment.sela(24)), ("digits", None)):
        options = {"batch_size": 64 if data is not folder else 8, "augment": augment, "dtype": dtype}
        options |= {"channels_last": channels_last, "on_bad_image": "skip", "max_bad_fraction": 0.1, "threads": 2}
        there = Loader(data, device=card.place, resident=resident, **options)
        here = Loader(data, resident=False, **options)
        assert there.residency.kept == (resident == "auto" and data is not folder), there.residency
        made_there = there.augment if there.residency.kept else None
        for epoch in (0, 3):
            assert_same_batches(there.epoch(epoch), here.epoch(epoch), card, made_there)
        assert there.bad_images == here.bad_images
        start = options["batch_size"]
        assert_same_batches(there.epoch(1, start=start), here.epoch(1, start=start), card, made_there)


def test_batches_stay_as_they_are_while_the_next_ones_arrive(card):
    images = np.random.default_rng(0).integers(0, 256, (4000, 32, 32, 3), dtype=np.uint8)
    options = {"batch_size": 100, "augment": Augment.cifar(32), "threads": 2}
    options["resident"] = False
    kept = list(Loader(images, device=card.place, **options).epoch(0))  # none is looked at before all have come
    assert_same_batches(kept, Loader(images, **options).epoch(0), card)


def test_kept_images_come_again_in_any_order_and_for_several_ranks(card):
    images = np.random.default_rng(0).integers(0, 256, (333, 31, 33, 1), dtype=np.uint8)
    options = {"batch_size": 64, "augment": Augment.cifar(28), "rank": 1, "world_size": 2, "threads": 2}
    there = Loader(images, device=card.place, resident=True, **options)
    here = Loader(images, resident=False, **options)
    order = np.random.default_rng(1).integers(0, 333, 700)
    assert_same_batches(there.epoch(2), here.epoch(2), card, there.augment)
    assert_same_batches(there.epoch(2, order=order), here.epoch(2, order=order), card, there.augment)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """37 JPEG files of different sizes and samplings, grey and turned ones, and some PNG files between them."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(37):
        pixels = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        image = pixels.resize((150 + 7 * i, 330 - 6 * i), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8 if i % 4 == 1 else 1
        if i % 9 == 4:
            image.save(root / f"{i:02d}.png")
        else:
            image.convert("L" if i % 5 == 2 else "RGB").save(root / f"{i:02d}.jpg", subsampling=i % 3, exif=exif)
    return root


@pytest.mark.parametrize("send", ["planes", "views"])
@pytest.mark.parametrize(
    ("augment", "options"),
    [
        (Augment.sela(224), {"dtype": torch.bfloat16, "channels_last": True}),
        (Augment.aug_plus(96), {"dtype": torch.float16}),
        (Augment.sela(65), {"exact": True, "exif": True}),
        (Augment.multi_crop((48, 32), (2, 1)), {"exif": True}),
        (Augment.deepcluster_eval(33), {"channels_last": True}),
    ],
)
def test_views_of_jpeg_files_are_made_there_from_their_samples(card, photographs, augment, options, send):
    options = {"batch_size": 8, "augment": augment, "threads": 2, **options}
    there, here = Loader(photographs, device=card.place, send=send, **options), Loader(photographs, **options)
    assert there.sending.planes == (send == "planes"), there.sending
    expected = [list(here.epoch(epoch)) for epoch in range(2)]
    for epoch, batches in enumerate(expected):
        kept = list(there.epoch(epoch))  # none is looked at before all have come
        for one, other in zip(kept, batches, strict=True):
            assert one.images is one.views[0]
            assert torch.equal(one.placed.cpu(), other.index)
            assert repr(one.params) == repr(other.params)
            for view, wanted, drawn in zip(one.views, other.views, there.views, strict=True):
                assert view.device == card.place
                assert view.stride() == wanted.stride()
                if send == "views":
                    assert torch.equal(view.cpu(), wanted)
                else:
                    assert augment_difference(drawn, view.cpu(), wanted) is None
        again = there.epoch(epoch, start=batches[0].position)
        for one, other in zip(again, kept[1:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))


@pytest.mark.gpu
def test_samples_stay_as_they_are_while_streams_change_and_the_next_ones_arrive(cuda, photographs):
    options = {"batch_size": 4, "augment": Augment.sela(96), "threads": 2, "device": cuda.place}
    expected = [batch.images.cpu() for batch in Loader(photographs, **options).epoch(0)]
    streams, found = [torch.cuda.Stream() for _ in range(3)], []
    batches = Loader(photographs, **options).epoch(0)
    for number in range(len(expected)):
        with torch.cuda.stream(streams[number % 3]):
            torch.cuda._sleep(3_000_000)
            batch = next(batches)
            found.append(batch.images.clone())
            del batch
    batches.close()
    torch.cuda.synchronize()
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


def test_leaving_early_ends_the_threads(card):
    loader = Loader("digits", batch_size=64, device=card.place, threads=2)
    before = threading.active_count()
    for _ in range(3):
        for batch in loader.epoch(0):
            assert len(batch.index) == 64
            break
    for thread in threading.enumerate():
        if thread.name.startswith("sela-"):
            thread.join(timeout=10)
    assert threading.active_count() <= before


@pytest.mark.gpu
def test_the_name_of_a_device_is_enough_and_an_absent_one_an_error(cuda):
    batch = next(iter(Loader("digits", batch_size=64, device="cuda", threads=1).epoch(0)))
    assert batch.images.device == cuda.place
    with pytest.raises(ResourceError, match="is not there"):
        Loader("digits", device=f"cuda:{torch.cuda.device_count()}")


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False])
def test_a_batch_is_made_or_copied_while_the_consumer_computes_on_another_stream(cuda, resident):
    images = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    options = {"batch_size": 100, "augment": Augment.cifar(32), "threads": 2}
    expected = [float(batch.images.double().sum()) for batch in Loader(images, **options).epoch(0)]
    stream, sums = torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        for batch in Loader(images, device=cuda.place, resident=resident, **options).epoch(0):
            torch.cuda._sleep(5_000_000)
            sums.append(batch.images.double().sum())
    stream.synchronize()
    far = 3e-4 * 100 * 32 * 32 * 3 if resident else 1e-6
    assert [float(total) for total in sums] == pytest.approx(expected, rel=1e-9, abs=far)


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False])
def test_streams_may_change_from_batch_to_batch(cuda, resident):
    images = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    options = {"batch_size": 100, "augment": Augment.cifar(32), "threads": 2, "dtype": torch.float16}
    options |= {"device": cuda.place, "resident": resident}
    expected = [batch.images.cpu() for batch in Loader(images, **options).epoch(0)]
    streams, found = [torch.cuda.Stream() for _ in range(3)], []
    batches = Loader(images, **options).epoch(0)
    for number in range(20):
        with torch.cuda.stream(streams[number % 3]):
            torch.cuda._sleep(3_000_000)
            batch = next(batches)
            found.append(batch.images.clone())
            del batch
    batches.close()
    torch.cuda.synchronize()
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_a_consumer_that_waits_for_nothing_does_not_fill_the_device(cuda):
    images = np.random.default_rng(0).integers(0, 256, (20_000, 32, 32, 3), dtype=np.uint8)
    options = {"batch_size": 500, "augment": Augment.none(32), "threads": 2, "device": cuda.place}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    batch_bytes = 500 * 3 * 32 * 32 * 4
    total = torch.zeros((), device=cuda.place)
    for batch in Loader(images, resident=False, **options).epoch(0):
        torch.cuda._sleep(20_000_000)
        total += batch.images.sum()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 12 * batch_bytes  # of 40


@pytest.mark.gpu
def test_kept_images_take_their_bytes_and_give_them_back(cuda):
    images = np.random.default_rng(0).integers(0, 256, (20_000, 32, 32, 3), dtype=np.uint8)
    before = torch.cuda.memory_allocated()
    loader = Loader(images, batch_size=100, device=cuda.place, resident=True, threads=1)
    batches = loader.epoch(0)
    batch = next(batches)
    assert torch.cuda.memory_allocated() - before >= images.nbytes
    batches.close()
    del batch, batches
    loader.close()
    assert torch.cuda.memory_allocated() - before < images.nbytes / 10
