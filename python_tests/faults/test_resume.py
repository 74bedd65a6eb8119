"""Runs that are continued otherwise than they began: the cases D11 and D17 of the fault list."""

import dataclasses
import io
import os
import re
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

import sela_ext
from sela_ext.errors import CheckpointError
from sela_ext.training import Options
from sela_ext.training.presets import PRESETS

TINY = {
    "model": "small-convnet", "image_size": 16, "epochs": 1, "batch_size": 12, "clusters": [4, 3], "projection": 0,
    "label_source": "eval", "label_passes": 1, "half_resolution": 0.0, "threads": 1, "progress": False,
}  # fmt: skip
FLAGS = [
    *("--model", "small-convnet", "--image-size", "16", "--epochs", "1", "--batch-size", "12", "--clusters", "4,3"),
    *("--projection", "0", "--label-source", "eval", "--label-passes", "1", "--threads", "1", "--no-progress"),
]


def images(count=48, side=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def tree(folder):
    """Every file and folder below a folder, with what is in it; the lock says who was there last."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def refusal(data, out, **options):
    """What is said of a resume that is refused; nothing in the run folder changes by it."""
    before = tree(out)
    with pytest.raises(CheckpointError) as caught:
        sela_ext.train(data, out=out, resume=True, **options)
    assert tree(out) == before
    message = str(caught.value)
    assert "started differently" in message
    assert "name another out" in message
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is over."""
    out = tmp_path_factory.mktemp("finished") / "run"
    sela_ext.train(images(), out=out, **TINY)
    return out


# ---- D11: other options, another network, another seed.

# Another value of every option that says what is learnt, and how the change is told.
OTHERS = {
    "model": ("small-resnet", "was 'small-convnet', now 'small-resnet'"),
    "clusters": ([4, 5], r"was \[4, 3\], now \[4, 5\]"),
    "head_kind": ("linear", "was 'cosine', now 'linear'"),
    "temperature": (0.5, "was 0.07, now 0.5"),
    "projection": (8, "was 0, now 8"),
    "epochs": (3, "was 1, now 3"),
    "budget": ("1h", "was None, now '1h'"),
    "batch_size": (24, "was 12, now 24"),
    "lr": (0.5, r"was 0.\d+, now 0.5"),
    "lr_schedule": ("constant", "was '.*', now 'constant'"),
    "lr_milestones": ([0.2], r"was \[.*\], now \[0.2\]"),
    "warmup": (0.3, "was .*, now 0.3"),
    "optimizer": ("adamw", "was 'sgd', now 'adamw'"),
    "momentum": (0.5, "was .*, now 0.5"),
    "nesterov": (False, "was True, now False"),
    "weight_decay": (0.25, "was .*, now 0.25"),
    "decay_vectors": (True, "was False, now True"),
    "ema": (0.5, "was 0.0, now 0.5"),
    "accumulate": (2, "was 1, now 2"),
    "compile": None,  # needs a compiler; it is compared like the others
    "loss": ("sum", "was 'mean', now 'sum'"),
    "half_resolution": (0.75, "was .*, now 0.75"),
    "method": ("kmeans", "was 'sela', now 'kmeans'"),
    "label_passes": (2, "was 1, now 2"),
    "label_spacing": ("quadratic", "was 'linear', now 'quadratic'"),
    "label_source": ("official", "was 'eval', now 'official'"),
    "label_augment": ("flip", "was 'none', now 'flip'"),
    "label_heads": ("turn", "was 'all', now 'turn'"),
    "init": ("random", "was 'kmeans', now 'random'"),
    "lam": (12.0, "was .*, now 12.0"),
    "label_tol": (1e-5, "was .*, now 1e-05"),
    "label_method": ("newton", "was 'auto', now 'newton'"),
    "label_max_passes": (77, "was 1000, now 77"),
    "balance": ("exact", "was 'argmax', now 'exact'"),
    "marginals": ("estimated", "was None, now 'estimated'"),
    "relax": (0.5, "was None, now 0.5"),
    "size_bounds": ([0.5, 2], r"was None, now \[0.5, 2\]"),
    "pca": None,  # of methods that cluster; refused with others
    "kmeans_iterations": None,
    "sampler": ("clusters", "was 'images', now 'clusters'"),
    "crops": ("2x16", "was None, now '2x16'"),
    "freeze_prototypes": (0.5, "was 0.0, now 0.5"),
    "fixed_labels": None,  # its own test, in python_tests/training/test_fixed_labels.py
    "rotnet": (True, "was False, now True"),
    "augment": ("flip", "was 'small', now 'flip'"),
    "image_size": (24, "was 16, now 24"),
    "feature_noise": None,  # of feature vectors; refused with images
    "feature_dropout": None,
    "feature_scale": None,
    "imbalance": None,  # needs labels
    "on_bad_image": ("skip", "was 'raise', now 'skip'"),
    "exact": (True, "was False, now True"),
    "exif": (True, "was False, now True"),
    "max_bad_fraction": (0.5, "was 0.01, now 0.5"),
    "labels": (np.arange(48) % 4, "was None, now "),
    "classes": None,  # needs labels
    "eval_data": None,  # needs labels
    "holdout": (5, "was .*, now 5"),
    "evaluate_every": (1, "was 0, now 1"),
    "device": None,  # there may be but one
    "precision": None,
    "seed": (7, "was 0, now 7"),
    "sync_batch_norm": None,  # means something with several ranks alone
    "log_every": (3, "was .*, now 3"),
    "preset": ("fast", "was None, now 'fast'"),
    "heads": None,  # follows clusters
}
# What may be another when a run is continued: it does not change what is learnt.
FREE = {
    "resume", "overwrite", "checkpoint_seconds", "progress", "threads", "index", "callbacks", "wandb", "dry_run",
    "devices", "rank_timeout", "rank_silence", "resident",
}  # fmt: skip


# D11
def test_d11_every_option_is_in_this_test():
    names = {spec.name for spec in dataclasses.fields(Options)}
    assert names <= set(OTHERS) | FREE
    assert not FREE & set(OTHERS)


# D11
@pytest.mark.parametrize("name", [name for name, other in OTHERS.items() if other is not None])
def test_d11_another_option_is_refused_with_old_and_new(finished, name):
    value, told = OTHERS[name]
    given = {**TINY, name: value}
    if name == "budget":
        given["epochs"] = "auto"
    if name == "lr_milestones":
        given["lr_schedule"] = "step"
    if name == "half_resolution":
        given["model"] = "small-resnet"  # which takes half as many pixels
    message = refusal(images(), finished, **given)
    assert re.search(rf"\b{name}: ({told})", message), message


# D11
@pytest.mark.parametrize("name", sorted(FREE - {"wandb", "dry_run", "overwrite", "devices"}))
def test_d11_what_does_not_change_what_is_learnt_may_be_another(finished, tmp_path, name):
    values = {
        "resume": True, "checkpoint_seconds": 7.5, "progress": True, "threads": 2, "index": "off",
        "callbacks": lambda event, info: None, "rank_timeout": 99.0, "rank_silence": 99.0, "resident": False,
    }  # fmt: skip
    if name not in {spec.name for spec in dataclasses.fields(Options)}:
        pytest.skip("a version without this option")
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with np.load(finished / "labels.npz") as saved:
        labels = saved["labels"]
    again = sela_ext.train(images(), out=out, **{**TINY, "resume": True, name: values[name]})
    np.testing.assert_array_equal(again.labels, labels)


# D11
def test_d11_several_differences_are_all_listed_and_the_status_is_4(tmp_path, sela):
    np.save(tmp_path / "images.npy", images())
    train = ["train", "--data", tmp_path / "images.npy", "--out", tmp_path / "run", *FLAGS]
    assert sela(*train)[0] == 0
    before = tree(tmp_path / "run")
    other = ["--clusters", "5,6", "--model", "small-resnet", "--seed", "3", "--resume"]
    status, said, err = sela(*train, *other)
    assert (status, said, err.count("\n")) == (4, "", 1)
    for part in (
        "clusters: was [4, 3], now [5, 6]",
        "model: was 'small-convnet', now 'small-resnet'",
        "seed: was 0, now 3",
    ):
        assert part in err
    np.save(tmp_path / "images.npy", images(40))
    status, said, err = sela(*train, "--resume")
    assert (status, said, err.count("\n")) == (4, "", 1)
    assert "count: was 48, now 40" in err
    assert tree(tmp_path / "run") == before
    # As it was started it goes on, and has nothing left to do.
    np.save(tmp_path / "images.npy", images())
    assert sela(*train, "--resume")[0] == 0


# D11
def test_d11_a_preset_that_says_something_else_is_refused(finished):
    assert "fast" in PRESETS
    assert "preset: was None, now 'fast'" in refusal(images(), finished, **TINY, preset="fast")


# D11
def test_d11_another_network_of_ones_own_is_refused_also_where_it_has_the_same_name(tmp_path):
    def build(width):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    sela_ext.train(images(), out=tmp_path / "run", **{**TINY, "model": lambda: build(8)})
    before = tree(tmp_path / "run")
    wider = {**TINY, "model": lambda: build(9)}
    told = r"the network is not.*backbone\.0\.weight was \[8, 3, 3, 3\], now \[9, 3, 3, 3\].*give that one as model"
    with pytest.raises(CheckpointError, match=told) as caught:
        sela_ext.train(images(), out=tmp_path / "run", resume=True, **wider)
    assert "\n" not in str(caught.value)
    deeper = {**TINY, "model": lambda: nn.Sequential(build(8), nn.Linear(8, 8))}
    with pytest.raises(CheckpointError, match=r"backbone\.0\.weight was \[8, 3, 3, 3\], now none.*and 3 more"):
        sela_ext.train(images(), out=tmp_path / "run", resume=True, **deeper)
    assert tree(tmp_path / "run") == before


# ---- D17: other data.


def fill(folder, count=30):
    folder.mkdir()
    for i in range(count):
        Image.fromarray(images(1, 20 + i, seed=i)[0]).save(folder / f"{i:02d}.jpg")
    return folder


def add(folder):
    shutil.copy(folder / "04.jpg", folder / "00a.jpg")


def remove(folder):
    (folder / "00.jpg").unlink()


def replace(folder):
    shutil.copy(folder / "04.jpg", folder / "05.jpg")


def rename(folder):
    (folder / "01.jpg").rename(folder / "01b.jpg")


def swap(folder):
    (folder / "00.jpg").rename(folder / "x")
    (folder / "01.jpg").rename(folder / "00.jpg")
    (folder / "x").rename(folder / "01.jpg")


CHANGES = {
    add: r"count: was 30, now 31.*first_names: was \['00.jpg', '01.jpg'.*now \['00.jpg', '00a.jpg'",
    remove: r"count: was 30, now 29.*first_names: was \['00.jpg'.*now \['01.jpg'",
    replace: r"file_sizes: was",
    rename: r"first_names: was \['00.jpg', '01.jpg'.*now \['00.jpg', '01b.jpg'.*names: was",
    swap: r"file_sizes: was",
}


def as_folder(folder):
    return folder


def as_list(folder):
    return sorted(folder.iterdir())


def as_tar(folder):
    path = folder.parent / "images.tar"
    with tarfile.open(path, "w") as archive:
        for one in sorted(folder.iterdir()):
            member = tarfile.TarInfo(one.name)
            member.size = one.stat().st_size
            archive.addfile(member, io.BytesIO(one.read_bytes()))
    return path


def as_pack(folder):
    sela_ext.pack(folder, folder.parent / "pack", overwrite=True, raw=False, threads=1)
    return folder.parent / "pack"


# D17
@pytest.mark.parametrize("kind", [as_folder, as_list, as_tar, as_pack], ids=lambda kind: kind.__name__)
def test_d17_files_that_changed_are_refused_with_counts_and_names(tmp_path, kind):
    out = tmp_path / "run"
    sela_ext.train(kind(fill(tmp_path / "images")), out=out, **TINY)
    for change, told in CHANGES.items():
        shutil.rmtree(tmp_path / "images")
        folder = fill(tmp_path / "images")
        change(folder)
        message = refusal(kind(folder), out, **TINY)
        if kind is as_folder:
            assert re.search(told, message), message
        assert re.search(r"was .*, now ", message), message
        assert "the data's" in message
    # Restored, they are the same: times do not count.
    shutil.rmtree(tmp_path / "images")
    again = sela_ext.train(kind(fill(tmp_path / "images")), out=out, resume=True, **TINY)
    assert again.labels.shape == (2, 30)


# D17
def test_d17_arrays_that_changed_are_refused(tmp_path):
    sela_ext.train(images(), out=tmp_path / "run", **TINY)
    changed = images()
    changed[30, 5, 5, 1] ^= 1
    assert "the data's" in refusal(changed, tmp_path / "run", **TINY)
    assert "count: was 48, now 47" in refusal(images()[1:], tmp_path / "run", **TINY)
    assert "the data's" in refusal(images()[::-1].copy(), tmp_path / "run", **TINY)
    grey = refusal(images()[..., 0].copy(), tmp_path / "run", **TINY)
    assert "the data's" in grey


# D17
def test_d17_images_that_vanished_before_a_resume_are_an_error_of_the_data(tmp_path, sela):
    folder = fill(tmp_path / "images")
    train = ["train", "--data", folder, "--out", tmp_path / "run", *FLAGS]
    assert sela(*train)[0] == 0
    before = tree(tmp_path / "run")
    shutil.rmtree(folder)
    status, _, err = sela(*train, "--resume")
    assert (status, err.count("\n")) == (3, 1)
    assert "no such file or folder" in err
    folder.mkdir()
    status, _, err = sela(*train, "--resume")
    assert (status, err.count("\n")) == (3, 1)
    assert tree(tmp_path / "run") == before


def test_d17_data_that_are_cut_short_while_a_run_reads_them_end_it_with_their_name(server, tmp_path):
    path, out = tmp_path / "images.npy", tmp_path / "run"
    np.save(path, np.random.default_rng(0).integers(0, 256, (160, 40, 40), np.uint8))
    options = ["--epochs", "9", "--batch-size", "40", "--clusters", "5", "--image-size", "16", "--threads", "1"]
    command = ["train", "--data", path, "--out", out, *options, "--checkpoint-seconds", "0", "--no-progress"]
    started = server.start(*command, fault="after step:5:stop")
    state = Path(f"/proc/{started.pid}/stat")
    end = time.monotonic() + 120
    while state.read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < end, started.printed()
        time.sleep(0.01)
    whole = path.read_bytes()
    os.truncate(path, 4096)
    started.kill(signal.SIGCONT)
    assert started.wait() == 3, started.printed()
    assert f"sela: error: data: {path} was read, and could not be: it became shorter" in started.printed()
    path.write_bytes(whole)
    status, printed = server.run(*command, "--resume")
    assert status == 0, printed
