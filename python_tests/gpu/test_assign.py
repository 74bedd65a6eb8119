"""`assign` on a device: the labels of the CPU, whatever is asked for."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

import sela_ext


def peaked_logits(rows, cols, seed=0):
    """Logits as after some training: images of a class share their favourite clusters; spans of hundreds of nats."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, 24))
    features = centres[rng.integers(40, size=rows)] + 0.5 * rng.standard_normal((rows, 24))
    weight = rng.standard_normal((24, cols)) / np.sqrt(24)
    return torch.from_numpy((3.0 * (features @ weight + 0.3 * rng.standard_normal(cols))).astype(np.float32))


def dense_logits(rows, cols):
    """Logits of an untrained network."""
    return 0.3 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def as_torch(result):
    """The labels, potential and sizes of a numpy result as tensors; numpy logits never leave the CPU kernels."""
    arrays = {name: torch.from_numpy(getattr(result, name)) for name in ("labels", "potential", "sizes")}
    return dataclasses.replace(result, **arrays)


def assert_as_on_the_cpu(found, expected, logits, card, *, share=1e-3):
    """The same solution: labels equal but for near ties, potentials within what the tolerance leaves open."""
    assert found.backend == "cuda"
    assert found.labels.device == found.potential.device == found.sizes.device == torch.device(card.place)
    assert found.error <= max(1e-5, 2 * expected.error)
    assert found.masked == expected.masked
    labels, wanted = found.labels.cpu(), expected.labels.cpu()
    differ = (labels != wanted).nonzero()[:, 0]
    assert len(differ) <= share * len(labels)
    score = found.lam * logits[differ].double() + expected.potential.cpu()
    gap = score.gather(1, wanted[differ, None].long()) - score.gather(1, labels[differ, None].long())
    assert bool((gap.abs() <= 1e-3 * (1 + score.abs().amax(1, keepdim=True))).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["anderson", "sinkhorn", "newton"])
@pytest.mark.parametrize("kind", ["peaked", "dense"])
def test_labels_are_those_of_the_cpu(card, dtype, method, kind):
    logits = peaked_logits(3001, 130) if kind == "peaked" else dense_logits(3001, 300)
    logits = logits.to(dtype)
    options = {"tol": 1e-6, "method": method, "max_passes": 500}
    expected = sela_ext.assign(logits.float().numpy() if dtype != torch.float64 else logits.numpy(), **options)
    expected = as_torch(expected)
    found = sela_ext.assign(logits.to(card.place), **options)
    assert_as_on_the_cpu(found, expected, logits, card)


def test_weights_marginals_masks_and_starts_are_honoured(card):
    logits = peaked_logits(2001, 65)
    logits[17, 3] = float("nan")
    logits[1999] = -float("inf")
    shares = np.linspace(1, 3, 65)
    weights = np.random.default_rng(1).random(2001)
    weights[::5] = 0
    options = {"tol": 1e-5, "marginals": shares, "row_weights": weights, "max_passes": 1000}
    expected = as_torch(sela_ext.assign(logits.numpy(), **options))
    on_card = logits.to(card.place)
    found = sela_ext.assign(on_card, **{**options, "row_weights": torch.from_numpy(weights).to(card.place)})
    assert_as_on_the_cpu(found, expected, logits, card)
    assert found.masked == 2
    again = sela_ext.assign(on_card, start=found, **options)
    assert again.passes <= 3
    for labels in (again.labels, found.predict(on_card)):  # without a reference: near ties may fall the other way
        assert int((labels != found.labels).sum()) <= 2


def test_columns_that_hardly_anything_goes_to_are_found_on_the_device(card):
    logits = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    logits[:, 7] -= 40.0  # a thousand nats away: its sum underflows
    expected = as_torch(sela_ext.assign(logits.numpy(), tol=1e-5, max_passes=3000))
    found = sela_ext.assign(logits.to(card.place), tol=1e-5, max_passes=3000)
    assert_as_on_the_cpu(found, expected, logits, card)
    assert int(found.sizes[7]) == int(expected.sizes[7])


def test_equal_rows_are_dealt_out_evenly_on_the_device_too(card):
    found = sela_ext.assign(torch.zeros(100, 7, device=card.place))
    assert sorted(found.sizes.tolist()) == [14] * 5 + [15] * 2
    assert found.ties > 0


def test_the_official_rule_is_solved_by_the_cpu_and_says_so(card):
    logits = peaked_logits(600, 20)
    expected = sela_ext.assign(logits.numpy(), stop="official")
    found = sela_ext.assign(logits.to(card.place), stop="official")
    assert found.backend.startswith("cpu-")
    assert found.labels.device == torch.device(card.place)
    assert found.labels.cpu().tolist() == expected.labels.tolist()


@pytest.mark.parametrize("method", ["anderson", "sinkhorn"])
@pytest.mark.parametrize("max_passes", [1, 2, 3, 7, 20])
def test_stages_keep_to_the_passes_that_are_allowed_and_tell_of_each(card, method, max_passes):
    logits = dense_logits(700, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few passes do not balance
        found = sela_ext.assign(logits.to(card.place), method=method, tol=0, max_passes=max_passes)
        expected = sela_ext.assign(logits.numpy(), method=method, tol=0, max_passes=max_passes)
    assert found.passes == expected.passes == len(found.history) == max_passes
    for mine, theirs in zip(found.history[:6], expected.history[:6], strict=True):
        assert mine["passes"] == theirs["passes"]
        assert mine["error"] == pytest.approx(theirs["error"], rel=0.05, abs=1e-6)
        assert mine["objective"] == pytest.approx(theirs["objective"], rel=1e-5)


@pytest.mark.parametrize("storage", ["fixed16", "float16", "bfloat16"])
def test_a_solve_on_a_copy_in_16_bits_gives_the_labels_of_the_cpu(card, storage):
    logits = peaked_logits(3001, 130)
    options = {"tol": 1e-4, "method": "anderson", "max_passes": 300, "storage": storage}
    expected = as_torch(sela_ext.assign(logits.numpy(), **options))
    found = sela_ext.assign(logits.to(card.place), **options)
    assert found.storage == expected.storage == storage
    assert found.error <= 1e-4
    assert any(entry.get("bits") == 16 for entry in found.history)
    assert_as_on_the_cpu(found, expected, logits, card, share=5e-3)
