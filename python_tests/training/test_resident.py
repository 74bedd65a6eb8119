"""Runs whose images are kept on the device, on a card that the host plays with the CPU's kernels."""

import json

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext.data.residency import ResidentImages
from sela_ext.errors import OptionError, ResourceError
from sela_ext.training import loop
from sela_ext.training.plan import SPARE, RunPlan
from sela_ext.training.resident import room_for_images

OPTIONS = {
    "model": "small-resnet", "clusters": 4, "heads": 2, "epochs": 2, "batch_size": 32, "projection": 0, "threads": 1,
    "precision": "float32", "progress": False, "index": "off", "seed": 3, "holdout": 32,
}  # fmt: skip


def pictures(count=160):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 80, (count, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        y, x = divmod(number % 4, 2)
        image[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] += 150
    return images


@pytest.fixture
def card(as_cuda, host_card, monkeypatch):
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    return as_cuda(host_card)


@pytest.fixture
def sent(monkeypatch):
    """Number of images of each set that went to the device."""
    found = []
    real = ResidentImages.images

    def images(self):
        if not self.there:
            found.append(self.shape[0])
        return real(self)

    monkeypatch.setattr(ResidentImages, "images", images)
    return found


def saved(result):
    return json.loads((result.out / "options.json").read_text())


@pytest.mark.parametrize("source", [{"label_source": "bank"}, {"label_source": "eval"}, {"label_source": "official"}])
def test_every_pass_over_the_images_reads_what_was_sent_once(card, host_core, sent, tmp_path, source):
    kept = sela_ext.train(pictures(), out=tmp_path / "kept", labels=np.arange(160) % 4, **source, **OPTIONS)
    assert sorted(sent) == [32, 128]
    launches = host_core.calls
    assert launches > 0
    options = saved(kept)
    assert options["options"]["resident"] is True
    assert options["reasons"]["resident"].startswith("kept on the device: 98.3 kB of 1.07 GB free")
    sent.clear()
    other = sela_ext.train(
        pictures(), out=tmp_path / "other", labels=np.arange(160) % 4, resident=False, **source, **OPTIONS
    )
    assert not sent
    assert saved(other)["options"]["resident"] is False
    assert "resident" not in saved(other)["reasons"]
    # The played kernels are the CPU's own: the same bits all the way.
    assert np.array_equal(kept.labels, other.labels)
    for one, two in zip(kept.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_run_continues_where_images_are_kept_and_where_they_are_not(card, tmp_path, monkeypatch):
    whole = sela_ext.train(pictures(), out=tmp_path / "whole", **OPTIONS)

    class Stopped(BaseException):
        pass

    real, calls = loop.learning_rate, []

    def stop(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 6:
            raise Stopped
        return real(*arguments, **keywords)

    monkeypatch.setattr(loop, "learning_rate", stop)
    with pytest.raises(Stopped):
        sela_ext.train(pictures(), out=tmp_path / "run", checkpoint_seconds=1e-4, resident=True, **OPTIONS)
    monkeypatch.setattr(loop, "learning_rate", real)
    result = sela_ext.train(pictures(), out=tmp_path / "run", resume=True, resident=False, **OPTIONS)
    assert np.array_equal(result.labels, whole.labels)


def test_the_plan_names_what_is_kept_and_room_decides(card, tmp_path, sent):
    plan = sela_ext.train(pictures(), out=tmp_path / "run", dry_run=True, **OPTIONS)
    assert {part.name: part.nbytes for part in plan.parts if "on the device" in part.name} == {
        "training images on the device": 128 * 16 * 16 * 3,
        "held images on the device": 32 * 16 * 16 * 3,
    }
    assert "training images on the device 96.0 KiB always" in " ".join(plan.table().split())
    assert sent == [128]  # the estimate of the time read them
    assert not (tmp_path / "run").exists()


def test_images_for_which_there_is_no_room_stay_where_they_are(card, tmp_path, monkeypatch):
    real = loop.plan_run

    def tight(*arguments, **keywords):
        found = real(*arguments, **keywords)
        needed = found.peak("cpu")[0] - sum(part.nbytes for part in found.parts if part.there)
        return RunPlan(found.parts, {"cpu": int((needed + 50_000) / SPARE)})

    monkeypatch.setattr(loop, "plan_run", tight)
    result = sela_ext.train(pictures(), out=tmp_path / "run", **OPTIONS)
    reason = saved(result)["reasons"]["resident"]
    assert reason.startswith("not kept: 98.3 kB of images, room for 50 kB of 1.07 GB free")
    with pytest.raises(ResourceError, match=r"resident: expected images that fit beside all else, found 98\.3 kB"):
        sela_ext.train(pictures(), out=tmp_path / "wanted", resident=True, **OPTIONS)


def test_room_is_what_the_plan_leaves():
    assert room_for_images(RunPlan((), {"cpu": None}), "cpu") == float("inf")
    assert room_for_images(RunPlan((), {"cpu": 1000}), "cpu") == SPARE * 1000


def test_vectors_are_not_kept_and_the_cpu_keeps_nothing(tmp_path, request):
    options = {"epochs": 1, "clusters": 3, "heads": 1, "threads": 1, "progress": False, "batch_size": 16}
    vectors = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    result = sela_ext.train(vectors, out=tmp_path / "vectors", device="cpu", **options)
    assert saved(result)["options"]["resident"] is False
    assert "on the CPU" in saved(result)["reasons"]["resident"]
    with pytest.raises(OptionError, match="resident: expected False on cpu"):
        sela_ext.train(vectors, out=tmp_path / "wanted", device="cpu", resident=True, **options)
    request.getfixturevalue("card")
    result = sela_ext.train(vectors, out=tmp_path / "played", device="cpu", **options)
    assert saved(result)["reasons"]["resident"] == "not kept: feature vectors, whose rows are sent"
    with pytest.raises(OptionError, match="resident: expected images, found feature vectors"):
        sela_ext.train(vectors, out=tmp_path / "refused", device="cpu", resident=True, **options)
