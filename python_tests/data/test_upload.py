"""The order of copies to a GPU, played by streams and events that happen when the test says so.

What a real device does with them is shown by python_tests/gpu/test_loader.py.
"""

import contextlib

import pytest
import torch

from sela_ext.data import upload as upload_module
from sela_ext.data.ring import TensorRing
from sela_ext.data.upload import Uploader


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
                assert played.inside is stream
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
    assert played.log[1:] == [("wait", 0, "consumer"), ("mark", "consumer"), ("mark", "consumer")]
    for number, (copy, tensor) in enumerate(zip(received, tensors, strict=True)):
        assert copy.data_ptr() != tensor.data_ptr()
        assert copy.stride() == tensor.stride()
        assert (copy == number).all()


def test_memory_goes_back_to_the_ring_when_its_copy_is_done_and_not_before(played):
    uploader = Uploader(torch.device("cpu"))
    ring = TensorRing([(1, 2, 2)], rows=3, dtype=torch.float32)
    for _ in range(3):
        uploader.receive(uploader.send(ring.lend(3)))
    assert ring.free == 0
    played.advance(1)
    uploader.send(ring.lend(3))
    assert ring.free == 2
    uploader.close()
    assert played.log[-2:] == [("synchronize", 2), ("synchronize", 3)]
    assert ring.free == 4
