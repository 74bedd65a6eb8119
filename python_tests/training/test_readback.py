"""Numbers on their way from a device, played by events that happen when the test says so."""

import pytest
import torch

from sela_ext.training import readback as module
from sela_ext.training.readback import Readback


def test_numbers_of_any_type_come_back_in_order():
    scalars = [torch.tensor(1.5), torch.tensor([3], dtype=torch.int64), torch.tensor(-0.25, dtype=torch.bfloat16)]
    assert Readback(scalars).read() == [1.5, 3.0, -0.25]
    loss = torch.tensor(2.0, requires_grad=True) * 3
    assert Readback([loss]).read() == [6.0]
    assert str(Readback([torch.tensor(float("nan"))]).read()[0]) == "nan"


def test_a_number_is_the_one_of_its_time():
    value = torch.tensor(1.0)
    sent = Readback([value])
    value.fill_(9.0)
    assert sent.read() == [1.0]


def test_only_the_event_behind_the_numbers_is_waited_for(monkeypatch):
    log = []

    class Event:
        def record(self, stream):
            log.append(("record", stream))

        def synchronize(self):
            log.append("wait")

    class Numbers:
        device = torch.device("cuda", 3)

        def to(self, device, non_blocking):
            assert device == "cpu"
            assert non_blocking
            log.append("send")
            return torch.tensor([0.5])

    monkeypatch.setattr(module.torch.cuda, "Event", Event)
    monkeypatch.setattr(module.torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(module.torch, "stack", lambda scalars: Numbers())
    sent = Readback([torch.tensor(0.0)])
    assert log == ["send", ("record", "stream of cuda:3")]
    assert sent.read() == [0.5]
    assert log[2:] == ["wait"]


@pytest.mark.gpu
def test_a_device_goes_on_while_its_numbers_are_read():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    first = torch.ones((), device="cuda") * 7
    sent = Readback([first])
    begun, ended = torch.cuda.Event(), torch.cuda.Event()
    begun.record()
    torch.cuda._sleep(2_000_000_000)  # about a second
    ended.record()
    assert sent.read() == [7.0]
    assert not ended.query()
    torch.cuda.synchronize()
