import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import sela_ext
from sela_ext.cli.program import run as run_command
from sela_ext.errors import CheckpointError, DataError, OptionError
from sela_ext.models import Heads, Standardize, build_vector_backbone
from sela_ext.training import labelling
from sela_ext.training.labelling import label_pass
from sela_ext.training.options import Options
from sela_ext.training.prototypes import place_prototypes
from sela_ext.training.recipes import SelaRecipe
from sela_ext.training.vector_embeddings import VectorEmbeddings, rows_of
from sela_ext.training.vector_options import automatic_batch, automatic_epochs

SMALL = {"clusters": 4, "heads": 2, "epochs": 2, "batch_size": 64, "threads": 1, "progress": False}


def blobs(count=400, width=9, kinds=4, dtype="float32", seed=0):
    """Rows around a few centres, far from zero and of uneven size, and the number of each row's centre."""
    rng = np.random.default_rng(seed)
    truth = np.arange(count) % kinds
    rows = 4 * rng.standard_normal((kinds, width))[truth] + rng.standard_normal((count, width)) + 7
    return rows.astype(dtype), truth


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    rows, truth = blobs(dtype="float16")
    np.save(folder / "rows.npy", rows)
    result = sela_ext.train(folder / "rows.npy", out=folder / "run", labels=truth, holdout=60, **{**SMALL, "epochs": 4})
    return folder, rows, truth, result


def test_a_run_on_vectors_leaves_all_that_a_run_leaves(trained):
    folder, _, _, result = trained
    names = {path.name for path in (folder / "run").iterdir()}
    assert {
        "options.json",
        "train.log",
        "metrics.jsonl",
        "labels.csv",
        "labels.npz",
        "network.pt",
        "report.html",
        "report.npz",
    } <= names
    assert result.labels.shape == (2, 400)
    assert result.metrics["nmi"] > 0.9
    assert result.metrics["knn"] > 0.95
    assert result.metrics["linear"] > 0.95
    sizes = np.bincount(result.labels[result.head], minlength=4)
    assert sizes.min() >= 90
    written = json.loads((folder / "run" / "options.json").read_text())
    assert written["options"]["model"] == "identity"
    assert written["resolved"]["vector_size"] == 9
    assert "augment" not in written["resolved"]
    assert [name for name, value in written["options"].items() if value == "auto"] == ["label_method"]
    with open(folder / "run" / "labels.csv", newline="") as table:
        lines = list(csv.reader(table))
    assert lines[1][:2] == ["0", "row/00000"]
    assert len(lines) == 401
    page = (folder / "run" / "report.html").read_text()
    assert "The data are feature vectors" in page
    assert "<img" not in page


def test_the_features_of_the_model_identity_are_the_standardised_rows(trained):
    folder, rows, _, result = trained
    features = sela_ext.embed(folder / "run", rows)
    standardize = result.network.backbone
    wanted = (rows.astype(np.float32) - standardize.mean.numpy()) * standardize.scale.numpy()
    np.testing.assert_array_equal(features, wanted)
    kept = wanted[:, :]
    assert abs(kept.mean()) < 0.1
    assert kept.std() == pytest.approx(1, abs=0.05)


def test_predict_gives_the_labels_of_the_run_and_evaluate_its_figures(trained):
    folder, rows, _, result = trained
    again = sela_ext.predict(folder / "run", folder / "rows.npy", threads=1)
    assert (again == result.labels).mean() > 0.98  # the training rows that lie on a border may differ
    assert torch.equal(torch.from_numpy(again), sela_ext.predict(folder / "run", torch.from_numpy(rows), threads=1))
    best = sela_ext.predict(folder / "run", rows[:33], head="best", threads=1)
    np.testing.assert_array_equal(best, again[result.head, :33])
    found = sela_ext.evaluate(folder / "run", threads=1)
    assert found["nmi"] == pytest.approx(result.metrics["nmi"], abs=1e-6)
    assert found["knn"] == pytest.approx(result.metrics["knn"], abs=0.02)


def test_what_sela_embed_writes_is_data(tmp_path, trained):
    folder = trained[0]
    for name in ("features.npy", "features.npz"):
        command = ["embed", str(folder / "run"), "--data", str(folder / "rows.npy"), "--out", str(tmp_path / name)]
        assert run_command([*command, "--threads", "1"]) == 0
        result = sela_ext.train(tmp_path / name, out=tmp_path / f"of-{name}", **{**SMALL, "epochs": 1})
        assert result.labels.shape == (2, 400)
        assert "nmi" not in result.metrics


def test_the_command_line_trains_evaluates_and_reports(tmp_path, trained, capsys):
    folder, _, truth, _ = trained
    np.save(tmp_path / "y.npy", truth)
    out = str(tmp_path / "run")
    command = ["train", "--data", str(folder / "rows.npy"), "--out", out, "--clusters", "4,3", "--labels"]
    assert run_command([*command, str(tmp_path / "y.npy"), "--epochs", "1", "--threads", "1", "--no-progress"]) == 0
    assert run_command(["evaluate", out, "--no-progress", "--threads", "1"]) == 0
    assert run_command(["report", out]) == 0
    assert "report.html" in capsys.readouterr().out
    assert run_command(["predict", out, "--data", str(folder / "rows.npy"), "--out", str(tmp_path / "p.csv")]) == 0
    assert (tmp_path / "p.csv").read_text().splitlines()[0] == "index,name,label_0,label_1"


@pytest.mark.parametrize("model", ["mlp-16", "mlp-16-8", "own"])
def test_networks_with_layers_are_trained_and_kept(tmp_path, model):
    rows, truth = blobs()
    own = nn.Sequential(nn.Linear(9, 12), nn.BatchNorm1d(12), nn.ReLU())
    given = own if model == "own" else model
    result = sela_ext.train(rows, out=tmp_path / "run", labels=truth, model=given, **{**SMALL, "epochs": 4})
    width = {"mlp-16": 16, "mlp-16-8": 8, "own": 12}[model]
    again = {"model": own} if model == "own" else {}
    assert sela_ext.embed(tmp_path / "run", rows, **again).shape == (400, width)
    assert (sela_ext.predict(tmp_path / "run", rows, threads=1, **again) == result.labels).mean() > 0.97
    assert result.metrics["nmi"] > 0.8
    assert any(parameter.requires_grad for parameter in result.network.backbone.parameters())


def test_a_bank_and_a_projection_work_with_layers(tmp_path):
    rows, truth = blobs()
    for number, options in enumerate(({"label_source": "bank", "model": "mlp-16"}, {"projection": 16})):
        result = sela_ext.train(rows, out=tmp_path / str(number), labels=truth, **options, **SMALL)
        assert result.metrics["nmi"] > 0.6


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    rows, truth = blobs(count=333)
    options = {**SMALL, "epochs": 3, "labels": truth, "checkpoint_seconds": 1e-9, "model": "mlp-8"}
    whole = sela_ext.train(rows, out=tmp_path / "whole", **options)
    after_step, steps = SelaRecipe.after_step, []

    def stop(self, batch, output):
        steps.append(1)
        if len(steps) == 8:
            raise RuntimeError("in the middle of the second epoch")
        after_step(self, batch, output)

    monkeypatch.setattr(SelaRecipe, "after_step", stop)
    with pytest.raises(RuntimeError, match="in the middle"):
        sela_ext.train(rows, out=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "labels.csv").exists()
    monkeypatch.undo()
    resumed = sela_ext.train(rows, out=tmp_path / "run", resume=True, **options)
    np.testing.assert_array_equal(resumed.labels, whole.labels)
    np.testing.assert_array_equal(resumed.confidence, whole.confidence)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="count"):
        sela_ext.train(rows[:-1], out=tmp_path / "run", resume=True, **{**options, "labels": truth[:-1]})


def test_threads_and_the_type_of_equal_numbers_change_nothing(tmp_path):
    rows, _ = blobs(dtype="float16")
    one = sela_ext.train(rows, out=tmp_path / "one", **SMALL)
    other = sela_ext.train(rows.astype(np.float64), out=tmp_path / "other", **{**SMALL, "threads": 2})
    assert (one.labels == other.labels).mean() > 0.99  # products of two threads may round otherwise


@pytest.mark.parametrize("model", ["identity", "mlp-8"])
def test_rows_that_are_not_finite_are_skipped_and_listed(tmp_path, model):
    rows, truth = blobs()
    rows[[3, 150], 2] = np.nan, np.inf
    with pytest.raises(DataError, match="row/00003: holds NaN or infinity"):
        sela_ext.train(rows, out=tmp_path / "raise", **SMALL)
    result = sela_ext.train(rows, out=tmp_path / "run", labels=truth, on_bad_image="skip", model=model, **SMALL)
    assert np.flatnonzero((result.labels == -1).any(0)).tolist() == [3, 150]
    with open(tmp_path / "run" / "bad_images.csv", newline="") as table:
        assert [line[1] for line in csv.reader(table)][1:] == ["row/00003", "row/00150"]
    again = sela_ext.predict(tmp_path / "run", rows, on_bad_image="skip", threads=1)
    assert np.flatnonzero((again == -1).all(0)).tolist() == [3, 150]


def test_columns_of_different_units_may_each_have_their_scale(tmp_path):
    rows, truth = blobs()
    rows[:, 0] *= 1000
    rows[:, 3] = 5  # says nothing
    poor = sela_ext.train(rows, out=tmp_path / "one", labels=truth, **SMALL)
    good = sela_ext.train(rows, out=tmp_path / "columns", labels=truth, feature_scale="columns", **SMALL)
    assert good.metrics["nmi"] > poor.metrics["nmi"] + 0.2
    features = sela_ext.embed(tmp_path / "columns", rows)
    np.testing.assert_allclose(features.std(0), [1, 1, 1, 0, 1, 1, 1, 1, 1], atol=1e-4)


@pytest.mark.parametrize(
    "option",
    [
        {"augment": "sela"},
        {"image_size": 32},
        {"half_resolution": 0.5},
        {"exact": True},
        {"exif": True},
        {"index": "somewhere"},
        {"label_augment": "flip"},
        {"label_source": "official"},
        {"method": "sela-v2"},
        {"label_source": "bank"},
        {"model": "resnet18"},
        {"model": "mlp-0"},
        {"model": nn.Linear(3, 4)},
        {"eval_data": "digits"},
    ],
)
def test_what_only_images_have_is_refused(tmp_path, option):
    with pytest.raises((OptionError, DataError), match=next(iter(option))):
        sela_ext.train(blobs()[0], out=tmp_path / "run", **option, **SMALL)


def test_predict_and_probes_refuse_what_does_not_fit(tmp_path, trained):
    folder = trained[0]
    with pytest.raises(DataError, match="expected vectors of 9 numbers"):
        sela_ext.predict(folder / "run", np.zeros((3, 8), np.float32))
    with pytest.raises(DataError, match="expected vectors of 9 numbers"):
        sela_ext.predict(folder / "run", "digits")
    for options in ({"what": "layers"}, {"what": "linear", "probe": "augmented"}):
        with pytest.raises(OptionError, match="expected images"):
            sela_ext.evaluate(folder / "run", threads=1, **options)


def test_defaults_are_those_of_the_recipe_for_vectors_and_grow_with_the_data(tmp_path):
    rows, truth = blobs(count=120)
    sela_ext.train(rows, out=tmp_path / "run", labels=truth, epochs=1, threads=1, progress=False)
    written = json.loads((tmp_path / "run" / "options.json").read_text())["options"]
    assert written["clusters"] == [4] * 4
    assert written["batch_size"] == 30  # a quarter of the rows
    assert written["lr"] == pytest.approx(0.1 * math.sqrt(30 / 256))
    assert (written["head_kind"], written["temperature"], written["init"]) == ("cosine", 0.1, "kmeans")
    assert (written["feature_noise"], written["feature_dropout"]) == (0.3, 0.2)
    assert [automatic_epochs(n) for n in (10, 10_000, 10**7)] == [60, 20, 4]
    assert [automatic_batch(n) for n in (10, 100_000, 10**7)] == [64, 256, 4096]
    assert Options().feature_noise == sela_ext.SelfLabelling().noise
    assert Options().feature_dropout == sela_ext.SelfLabelling().feature_dropout


def test_several_numbers_of_clusters_share_the_heads_and_report_their_stability(tmp_path):
    rows, truth = blobs()
    result = sela_ext.train(rows, out=tmp_path / "run", labels=truth, **{**SMALL, "clusters": [4, 9], "heads": 6})
    assert list(result.stability) == [4, 9]
    assert result.stability[4] > 0.9 > result.stability[9]
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert events[-1]["stability_by_clusters"] == {str(k): v for k, v in result.stability.items()}
    assert events[-1]["stability"] == result.stability[[4, 4, 4, 9, 9, 9][result.head]]
    assert "Heads that began differently agree to" in (tmp_path / "run" / "report.html").read_text()


def test_balanced_rounds_place_prototypes_for_even_clusters():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [700, 200, 101])
    points = (3 * rng.standard_normal((3, 6))[truth] + rng.standard_normal((1001, 6))).astype(np.float32)
    embeddings, valid = torch.from_numpy(points), torch.ones(1001, dtype=torch.bool)
    entropies = []
    for rounds in (0, 20):
        torch.manual_seed(0)
        heads = Heads(6, [3, 8], "cosine", 0.1)
        place_prototypes(heads, embeddings, valid, 1, rounds=rounds, threads=1)
        found = label_pass(heads, embeddings, valid, np.full((2, 1001), -1, np.int32), lam=25.0, tol=1e-3, threads=1)
        entropies.append([head["cross_entropy"] for head in found.heads])
        again = Heads(6, [3, 8], "cosine", 0.1)
        again.load_state_dict(heads.state_dict())
        place_prototypes(again, embeddings, valid, 1, rounds=rounds, threads=2)
        torch.testing.assert_close(again.weight, heads.weight)
    assert entropies[1][0] < entropies[0][0]
    assert entropies[1][1] < entropies[0][1]


# --- Embeddings that are read when they are needed


@pytest.mark.parametrize("count", [1, 129, 1001])
def test_rows_on_demand_stand_in_for_their_tensor(count):
    rows, _ = blobs(count=count)
    source = sela_ext.data.VectorSource(rows)
    backbone = build_vector_backbone("identity", torch.from_numpy(rows.mean(0)), torch.full((9,), 0.3)).module
    embeddings = VectorEmbeddings(source, backbone)
    whole = backbone(torch.from_numpy(rows))
    assert embeddings.shape == whole.shape
    mask = torch.arange(count) % 3 == 0
    for choice in (slice(None), slice(0, 100), slice(count - 1, count + 9), mask, mask.nonzero()[:, 0]):
        assert torch.equal(embeddings[choice], whole[choice])
    part = rows_of(embeddings, mask.nonzero()[:, 0])
    assert torch.equal(part.cpu(), whole[mask])
    assert torch.equal(rows_of(part, torch.tensor([0])).cpu(), whole[:1])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("memory", [math.inf, 5000.0 * 12, 0.0])
def test_labels_solved_from_rows_on_demand_are_those_of_stored_embeddings(kind, memory, monkeypatch):
    rows, _ = blobs(count=1001)
    torch.manual_seed(0)
    backbone = Standardize(torch.from_numpy(rows.mean(0)), torch.full((9,), 0.25))
    heads = Heads(9, [6, 11], kind)
    nn.init.normal_(heads.weight)
    valid = torch.ones(1001, dtype=torch.bool)
    valid[[0, 500]] = False
    given = (valid, np.full((2, 1001), -1, np.int32))
    stored = label_pass(heads, backbone(torch.from_numpy(rows)), *given, lam=5.0, tol=1e-6, threads=1)
    monkeypatch.setattr(labelling, "_free_memory", lambda device, ranks: memory)
    embeddings = VectorEmbeddings(sela_ext.data.VectorSource(rows), backbone)
    found = label_pass(heads, embeddings, *given, lam=5.0, tol=1e-6, threads=1)
    assert (found.labels == stored.labels).mean() > 0.995
    assert (found.labels[:, [0, 500]] == -1).all()
    for a, b in zip(found.heads, stored.heads, strict=True):
        assert a["cross_entropy"] == pytest.approx(b["cross_entropy"], rel=1e-3)


def test_prototypes_that_are_all_there_is_to_train_are_not_frozen(tmp_path):
    with pytest.raises(OptionError, match="freeze_prototypes: expected 0 with a network whose"):
        sela_ext.train(blobs()[0], out=tmp_path / "run", freeze_prototypes=1.0, **SMALL)
    sela_ext.train(blobs()[0], out=tmp_path / "layers", freeze_prototypes=1.0, model="mlp-8", **SMALL)


def test_bfloat16_vectors_of_torch_are_trained_on(tmp_path):
    rows = torch.from_numpy(blobs(120)[0]).bfloat16()
    result = sela_ext.train(rows, out=tmp_path / "run", **SMALL)
    same = sela_ext.train(rows.float(), out=tmp_path / "same", **SMALL)
    np.testing.assert_array_equal(result.labels, same.labels)


def test_rows_of_denormal_numbers_are_trained_on_without_a_warning(tmp_path):
    result = sela_ext.train((blobs(120)[0] * 1e-44).astype("float32"), out=tmp_path / "run", **SMALL)
    assert result.labels.shape == (2, 120)


def test_a_report_written_again_is_the_runs(tmp_path, trained, capsys):
    folder, *_ = trained
    before = (folder / "run" / "report.html").read_text()
    assert run_command(["report", str(folder / "run")]) == 0
    assert (folder / "run" / "report.html").read_text() == before
    sela_ext.train(blobs(60)[0], out=tmp_path / "memory", **{**SMALL, "epochs": 1})
    capsys.readouterr()
    assert run_command(["report", str(tmp_path / "memory")]) == 0
    assert "cannot be shown: they were given from memory: array float32 [60, 9]" in capsys.readouterr().out


def test_a_dry_run_shows_its_plan_without_progress_too(tmp_path, trained, capsys):
    command = ["train", "--data", str(trained[0] / "rows.npy"), "--out", str(tmp_path / "run"), "--clusters", "4"]
    assert run_command([*command, "--dry-run", "--no-progress"]) == 0
    assert capsys.readouterr().out.count("most at once") == 1
    assert not (tmp_path / "run").exists()


def test_a_resume_with_other_rows_says_so_in_words(tmp_path):
    rows = blobs(60)[0]
    sela_ext.train(rows, out=tmp_path / "run", **SMALL)
    with pytest.raises(CheckpointError, match=r"the data's rows: was '.{8}\.\.\.', now .*; give what it was started"):
        sela_ext.train(rows + 1, out=tmp_path / "run", resume=True, **SMALL)
    with pytest.raises(CheckpointError, match=r"differently: feature_noise: was 0\.3, now 0\.1; give"):
        sela_ext.train(rows, out=tmp_path / "run", resume=True, feature_noise=0.1, **SMALL)
