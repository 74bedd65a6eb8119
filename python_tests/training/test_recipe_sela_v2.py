import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import sela_ext
from sela_ext.cli import main
from sela_ext.data import open_source
from sela_ext.errors import OptionError
from sela_ext.training.crops import crop_views, parse_crops
from sela_ext.training.labelling import LabelPass
from sela_ext.training.options import make_options
from sela_ext.training.presets import PRESETS
from sela_ext.training.recipes import SelaV2Recipe
from sela_ext.training.recipes.sela_v2 import merge_passes
from sela_ext.training.resolve import resolve

TINY = {
    "method": "sela-v2",
    "model": "small-resnet",
    "epochs": 2,
    "batch_size": 64,
    "clusters": [4, 3, 4],
    "projection": [16, 8],
    "crops": "2x16+1x8",
    "threads": 1,
    "precision": "float32",
    "progress": False,
}


def blobs(count=161, size=16, channels=3, classes=4, seed=0):
    """Images that are easy to tell apart: stripes, upright or lying, thin or thick, in noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 90, (count, size, size, channels), dtype=np.uint8)
    for i, label in enumerate(labels):
        stripes = np.arange(size) // (1 + int(label) // 2 * 3) % 2 == 0
        images[i][stripes if label % 2 else np.s_[:, stripes]] += 150
    return images, labels


def events(out, kind):
    return [e for e in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if e["event"] == kind]


class Labelled(torch.utils.data.Dataset):
    """Images with labels, as torch's data sets have them."""

    def __init__(self, images, labels):
        self.images, self.targets = images, labels.tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.targets[i]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    images, labels = blobs()
    return sela_ext.train(images, labels=labels, out=tmp_path_factory.mktemp("v2") / "run", **TINY)


@pytest.fixture
def recipes(monkeypatch):
    """The recipes of the runs of a test, to look into."""
    made = []
    build = SelaV2Recipe.__init__

    def remember(self, run):
        build(self, run)
        made.append(self)

    monkeypatch.setattr(SelaV2Recipe, "__init__", remember)
    return made


def test_a_run_labels_all_images_and_can_be_put_to_use(unbroken):
    images, labels = blobs()
    assert unbroken.labels.shape == (3, 161)
    assert (unbroken.labels >= 0).all()
    assert [int(row.max()) < k for row, k in zip(unbroken.labels, (4, 3, 4), strict=True)] == [True] * 3
    assert [p["step"] for p in events(unbroken.out, "label_pass")] == [0, 3]
    written = json.loads((unbroken.out / "options.json").read_text())["options"]
    assert (written["crops"], written["projection"], written["temperature"]) == ("2x16+1x8", [16, 8], 0.1)
    assert written["half_resolution"] == 0
    features = sela_ext.embed(unbroken.out, images, threads=1)
    assert features.shape[0] == 161
    assert sela_ext.predict(unbroken.out, images, threads=1).shape[-1] == 161
    scores = sela_ext.evaluate(unbroken.out, Labelled(images, labels), what=("clusters", "knn"), threads=1)
    assert 0 <= scores["nmi"] <= 1
    assert 0.25 < scores["knn"] <= 1
    network, _ = sela_ext.load_released(unbroken.out / "network.pt")
    state = unbroken.network.state_dict()
    assert all(torch.equal(value, state[name].cpu()) for name, value in network.state_dict().items())
    assert (unbroken.out / "report.html").exists()


def test_it_finds_easy_clusters(tmp_path):
    images, labels = blobs(256)
    options = {**TINY, "clusters": 4, "heads": 4, "epochs": 12, "projection": 0, "augment": "resized_crop"}
    result = sela_ext.train(
        images,
        out=tmp_path / "run",
        labels=labels,
        crops="2x16:0.5-1+2x8:0.3-0.5",
        **{name: value for name, value in options.items() if name != "crops"},
    )
    assert result.metrics["nmi"] > 0.9


def test_heads_take_the_banks_of_the_large_crops_in_turn(tmp_path, recipes, monkeypatch):
    images, _ = blobs()
    solved = []
    solve = SelaV2Recipe.solve

    def watch(self, embeddings, valid, which):
        solved.append((next(n for n, bank in enumerate(self.banks) if bank.embeddings is embeddings), which))
        return solve(self, embeddings, valid, which)

    monkeypatch.setattr(SelaV2Recipe, "solve", watch)
    sela_ext.train(images, out=tmp_path / "run", **{**TINY, "crops": "2x16+1x8"})
    assert solved == [(0, [0, 2]), (1, [1])] * 2
    banks = recipes[0].banks
    assert [bank.embeddings.shape for bank in banks] == [(161, 8)] * 2
    assert [bank.embeddings.dtype for bank in banks] == [torch.float16] * 2
    assert not torch.equal(banks[0].embeddings, banks[1].embeddings)
    for bank in banks:
        assert bank.valid.all()
        assert torch.allclose(bank.embeddings.float().norm(dim=1), torch.ones(161), atol=2e-3)


def test_the_bank_holds_what_the_steps_saw(tmp_path, recipes, monkeypatch):
    images, _ = blobs(96)
    seen = {}
    after = SelaV2Recipe.after_step

    def note(self, batch, output):
        rows = len(batch.index)
        for i, image in enumerate(batch.index.tolist()):
            seen[image] = [output.embedding[v * rows + i].detach() for v in range(3)]
        after(self, batch, output)

    monkeypatch.setattr(SelaV2Recipe, "after_step", note)
    sela_ext.train(images, out=tmp_path / "run", **{**TINY, "batch_size": 32})
    assert sorted(seen) == list(range(96))
    for image, views in seen.items():
        for bank, view in zip(recipes[0].banks, views, strict=False):
            wanted = nn.functional.normalize(view, dim=0)
            assert torch.allclose(bank.embeddings[image].float(), wanted, atol=1e-3)


def test_one_head_per_pass_in_turn(tmp_path):
    images, _ = blobs()
    sela_ext.train(
        images,
        out=tmp_path / "run",
        **{**TINY, "label_heads": "turn", "label_passes": 3, "epochs": 3, "init": "random"},
    )
    turns = [[head["head"] for head in p["heads"]] for p in events(tmp_path / "run", "label_pass")]
    assert turns == [[0], [1], [2]]


@pytest.mark.parametrize("crops", ["1x16", "1x16+2x8", [(3, 16)]])
def test_one_large_view_or_one_size_is_enough(tmp_path, crops):
    images, _ = blobs(70)
    result = sela_ext.train(images, out=tmp_path / "run", **{**TINY, "crops": crops, "epochs": 1})
    assert (result.labels >= 0).all()
    assert math.isfinite(result.metrics["cross_entropy"])


@pytest.mark.parametrize("count", [65, 66, 129])
def test_a_short_last_batch_changes_nothing_for_its_images(tmp_path, recipes, count):
    images, _ = blobs(count)
    result = sela_ext.train(images, out=tmp_path / "run", **TINY)
    assert (result.labels >= 0).all()
    assert int(recipes[0].banks[0].valid.sum()) >= count - 1


def test_a_run_that_broke_off_resumes_to_the_same_bits(tmp_path, unbroken, monkeypatch):
    images, labels = blobs()
    after = SelaV2Recipe.after_step

    def stop(self, batch, output):
        if self.run.state["step"] == 4:  # in the middle of the second epoch
            raise RuntimeError("the power is off")
        after(self, batch, output)

    monkeypatch.setattr(SelaV2Recipe, "after_step", stop)
    with pytest.raises(RuntimeError, match="power"):
        sela_ext.train(images, labels=labels, out=tmp_path / "run", checkpoint_seconds=0.0, **TINY)
    monkeypatch.undo()
    result = sela_ext.train(images, labels=labels, out=tmp_path / "run", resume=True, **TINY)
    assert np.array_equal(result.labels, unbroken.labels)
    assert np.array_equal(result.confidence, unbroken.confidence)
    state = unbroken.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in result.network.state_dict().items())
    assert [p["step"] for p in events(result.out, "label_pass")] == [0, 3]


def test_frozen_prototypes_stay_and_the_network_learns(tmp_path, monkeypatch):
    images, _ = blobs()
    weights = []
    after = SelaV2Recipe.after_step

    def note(self, batch, output):
        weights.append((self.run.network.heads.weight.detach().clone(), next(self.run.network.parameters()).clone()))
        after(self, batch, output)

    monkeypatch.setattr(SelaV2Recipe, "after_step", note)
    sela_ext.train(images, out=tmp_path / "run", freeze_prototypes=1.0, weight_decay=0.1, **TINY)
    moved = [not torch.equal(one[0], other[0]) for one, other in itertools.pairwise(weights)]
    assert moved == [False, False, True, True, True]  # three steps per epoch
    assert all(not torch.equal(one[1], other[1]) for one, other in itertools.pairwise(weights))


def test_an_unreadable_image_gets_no_label(tmp_path, recipes):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(blobs(41)[0]):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:60])
    options = {**TINY, "batch_size": 16, "clusters": 3, "heads": 2, "on_bad_image": "skip", "max_bad_fraction": 0.1}
    result = sela_ext.train(folder, out=tmp_path / "run", **options)
    assert (result.labels[:, 7] == -1).all()
    assert (np.delete(result.labels, 7, axis=1) >= 0).all()
    assert not any(bool(bank.valid[7]) for bank in recipes[0].banks)
    assert (result.out / "bad_images.csv").exists()


def test_crops_are_a_means_of_plain_sela_too(tmp_path):
    images, _ = blobs()
    options = {**TINY, "method": "sela", "clusters": [4, 4]}
    runs = [
        sela_ext.train(images, out=tmp_path / str(i), **{**options, **change})
        for i, change in enumerate([{}, {"crops": None}, {"label_source": "official"}, {"loss": "sum"}])
    ]
    states = [run.network.state_dict() for run in runs]
    for other in states[1:]:
        assert any(not torch.equal(states[0][name], other[name]) for name in other)
    with pytest.raises(OptionError, match="half_resolution and crops"):
        sela_ext.train(images, out=tmp_path / "r", half_resolution=0.5, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 162}, "at most the number of images, 161, found 162"),
        ({"crops": "2x16+"}, "crops: expected COUNTxSIZE"),
        ({"crops": "2x16", "image_size": 24}, "image_size: expected 16 pixels, the largest of crops, found 24"),
        (
            {"crops": "2x16", "augment": sela_ext.Augment.cifar(24)},
            "augment: expected 16 pixels, the largest of crops, found 24",
        ),
        ({"crops": "2x16", "augment": "none"}, "random crops, found crop='resize'"),
        ({"label_source": "eval"}, "label_source: expected bank with method sela-v2, found eval"),
        ({"head_kind": "linear"}, "head_kind: expected cosine with method sela-v2, found linear"),
        ({"projection": [16, 0]}, "projection: expected widths of at least 1"),
        (
            {"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8))},
            "crops: expected a network that takes all of .*; model: Sequential does not take images of 3 x 8 x 8",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, options, message):
    images, _ = blobs()
    with pytest.raises(OptionError, match=message):
        sela_ext.train(images, out=tmp_path / "run", **{**TINY, **options})
    assert not (tmp_path / "run").exists()


def test_a_network_of_one_size_gets_views_of_one_size(tmp_path):
    images, _ = blobs(64)

    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))

    options = {**TINY, "epochs": 1, "crops": None, "model": build}
    result = sela_ext.train(images, out=tmp_path / "run", **options)
    written = json.loads((result.out / "options.json").read_text())
    assert written["options"]["crops"] == "2x32"
    assert written["reasons"]["crops"] == "the network does not take 16 x 16"


def planned(images, **options):
    """What a run would do."""
    chosen = make_options(options)
    given = set(options) | set(PRESETS[options["preset"]].options if "preset" in options else ())
    return resolve(chosen, given, open_source(images))


def test_the_presets_say_what_the_authors_scripts_say():
    photographs = np.zeros((3000, 64, 64, 3), np.uint8)
    for name, crops, size in (
        ("sela-v2-resnet50", "2x160:0.08-1+4x96:0.05-0.14", 160),
        ("sela-v2-resnet50-2x224", "2x224:0.08-1", 224),
    ):
        plan = planned(photographs, preset=name, device="cpu")
        opt = plan.options
        assert (opt.crops, opt.image_size, opt.projection, opt.clusters) == (crops, size, [2048, 128], [3000] * 3)
        assert (opt.lr, opt.weight_decay, opt.warmup, opt.lr_schedule) == (4.8, 1e-6, 0.025, "cosine")
        assert (opt.label_passes, opt.label_source, opt.freeze_prototypes) == (400, "bank", 1)
        views = crop_views(plan.augment, parse_crops(opt.crops))
        assert (views[0].size, views[0].scale) == (size, (0.08, 1.0))
        assert views[0].saturation == 0.8
        assert PRESETS[name].options["batch_size"] == 4096
        assert PRESETS[name].options["optimizer"] == "lars"


def test_the_small_preset_is_what_the_method_takes_by_itself():
    images = np.zeros((300, 28, 28), np.uint8)
    plans = [
        planned(images, device="cpu", **options) for options in ({"preset": "sela-v2-small"}, {"method": "sela-v2"})
    ]
    one, other = ({**vars(plan.options), "preset": None} for plan in plans)
    assert {name for name in one if one[name] != other[name]} <= {"lr", "batch_size"}
    assert one["crops"] == "2x32+4x16"
    assert one["model"] == "small-resnet"
    assert one["projection"] == 0
    many = planned(np.zeros((10_000, 4, 4), np.uint8), preset="sela-v2-small", device="cpu")
    assert many.options.projection == [512, 128]


def test_larger_images_take_the_authors_projection_and_colours():
    plan = planned(np.zeros((40, 64, 64, 3), np.uint8), method="sela-v2", device="cpu", clusters=4)
    assert (plan.options.projection, plan.options.augment, plan.options.crops) == ([2048, 128], "swav", "2x128+4x64")


def test_the_command_line_takes_crops_and_an_mlp(tmp_path):
    np.save(tmp_path / "images.npy", blobs(70)[0])
    words = f"train --data {tmp_path / 'images.npy'} --out {tmp_path / 'run'} --method sela-v2 --model small-resnet"
    words += " --epochs 1 --batch-size 32 --clusters 4,3 --threads 1 --no-progress"
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*words.split(), "--projection", "16,8", "--crops", "2x16:0.5-1 + 1x8"])
    written = json.loads((tmp_path / "run" / "options.json").read_text())["options"]
    assert (written["projection"], written["crops"]) == ([16, 8], "2x16:0.5-1+1x8")


def test_label_passes_of_different_heads_are_merged():
    def one(head, value):
        labels, confidence = np.full((3, 5), -7, np.int32), np.zeros((3, 5), np.float32)
        labels[head], confidence[head] = value, 0.5
        record = {"head": head, "cross_entropy": 1.0}
        return LabelPass(labels, confidence, {head: np.zeros(2)}, [record], value, 1.5, [f"head {head}"], 0.25)

    merged = merge_passes([one(2, 4), one(0, 1)], np.full((3, 5), 9, np.int32))
    assert merged.labels[:, 0].tolist() == [1, 9, 4]
    assert merged.confidence[:, 0].tolist() == [0.5, 0.0, 0.5]
    assert [record["head"] for record in merged.heads] == [0, 2]
    assert (merged.masked, merged.seconds, merged.wait_seconds) == (4, 3.0, 0.5)
    assert sorted(merged.potentials) == [0, 2]
    assert merged.complaints == ["head 2", "head 0"]
