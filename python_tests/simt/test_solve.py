"""Whole solves with the runner as the card: every kernel of the solver, from the first pass to the labels."""

import numpy as np
import pytest

pytestmark = pytest.mark.plain_only

ROWS, COLS, LAM = 600, 24, 25.0


@pytest.fixture
def card(simt, request, monkeypatch):
    """A card whose kernels run on the runner, unchecked."""
    torch = pytest.importorskip("torch")
    from sela_ext.kernels import device

    played = request.getfixturevalue("host_card")
    played.core = simt
    simt.set_device(2, 2)
    request.getfixturevalue("as_cuda")(played)
    monkeypatch.setitem(device._usable, torch.device(played.place), played)
    return played


def trained_logits():
    """Images of a class share their favourite clusters: few entries of a row count."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((12, 24))
    features = centres[rng.integers(12, size=ROWS)] + 0.5 * rng.standard_normal((ROWS, 24))
    weight = rng.standard_normal((24, COLS)) / np.sqrt(24)
    return (3.0 * (features @ weight + 0.3 * rng.standard_normal(COLS))).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "newton"},
        {"method": "newton", "relax": 0.5},
        {"method": "newton", "size_bounds": (15, 40)},
        {"method": "newton", "row_weights": np.arange(ROWS) % 4},
        {"method": "anderson"},
        {"method": "sinkhorn", "tol": 0.05},
        {},
    ],
    ids=["newton", "relaxed", "bounded", "weighted", "anderson", "sinkhorn", "auto"],
)
def test_labels_are_those_of_the_cpu(simt, card, options):
    import torch

    import sela_ext

    logits = trained_logits()
    options = {"tol": 1e-6, "lam": LAM, **options}
    expected = sela_ext.assign(logits, **options)
    before = simt.statistics()["launches"]
    found = sela_ext.assign(torch.from_numpy(logits), **options)
    assert simt.statistics()["launches"] - before > 10
    assert (found.backend, found.method, found.converged) == ("cuda", expected.method, expected.converged)
    assert abs(found.passes - expected.passes) <= 2 + 0.1 * expected.passes
    # Labels that differ must be near ties of the CPU's solution, which are listed where one is not.
    scores = LAM * logits.astype(np.float64) + expected.potential
    differ = np.flatnonzero(found.labels.numpy() != expected.labels)
    gaps = scores[differ, expected.labels[differ]] - scores[differ, found.labels.numpy()[differ]]
    ties = dict(zip(differ.tolist(), gaps.tolist(), strict=True))
    assert all(gap <= 1e-3 for gap in ties.values()), f"labels that differ, and by how many nats: {ties}"
    assert len(differ) <= 3
