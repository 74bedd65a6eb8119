"""Images that are kept on a device: the CPU's batches, made there, and the plan that decides."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from sela_ext import Augment, Loader, kernels
from sela_ext.data import open_source, residency
from sela_ext.data.residency import ResidentImages, plan_residency, size
from sela_ext.errors import OptionError, ResourceError


@pytest.fixture
def play(as_cuda, host_card, monkeypatch):
    """Makes the processor a card from then on; what was made before was made without one."""
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    return lambda: as_cuda(host_card)


def pictures(count=101, height=20, width=17, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) >= 1
    for one, other in zip(found, expected, strict=True):
        for view, wanted in zip(one.views, other.views, strict=True):
            assert view.stride() == wanted.stride()
            assert torch.equal(view, wanted)
        assert one.images is one.views[0]
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.placed, one.index)
        assert one.position == other.position
        assert type(one.params) is type(other.params)
        if isinstance(other.params, tuple):
            assert [p.tobytes() for p in one.params] == [p.tobytes() for p in other.params]
        else:
            assert one.params.tobytes() == other.params.tobytes()
        assert one.effects == other.effects
        assert (one.labels is None) == (other.labels is None)
        if other.labels is not None:
            assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_those_of_the_cpu_from_every_position(play, host_core, dtype, channels_last):
    options = {"batch_size": 16, "augment": Augment.cifar(24), "dtype": dtype, "channels_last": channels_last}
    options |= {"seed": 5, "threads": 1}
    here = Loader(pictures(), **options)
    expected = list(here.epoch(3))
    assert here.residency.reason == "not kept: batches are made on the CPU, where the images are"
    play()
    there = Loader(pictures(), **options)
    assert there.residency.kept
    assert_same(there.epoch(3), expected)
    assert host_core.calls == len(expected)  # one launch each
    for number, batch in enumerate(expected[:-1]):
        assert_same(there.epoch(3, start=batch.position), expected[number + 1 :])


@pytest.mark.parametrize(
    "options",
    [
        {"augment": [Augment.sela(24), Augment.sela(12), Augment.flip(12)], "view": 3},
        {"augment": Augment.sela(17), "drop_last": True, "rank": 1, "world_size": 3},
        {"augment": Augment.eval(9), "whole_batches": True, "rank": 2, "world_size": 3, "shuffle": False},
        {"augment": None},
    ],
)
def test_views_and_ranks_are_those_of_the_cpu(play, options):
    options = {"batch_size": 8, "threads": 1, "labels": np.arange(101) % 7, **options}
    expected = list(Loader(pictures(), **options).epoch(1))
    play()
    assert_same(Loader(pictures(), resident=True, **options).epoch(1), expected)


def test_images_that_come_again_are_drawn_anew_as_on_the_cpu(play, host_core):
    order = np.random.default_rng(1).integers(0, 101, 250)
    options = {"batch_size": 32, "augment": Augment.cifar(20), "threads": 1}
    expected = list(Loader(pictures(), **options).epoch(2, order=order))
    play()
    there = Loader(pictures(), resident=True, **options)
    assert_same(there.epoch(2, order=order), expected)
    assert host_core.calls == 2 * len(expected)  # drawn by one kernel, and given to the other
    unique = np.random.default_rng(2).permutation(101)[:40]
    assert len(list(there.epoch(2, order=unique))) == 2
    assert host_core.calls == 2 * len(expected) + 2


@pytest.mark.parametrize("channels", [1, 3])
def test_a_part_of_a_memory_map_is_sent_alone_and_piece_by_piece(play, tmp_path, monkeypatch, channels):
    np.save(tmp_path / "images.npy", pictures(channels=channels))
    mapped = open_source(tmp_path / "images.npy")
    part = mapped.subset(np.arange(100, 0, -2))
    assert part.array is None
    options = {"batch_size": 16, "augment": Augment.cifar(20), "threads": 1}
    expected = list(Loader(part, **options).epoch(0))
    monkeypatch.setattr(residency, "_PIECE", 3000)
    play()
    there = Loader(part, **options)
    assert there.residency.nbytes == 50 * 20 * 17 * channels
    assert_same(there.epoch(0), expected)


def test_loaders_of_one_source_share_what_is_kept(play, monkeypatch):
    sent = []
    real = residency._sent
    monkeypatch.setattr(residency, "_sent", lambda *arguments: sent.append(1) or real(*arguments))
    play()
    source = open_source(pictures())
    kept = ResidentImages(source, torch.device("cpu"))
    assert not kept.there
    for augment in (Augment.cifar(20), Augment.eval(20)):
        loader = Loader(source, augment=augment, resident=kept, threads=1)
        assert len(list(loader.epoch(0))) == 1
        loader.close()
    assert sent == [1]
    assert kept.there
    kept.close()
    assert not kept.there
    own = Loader(source, threads=1)
    for _ in range(2):
        list(own.epoch(0))
    assert sent == [1, 1]
    own.close()
    assert len(list(own.epoch(0))) == 1
    assert sent == [1, 1, 1]
    with pytest.raises(OptionError, match=r"resident: expected images \[101, 20, 17, 3\], found array: 9 images"):
        Loader(pictures(9), resident=kept)


def test_nothing_is_drawn_on_the_cpu_and_no_thread_is_started_before_it_is_asked_for(play, monkeypatch):
    card = play()
    waits = []
    monkeypatch.setattr(card, "synchronize", lambda: waits.append(1))
    drawn = []
    real = kernels.sample_parameters
    monkeypatch.setattr(kernels, "sample_parameters", lambda *a, **k: drawn.append(1) or real(*a, **k))
    before = threading.active_count()
    loader = Loader(pictures(), batch_size=8, augment=Augment.cifar(20), threads=2)
    batches = loader.epoch(0)
    first = next(batches)
    assert threading.active_count() == before
    assert len(list(batches)) == 12
    assert waits == [1]  # when the images were sent
    assert not drawn
    assert len(first.params) == 8
    assert first.params is first.params
    assert drawn == [1]
    assert 0 < loader.wait_seconds <= loader.seconds


def folder_of(tmp_path):
    for i in range(3):
        Image.fromarray(pictures(1, 9 + i)[0]).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (folder_of, {}, "images that lie in files, or have different sizes"),
        (pictures, {"dtype": torch.uint8}, "float32, bfloat16 or float16 on CUDA, found torch.uint8"),
        (pictures, {"augment": Augment.none(7)}, "images that CUDA kernels do not augment: size 7"),
        (pictures, {"augment": [Augment.none(16), Augment.none(7)]}, "images that CUDA kernels do not augment: size 7"),
    ],
)
def test_what_cannot_be_kept_is_not_and_says_why(play, tmp_path, monkeypatch, data, options, words):
    play()
    real = residency.resident_refusal
    monkeypatch.setattr(residency, "resident_refusal", lambda n, a, d: "size 7" if a.size == 7 else real(n, a, d))
    data = data(tmp_path) if data is folder_of else data()
    loader = Loader(data, threads=1, **options)
    assert not loader.residency.kept
    assert loader.residency.reason.startswith("not kept: ")
    assert len(list(loader.epoch(0))) == 1
    with pytest.raises(OptionError, match=f"resident: expected images that can be kept on the device, found .*{words}"):
        Loader(data, resident=True, threads=1, **options)


def test_room_decides(play):
    card = play()
    images = pictures()
    card.memory = 2 * images.nbytes
    loader = Loader(images, threads=1)
    assert loader.residency.reason == "kept on the device: 103 kB of 206 kB free"
    card.memory -= 2
    loader = Loader(images, threads=1)
    assert loader.residency.reason == "not kept: 103 kB of images, room for 103 kB of 206 kB free on cpu"
    with pytest.raises(ResourceError, match="resident: expected images that fit beside all else, found 103 kB"):
        Loader(images, resident=True, threads=1)
    source, views = open_source(images), [Augment.cifar(20)]
    found = plan_residency(source, views, torch.float32, torch.device("cpu"), room=images.nbytes)
    assert found.kept
    assert found.nbytes == images.nbytes
    assert not plan_residency(source, views, torch.float32, torch.device("cpu"), room=images.nbytes - 1).kept
    assert not plan_residency(source, views, torch.float32, torch.device("cpu"), wish=False).kept


def test_a_device_whose_kernels_are_refused_keeps_nothing(play, monkeypatch):
    play()
    monkeypatch.setattr("sela_ext.data.residency.usable", lambda place: None)
    loader = Loader(pictures(), threads=1)
    assert loader.residency.reason == "not kept: cpu, whose kernels are not used"


def test_without_a_card_resident_is_an_error_when_asked_for_and_nothing_by_itself():
    with pytest.raises(OptionError, match="batches are made on the CPU"):
        Loader("digits", resident=True)
    assert not Loader("digits").residency.kept
    assert Loader("digits", resident=False).residency.reason == "not kept: resident is False"
    with pytest.raises(OptionError, match='resident: expected "auto", True, False or ResidentImages, found 3'):
        Loader("digits", resident=3)


@pytest.mark.parametrize(
    ("nbytes", "words"), [(999, "999 B"), (999_700, "1 MB"), (153_600_000, "154 MB"), (3e15, "3e+03 TB")]
)
def test_sizes_are_written_in_three_digits(nbytes, words):
    assert size(nbytes) == words


def test_every_stream_waits_for_the_order_and_holds_what_it_reads(play, monkeypatch):
    card = play()
    log = []
    monkeypatch.setattr(card, "mark", lambda: log.append("sent") or len(log))
    monkeypatch.setattr(card, "follow", lambda mark: log.append(("waits", mark)))
    monkeypatch.setattr(card, "hold", lambda *tensors: log.append(("holds", [tuple(t.shape) for t in tensors])))
    options = {"batch_size": 40, "augment": Augment.cifar(20), "threads": 1}
    order = np.arange(90) % 45
    assert len(list(Loader(pictures(), **options).epoch(0, order=order))) == 3
    held = [(101, 20, 17, 3), (90,), (90,)]
    assert log == ["sent", *[("waits", 1), ("holds", held)] * 3]


@pytest.mark.parametrize(
    "augment",
    [
        Augment.aug_plus(96),
        Augment.multi_crop((80, 48), (2, 1)),
        Augment.sela(70),
        Augment.deepcluster(24),
    ],
)
def test_large_images_and_effects_are_those_of_the_cpu(play, host_core, augment):
    images, order = pictures(41, 120, 107), np.arange(60) % 41
    options = {"batch_size": 8, "augment": augment, "threads": 1, "seed": 3}
    here = Loader(images, **options)
    expected, again = list(here.epoch(1)), list(here.epoch(1, order=order))
    play()
    there = Loader(images, resident=True, **options)
    for one, other in zip(there.epoch(1), expected, strict=True):
        assert all(torch.equal(view, wanted) for view, wanted in zip(one.views, other.views, strict=True))
        assert repr(one.params) == repr(other.params)
        assert repr(one.effects) == repr(other.effects)
    launches = host_core.calls
    assert launches > 0
    # Images that come again are drawn by numbers of their own, by as many launches for a batch.
    for one, other in zip(there.epoch(1, order=order), again, strict=True):
        assert all(torch.equal(view, wanted) for view, wanted in zip(one.views, other.views, strict=True))
        assert repr(one.params) == repr(other.params)
        assert repr(one.effects) == repr(other.effects)
    assert host_core.calls - launches == len(there.views) * len(again)
