import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from sela_ext.data import Augment, Loader, open_source
from sela_ext.errors import DataError, NumericsError, OptionError
from sela_ext.evaluation import (
    Pooled,
    ProbeSchedule,
    Stages,
    Viewing,
    fine_tune_scores,
    linear_scores,
    probes,
    sgd_scores,
    stage_scores,
)
from sela_ext.evaluation.probes import Probe
from sela_ext.models import AlexNet, SmallResNet

QUICK = ProbeSchedule(4, 32, 0.05, 0.1, (3,), 0.9, 1e-5)


def spots(n, seed, classes=4, side=32, channels=3):
    """Images with a bright square in the corner that is their class, in an order that mixes the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    images = rng.integers(0, 60, size=(n, side, side, channels), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = divmod(int(label), 2)
        image[top * 16 : top * 16 + 12, left * 16 : left * 16 + 12] += 150
    return open_source(images, labels=labels)


def shades(n, seed):
    """Images whose class is their colour: mirrored or cropped, it stays."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    images = rng.integers(0, 60, size=(n, 32, 32, 3), dtype=np.uint8)
    images[np.arange(n), :, :, labels] += 150
    return open_source(images, labels=labels)


@pytest.fixture
def viewing():
    view = Augment.none(32)
    return Viewing(view, view, threads=1)


def test_sgd_on_cached_features_comes_close_to_logistic_regression():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 20))
    labels = rng.integers(6, size=1333)
    features = centres[labels] + 0.8 * rng.normal(size=(1333, 20))
    split = (features[:1000], labels[:1000] * 7, features[1000:], labels[1000:] * 7)
    exact = linear_scores(*split)
    found = sgd_scores(*split, schedule=ProbeSchedule(30, 64, 0.1, 0.1, (20, 26)))
    assert found["top1"] == pytest.approx(exact["top1"], abs=0.02)
    assert found["top5"] >= found["top1"]
    assert sgd_scores(*split, epochs=3, seed=1) == sgd_scores(*split, epochs=3, seed=1)


def test_a_probe_on_features_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    sgd_scores(np.eye(8), np.arange(8) % 2, np.eye(8), np.arange(8) % 2, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_learning_rate_that_is_too_high_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(NumericsError, match="lower lr"):
        sgd_scores(
            rng.normal(size=(64, 4)) * 1e20,
            np.arange(64) % 2,
            np.eye(4),
            [0, 1, 0, 1],
            schedule=ProbeSchedule(9, 32, 1e30),
        )


def test_probes_of_all_stages_learn_and_are_told_apart(viewing):
    torch.manual_seed(0)
    network = SmallResNet()
    shares = []
    found = stage_scores(
        Stages(network),
        spots(301, 1),
        spots(99, 2),
        viewing,
        schedule=QUICK,
        progress=lambda share, text: shares.append(share),
    )
    assert {name: scores["values"] for name, scores in found.items()} == {
        "block1": 8192,
        "block2": 4096,
        "block3": 2048,
    }
    assert all(scores["top1"] > 0.9 for scores in found.values())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    again = stage_scores(Stages(network), spots(301, 1), spots(99, 2), viewing, schedule=QUICK)
    assert again == found


def test_probes_trained_together_learn_what_each_learns_alone(viewing):
    torch.manual_seed(0)
    stages = Stages(SmallResNet())
    train, test = spots(161, 1), spots(60, 2)

    def weights(names):
        stages.names = names
        kept = {}
        original = probes._judge

        def keep(stages, trained, *rest):
            kept.update({name: probe.linear.weight.detach().clone() for name, probe in trained.items()})
            return original(stages, trained, *rest)

        probes._judge = keep
        try:
            stage_scores(stages, train, test, viewing, schedule=dataclasses.replace(QUICK, epochs=1))
        finally:
            probes._judge = original
        return kept

    together = weights(["block1", "block2", "block3"])
    alone = weights(["block1"])
    # The first probe draws the same first weights in both, and nothing else that is trained reaches it.
    assert torch.equal(together["block1"], alone["block1"])


def test_the_network_is_not_trained(viewing):
    torch.manual_seed(0)
    network = SmallResNet()
    before = copy.deepcopy(network.state_dict())
    stage_scores(Pooled(network), spots(64, 1), spots(31, 2), viewing, schedule=QUICK)
    fine_tune_scores(network, spots(64, 1), spots(31, 2), viewing, schedule=dataclasses.replace(QUICK, epochs=1))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_grey_images_reach_a_network_for_colour(viewing):
    torch.manual_seed(0)
    found = stage_scores(
        Stages(SmallResNet(3)), spots(161, 1, channels=1), spots(60, 2, channels=1), viewing, schedule=QUICK
    )
    assert found["block1"]["top1"] > 0.9


def test_images_without_a_label_are_left_out_of_probes(viewing):
    torch.manual_seed(0)
    network = SmallResNet()
    train, test = spots(120, 1), spots(60, 2)
    gaps = train.labels.copy()
    gaps[::3] = -1
    holes = test.labels.copy()
    holes[::4] = -1
    known, judged = np.flatnonzero(gaps >= 0), np.flatnonzero(holes >= 0)
    short = dataclasses.replace(QUICK, epochs=2)
    with_gaps = stage_scores(
        Pooled(network), open_source(train, labels=gaps), open_source(test, labels=holes), viewing, schedule=short
    )
    without = stage_scores(Pooled(network), train.subset(known), test.subset(judged), viewing, schedule=short)
    assert with_gaps == without
    with pytest.raises(DataError, match="expected training images with labels, found none"):
        stage_scores(Pooled(network), open_source(np.zeros((4, 32, 32), np.uint8)), test, viewing, schedule=short)


@pytest.mark.parametrize(("batch_size", "ranks"), [(32, 1), (32, 3), (7, 2)])
def test_features_and_labels_belong_together_however_images_come(batch_size, ranks):
    """Shuffled, sharded over ranks, a ragged last batch: each feature must end at the place of its image.

    A place computed from the number of the batch and its size is wrong for the last batch, and for any shuffle.
    """
    source = spots(101, 3)
    first = Loader(source, batch_size=128, augment=Augment.none(32), shuffle=False, threads=1)
    expected = next(iter(first.epoch(0))).images.mean((1, 2, 3))
    found, labels = torch.full((101,), torch.nan), np.full(101, -1)
    sizes = []
    for rank in range(ranks):
        loader = Loader(
            source, batch_size=batch_size, augment=Augment.none(32), seed=4, threads=1, rank=rank, world_size=ranks
        )
        for batch in loader.epoch(5):
            sizes.append(len(batch.index))
            found[batch.index] = batch.images.mean((1, 2, 3))
            labels[batch.index.numpy()] = batch.labels.numpy()
    assert len(set(sizes)) > 1  # a ragged last batch
    assert torch.equal(found, expected)
    assert np.array_equal(labels, source.labels)


@pytest.mark.parametrize("crops", [1, 10])
def test_test_scores_are_put_at_the_place_of_their_image(monkeypatch, viewing, crops):
    """The judged images come in another order, in ragged batches: the figures stay the same."""
    torch.manual_seed(0)
    stages, train, test = Pooled(SmallResNet()), shades(161, 1), shades(45, 2)
    expected = stage_scores(stages, train, test, viewing, schedule=QUICK, crops=crops)
    original = probes._test_views

    def shuffled(source, viewing, crops):
        images, index = zip(*original(source, viewing, crops), strict=True)
        images, index = torch.cat(images), torch.cat(index)
        images = images.view(len(index), crops, *images.shape[1:])
        for rows in torch.split(torch.randperm(len(index), generator=torch.Generator().manual_seed(1)), 13):
            yield images[rows].flatten(0, 1), index[rows]

    monkeypatch.setattr(probes, "_test_views", shuffled)
    found = stage_scores(stages, train, test, viewing, schedule=QUICK, crops=crops)
    assert found["pooled"]["top1"] == pytest.approx(expected["pooled"]["top1"], abs=0.5 / 45)
    assert found["pooled"]["top1"] > 0.9


def test_logits_of_ten_crops_are_averaged(monkeypatch, viewing):
    """Of ten views of which one shouts and nine agree quietly, the sum decides."""

    class Mean(nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    def views(source, viewing, crops):
        quiet = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 4, 4)
        loud = torch.tensor([0.0, 20.0, 0.0])[:, None, None].expand(3, 4, 4)
        for index in range(len(source)):
            shout = index % 2  # every second image is of class 1 by its last view alone
            yield torch.stack([quiet] * 9 + [loud if shout else quiet]), torch.tensor([index])

    monkeypatch.setattr(probes, "_test_views", views)
    probe = Probe((3,), 2, normalize=False)
    probe.linear.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    test = open_source(np.zeros((7, 4, 4, 3), np.uint8), labels=np.arange(7) % 2)
    trained = nn.ModuleDict({"pooled": probe})
    found = probes._judge(Pooled(Mean()), trained, test, np.arange(2), viewing, 10)
    assert found["pooled"]["top1"] == 1.0


def test_five_probes_of_an_alexnet_are_trained_together():
    torch.manual_seed(0)
    view = Augment.none(64)
    found = stage_scores(
        Stages(AlexNet(3, "small")),
        spots(48, 1),
        spots(24, 2),
        Viewing(view, view, threads=1),
        schedule="alexnet",
        epochs=1,
    )
    assert list(found) == ["conv1", "conv2", "conv3", "conv4", "conv5"]


def test_fine_tuning_learns_from_few_images(viewing):
    torch.manual_seed(0)
    found = fine_tune_scores(
        SmallResNet(), spots(96, 1), spots(60, 2), viewing, schedule=ProbeSchedule(6, 16, 0.1, 0.1, (5,))
    )
    assert found["top1"] > 0.9
    assert set(found) == {"top1", "top5"}


def test_a_probe_pools_normalises_and_classifies():
    torch.manual_seed(0)
    probe = Probe((8, 30, 40), 5)
    activations = torch.randn(6, 8, 30, 40) * 7 + 3
    pooled = nn.functional.adaptive_max_pool2d(activations, 30)
    assert probe.values == 8 * 30 * 30
    mean, var = pooled.mean((0, 2, 3), keepdim=True), pooled.var((0, 2, 3), unbiased=False, keepdim=True)
    expected = probe.linear(((pooled - mean) / (var + 1e-5).sqrt()).flatten(1))
    torch.testing.assert_close(probe(activations), expected, atol=1e-4, rtol=1e-4)
    assert not any(name.startswith("norm") for name, _ in probe.named_parameters())


def test_numbers_of_crops_that_there_are_not_are_refused(viewing):
    with pytest.raises(OptionError, match="crops: expected 1 or 10, found 5"):
        stage_scores(Pooled(SmallResNet()), spots(8, 1), spots(8, 2), viewing, crops=5)


def test_images_that_a_network_does_not_take_are_refused():
    view = Augment.none(8)
    with pytest.raises(OptionError, match="does not take images of 3 x 8 x 8"):
        stage_scores(Stages(AlexNet()), spots(8, 1), spots(8, 2), Viewing(view, view, threads=1))
