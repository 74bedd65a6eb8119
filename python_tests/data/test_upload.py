"""The order of copies to a GPU, played by streams and events that happen when the test says so.

What a real device does with them is shown by python_tests/gpu/test_loader.py.
"""

import contextlib

import numpy as np
import pytest
import torch

from sela_ext import Augment, Loader
from sela_ext.data import upload as upload_module
from sela_ext.data.ring import TensorRing
from sela_ext.data.upload import Uploader
from sela_ext.data.vector_loader import VectorLoader
from sela_ext.data.vectors import VectorSource


class Played:
    """What Uploader uses of torch.cuda. Copies land at once; events happen when `advance` is called."""

    def __init__(self):
        self.log = []
        self.events = []
        self.streams = 0
        self.inside = None
        played = self

        class Event:
            def __init__(self):
                self.recorded = self.happened = False
                self.number = len(played.events)
                played.events.append(self)

            def record(self, stream):
                assert stream is played.consumer or played.inside is stream
                self.recorded = True
                played.log.append(("record", self.number, stream.name))

            def query(self):
                return self.happened

            def synchronize(self):
                assert self.recorded
                self.happened = True
                played.log.append(("synchronize", self.number))

        class Stream:
            def __init__(self, device):
                self.name = f"copy{played.streams}"
                played.streams += 1

            def wait_event(self, event):
                assert event.recorded
                played.log.append(("wait", event.number, self.name))

        self.Event, self.Stream = Event, Stream
        self.consumer = Stream(None)
        self.consumer.name = "consumer"

    @contextlib.contextmanager
    def stream(self, stream):
        self.inside = stream
        yield
        self.inside = None

    def current_stream(self, device):
        return self.consumer

    def advance(self, number):
        for event in self.events[: number + 1]:
            event.happened = True


@pytest.fixture
def played(monkeypatch):
    fake = Played()
    monkeypatch.setattr(upload_module.torch, "cuda", fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: fake.log.append(("mark", stream.name)))
    return fake


def test_the_consumers_stream_waits_for_the_copy_and_marks_its_memory(played):
    uploader = Uploader(torch.device("cpu"))
    ring = TensorRing([(1, 2, 2), (1, 1, 1)], rows=3, dtype=torch.float32, channels_last=True)
    tensors = ring.lend(3)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    sent = uploader.send(tensors)
    assert played.log == [("record", 0, "copy1")]
    received = uploader.receive(sent)
    marks = [("mark", "consumer"), ("mark", "consumer")]
    assert played.log[1:] == [("record", 1, "consumer"), ("wait", 0, "consumer"), *marks]
    for number, (copy, tensor) in enumerate(zip(received, tensors, strict=True)):
        assert copy.data_ptr() != tensor.data_ptr()
        assert copy.stride() == tensor.stride()
        assert (copy == number).all()


def test_memory_goes_back_to_the_ring_when_its_copy_is_done_and_not_before(played):
    uploader = Uploader(torch.device("cpu"))
    ring = TensorRing([(1, 2, 2)], rows=3, dtype=torch.float32)
    for _ in range(3):
        uploader.send(ring.lend(3))
    assert ring.free == 0
    played.advance(1)
    uploader.send(ring.lend(3))
    assert ring.free == 2
    uploader.close()
    assert played.log[-2:] == [("synchronize", 2), ("synchronize", 3)]
    assert ring.free == 4


def test_a_copy_waits_while_so_many_others_are_under_way(played):
    uploader = Uploader(torch.device("cpu"))
    ring = TensorRing([(1, 2, 2)], rows=3, dtype=torch.float32)
    for _ in range(upload_module.COPIES):
        uploader.send(ring.lend(3))
    assert not [entry for entry in played.log if entry[0] == "synchronize"]
    for number in range(4):
        uploader.send(ring.lend(3))
        assert played.log[-2] == ("synchronize", number)
        assert ring.free == 1  # the memory of the one that was waited for is there for the next


def test_a_batch_waits_until_the_device_has_come_to_one_some_batches_before(played):
    uploader = Uploader(torch.device("cpu"))
    followed = []
    for number in range(8):
        sent = uploader.send([torch.zeros(1)])
        sent.done.happened = True
        before = len(played.events)
        uploader.receive(sent)
        followed.append(before)
        waited = [entry[1] for entry in played.log if entry[0] == "synchronize" and entry[1] in followed]
        assert waited == followed[: max(0, number + 1 - upload_module.BATCHES_BEHIND)]


class LateUploader:
    """Copies as late as a device may: when the consumer is about to read."""

    def __init__(self, device):
        self.closed = False
        self.sent = 0
        self.late = {}

    def send(self, tensors):
        self.sent += 1
        assert not self.closed
        upload = upload_module.Upload([torch.zeros_like(tensor) for tensor in tensors], None)
        self.late[id(upload)] = tensors
        return upload

    def receive(self, upload):
        for copy, tensor in zip(upload.tensors, self.late.pop(id(upload)), strict=True):
            copy.copy_(tensor)
        return upload.tensors

    def close(self):
        self.closed = True


@pytest.mark.parametrize("augment", [Augment.sela(12), Augment.multi_crop((12, 8), (1, 2))])
def test_a_loader_sends_every_batch_and_keeps_its_memory_until_it_has_arrived(monkeypatch, augment):
    images = np.random.default_rng(0).integers(0, 256, (90, 16, 16, 3), dtype=np.uint8)
    options = {"batch_size": 8, "augment": augment, "threads": 2, "channels_last": True}
    expected = list(Loader(images, **options).epoch(1))
    uploaders = []

    def make(device):
        uploaders.append(LateUploader(device))
        return uploaders[-1]

    monkeypatch.setattr("sela_ext.data.loader.Uploader", make)
    loader = Loader(images, **options)
    loader._device = torch.device("meta")  # not the CPU
    found = list(loader.epoch(1))
    assert len(found) == len(expected) == 12
    for one, other in zip(found, expected, strict=True):
        assert one.images is one.views[0]
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.placed, other.index)
        assert one.placed is not one.index  # it came with the images
    batches = loader.epoch(2)
    next(batches)
    batches.close()
    assert [uploader.closed for uploader in uploaders] == [True, True]
    assert uploaders[0].sent == 12


def test_vectors_are_sent_likewise(monkeypatch):
    source = VectorSource(np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32))
    options = {"batch_size": 16, "views": 2, "threads": 1}
    expected = list(VectorLoader(source, **options).epoch(1))
    uploaders = []

    def make(device):
        uploaders.append(LateUploader(device))
        return uploaders[-1]

    monkeypatch.setattr("sela_ext.data.vector_loader.Uploader", make)
    loader = VectorLoader(source, device="meta", **options)
    found = list(loader.epoch(1))
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.placed, other.index)
    batches = loader.epoch(2, order=np.arange(40))
    next(batches)
    batches.close()
    assert [uploader.closed for uploader in uploaders] == [True, True]
    assert uploaders[0].sent == 4
