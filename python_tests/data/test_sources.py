"""Every source: recognised, read as it was written, and trained on."""

import importlib.util
import json

import numpy as np
import pytest

import sela_ext
from sela_ext import cli
from sela_ext.data import Loader, find_eval_source, open_source
from sela_ext.kernels import Augment

KINDS = {  # name in source_files.WRITERS: kind, images, size of an image, evaluation images
    "folder": ("folder", 24, 32, None),
    "class folders": ("folder", 24, 32, None),
    "csv": ("table", 24, 32, None),
    "tsv": ("table", 24, 32, None),
    "txt": ("table", 24, 32, None),
    "npy": ("array", 24, 32, None),
    "npz": ("npz", 24, 32, 6),
    "idx": ("idx", 24, 28, 6),
    "idx gz": ("idx", 24, 28, 6),
    "cifar-10 python": ("cifar-10", 30, 32, 6),
    "cifar-10 binary": ("cifar-10", 30, 32, 6),
    "cifar-100 python": ("cifar-100", 24, 32, 6),
    "cifar-100 binary": ("cifar-100", 24, 32, 6),
    "cifar-10 archive": ("cifar-10", 30, 32, 6),
    "cifar batch": ("cifar-10", 24, 32, None),
    "stl-10": ("stl-10", 32, 96, 6),
    "svhn": ("svhn", 24, 32, 6),
    "svhn file": ("svhn", 24, 32, 6),
    "tar": ("tar", 24, 32, None),
    "tar folder": ("tar", 24, 32, 12),
    "tar pattern": ("tar", 24, 32, 12),
    "parquet": ("huggingface", 24, 32, None),
}
UNLABELLED = {"folder", "txt", "npy"}
LOSSY = {"tar", "tar folder", "tar pattern"}
# One of a kind that is in memory, one that is files, one that is bytes in a map.
FAST = {"cifar-10 python", "csv", "tar folder"}


def needs(name):
    if name == "parquet" and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed: pip install 'sela_ext[huggingface]'")


def test_every_writer_is_tested(files):
    assert set(files.WRITERS) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_each_source_is_recognised_and_read_as_it_was_written(tmp_path, files, name):
    needs(name)
    kind, count, size, judged = KINDS[name]
    data = files.WRITERS[name](tmp_path)
    source = open_source(str(data))
    assert (source.kind, len(source)) == (kind, count)
    first = source.read(0)
    assert first.shape == (size, size, source.channels)
    assert len(source.names) == len(set(source.names)) == count
    assert source.name(count - 1) == source.names[-1]
    if name in UNLABELLED:
        assert source.labels is None
    else:
        known = source.labels[source.labels >= 0]
        assert set(known.tolist()) == {0, 1, 2, 3}
        bright = [source.read(i).mean(axis=2)[:: size - 1, :: size - 1].argmax() for i in range(count)]
        # The bright corner says the label: rows and columns are not exchanged, labels not shifted.
        labelled = source.labels >= 0
        np.testing.assert_array_equal(np.array(bright)[labelled], source.labels[labelled])
    fingerprint = source.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == open_source(data).fingerprint()
    held = find_eval_source(str(data))
    assert (None if held is None else len(held)) == judged
    if held is not None:
        assert held.kind == source.kind
        assert held.fingerprint() != fingerprint
        assert set(held.labels.tolist()) == {0, 1, 2, 3}
    if name not in LOSSY and name not in {"stl-10", "idx", "idx gz", "class folders"} and count == 24:
        np.testing.assert_array_equal(first, files.pictures()[0][0])


@pytest.mark.parametrize("name", KINDS)
def test_each_source_gives_batches_that_do_not_depend_on_threads(tmp_path, files, name):
    needs(name)
    data = files.WRITERS[name](tmp_path)
    batches = [
        list(Loader(data, batch_size=7, augment=Augment.cifar(24), threads=threads, seed=3).epoch(1))
        for threads in (1, 3)
    ]
    seen = np.concatenate([batch.index.numpy() for batch in batches[0]])
    assert sorted(seen.tolist()) == list(range(KINDS[name][1]))
    for one, other in zip(*batches, strict=True):
        assert (one.images == other.images).all()


TRAINED = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
TINY = {"epochs": 1, "batch_size": 8, "clusters": 3, "heads": 1, "projection": 8, "threads": 1}


@pytest.mark.parametrize("name", TRAINED)
def test_the_command_line_trains_on_each_source(tmp_path, files, name, capsys):
    needs(name)
    data = files.WRITERS[name](tmp_path)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    assert cli.run(["train", "--data", str(data), "--out", str(tmp_path / "run"), "--image-size=24", *options]) == 0
    labels = np.load(tmp_path / "run" / "labels.npz")["labels"]
    assert labels.shape == (1, KINDS[name][1])
    assert set(labels.ravel()) <= {0, 1, 2}
    end = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert end["event"] == "end"
    assert ('"nmi":' in json.dumps(end)) == (name not in UNLABELLED)


@pytest.mark.slow
def test_train_takes_objects_too(tmp_path, files):
    images, labels = files.pictures()
    names, _ = files.write_images(tmp_path / "x")
    for i, data in enumerate([images, images[..., 0], [tmp_path / "x" / name for name in names]]):
        result = sela_ext.train(data, out=tmp_path / str(i), labels=labels, progress=False, image_size=24, **TINY)
        assert result.labels.shape == (1, 24)
