"""The device of these tests: the real card (`pytest -m gpu`), and two that the host plays to test the tests.

On a machine without a card the bodies run on the host all the same, through the same checks, allocations and calls:
`played` has the CPU kernels behind the CUDA functions' signatures, `simt` (slow) the CUDA kernels' own source on the
runner of csrc/simt.
"""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sela_ext import kernels


@dataclass
class Card:
    """Where the tests run.

    Attributes:
        place: device of the tensors.
        played: whether the host plays the card.
    """

    place: torch.device
    played: bool

    def put(self, tensor):
        """A copy on the device, with the strides and the offset into its memory that the tensor has."""
        rows, cols = tensor.shape
        step = tensor.stride(0) if rows > 1 else cols
        room = torch.full((tensor.storage_offset() + max(rows, 1) * max(step, 1),), float("nan"), dtype=tensor.dtype)
        copy = room.to(self.place).as_strided((rows, cols), (step, 1), tensor.storage_offset())
        return copy.copy_(tensor)


def real_card(monkeypatch, tmp_path_factory):
    """The first CUDA device with its kernels in use, unchecked, so that a wrong one fails here and nowhere else."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    monkeypatch.setenv("SELA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("sela_ext.kernels.self_check._verdicts", {})
    monkeypatch.setattr("sela_ext.kernels.device._usable", {})
    verdict = kernels.device_verdict("cuda")
    if verdict.state in ("absent", "unsupported"):
        pytest.skip(str(verdict))
    return Card(torch.device("cuda", torch.cuda.current_device()), played=False)


@pytest.fixture
def cuda(monkeypatch, tmp_path_factory):
    """The real card; for tests of what a host cannot play: streams, graphs, several devices, memory."""
    return real_card(monkeypatch, tmp_path_factory)


@functools.cache
def runner():
    """The module _simt, as the tests in python_tests/simt build and load it."""
    spec = importlib.util.spec_from_file_location("simt_conftest", Path(__file__).parents[1] / "simt" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


SIMT = ("test_augment", "test_jpeg", "test_newton", "test_rounding", "test_sinkhorn")  # what the runner plays, too


def pytest_generate_tests(metafunc):
    """The cards of a test: the runner plays one where kernels are tested; training on the host's is slow."""
    if "card" not in metafunc.fixturenames:
        return
    trains = "data" in metafunc.fixturenames
    cards = [
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("played", marks=pytest.mark.slow if trains else ()),
    ]
    if Path(metafunc.module.__file__).stem in SIMT:
        cards.append(pytest.param("simt", marks=pytest.mark.slow))
    metafunc.parametrize("card", cards, indirect=True)


@pytest.fixture
def card(request, monkeypatch, tmp_path_factory):
    """The real card, and the played ones."""
    if request.param == "cuda":
        return real_card(monkeypatch, tmp_path_factory)
    host_card = request.getfixturevalue("host_card")
    if request.param == "simt":
        host_card.core = runner()
    request.getfixturevalue("as_cuda")(host_card)
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    return Card(host_card.place, played=True)


def assert_same_labels(logits, potential, scale, found, expected, tolerance):
    """Equal, but for rows whose two best scores differ by less than the arithmetic can tell."""
    found, expected = found.cpu(), expected.cpu()
    assert found.dtype == torch.int32
    for row in (found != expected).nonzero()[:, 0].tolist():
        mine, theirs = int(found[row]), int(expected[row])
        assert mine >= 0, f"row {row}: expected label {theirs}, found {mine}"
        assert theirs >= 0, f"row {row}: expected label {theirs}, found {mine}"
        score = scale * logits[row].cpu().double() + potential.cpu().double()
        gap = float(score[theirs] - score[mine])
        near = tolerance * (1 + float(score[theirs].abs()))
        assert gap <= near, f"row {row}: expected label {theirs}, found {mine}, worse by {gap} nats"


@pytest.fixture
def assert_equal_to_twin():
    """Compares a pass on a device with the float64 twin on the host."""

    def compare(found, expected, logits, potential, scale):
        exact = logits.dtype == torch.float64
        total = max(expected.weight, 1e-30)
        distance = float((found.column_sums.cpu() - expected.column_sums.cpu()).abs().sum())
        assert distance <= (1e-11 if exact else 3e-6) * total
        assert found.masked == expected.masked
        assert found.weight == pytest.approx(expected.weight, rel=1e-12)
        nearly = {"rel": 1e-11, "abs": 1e-11 * total} if exact else {"rel": 3e-7, "abs": 5e-6 * total}
        assert found.objective == pytest.approx(expected.objective, **nearly)
        close = {"rtol": 1e-11, "atol": 1e-11} if exact else {"rtol": 3e-7, "atol": 1e-5}
        torch.testing.assert_close(found.lse.cpu(), expected.lse.cpu(), equal_nan=True, **close)
        assert (found.labels is None) == (expected.labels is None)
        if expected.labels is not None:
            tolerance = 1e-11 if exact else 1e-6
            assert_same_labels(logits, potential, scale, found.labels, expected.labels, tolerance)

    return compare


@pytest.fixture
def same_labels():
    """`assert_same_labels`, for tests that compare labels alone."""
    return assert_same_labels
