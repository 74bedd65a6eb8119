import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

import sela_ext
from sela_ext import cli
from sela_ext.errors import DataError, NumericsError, OptionError, ResourceError
from sela_ext.finetuning import run
from sela_ext.finetuning.classification import Classification
from sela_ext.finetuning.detection import Detection
from sela_ext.finetuning.options import make_options, settle
from sela_ext.finetuning.segmentation import Segmentation
from sela_ext.finetuning.task import Setting, order
from sela_ext.finetuning.trunk import load_trunk
from sela_ext.finetuning.voc import VocTree

SMALL = {
    "device": "cpu",
    "precision": "float32",
    "iterations": 2,
    "batch_size": 4,
    "image_size": 64,
    "threads": 1,
    "progress": False,
}
FEW_REGIONS = {"proposals": 20, "regions": 16}
SCORES = {
    "classification": {"map", "map_11point"},
    "detection": {"ap50", "ap50_11point", "ap75", "ap"},
    "segmentation": {"miou", "pixel_accuracy"},
}


def options_for(task, **more):
    return {**SMALL, **(FEW_REGIONS if task == "detection" else {}), **more}


def build(kind, tree, backbone="small-resnet", **options):
    task = kind.__name__.lower()
    given = {"batch_norm": "train", "train_split": "trainval", "test_split": "test", **options}
    settled = settle(make_options(options_for(task, **given)), task)
    torch.manual_seed(0)
    return kind(Setting(VocTree(tree), load_trunk(backbone, pretrained=False, size=64), settled))


def tensors(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("task", list(SCORES))
def test_every_task_runs_from_the_folder_to_its_scores(voc, tmp_path, task):
    out = tmp_path / "out"
    result = sela_ext.finetune("small-resnet", voc=voc, task=task, out=out, log_every=1, **options_for(task))
    assert {name for name in result.metrics if name in SCORES[task]} == SCORES[task]
    assert all(0 <= result.metrics[name] <= 1 for name in SCORES[task])
    assert not result.model.training
    written = json.loads((out / "metrics.json").read_text())
    assert written["task"] == task
    assert written["iterations"] == 2
    assert all(written[name] == result.metrics[name] for name in SCORES[task])
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["step", "step", "end"]
    assert all(math.isfinite(event["loss"]) for event in events[:2])
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 2
    model = result.model.state_dict()
    assert saved["model"].keys() == model.keys()
    assert all(torch.equal(value, model[key]) for key, value in saved["model"].items())
    options = json.loads((out / "options.json").read_text())
    assert (options["train_split"], options["test_split"], options["batch_norm"]) == ("trainval", "test", "train")
    assert "small-resnet" in (out / "finetune.log").read_text()


@pytest.mark.parametrize("task", list(SCORES))
def test_the_same_seed_gives_the_same_network(make_voc, tmp_path, task):
    path, _ = make_voc(train=6, test=1)
    networks = []
    for i, seed in enumerate((0, 0, 1)):
        options = options_for(task, seed=seed, batch_size=2, test_crops="centre")
        result = sela_ext.finetune("small-resnet", voc=path, task=task, out=tmp_path / str(i), **options)
        networks.append(result.model.state_dict())
    assert all(torch.equal(value, networks[1][key]) for key, value in networks[0].items())
    assert any(not torch.equal(value, networks[2][key]) for key, value in networks[0].items())


@pytest.mark.parametrize("kind", [Classification, Detection, Segmentation])
def test_fc6_8_leaves_the_backbone_as_it_is(voc, kind):
    work = build(kind, voc, layers="fc6-8", batch_norm="frozen")
    before = tensors(work.backbone())
    head = [p for p in work.model.parameters() if p.requires_grad]
    assert head
    work.train_mode()
    optimizer = torch.optim.SGD(head, lr=0.01)
    work.loss(next(work.epoch(0))).backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in work.backbone().state_dict().items())


def test_an_untrained_backbone_gathers_statistics_for_its_batch_norm(voc):
    work = build(Classification, voc, layers="fc6-8", batch_norm="train")
    before = tensors(work.backbone())
    work.train_mode()
    work.loss(next(work.epoch(0))).backward()
    changed = {key for key, value in work.backbone().state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("running_" in key or "num_batches" in key for key in changed)
    assert all(parameter.grad is None for parameter in work.backbone().parameters())


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_frozen_batch_norm_learns_nothing_while_convolutions_do(voc, batch_norm):
    work = build(Segmentation, voc, layers="all", batch_norm=batch_norm)
    before = tensors(work.backbone())
    work.train_mode()
    trained = [p for p in work.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    work.loss(next(work.epoch(0))).backward()
    optimizer.step()
    changed = {key for key, value in work.backbone().state_dict().items() if not torch.equal(value, before[key])}
    norms = {key for key in changed if "running_" in key or "bn" in key}
    assert any(key.endswith("conv1.weight") for key in changed)
    assert bool(norms) == (batch_norm == "train")


def test_the_fully_connected_layers_of_alexnet_are_drawn_anew_and_trained(voc):
    work = build(Classification, voc, "alexnet", layers="fc6-8", batch_norm="frozen")
    net = work.backbone()
    assert not any(p.requires_grad for p in net.features.parameters())
    assert all(p.requires_grad for p in net.classifier.parameters())
    for layer in (net.classifier[1], net.classifier[4]):
        assert float(layer.bias.detach().min()) == float(layer.bias.detach().max()) == pytest.approx(0.1)
    work.train_mode()
    assert net.classifier.training
    assert not net.features[1].training


def test_images_that_are_hard_to_tell_add_nothing_to_the_loss(voc):
    work = build(Classification, voc)
    batch = next(work.epoch(0))
    work.model.eval()
    with torch.no_grad():
        whole = work.loss(batch)
        work.train_table[batch.index, 1] = 0
        without = work.loss(batch)
        work.train_table[batch.index] = 0
        nothing = work.loss(batch)
    assert 0 < float(without) < float(whole)
    assert float(nothing) == 0


def test_mirrored_images_have_mirrored_boxes(voc):
    work = build(Detection, voc)
    seen = set()
    for epoch in range(6):
        image, target = work._sample(0, epoch)
        plain = torch.from_numpy(work.train_objects[0].boxes)
        if torch.equal(target["boxes"], plain):
            seen.add("plain")
        else:
            width = image.shape[2]
            assert torch.equal(target["boxes"][:, 0], width - plain[:, 2])
            assert torch.equal(target["boxes"][:, 2], width - plain[:, 0])
            seen.add("mirrored")
        for box, label in zip(target["boxes"].int(), target["labels"], strict=True):
            middle = image[:, (box[1] + box[3]) // 2 + 2, (box[0] + box[2]) // 2]
            assert int(middle.argmax()) == int(label) - 1  # red, green, blue
    assert seen == {"plain", "mirrored"}


def test_masks_go_where_their_images_go(voc):
    work = build(Segmentation, voc)
    agreements = []
    for i in range(6):
        image, mask = work._sample(i, 0)
        assert image.shape == (3, 64, 64)
        assert mask.shape == (64, 64)
        things = (mask > 0) & (mask < 255)
        if things.any():
            mean, std = torch.tensor(work.setting.trunk.mean), torch.tensor(work.setting.trunk.std)
            colours = image * std[:, None, None] + mean[:, None, None]
            agreements.append(float((colours.argmax(0)[things] == mask[things] - 1).float().mean()))
    assert len(agreements) >= 3
    assert min(agreements) > 0.8  # JPEG and resampling blur the edges


def test_an_epoch_shows_every_image_once(voc):
    assert sorted(order(12, 3, 1)) == list(range(12))
    assert order(12, 3, 1) != order(12, 3, 2)
    work = build(Detection, voc, batch_size=5)
    assert [len(images) for images, _ in work.epoch(0)] == [5, 5, 2]


@pytest.mark.parametrize(("crops", "passes"), [("random", 10), ("ten", 10), ("centre", 1)])
def test_scores_are_summed_over_the_crops(voc, monkeypatch, crops, passes):
    work = build(Classification, voc, test_crops=crops)
    seen = []
    model = work.model
    work.model = nn.Sequential()
    monkeypatch.setattr(work.model, "forward", lambda images: seen.append(images.shape) or model.eval()(images))
    scores = work.evaluate(lambda share: None)
    assert sum(shape[0] for shape in seen) == passes * 8
    assert {tuple(shape[1:]) for shape in seen} == {(3, 64, 64)}
    assert 0 <= scores["map"] <= 1


def test_ten_crops_are_corners_and_centre_and_their_mirror_images(make_voc):
    from PIL import Image

    path, _ = make_voc()
    pixels = np.zeros((73, 146, 3), np.uint8)  # 73 = 64 * 256 / 224: no resampling
    pixels[:, :, 0] = np.arange(146)
    pixels[:, :, 1] = np.arange(73)[:, None]
    Image.fromarray(pixels).save(path / "JPEGImages" / "test_000000.jpg", format="PNG")
    work = build(Classification, path, test_crops="ten")
    crops = work._ten("test_000000")
    trunk = work.setting.trunk
    found = (crops * torch.tensor(trunk.std)[:, None, None] + torch.tensor(trunk.mean)[:, None, None]) * 255
    corners = [(0, 0), (0, 82), (9, 0), (9, 82), (4, 41)]
    for crop, (y, x) in zip(found[:5], corners, strict=True):
        assert torch.allclose(crop[:2, 0, 0], torch.tensor([float(x), float(y)]), atol=1e-2)
    assert torch.allclose(found[5:].flip(3), found[:5], atol=1e-3)


def test_bfloat16_computes_and_learns(voc, tmp_path):
    for task in SCORES:
        options = options_for(task, precision="bfloat16", iterations=1)
        result = sela_ext.finetune("small-resnet", voc=voc, task=task, out=tmp_path / task, **options)
        assert {p.dtype for p in result.model.parameters()} == {torch.float32}


def test_a_crash_leaves_the_last_checkpoint(voc, tmp_path, monkeypatch):
    original = Classification.loss
    steps = []

    def loss(self, batch):
        steps.append(1)
        if len(steps) == 3:
            raise KeyError("a crash")
        return original(self, batch)

    monkeypatch.setattr(Classification, "loss", loss)
    options = options_for("classification", iterations=5, checkpoint_seconds=1e-9)
    with pytest.raises(KeyError, match="a crash"):
        sela_ext.finetune("small-resnet", voc=voc, task="classification", out=tmp_path / "out", **options)
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_full_disk_is_one_clear_error_and_the_old_checkpoint_stays(voc, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with run._Folder(tmp_path / "out", False) as files:
        files.save({"step": 1})
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(ResourceError, match=r"checkpoint\.pt \(.* bytes\): No space left"):
            files.save({"step": 2})
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True) == {"step": 1}


def test_a_loss_that_is_not_finite_stops_the_run(voc, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "loss", lambda self, batch: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(NumericsError, match="loss is nan at step 0 of classification"):
        sela_ext.finetune("small-resnet", voc=voc, task="classification", out=tmp_path / "out", **SMALL)


def test_folders_that_hold_something_are_left_alone(voc, tmp_path):
    out = tmp_path / "out"
    arguments = {"voc": voc, "task": "classification", "out": out, **SMALL, "iterations": 1}
    sela_ext.finetune("small-resnet", **arguments)
    with pytest.raises(OptionError, match="set overwrite to replace"):
        sela_ext.finetune("small-resnet", **arguments)
    sela_ext.finetune("small-resnet", **arguments, overwrite=True)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"found mine\.txt; nothing was deleted"):
        sela_ext.finetune("small-resnet", **arguments, overwrite=True)
    with pytest.raises(OptionError, match="found the file"):
        sela_ext.finetune("small-resnet", **{**arguments, "out": out / "mine.txt"})


def test_splits_with_other_classes_are_refused(make_voc, tmp_path):
    path, _ = make_voc()
    (path / "ImageSets" / "Main" / "cat_test.txt").unlink()
    with pytest.raises(DataError, match=r"expected the same classes .* found cat in one of them only"):
        sela_ext.finetune("small-resnet", voc=path, task="classification", out=tmp_path / "a", **SMALL)
    for file in (path / "Annotations").glob("trainval_*.xml"):
        file.write_text(file.read_text().replace("<name>cat<", "<name>bird<"))
    with pytest.raises(DataError, match="found cat besides"):
        sela_ext.finetune("small-resnet", voc=path, task="detection", out=tmp_path / "b", **SMALL)


def test_boxes_outside_their_image_are_refused(make_voc, tmp_path):
    path, _ = make_voc()
    for file in (path / "Annotations").glob("trainval_*.xml"):
        text = file.read_text()
        file.write_text(text.replace("<xmin>", "<xmin>9").replace("<xmax>", "<xmax>9"))
    with pytest.raises(DataError, match=r"Annotations/trainval_\d+\.xml: expected boxes inside"):
        sela_ext.finetune("small-resnet", voc=path, task="detection", out=tmp_path / "b", **options_for("detection"))


def test_the_command_line_runs_it(voc, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["finetune", "small-resnet", "--voc", str(voc), "--task", "classification", "--out", str(out)]
    more = ["--iterations", "1", "--batch-size", "4", "--image-size", "64", "--threads", "1", "--layers", "all"]
    assert cli.run([*arguments, *more, "--test-crops", "centre"]) == 0
    assert "map" in capsys.readouterr().out
    assert json.loads((out / "options.json").read_text())["layers"] == "all"
    with pytest.raises(OptionError, match="did you mean --iterations"):
        cli.run([*arguments, "--iteration", "3"])
    with pytest.raises(OptionError, match="did you mean detection"):
        cli.run([*arguments[:-4], "--task", "detecton"])


def test_a_released_checkpoint_is_a_backbone(voc, tmp_path):
    import torchvision

    path = tmp_path / "resnet18-1k_pp.pth"
    state = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save({"state_dict": state, "labels": torch.zeros(5, dtype=torch.int64)}, path)
    options = options_for("classification", iterations=1, test_crops="centre")
    result = sela_ext.finetune(str(path), voc=voc, task="classification", out=tmp_path / "out", **options)
    assert result.metrics["network"] == "resnet18"
    assert torch.equal(result.model[0].conv1.weight, state["conv1.weight"])  # fc6-8 by default
    written = json.loads((tmp_path / "out" / "options.json").read_text())
    assert (written["trained"], written["batch_norm"]) == (True, "frozen")


def test_a_signal_ends_the_run_with_its_checkpoint(voc, tmp_path, monkeypatch):
    original = Classification.loss
    steps = []

    def loss(self, batch):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(Classification, "loss", loss)
    options = options_for("classification", iterations=50)
    with pytest.raises(SystemExit) as caught:
        sela_ext.finetune("small-resnet", voc=voc, task="classification", out=tmp_path / "out", **options)
    assert caught.value.code == 143
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 2


@pytest.mark.slow
@pytest.mark.timeout(3000)  # two minutes of processor time, all in all
@pytest.mark.parametrize(
    ("task", "score", "least", "options"),
    [
        (
            "classification",
            "map",
            0.9,
            {"batch_size": 16, "image_size": 48, "lr": 0.05, "crop_low": 0.5, "crop_high": 1.0},
        ),
        ("segmentation", "miou", 0.6, {"batch_size": 8, "lr": 0.05, "classes": 4}),
        (
            "detection",
            "ap50",
            0.5,
            {"iterations": 100, "image_size": 80, "warmup": 20, "proposals": 100, "regions": 64},
        ),
    ],
)
def test_every_task_learns_what_is_in_the_pictures(make_voc, tmp_path, task, score, least, options):
    path, _ = make_voc(train=64, test=32)
    options = {"iterations": 150, "layers": "all", "test_crops": "centre", **options}
    result = sela_ext.finetune("small-resnet", voc=path, task=task, out=tmp_path / "out", **{**SMALL, **options})
    assert result.metrics[score] > least
