"""Anderson's step between two passes, executed by the SIMT runner: the steps that the host takes."""

import numpy as np
import pytest

from sela_ext.assign.anderson import RESTART, STEP_CAP, Memory
from sela_ext.kernels.anderson_device import STATE
from sela_ext.kernels.reference import anderson_step

UNIT = 2.0**-40  # of the column sums, as a share
FAINT = 1e-9
SENTINEL = -77.0


class Device:
    """The vectors and the state of iterations on the device that the runner plays."""

    def __init__(self, simt, target, *, accelerate=True, restart=RESTART, cap=STEP_CAP, rounded=False):
        self.simt, self.target, self.cols = simt, target, len(target)
        guard = 0 if simt.variant == "address" else 16
        self.memory = np.full(simt.ANDERSON_VECTORS * self.cols + 2 * guard, SENTINEL)
        self.guard = guard
        self.vectors = self.memory[guard : guard + simt.ANDERSON_VECTORS * self.cols]
        self.vectors[:] = np.nan  # nothing is read that was not written
        self.state = np.zeros(STATE.itemsize // 8 + simt.ANDERSON_MEMORY**2, np.int64)
        self.options = (FAINT, restart, cap, accelerate, rounded)

    @property
    def known(self):
        return self.state[: STATE.itemsize // 8].view(STATE)[0]

    def step(self, shares, potential):
        columns = np.rint(shares / UNIT).astype(np.int64)
        following = np.full(self.cols + 2, SENTINEL)
        self.simt.anderson_step_cuda(
            *(columns.ctypes.data, potential.ctypes.data, following[1:].ctypes.data, self.target.ctypes.data),
            *(self.vectors.ctypes.data, self.state.ctypes.data, self.cols, UNIT, *self.options, 0),
        )
        assert (following[[0, -1]] == SENTINEL).all()
        assert (self.memory[: self.guard] == SENTINEL).all()
        assert (self.memory[len(self.memory) - self.guard :] == SENTINEL).all()
        return following[1:-1]


class Host:
    """The iterations of sela_ext/assign/anderson.py, with the twin's step: the shortest of equally good ones."""

    def __init__(self, target, restart=RESTART):
        self.target, self.restart = target, restart
        self.memory, self.at, self.best, self.plain = Memory(len(target)), None, None, False

    def centred(self, x):
        return x - self.target @ x

    def step(self, shares, potential):
        error = np.abs(shares - self.target).sum()
        new = potential, self.centred(np.log(self.target) - np.log(shares)), error
        if self.at is not None:
            self.memory.add(new[0] - self.at[0], new[1] - self.at[1])
        self.at = new
        if self.best is None or error < self.best[2]:
            self.best = new
        if error > self.restart * self.best[2] and not self.plain:
            self.memory.clear()
            self.at, self.plain = self.best, True
            step = self.at[1]
        else:
            self.plain = False
            step = anderson_step(self.at[1], *self.memory.differences, cap=STEP_CAP)
        return self.centred(self.at[0] + step)


def plan_shares(logits, g):
    t = logits + g
    p = np.exp(t - t.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True)).mean(axis=0)


def problem(rows, cols, seed=0, spread=2.0):
    rng = np.random.default_rng(seed)
    target = rng.random(cols) + 0.5
    return spread * rng.standard_normal((rows, cols)), target / target.sum()


def quantised(shares):
    """As the integers of a pass hold them."""
    return np.rint(shares / UNIT) * UNIT


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", [1, 2, 31, 33, 600])
def test_steps_are_those_of_the_host(simt, cols):
    logits, target = problem(150, cols, seed=cols)
    device, host = Device(simt, target), Host(target)
    g = np.zeros(cols)
    for i in range(16):  # beyond the memory
        shares = quantised(plan_shares(logits, g))
        error = np.abs(shares - target).sum()
        mine, theirs = device.step(shares, g), host.step(shares, g)
        if error < 1e-8:  # rounding is all that is left
            break
        # The least squares of nearly dependent changes: normal equations here, singular values there.
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9 + 1e-3 * error)
        assert device.known["steps"] == i + 1
        assert device.known["known"] == min(i, 10)
        assert device.known["error"] == pytest.approx(error, rel=1e-10)
        g = theirs
    assert error < 1e-4


@pytest.mark.plain_only
def test_a_device_left_alone_needs_as_many_passes_as_the_host(simt):
    logits, target = problem(300, 40, spread=6.0)
    passes = {}
    for name, method in (("device", Device(simt, target)), ("host", Host(target))):
        g = np.zeros(40)
        passes[name] = 0
        while passes[name] < 200:
            shares = quantised(plan_shares(logits, g))
            if np.abs(shares - target).sum() < 1e-7:
                break
            g = method.step(shares, g)
            passes[name] += 1
    assert passes["host"] < 60
    assert abs(passes["device"] - passes["host"]) <= 2 + passes["host"] // 8


@pytest.mark.plain_only
def test_an_explosion_leads_back_to_the_best_point_once(simt):
    logits, target = problem(100, 20)
    device, host = Device(simt, target), Host(target)
    g = np.zeros(20)
    for _ in range(4):
        shares = quantised(plan_shares(logits, g))
        device.step(shares, g)
        g = host.step(shares, g)
    far = np.where(np.arange(20) % 2, 0.02, 0.08) * target  # of a small sum: a large error
    for plain in (1, 0, 1):
        mine, theirs = device.step(quantised(far), g), host.step(quantised(far), g)
        assert (device.known["plain"], host.plain) == (plain, bool(plain))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
        if plain:
            assert device.known["known"] == 0
    assert device.known["best"] == pytest.approx(host.best[2])


@pytest.mark.plain_only
def test_of_equally_good_points_the_first_is_kept(simt):
    _, target = problem(10, 20)
    device = Device(simt, target)
    points = [np.linspace(-1, 1, 20), np.linspace(2, -1, 20), np.zeros(20)]
    shares = quantised(np.where(np.arange(20) % 2, 0.9, 1.1) * target)
    for g in points[:2]:
        device.step(shares, g)
    far = np.where(np.arange(20) % 2, 0.02, 0.08) * target
    found = device.step(quantised(far), points[2])  # an explosion: back to the best, with a plain step
    assert device.known["plain"] == 1
    expected = points[0] + np.log(target) - np.log(shares)
    np.testing.assert_allclose(found, expected - target @ expected, rtol=0, atol=1e-9)


@pytest.mark.plain_only
def test_steps_that_go_too_far_are_shortened(simt):
    logits, target = problem(60, 12, spread=12.0)
    capped = 0
    for cap in (0.01, STEP_CAP):
        device, host = Device(simt, target, cap=cap), Host(target)
        g = np.zeros(12)
        for _ in range(8):
            shares = np.maximum(quantised(plan_shares(logits, g)), 1e-6)
            mine = device.step(shares, g)
            theirs = host.step(shares, g)
            step = mine - host.at[0]
            step -= step.mean()
            residual = host.at[1]
            limit = max(cap, 2 * np.abs(residual).max())
            assert np.abs(step).max() <= limit * (1 + 1e-9) + 1e-12
            capped += np.abs(step).max() >= limit * (1 - 1e-6)
            g = theirs
    assert capped > 0


@pytest.mark.plain_only
def test_plain_steps_are_sinkhorns(simt):
    logits, target = problem(80, 33)
    device = Device(simt, target, accelerate=False, restart=np.inf, cap=np.inf, rounded=True)
    g = np.zeros(33)
    for _ in range(5):
        shares = quantised(plan_shares(logits, g))
        found = device.step(shares, g)
        expected = g + np.log(target) - np.log(shares)
        expected -= target @ expected
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-7)
        np.testing.assert_array_equal(found, found.astype(np.float32))
        g = found


@pytest.mark.plain_only
@pytest.mark.parametrize("share", [0.0, 0.9e-9, np.nan])
def test_a_faint_column_ends_the_iterations(simt, share):
    _, target = problem(10, 7)
    device = Device(simt, target)
    g = np.linspace(-1, 1, 7)
    first = device.step(target * 0.9, g)
    assert device.known["ended"] == 0
    assert np.abs(first - g).max() > 0
    shares = target.copy()
    shares[3] = 0.0 if np.isnan(share) else share * target[3] * 0.99
    g = first.copy()
    np.testing.assert_array_equal(device.step(shares, g), g)
    assert device.known["ended"] == 1
    np.testing.assert_array_equal(device.step(target * 0.9, g), g)  # nothing is done any more
    assert device.known["steps"] == 1


@pytest.mark.plain_only
def test_changes_that_depend_on_one_another_do_no_harm(simt):
    _, target = problem(10, 9)
    device = Device(simt, target)
    g = np.zeros(9)
    for _ in range(14):  # the same step and change again and again
        following = device.step(target * 1.0, g)
        assert np.isfinite(following).all()
        g = g + 0.0


def test_steps_have_the_same_bits_in_any_order_of_threads(simt, schedule):
    """Runs under the sanitizers: more columns than a warp, the memory full."""
    logits, target = problem(60, 70, spread=3.0)
    found = []
    for seed in (schedule, 0):
        simt.set_schedule(seed)
        device, g = Device(simt, target, rounded=True), np.zeros(70)
        for _ in range(13):
            g = device.step(quantised(plan_shares(logits, g)), g).copy()
        found.append(g.tobytes())
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="columns"):
        simt.anderson_step_cuda(0, 0, 0, 0, 0, 0, 0, 1.0, 1e-9, 3.0, 10.0, True, True, 0)
