from itertools import pairwise

import pytest
import torch

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


def test_linear_falls_to_zero_and_constant_stays_after_the_warm_up():
    assert [learning_rate(1.0, p, "linear", 0.2) for p in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1, 0.5, 0])
    assert [learning_rate(0.3, p, "constant", 0.5) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.15, 0.3, 0.3])


@pytest.mark.parametrize(("warmup", "peak"), [(0.0, 0.3), (0.1, 0.1)])
def test_one_cycle_is_that_of_torch(warmup, peak):
    steps = 1000
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=steps, pct_start=peak)
    for step in range(steps):
        # torch counts both ends among its steps: its peak lies at peak * steps - 1, its end at steps - 1
        position = (step / (peak * steps - 1)) * peak if step < peak * steps - 1 else None
        if position is None:
            position = peak + (step - (peak * steps - 1)) / (steps - peak * steps) * (1 - peak)
        assert learning_rate(0.5, position, "onecycle", warmup) == pytest.approx(cycle.get_last_lr()[0], abs=1e-7)
        optimizer.step()
        cycle.step()


@pytest.mark.parametrize("schedule", ["step", "cosine", "linear", "constant", "onecycle"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
def test_rates_are_never_negative_nor_above_the_highest(schedule, warmup):
    rates = [learning_rate(0.1, step / 1001, schedule, warmup) for step in range(1002)]
    assert min(rates) >= 0
    assert max(rates) <= 0.1 * (1 + 1e-12)
    if warmup < 1:
        assert max(rates) == pytest.approx(0.1, rel=1e-3)
