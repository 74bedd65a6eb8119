import pytest

from sela_ext.training.clock import PARTS, Clock, Remaining, describe_shares, words


class Time:
    """A clock that is set by hand."""

    def __init__(self):
        self.value = 100.0

    def __call__(self):
        return self.value


def test_every_second_counts_for_exactly_one_part():
    time = Time()
    clock = Clock(now=time)
    time.value += 3
    clock.enter("train")
    time.value += 10
    with clock.part("label_pass"):
        time.value += 2
        with clock.part("checkpoint"):
            time.value += 1
        time.value += 4
    time.value += 5
    with clock.part("evaluation"):
        time.value += 7
    seconds = clock.seconds(waited=6.0)
    assert seconds == {
        "start": 3, "train": 9, "wait": 6, "label_pass": 6, "evaluation": 7, "checkpoint": 1
    }  # fmt: skip
    assert sum(seconds.values()) == 32


def test_a_part_that_raises_still_ends():
    time = Time()
    clock = Clock(now=time)

    def fail():
        with clock.part("evaluation"):
            time.value += 2
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    time.value += 1
    assert clock.seconds()["evaluation"] == 2
    assert clock.seconds()["start"] == 1


def test_seconds_of_earlier_sessions_are_added():
    time = Time()
    clock = Clock({"train": 50.0, "wait": 2.0}, now=time)
    clock.enter("train")
    time.value += 10
    seconds = clock.seconds(waited=1.0)
    assert (seconds["train"], seconds["wait"]) == (59.0, 3.0)
    assert set(seconds) == set(PARTS)


def test_rates_are_those_of_the_steps_since_the_last_call():
    time = Time()
    clock = Clock(now=time)
    time.value += 100  # a long start
    clock.enter("train")
    time.value += 2
    first = clock.rates(200, 200, 0.5)
    assert first["images_per_second"] == 100
    assert first["data_wait_share"] == 0.25
    assert first["run_images_per_second"] == pytest.approx(200 / 102)
    with clock.part("label_pass"):
        time.value += 50
    time.value += 4
    second = clock.rates(100, 300, 0.5)
    assert second["images_per_second"] == 25
    assert second["data_wait_share"] == 0
    assert second["interval_seconds"] == 4


def test_names_of_rates_tell_that_they_depend_on_the_clock():
    rates = Clock().rates(1, 1, 0.0)
    assert all(any(word in name for word in ("seconds", "per_second", "wait")) for name in rates)


def test_time_to_come_leaves_out_what_came_before_the_first_step():
    time = Time()
    remaining = Remaining(now=time)
    time.value += 1000
    assert remaining.update(0.1) is None
    time.value += 10
    assert remaining.update(0.2) == pytest.approx(80)
    assert remaining.update(1.0) == pytest.approx(0)
    assert Remaining(now=time).update(0.5) is None


def test_shares_name_the_largest_part_first_and_leave_out_crumbs():
    assert describe_shares({"train": 1.0, "wait": 2.0, "start": 0.001}) == (
        "67% waiting for images, 33% training steps"
    )
    assert describe_shares({}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3599, "60 min"), (3600, "1 h 0 min"), (1e6, "11 d 14 h")],
)
def test_times_in_words(seconds, text):
    assert words(seconds) == text
