import json
import math

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext.data import digits_split, open_source
from sela_ext.errors import CheckpointError, DataError, OptionError
from sela_ext.evaluation import cluster_metrics, few_shot_rows, knn_scores, linear_scores
from sela_ext.inference import protocols
from sela_ext.inference import subject as subjects
from sela_ext.models import Network, SmallResNet

QUIET = {"threads": 1, "precision": "float32"}


def squares(n, seed, channels=1):
    """Labelled images of a square whose size is the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    images = rng.integers(0, 40, size=(n, 20, 20, channels), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[: 5 + 5 * label, : 5 + 5 * label] += 160
    return open_source(images, labels=labels)


def test_a_run_scores_what_it_said_at_its_end(trained):
    found = sela_ext.evaluate(trained, **QUIET)
    for name in ("nmi", "ami", "ari", "accuracy", "purity", "class_entropy", "knn", "linear"):
        assert found[name] == pytest.approx(trained.metrics[name], abs=1e-9), name
    report = found["data_sets"][0]
    assert report["clusters"]["head"] == trained.head
    assert report["clusters"]["labels"] == "as the run left them"
    assert (report["images"], report["test_images"], report["classes"]) == (1437, 360, 10)
    assert report["known_as"] == "digits"
    assert report["trivial"]["knn"] == 0.981


def test_every_head_is_judged_and_described(trained):
    found = sela_ext.evaluate(trained.out, what="clusters", **QUIET)["data_sets"][0]["clusters"]["heads"]
    teach, _ = digits_split()
    truth = open_source("digits").labels[teach]
    assert [head["clusters"] for head in found] == [10, 7, 10]
    for head, record in enumerate(found):
        labels = trained.labels[head, teach]
        expected = cluster_metrics(truth, labels)
        assert {name: record[name] for name in expected} == expected
        assert record["cluster_sizes"] == np.bincount(labels, minlength=record["clusters"]).tolist()
        for k in range(record["clusters"]):
            share = np.bincount(truth[labels == k], minlength=10) / max(1, (labels == k).sum())
            entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
            assert record["cluster_entropy"][k] == pytest.approx(entropy, abs=1e-12)
        assert 0 < record["cross_entropy"] < math.log(record["clusters"]) + 0.5
    chosen = min(found, key=lambda record: record["cross_entropy"])["head"]
    assert chosen == trained.head


def test_labels_of_successive_passes_are_compared(trained):
    found = sela_ext.evaluate(trained.out, what="clusters", **QUIET)["data_sets"][0]["clusters"]["heads"]
    lines = [json.loads(line) for line in (trained.out / "metrics.jsonl").read_text().splitlines()]
    passes = [event for event in lines if event["event"] == "label_pass"]
    assert passes
    for head, record in enumerate(found):
        assert record["nmi_between_passes"] == [event["heads"][head]["nmi_previous"] for event in passes]


def test_figures_are_those_of_the_features(run):
    found = sela_ext.evaluate(run, what=("knn", "linear", "few-shot"), k=(5, 31), fractions=(0.1,), **QUIET)
    features = sela_ext.embed(run, "digits", **QUIET)
    labels = open_source("digits").labels
    teach, judge = digits_split()
    parts = features[teach], labels[teach], features[judge], labels[judge]
    scores = knn_scores(*parts, k=(5, 31))
    report = found["data_sets"][0]
    assert found["knn"] == pytest.approx(scores[5]["top1"], abs=1.5 / 360)
    assert report["knn_scores"]["31"]["top5"] == pytest.approx(scores[31]["top5"], abs=1.5 / 360)
    assert found["linear"] == pytest.approx(linear_scores(*parts)["top1"], abs=1.5 / 360)
    few = report["few_shot"]["0.1"]
    assert few["images"] == len(few_shot_rows(labels[teach], 0.1))
    assert few["linear"]["top1"] < found["linear"]


def test_the_report_is_json_and_repeatable(run):
    options = {"what": ("clusters", "knn"), **QUIET}
    one, other = sela_ext.evaluate(run, **options), sela_ext.evaluate(run, **options)
    assert json.loads(json.dumps(one)) == one
    for report in (one, other):
        report.pop("seconds")
        report["data_sets"][0].pop("seconds")
    assert one == other


def test_a_checkpoint_is_judged_by_the_labels_it_holds(run):
    checkpoint = max((run / "checkpoints").iterdir())
    found = sela_ext.evaluate(checkpoint, **QUIET)
    assert found["data_sets"][0]["clusters"]["labels"] == "as the run's checkpoint holds them"
    assert found["knn"] == pytest.approx(sela_ext.evaluate(run, what="knn", **QUIET)["knn"], abs=1.5 / 360)


def test_several_data_sets_make_one_report(run):
    found = sela_ext.evaluate(
        run, {"digits": "digits", "squares": (squares(90, 1), squares(40, 2))}, what=("clusters", "knn"), **QUIET
    )
    first, second = found["data_sets"]
    assert [first["name"], second["name"]] == ["digits", "squares"]
    assert found["knn"] == first["knn"]
    assert first["clusters"]["labels"] == "as the run left them"
    assert second["clusters"]["labels"] == "by the network and its potentials"
    assert (second["images"], second["test_images"], second["classes"]) == (90, 40, 3)
    assert "trivial" not in second
    predicted = sela_ext.predict(run, squares(90, 1), head=second["clusters"]["head"], **QUIET)
    assert second["nmi"] == cluster_metrics(squares(90, 1).labels, predicted)["nmi"]


def test_without_test_images_a_fifth_judges_the_linear_probe(run):
    found = sela_ext.evaluate(run, {"squares": squares(151, 1)}, what=("knn", "linear", "few-shot"), **QUIET)
    report = found["data_sets"][0]
    assert report["knn_judged"] == "each training image by the others"
    assert report["linear_judged"] == "a fifth of the images, not taught"
    features = sela_ext.embed(run, squares(151, 1), **QUIET)
    expected = knn_scores(features, squares(151, 1).labels, k=20)[20]["top1"]
    assert found["knn"] == pytest.approx(expected, abs=1.5 / 151)
    assert found["linear"] * 30 == pytest.approx(round(found["linear"] * 30))


@pytest.mark.parametrize("probe", ["sgd", "augmented"])
def test_probes_by_sgd_are_on_offer(run, probe):
    sets = {"squares": (squares(90, 1), squares(40, 2))}
    found = sela_ext.evaluate(run, sets, what="linear", probe=probe, epochs=8, **QUIET)
    assert found["data_sets"][0]["linear_probe"] == probe
    assert found["linear"] > 0.5


def test_layers_are_probed_under_either_name(run):
    sets = {"squares": (squares(60, 1), squares(30, 2))}
    options = {"epochs": 1, "crops": 10, **QUIET}
    one = sela_ext.evaluate(run, sets, what="alexnet", **options)["data_sets"][0]["layers"]
    other = sela_ext.evaluate(run, sets, what=("layers",), **options)["data_sets"][0]["layers"]
    assert one == other
    assert list(one["stages"]) == ["block1", "block2", "block3"]
    assert (one["crops"], one["epochs"]) == (10, 1)


def test_few_shot_fine_tunes_where_asked(monkeypatch, run):
    asked = []

    def tune(network, train, test, viewing, *, seed):
        asked.append((len(train), len(test), train.labels.tolist()))
        return {"top1": 0.5, "top5": 1.0}

    monkeypatch.setattr(protocols, "fine_tune_scores", tune)
    sets = {"squares": (squares(90, 1), squares(40, 2))}
    found = sela_ext.evaluate(run, sets, what="few-shot", fractions=(0.1,), fine_tune=True, **QUIET)
    entry = found["data_sets"][0]["few_shot"]["0.1"]
    assert entry["fine_tuned"] == {"top1": 0.5, "top5": 1.0}
    assert asked[0][:2] == (entry["images"], 40)
    assert np.bincount(asked[0][2]).tolist() == [3, 3, 3]


def test_a_random_network_is_seeded_and_settled():
    sets = {"squares": (squares(90, 1), squares(40, 2))}
    one, same, other = (sela_ext.evaluate("random:small-resnet", sets, seed=seed, **QUIET) for seed in (0, 0, 1))
    for report in (one, same, other):
        report.pop("seconds")
        report["data_sets"][0].pop("seconds")
    assert one == same
    assert one != other
    assert one["data_sets"][0]["clusters"]["labels"] == "k-means on the features, one cluster per class"
    assert one["subject"]["kind"] == "random"


def test_settling_gives_batch_norm_the_statistics_of_the_images():
    from sela_ext.inference.passes import choose_machine, settle
    from sela_ext.inference.subject import open_subject

    subject = open_subject("random:small-resnet")
    source = squares(64, 1, channels=3)
    options = {"device": "cpu", "batch_size": 64, "on_bad_image": "raise", **QUIET}
    machine = choose_machine(subject, **options)
    prepared = subject.prepare(source)
    assert prepared.untrained
    settled = settle(prepared, source, machine)
    assert not settled.untrained
    seen = []
    norm = settled.network.backbone.stem[1]
    norm.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    sela_ext.inference.passes.look(settled, source, machine)
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert norm.momentum == 0.1
    assert not settled.network.training


def test_pixels_alone_are_a_yardstick():
    found = sela_ext.evaluate("pixels", "digits", **QUIET)
    assert found["knn"] == pytest.approx(0.981, abs=0.01)
    assert found["linear"] == pytest.approx(0.975, abs=0.015)
    assert 0.65 < found["nmi"] < 0.8
    assert found["data_sets"][0]["parameters"] == 0


def test_a_module_is_judged_as_it_is():
    torch.manual_seed(0)
    network = SmallResNet(3).train()
    sets = {"squares": (squares(90, 1), squares(40, 2))}
    found = sela_ext.evaluate(network, sets, **QUIET)
    assert found["subject"]["network"] == "SmallResNet"
    assert found["knn"] > 0.5
    headed = Network(SmallResNet(1), 128, [4, 3], channels_in=1)
    report = sela_ext.evaluate(headed, sets, what="clusters", **QUIET)["data_sets"][0]
    assert report["clusters"]["labels"] == "by the network and what it finds most likely"
    entropies = [head["cross_entropy"] for head in report["clusters"]["heads"]]
    assert report["clusters"]["head"] == int(np.argmin(entropies))


def test_labels_that_came_with_released_weights_are_used_where_they_are_of_these_images(monkeypatch, tmp_path):
    torch.manual_seed(0)
    network = Network(SmallResNet(3), 128, [3, 5]).eval()
    train = squares(90, 1, channels=3)
    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setattr(subjects, "load_released", lambda path: (network, None))
    features = torch.from_numpy(sela_ext.embed(weights, train, image_size=64, threads=1))
    with torch.no_grad():
        logits = network.heads.split(network.heads(features))
    own = torch.stack([one.argmax(1) for one in logits])
    stored = torch.stack([(one - one.mean(0)).argmax(1) for one in logits])  # as if balanced
    options = {"what": "clusters", "image_size": 64, **QUIET}

    def judged(labels, images):
        monkeypatch.setattr(subjects, "load_released", lambda path: (network, labels))
        found = sela_ext.evaluate(weights, {"squares": (images, squares(40, 2, channels=3))}, **options)
        assert found["subject"]["kind"] == "released"
        clusters = found["data_sets"][0]["clusters"]
        return clusters["labels"], [head["cluster_sizes"] for head in clusters["heads"]]

    def sizes(labels):
        return [np.bincount(row, minlength=k).tolist() for row, k in zip(labels.numpy(), (3, 5), strict=True)]

    assert judged(stored, train) == ("as they came with the weights, in the order of the images", sizes(stored))
    other_order = torch.stack([torch.arange(90) % 3, torch.arange(90) % 5])
    origin, found = judged(other_order, train)
    assert origin.startswith("by the network and what it finds most likely; those that came with the weights are of ")
    assert found == sizes(own)
    assert judged(stored, squares(60, 3, channels=3))[0] == "by the network and what it finds most likely"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": (20, 0)}, "k: expected at least 1"),
        ({"sigma": 0.0}, "sigma: expected a finite number above 0"),
        ({"pca": 0}, "pca: expected at least 1"),
        ({"seed": -5}, "seed: expected a whole number in 0"),
        ({"crops": 5}, "crops: expected 1 or 10"),
        ({"fractions": (0.1, 1.5)}, "fractions: expected shares"),
    ],
)
def test_options_are_refused_before_anything_is_looked_at(wrong, message, monkeypatch):
    def unwanted(*arguments, **options):
        raise AssertionError("images were looked at")

    monkeypatch.setattr(protocols, "look", unwanted)
    with pytest.raises(OptionError, match=message):
        sela_ext.evaluate("random:small-resnet", "digits", what="knn", **wrong, **QUIET)


def test_images_that_are_not_those_of_the_run_are_not_judged_by_its_labels(monkeypatch, run):
    original = subjects._stored_labels

    def renamed(folder, found):
        labels, names, kept_only = original(folder, found)
        return labels, [f"other/{name}" for name in names], kept_only

    monkeypatch.setattr(subjects, "_stored_labels", renamed)
    with pytest.raises(DataError, match=r"the images are not the ones that .* labelled"):
        sela_ext.evaluate(run, what="clusters", **QUIET)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ("digits", {"what": "knn,speed"}, OptionError, "what: expected some of clusters, .* found 'speed'"),
        ("digits", {"what": ()}, OptionError, "what: empty"),
        ("digits", {"probe": "svm"}, OptionError, "probe: expected one of logistic, .* found 'svm'"),
        ("digits", {"schedule": "fast"}, OptionError, "schedule: expected resnet"),
        ("digits", {"k": ()}, OptionError, "k: expected a number"),
        ("digits", {"device": "tpu:9"}, OptionError, "device: expected"),
        ("digits", {"precision": "int8"}, OptionError, "precision: expected"),
        ("digits", {"threads": -1}, OptionError, "threads: expected a whole number"),
        ("digits", {"image_size": 2}, OptionError, "image_size: expected at least 4"),
        ("digits", {"on_bad_image": "hide"}, OptionError, "on_bad_image"),
        (None, {}, OptionError, "data: expected labelled images to evaluate random:small-resnet on"),
        (
            np.zeros((8, 20, 20), np.uint8),
            {},
            DataError,
            "expected labelled training images, found none .*; add a labels.csv",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, options, error, message):
    with pytest.raises(error, match=message):
        sela_ext.evaluate("random:small-resnet", given, **{**QUIET, **options})


def test_colour_images_are_refused_by_a_network_for_grey_ones(run):
    with pytest.raises(DataError, match="expected images of 1 channels as the network takes, found 3"):
        sela_ext.evaluate(run, {"colour": squares(30, 1, channels=3)}, **QUIET)


def test_a_run_whose_images_are_gone_asks_for_them(tmp_path):
    np.save(tmp_path / "images.npy", squares(60, 1).array)
    np.save(tmp_path / "labels.npy", squares(60, 1).labels)
    out = tmp_path / "run"
    options = {"epochs": 1, "clusters": 3, "heads": 1, "threads": 1, "precision": "float32", "progress": False}
    sela_ext.train(str(tmp_path / "images.npy"), out=out, labels=str(tmp_path / "labels.npy"), **options)
    assert 0 <= sela_ext.evaluate(out, what="knn", **QUIET)["knn"] <= 1
    (tmp_path / "images.npy").unlink()
    with pytest.raises(DataError, match=r"expected its images, found .*; name them as data"):
        sela_ext.evaluate(out, **QUIET)
    with pytest.raises(CheckpointError, match="found no such file or folder"):
        sela_ext.evaluate(str(tmp_path / "images.npy"), **QUIET)
