"""Images of which a device makes the views: the CPU's batches within the kernels' tolerance, whatever has no room."""

import ctypes
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from sela_ext import Augment, Loader
from sela_ext.data import loader as loader_module
from sela_ext.data import planes_upload
from sela_ext.data.upload import Upload
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels.check_cases import augment_difference


@pytest.fixture
def play(as_cuda, host_card, monkeypatch):
    """Makes the processor a card from then on; what was made before was made without one."""
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    return lambda: as_cuda(host_card)


def picture(seed, height, width):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.clip(np.asarray(coarse) + rng.normal(0, 9, (height, width, 3)), 0, 255)
    return Image.fromarray(noisy.astype(np.uint8))


SIZES = [(130, 171), (301, 105), (105, 104), (104, 104), (31, 1), (1, 33), (211, 403), (160, 240), (33, 107)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """29 images: JPEG files of many sizes and samplings, grey, turned and progressive ones, and PNG files."""
    root = tmp_path_factory.mktemp("images")
    for i in range(29):
        image = picture(i, *SIZES[i % len(SIZES)])
        if i % 7 == 3:
            image.save(root / f"{i:02d}.png")
            continue
        options = {"subsampling": i % 3, "quality": 80 + i % 3}
        if i % 11 == 5:
            options["progressive"] = True
        if i % 5 == 1:
            image = image.convert("L")
        if i % 5 == 2:
            exif = Image.Exif()
            exif[0x0112] = 1 + i % 8
            options["exif"] = exif
        image.save(root / f"{i:02d}.jpg", **options)
    return root


def assert_close(found, expected, augments):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) >= 1
    for one, other in zip(found, expected, strict=True):
        assert one.images is one.views[0]
        for view, wanted, augment in zip(one.views, other.views, augments, strict=True):
            assert view.stride() == wanted.stride()
            assert augment_difference(augment, view, wanted) is None
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.placed, one.index)
        assert one.position == other.position
        assert repr(one.params) == repr(other.params)
        assert repr(one.effects) == repr(other.effects)


def assert_equal(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) >= 1
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.index, other.index)
        assert all(torch.equal(view, wanted) for view, wanted in zip(one.views, other.views, strict=True))


CASES = [
    (Augment.sela(48), {}),
    (Augment.sela(31), {"exact": True}),
    (Augment.sela(33), {"exif": True, "view": 3}),
    (Augment.aug_plus(40), {"dtype": torch.bfloat16}),
    (Augment.deepcluster_eval(33), {"channels_last": True, "dtype": torch.float16}),
    (Augment.eval(24), {"shuffle": False, "whole_batches": True, "rank": 1, "world_size": 2}),
    (Augment.none(20), {"channels_last": True}),
    (Augment.deepcluster(12), {}),  # reduced transforms
    (Augment.multi_crop((40, 12), (2, 3)), {"exif": True}),
]


@pytest.mark.parametrize(("augment", "options"), CASES)
def test_batches_are_those_of_the_cpu_from_every_position(play, host_core, folder, augment, options):
    options = {"batch_size": 8, "augment": augment, "seed": 5, "threads": 2, **options}
    here = Loader(folder, **options)
    expected = list(here.epoch(3))
    assert not here.sending.planes
    play()
    there = Loader(folder, send="planes", **options)
    assert there.sending.planes
    assert_close(there.epoch(3), expected, there.views)
    assert host_core.calls == len(expected) * len(there.views)
    for number, batch in enumerate(expected[:-1]):
        assert_close(there.epoch(3, start=batch.position), expected[number + 1 :], there.views)


@pytest.mark.parametrize("nbytes", [0, 16_000, 300_000])
def test_what_has_no_room_is_made_here_and_the_same_bits_come_again(play, host_core, folder, monkeypatch, nbytes):
    views = Augment.multi_crop((40, 24), (1, 2))
    options = {"batch_size": 11, "augment": views, "seed": 5}
    expected = list(Loader(folder, threads=1, **options).epoch(1))
    monkeypatch.setattr(planes_upload.Sending, "room", lambda sending, rows: nbytes)
    sizes = itertools.cycle(view.size for view in views)

    def spoil(outputs):  # so that it can be told who has made a pixel
        values = len(outputs["params"]) * 3 * next(sizes) ** 2
        np.frombuffer((ctypes.c_char * (4 * values)).from_address(outputs["out"]), np.float32)[:] += np.float32(1e-5)

    host_core.spoil = spoil
    play()
    found = list(Loader(folder, threads=1, **options).epoch(1))
    assert_close(found, expected, views)
    for threads in (2, 4):
        there = Loader(folder, threads=threads, prefetch=1, **options)
        list(there.epoch(0))  # which finds entry points and keeps small images
        assert_equal(there.epoch(1), found)
        assert_equal(there.epoch(1, start=found[0].position), found[1:])
    made_here = []
    for one, other in zip(found, expected, strict=True):
        made_here += [torch.equal(a, b) for a, b in zip(one.images, other.images, strict=True)]
    assert all(made_here) == (nbytes == 0)
    assert nbytes == 300_000 or np.mean(made_here) > 0.2


@pytest.fixture
def spoiled(tmp_path):
    """30 images, of which 5 is empty, 11 a text and 20 truncated."""
    for i in range(30):
        picture(i, 120 + i, 130).save(tmp_path / f"{i:02d}.jpg", quality=80)
    (tmp_path / "05.jpg").write_bytes(b"")
    (tmp_path / "11.jpg").write_text("This is not a picture.")
    (tmp_path / "20.jpg").write_bytes((tmp_path / "20.jpg").read_bytes()[:-100])
    return tmp_path


@pytest.mark.parametrize("nbytes", [None, 60_000])
def test_bad_images_are_left_out_and_places_do_not_depend_on_what_is_known(play, spoiled, monkeypatch, nbytes):
    options = {"batch_size": 4, "augment": Augment.sela(40), "threads": 2, "on_bad_image": "skip"}
    options["max_bad_fraction"] = 0.2
    here = Loader(spoiled, **options)
    expected = [list(here.epoch(number)) for number in range(2)]
    if nbytes is not None:
        monkeypatch.setattr(planes_upload.Sending, "room", lambda sending, rows: nbytes)
    play()
    there = Loader(spoiled, **options)
    for number, batches in enumerate(expected):
        assert_close(there.epoch(number), batches, there.views)
    assert sorted(there.bad_images) == sorted(here.bad_images)
    assert [index for index, _, _ in sorted(there.bad_images)] == [5, 11, 20]
    # A run that is resumed has not met them yet.
    assert_equal(Loader(spoiled, **options).epoch(1), list(there.epoch(1)))


def test_rows_that_are_kept_know_which_of_them_were_made_here():
    index = np.arange(10, 16)
    rows = planes_upload.PlaneRows.begin(index, index, 0, (Augment.none(1),))
    rows.finished = np.array([5, 1, 3])  # in the order in which they were made
    rows.images = [torch.tensor([50.0, 10.0, 30.0]).reshape(3, 1, 1, 1)]
    kept = rows.keep(np.array([False, True, True, False, True, True]))
    assert kept.index.tolist() == [11, 12, 14, 15]
    assert kept.places.tolist() == [1, 2, 4, 5]
    assert kept.finished.tolist() == [3, 0]
    assert kept.images[0].flatten().tolist() == [50.0, 10.0]


def test_a_bad_image_is_an_error_otherwise_and_ends_the_epoch(play, spoiled):
    play()
    loader = Loader(spoiled, batch_size=4, augment=Augment.sela(40), threads=2, shuffle=False)
    batches = loader.epoch(0)
    next(batches)
    with pytest.raises(DataError, match=r"05.jpg: .*remove the file, or use on_bad_image"):
        list(batches)


def test_images_that_come_again_are_drawn_anew(play, folder):
    order = np.random.default_rng(1).integers(0, 29, 70)
    options = {"batch_size": 32, "augment": Augment.sela(40), "threads": 1}
    expected = list(Loader(folder, **options).epoch(2, order=order))
    play()
    there = Loader(folder, **options)
    assert_close(there.epoch(2, order=order), expected, there.views)
    there = Loader(folder, **{**options, "batch_size": 64})  # an order makes its largest batch larger
    before = there.arena_nbytes
    assert len(list(there.epoch(0, order=order))) == 2
    assert there.arena_nbytes > before


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ("digits", {}, "images that are not encoded files"),
        ("folder", {"dtype": torch.uint8}, "views that CUDA kernels do not make: expected float32"),
        ("pngs", {}, "none of 4 images that were looked at is a JPEG file of the compiled reader"),
    ],
)
def test_what_the_device_cannot_make_is_sent_as_views_and_says_why(play, folder, tmp_path, data, options, words):
    for i in range(4):
        picture(i, 20, 30).save(tmp_path / f"{i}.png")
    play()
    source = {"folder": folder, "pngs": tmp_path}.get(data, data)
    loader = Loader(source, threads=1, resident=False, **options)
    assert not loader.sending.planes
    assert loader.sending.reason.startswith("views: ")
    assert words in loader.sending.reason
    assert next(loader.epoch(0)).images.shape[0] >= 4
    with pytest.raises(OptionError, match=f"send: expected images that the device can make views of, found .*{words}"):
        next(Loader(source, threads=1, resident=False, send="planes", **options).epoch(0))


def test_small_views_of_large_images_are_sent_finished_unless_samples_are_asked_for(play, tmp_path):
    for i in range(3):
        picture(i, 211, 403).save(tmp_path / f"{i}.jpg")
    options = {"augment": Augment.none(9), "threads": 1}
    expected = list(Loader(tmp_path, **options).epoch(0))
    play()
    found = Loader(tmp_path, **options).sending
    assert not found.planes
    assert found.reason.endswith("kB of samples per image are more than twice what views take in float32")
    there = Loader(tmp_path, send="planes", **options)
    assert there.sending.planes
    assert_close(there.epoch(0), expected, there.views)


def test_views_are_sent_when_asked_for_or_where_kernels_are_not_used(play, folder, monkeypatch, host_core):
    play()
    loader = Loader(folder, threads=1, send="views")
    assert loader.sending.reason == "views: send is views"
    list(loader.epoch(0))
    assert host_core.calls == 0
    monkeypatch.setattr(planes_upload, "usable", lambda place: None)
    assert Loader(folder, threads=1).sending.reason == "views: cpu, whose kernels are not used"
    with pytest.raises(OptionError, match='send: expected "auto", "planes" or "views", found 3'):
        Loader(folder, send=3)
    images = np.zeros((5, 8, 8, 3), np.uint8)
    assert Loader(images, threads=1).sending.reason == "nothing: the images are kept on the device"


def test_without_a_card_planes_are_an_error_when_asked_for(folder):
    assert Loader(folder, threads=1).sending.reason == "views: batches are made on the CPU"
    with pytest.raises(OptionError, match="found batches are made on the CPU"):
        next(Loader(folder, threads=1, send="planes").epoch(0))


class LateUploader:
    """Copies as late as a device may: when the consumer is about to read."""

    def __init__(self, device):
        self.late = {}
        self.bytes = []

    def send(self, tensors, addressed=None):
        upload = Upload([torch.zeros_like(tensor) for tensor in tensors], None)
        if addressed is not None:
            addressed(upload.tensors)
        self.bytes.append(tensors[1].nbytes)
        self.late[id(upload)] = list(tensors)
        return upload

    def receive(self, upload):
        for copy, tensor in zip(upload.tensors, self.late.pop(id(upload)), strict=True):
            copy.copy_(tensor)
        return upload.tensors

    def close(self):
        self.late.clear()


def test_records_name_the_copy_and_memory_goes_back_to_the_ring(play, folder, monkeypatch):
    options = {"batch_size": 4, "augment": Augment.sela(40), "threads": 2}
    expected = list(Loader(folder, **options).epoch(0))
    uploaders = []
    monkeypatch.setattr(
        loader_module, "Uploader", lambda device: uploaders.append(LateUploader(device)) or uploaders[-1]
    )
    play()
    loader = Loader(folder, **options)
    loader._device = torch.device("meta")  # not the CPU, so that batches are sent
    monkeypatch.setattr(planes_upload, "on_card", lambda device: True)
    monkeypatch.setattr(planes_upload, "indexed", lambda device: torch.device("cpu"))
    assert_close(loader.epoch(0), expected, loader.views)
    room = loader.arena_nbytes
    assert max(uploaders[0].bytes) <= room
    assert min(uploaders[0].bytes) < room / 2  # what is used of an arena is sent
    assert loader._arenas.free >= 1
    del loader


def test_arenas_have_room_for_a_batch_and_a_limit():
    wanted = (4000, 6000, 0, 10_000)
    sending = planes_upload.Sending(True, "", wanted, 24_000)
    assert sending.room(256) == 1.5 * 5000 * 256
    assert sending.room(1) == pytest.approx(5000 + 4 * np.std(wanted), abs=16)
    assert planes_upload.Sending(True, "", wanted, 5504).room(100) == 550_400
    assert planes_upload.Sending(False, "", wanted, 24_000).room(256) == 0


def test_what_is_sent_is_said_before_anything_is(play, folder):
    play()
    loader = Loader(folder, batch_size=8, augment=[Augment.none(40), Augment.none(24)], threads=1)
    found = loader.sending
    assert found.planes
    assert found.reason.startswith("planes: the device makes the views; ")
    assert found.reason.endswith("kB of samples per image")
    assert len(found.wanted) == 29
    assert sum(wanted == 0 for wanted in found.wanted) >= 4  # the PNG files
    assert found.most == 24 * (40**2 + 24**2)
    assert loader.arena_nbytes == found.room(8) + planes_upload.records_bytes(8, 2)
    assert Loader(folder, threads=1, send="views").arena_nbytes == 0
