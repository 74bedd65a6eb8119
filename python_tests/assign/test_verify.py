"""`verify`: right numbers on cases done by hand, faults found where they are planted, nothing compiled in use."""

import importlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sela_ext
from sela_ext import _core
from sela_ext.assign.certificate import verify as verify_function
from sela_ext.cli import main
from sela_ext.errors import DataError, OptionError

LAM = 25.0


def gaussian_logits(rows, cols, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(dtype)


def test_a_two_by_two_case_done_by_hand():
    logits = np.log(np.array([[1.0, 3.0], [1.0, 1.0]]))
    c = sela_ext.verify(logits, labels=[1, 0], potential=[np.log(2.0), 0.0], lam=1.0)
    plan = np.array([[2 / 5, 3 / 5], [2 / 3, 1 / 3]])
    shares = plan.mean(axis=0)
    np.testing.assert_allclose(c.column_shares, shares)
    assert c.error == pytest.approx(np.abs(shares - 0.5).sum())
    assert c.objective == pytest.approx(np.log(2) / 2 - (np.log(5) + np.log(3)) / 2)
    np.testing.assert_allclose(c.margin, [np.log(3 / 2), np.log(2)])
    assert (c.disagreements, c.exact, c.misplaced, c.masked) == (0, True, 0.0, 0)
    assert c.label_value == pytest.approx(np.log(3) / 2)
    # bound: (log 3 + log 2) / 2 - min over sizes (1, 1) of sum n g / 2
    assert c.label_gap == pytest.approx((np.log(3) + np.log(2) - np.log(2)) / 2 - np.log(3) / 2)
    assert c.margin_quantiles[0.0] == pytest.approx(np.log(3 / 2))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 15), seed=st.integers(0, 10_000), off=st.floats(0, 3))
def test_the_duality_gap_bounds_the_distance_to_the_largest_objective(rows, cols, seed, off):
    rng = np.random.default_rng(seed)
    logits = 0.2 * rng.standard_normal((rows, cols))
    shares = rng.random(cols) + 0.1
    weights = rng.random(rows) + 0.01
    best = sela_ext.assign(logits, marginals=shares, row_weights=weights, tol=1e-11, max_passes=3000)
    g = best.potential + off * rng.standard_normal(cols)
    c = sela_ext.verify(logits, potential=g, marginals=shares, row_weights=weights)
    assert c.objective <= best.objective + 1e-6
    assert best.objective <= c.objective + c.duality_gap + 1e-6
    if off == 0 and best.converged:
        assert c.duality_gap < 1e-6


def test_what_assign_reports_is_true():
    logits = gaussian_logits(3000, 60)
    for stop in ("l1", "official"):
        a = sela_ext.assign(logits, tol=1e-5, stop=stop)
        c = sela_ext.verify(logits, a)
        assert c.error == pytest.approx(a.error, abs=1e-6)
        assert c.disagreements <= 1
        assert np.array_equal(c.sizes, a.sizes)
        assert 0 <= c.duality_gap < 1e-3
        assert c.faults(1e-4) == []
    exact = sela_ext.assign(logits, balance="exact")
    c = sela_ext.verify(logits, exact)
    assert c.exact
    assert c.label_gap == pytest.approx(exact.gap, abs=1e-5)
    assert c.disagreements > 0
    assert c.faults(2e-4, balance="exact") == []


@pytest.mark.parametrize("kind", ["torch", "bfloat16", "memory-mapped", "strided"])
def test_all_kinds_of_logits_are_read(kind, tmp_path, monkeypatch):
    module = importlib.import_module("sela_ext.assign.certificate")
    monkeypatch.setattr(module, "ENTRIES_AT_ONCE", 1000)  # several chunks
    logits = gaussian_logits(700, 31).astype(np.float16).astype(np.float32)
    plain = sela_ext.assign(logits)
    expected = sela_ext.verify(logits, plain)
    if kind == "memory-mapped":
        np.save(tmp_path / "logits.npy", logits)
        other = np.load(tmp_path / "logits.npy", mmap_mode="r")
    elif kind == "strided":
        other = np.asfortranarray(logits)
    else:
        other = torch.from_numpy(logits)
    if kind == "bfloat16":
        expected = sela_ext.verify(other.bfloat16().float().numpy(), plain)
        other = other.bfloat16()
    found = sela_ext.verify(other, plain)
    assert found.error == expected.error
    assert found.duality_gap == expected.duality_gap
    assert np.array_equal(found.margin, expected.margin)


def test_no_compiled_kernel_is_used(monkeypatch):
    logits = gaussian_logits(200, 9)
    a = sela_ext.assign(logits)
    for name in ("sinkhorn_pass_cpu", "sinkhorn_sums_cpu", "find_candidates_cpu", "Rounding"):
        monkeypatch.delattr(_core, name)
    assert sela_ext.verify(logits, a).error == pytest.approx(a.error, abs=1e-6)


def test_planted_faults_are_found():
    logits = gaussian_logits(1000, 20)
    logits[5] = np.nan
    a = sela_ext.assign(logits, tol=1e-6)
    assert sela_ext.verify(logits, a).faults(1e-5) == []
    labels = a.labels.copy()
    labels[5] = 3
    labels[6] = -1
    labels[10:20] = (labels[10:20] + 1) % 20
    c = sela_ext.verify(logits, labels=labels, potential=a.potential + 0.01 * np.arange(20))
    text = "\n".join(c.faults(1e-5, balance="argmax"))
    assert c.masked == 1
    assert c.disagreements >= 10
    assert "the L1 error of the cluster shares is" in text
    assert "labels are not the best cluster" in text
    assert "1 rows with NaN, +inf or only -inf have a label" in text
    assert "1 rows that could have a label have none" in text
    assert "the cluster sizes are not exact" in "\n".join(c.faults(balance="exact"))
    impossible = logits.copy()
    impossible[0, labels[0]] = -np.inf
    assert "1 labels are impossible" in "\n".join(sela_ext.verify(impossible, labels).faults())


def test_labels_alone_and_a_potential_alone_are_judged():
    logits = gaussian_logits(300, 10)
    a = sela_ext.assign(logits)
    only_labels = sela_ext.verify(logits, a.labels)
    assert only_labels.error is None
    assert only_labels.margin is None
    assert np.array_equal(only_labels.sizes, a.sizes)
    only_potential = sela_ext.verify(logits, potential=a.potential)
    assert only_potential.sizes is None
    assert only_potential.error == pytest.approx(a.error, abs=1e-6)


def test_wrong_arguments_are_refused():
    logits = gaussian_logits(30, 4)
    with pytest.raises(OptionError, match="expected an Assignment, labels or a potential"):
        sela_ext.verify(logits)
    with pytest.raises(OptionError, match=r"labels: expected numbers in -1 .. 3, found 0 .. 4"):
        sela_ext.verify(logits, np.arange(30) % 5)
    with pytest.raises(OptionError, match="labels: expected 30 integers"):
        sela_ext.verify(logits, np.zeros(30))
    with pytest.raises(OptionError, match="lam: expected a finite number > 0"):
        sela_ext.verify(logits, np.zeros(30, int), lam=-1)
    with pytest.raises(OptionError, match="either an Assignment or labels"):
        sela_ext.verify(logits, np.zeros(30, int), labels=np.zeros(30, int))
    with pytest.raises(DataError, match="nothing to judge"):
        sela_ext.verify(np.full((3, 2), np.nan), np.zeros(3, int))
    assert verify_function is sela_ext.verify


def sela(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


def test_the_command_certifies_what_sela_assign_wrote(capsys, tmp_path):
    np.save(tmp_path / "logits.npy", gaussian_logits(400, 8))
    files = [tmp_path / name for name in ("logits.npy", "labels.npy", "potential.npy")]
    code, _, err = sela(
        capsys, "assign", files[0], "--out", files[1], "--potential", files[2], "--balance", "exact", "--tol", "1e-5"
    )
    assert code == 0, err
    options = ["--labels", files[1], "--potential", files[2]]
    code, out, _ = sela(capsys, "verify", files[0], *options, "--balance", "exact")
    assert code == 0
    assert "the certificate holds" in out
    assert "margin_quantiles" in out
    code, out, _ = sela(capsys, "verify", files[0], *options, "--json", "--tol", "1e-9")
    assert code == 1
    found = json.loads(out)
    assert 0 < found["error"] < 2e-5
    assert found["exact"] is True
    assert any("L1 error" in fault for fault in found["faults"])
    # labels of a run folder: one head of [heads, N]
    (tmp_path / "run").mkdir()
    np.savez(tmp_path / "run" / "labels.npz", labels=np.stack([np.load(files[1]), np.zeros(400, np.int32)]))
    code, out, _ = sela(capsys, "verify", files[0], "--labels", tmp_path / "run", "--json", "--balance", "exact")
    assert (code, json.loads(out)["largest"]) == (0, 50)
    code, out, _ = sela(
        capsys, "verify", files[0], "--labels", tmp_path / "run", "--head", "1", "--json", "--balance", "exact"
    )
    assert (code, json.loads(out)["largest"]) == (1, 400)
    code, _, err = sela(capsys, "verify", files[0], "--labels", tmp_path / "run", "--head", "2")
    assert code == 2
    assert "--head: expected a number in 0 .. 1, found 2" in err
    code, _, err = sela(capsys, "verify", tmp_path / "absent.npy", "--labels", files[1])
    assert code == 3
    assert "absent.npy: expected a .npy file of logits" in err
