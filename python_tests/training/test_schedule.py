from itertools import pairwise

import pytest

from sela_ext.training.schedule import label_pass_times, learning_rate, passes_due


def test_quadratic_label_passes_start_at_once_and_thin_out():
    times = label_pass_times(100, 400, 1000, "quadratic")
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0
    assert all(later > earlier for earlier, later in pairwise(gaps))
    assert times[-1] == pytest.approx(401.01 * 1000)
    assert times[50] == pytest.approx((50 / 99) ** 2 * 401.01 * 1000)


def test_linear_label_passes_fall_on_the_epochs_when_there_are_as_many():
    assert label_pass_times(5, 5, 77, "linear") == [0, 77, 154, 231, 308]


def test_no_and_one_label_pass():
    assert label_pass_times(0, 10, 100, "quadratic") == []
    assert label_pass_times(1, 10, 100, "quadratic") == [0]


def test_passes_that_came_due_together_count_as_one():
    times = [0.0, 10.0, 11.0, 500.0]
    assert passes_due(times, 0, 0) == 1
    assert passes_due(times, 1, 9) == 1
    assert passes_due(times, 1, 12) == 3


def test_the_step_schedule_is_the_papers():
    rates = {epoch: learning_rate(0.05, epoch / 400, "step", 0.0) for epoch in (0, 149, 150, 300, 350, 399)}
    assert rates == pytest.approx({0: 0.05, 149: 0.05, 150: 5e-3, 300: 5e-4, 350: 5e-5, 399: 5e-5})


def test_the_cosine_schedule_warms_up_and_ends_at_zero():
    assert learning_rate(0.2, 0.015, "cosine", 0.03) == pytest.approx(0.1)
    assert learning_rate(0.2, 0.03, "cosine", 0.03) == pytest.approx(0.2)
    assert learning_rate(0.2, 0.515, "cosine", 0.03) == pytest.approx(0.1)
    assert learning_rate(0.2, 1.0, "cosine", 0.03) == pytest.approx(0.0, abs=1e-12)
