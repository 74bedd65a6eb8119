import pytest

from sela_ext.errors import OptionError
from sela_ext.evaluation import ProbeSchedule
from sela_ext.evaluation.schedule import named_schedule


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "rates"),
    [
        ("resnet", 100, 1024, {0: 0.1, 84: 0.1, 85: 0.01, 99: 0.01}),
        ("resnet-146", 146, 1024, {0: 0.1, 85: 0.01, 127: 0.01, 128: 0.001, 145: 0.001}),
        ("alexnet", 36, 192, {0: 1e-2, 9: 1e-2, 10: 1e-3, 20: 1e-4, 30: 1e-5, 35: 1e-5}),
        ("alexnet-paper", 36, 192, {0: 1e-2, 4: 1e-2, 5: 2e-3, 15: 4e-4, 25: 8e-5, 35: 8e-5}),
    ],
)
def test_published_schedules_are_as_published(name, epochs, batch, rates):
    schedule = named_schedule(name)
    assert (schedule.epochs, schedule.batch_size, schedule.momentum) == (epochs, batch, 0.9)
    assert {epoch: schedule.rate(epoch) for epoch in rates} == pytest.approx(rates, rel=1e-12)
    assert schedule.weight_decay == (1e-5 if name.startswith("alexnet") else 0.0)


def test_a_stretched_schedule_keeps_its_course():
    short = named_schedule("alexnet-paper", 12)
    assert (short.epochs, short.milestones) == (12, (2, 5, 8))
    assert named_schedule(short) is short
    assert [named_schedule("alexnet", epochs).rate(0) for epochs in (1, 2, 3)] == [0.01, 0.01, 0.01]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "schedule epochs: expected a whole number of at least 1, found 0"),
        ({"batch_size": 1}, "schedule batch_size: expected a whole number of at least 2, found 1"),
        ({"lr": 0.0}, "schedule lr: expected a finite number above 0"),
        ({"lr": float("nan")}, "schedule lr"),
        ({"factor": -1.0}, "schedule factor"),
        ({"momentum": 1.0}, r"schedule momentum: expected a number in \[0, 1\)"),
        ({"weight_decay": -1.0}, "schedule weight_decay"),
    ],
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(OptionError, match=message):
        ProbeSchedule(**{"epochs": 2, "batch_size": 8, "lr": 0.1, **change})


def test_an_unknown_name_is_refused():
    with pytest.raises(OptionError, match=r"schedule: expected resnet, .* found 'vgg'"):
        named_schedule("vgg")
