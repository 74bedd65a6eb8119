"""A whole run through the CUDA code path: digits are trained on with the kernels' own source as the device.

Torch stays on the processor; what `sela_ext` gives to a card goes to the kernels of csrc/simt: the images lie "on the
device" and are augmented there, and the label passes read their logits there. Each label pass is made once more by the
CPU path, from the same embeddings and heads.
"""

import json
from collections import Counter

import numpy as np
import pytest

pytestmark = pytest.mark.plain_only

IMAGES, CLUSTERS, HEADS, EPOCHS, BATCH = 160, 10, 2, 3, 40
LAM, TOLERANCE = 25.0, 1e-5
# Two labels are equally good when their scores differ by less, in nats: both solvers end within their tolerance of the
# same cluster sizes, at potentials that differ by the order of it.
NEAR = 0.02


class Counted:
    """The runner's module, which notes the CUDA functions that are called."""

    def __init__(self, simt):
        self.simt, self.calls = simt, Counter()
        self.__file__ = simt.__file__

    def __getattr__(self, name):
        found = getattr(self.simt, name)
        if not name.endswith("_cuda"):
            return found

        def call(*arguments, **keywords):
            self.calls[name] += 1
            return found(*arguments, **keywords)

        return call


@pytest.fixture
def core(simt, request, monkeypatch):
    """Makes the runner the device of everything; SELA_SELF_CHECK=off, since test_self_check.py checks it at length."""
    pytest.importorskip("torch")
    counted = Counted(simt)
    card = request.getfixturevalue("host_card")
    card.core = counted
    simt.set_device(3, 2)
    request.getfixturevalue("as_cuda")(card)
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    yield counted
    simt.set_device(2, 2)


@pytest.fixture
def compared(core, monkeypatch):
    """Every label pass of a run: what the CPU path says on the same logits, and where it says something else."""
    from sela_ext.kernels import device
    from sela_ext.training.recipes import sela

    found = []
    on_card, real = device.cards, sela.label_pass

    def twice(heads, embeddings, valid, previous, **options):
        made = real(heads, embeddings, valid, previous, **options)
        with monkeypatch.context() as without:
            without.setattr(device, "cards", device.Cards())
            wanted = real(heads, embeddings, valid, previous, **{**options, "start": None})
        assert device.cards is on_card
        found.append((made, wanted, near_ties(heads, embeddings, made, wanted)))
        return made

    monkeypatch.setattr(sela, "label_pass", twice)
    return found


def near_ties(heads, embeddings, made, wanted):
    """(head, row, label, label of the CPU path, what it gains by it in nats) of each label that differs."""
    import torch

    ties = []
    for head, row in np.argwhere(made.labels != wanted.labels).tolist():
        logits = heads.logits_of(head, embeddings[row : row + 1])[0].detach().double()
        score = LAM * logits + torch.from_numpy(wanted.potentials[head])
        mine, theirs = int(made.labels[head, row]), int(wanted.labels[head, row])
        assert 0 <= mine < CLUSTERS
        ties.append((head, row, mine, theirs, float(score[theirs] - score[mine])))
    return ties


def test_a_label_that_is_no_near_tie_is_told():
    import dataclasses

    torch = pytest.importorskip("torch")
    from sela_ext.models import Heads
    from sela_ext.training.labelling import label_pass, random_labels

    torch.manual_seed(0)
    heads, embeddings = Heads(16, [CLUSTERS] * HEADS, "cosine"), torch.randn(120, 16)
    previous = random_labels(120, [CLUSTERS] * HEADS, seed=0)
    valid = torch.ones(120, dtype=torch.bool)
    wanted = label_pass(heads, embeddings, valid, previous, lam=LAM, tol=TOLERANCE, threads=1)
    assert near_ties(heads, embeddings, wanted, wanted) == []
    other = wanted.labels.copy()
    other[1, 7] = (other[1, 7] + 1) % CLUSTERS
    ((head, row, mine, theirs, gain),) = near_ties(heads, embeddings, dataclasses.replace(wanted, labels=other), wanted)
    assert (head, row, mine, theirs) == (1, 7, other[1, 7], wanted.labels[1, 7])
    assert gain > NEAR


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images[:IMAGES] * 15.9).astype(np.uint8), data.target[:IMAGES]


@pytest.mark.parametrize(
    ("source", "sampler"),
    [("bank", "images"), ("eval", "images"), ("bank", "clusters")],
    ids=["bank", "eval", "clusters drawn evenly"],
)
def test_digits_are_trained_on_by_the_cuda_kernels_and_labelled_as_by_the_cpu(
    core, compared, tmp_path, source, sampler
):
    pytest.importorskip("sklearn")
    import sela_ext

    images, truth = digits()
    result = sela_ext.train(
        images,
        out=tmp_path / "run",
        labels=truth,
        model="small-resnet",
        image_size=16,
        clusters=CLUSTERS,
        heads=HEADS,
        projection=0,
        epochs=EPOCHS,
        batch_size=BATCH,
        half_resolution=0.0,
        precision="float32",
        label_source=source,
        sampler=sampler,
        label_passes=EPOCHS,
        label_spacing="linear",
        label_tol=TOLERANCE,
        holdout=0,
        threads=1,
        progress=False,
    )
    run = json.loads((tmp_path / "run" / "options.json").read_text())
    assert run["options"]["resident"] is True
    assert run["reasons"]["resident"].startswith("kept on the device: 10.2 kB")

    # Every batch was made by one launch: of the steps, the look that places the prototypes, the passes, the evaluation.
    steps, looks = EPOCHS * (IMAGES // BATCH), 2 + (EPOCHS if source == "eval" else 0)
    if sampler == "images":
        assert core.calls["augment_resident_cuda"] == steps + looks * -(-IMAGES // 64)
        assert not core.calls["sample_parameters_cuda"]
    else:  # images come several times in an epoch, each time drawn by a number of its own
        assert EPOCHS <= core.calls["sample_parameters_cuda"] <= steps
        assert core.calls["augment_resident_cuda"] == core.calls["sample_parameters_cuda"] + looks * -(-IMAGES // 64)
    # The label passes ran there, and nowhere else.
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    passes = [event for event in events if event["event"] == "label_pass"]
    assert len(passes) == len(compared) == EPOCHS
    assert core.calls["sinkhorn_pass_cuda"] >= HEADS * EPOCHS
    for event in passes:
        assert {head["backend"] for head in event["heads"]} == {"cuda"}
        assert all(head["converged"] for head in event["heads"])

    for made, wanted, ties in compared:
        assert {head["backend"] for head in wanted.heads} == {wanted.heads[0]["backend"]} != {"cuda"}
        assert np.bincount(made.labels[0], minlength=CLUSTERS).sum() == IMAGES
        print(f"{made.labels.size} labels, {len(ties)} near ties: {ties}")
        assert all(abs(gain) < NEAR for *_, gain in ties), ties
        assert len(ties) <= 0.05 * made.labels.size
        np.testing.assert_allclose(made.confidence, wanted.confidence, atol=1e-5)
    assert result.labels.shape == (HEADS, IMAGES)
    assert result.labels.min() >= 0
    assert all(np.isfinite(event["loss"]) for event in events if event["event"] == "step")
