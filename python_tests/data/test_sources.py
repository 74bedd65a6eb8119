"""Every source: recognised, read as it was written, and trained on."""

import importlib.util
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import sela_ext
from sela_ext import cli
from sela_ext.data import Loader, find_eval_source, open_source
from sela_ext.data.dataset import DatasetSource
from sela_ext.data.decode import decode_image
from sela_ext.errors import DataError, OptionError
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


def png_modes(files):
    """{name: PNG or other file} of one picture in every mode."""
    colour = Image.fromarray(files.pictures(1)[0][0])
    grey = colour.convert("L")
    alpha = Image.fromarray(np.linspace(0, 255, 1024).reshape(32, 32).astype(np.uint8))
    modes = {"1": grey.convert("1"), "L": grey, "RGB": colour, "P": colour.quantize(31), "CMYK": colour.convert("CMYK")}
    modes |= {"I;16": Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 99)}
    for name, image in (("LA", grey.convert("LA")), ("RGBA", colour.convert("RGBA"))):
        image.putalpha(alpha)
        modes[name] = image
    encoded = {}
    for name, image in modes.items():
        for kind in ("PNG", "TIFF", "WEBP", "GIF", "BMP", "JPEG"):
            file = io.BytesIO()
            try:
                image.save(file, kind)
            except (OSError, ValueError, KeyError):
                continue  # this format does not know the mode
            encoded[f"{name.replace(';', '')}.{kind.lower()}"] = file.getvalue()
    file = io.BytesIO()
    modes["P"].save(file, "PNG", transparency=5)
    encoded["clear.png"] = file.getvalue()
    return encoded


class Opened(torch.utils.data.Dataset):
    """Pillow's images, as a torchvision data set gives them."""

    def __init__(self, images):
        self.images = [Image.open(io.BytesIO(data)) for data in images]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_d4_every_kind_of_image_is_converted_alike_on_every_path(tmp_path, files):
    encoded = png_modes(files)
    assert len(encoded) > 20
    names = sorted(encoded)
    expected = [decode_image(encoded[name], name) for name in names]
    files.write_files(tmp_path / "folder", encoded)
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(f"folder/{name}" for name in names))
    (tmp_path / "a.tar").write_bytes(files.tar_bytes({name: encoded[name] for name in names}))
    ways = [tmp_path / "folder", tmp_path / "list.csv", tmp_path / "a.tar", [tmp_path / "folder" / n for n in names]]
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"image": [encoded[name] for name in names]}), tmp_path / "a.parquet")
        ways.append(tmp_path / "a.parquet")
    whole = Augment.none(32)
    for way in ways:
        source = open_source(way)
        (batch,) = Loader(source, augment=whole, shuffle=False, dtype=torch.uint8).epoch(0)
        for i, name in enumerate(names):
            np.testing.assert_array_equal(source.read(i), expected[i], err_msg=name)
            np.testing.assert_array_equal(batch.images[i].permute(1, 2, 0).numpy(), expected[i], err_msg=name)
    source = DatasetSource(Opened(encoded[name] for name in names[::-1]))
    for i, name in enumerate(names[::-1]):
        np.testing.assert_array_equal(source.read(i), expected[-1 - i], err_msg=name)


def test_d3_archives_and_tables_turn_images_as_folders_do(tmp_path, files):
    image = Image.fromarray(files.pictures(1)[0][0])
    turned = {}
    for orientation in range(1, 9):
        # What a camera stores when it is held in this way: the inverse of what exif_transpose does.
        back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
        stored = image if back is None else image.transpose(Image.Transpose(back))
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        stored.save(file, "PNG", exif=exif)
        turned[f"{orientation}.png"] = file.getvalue()
    files.write_files(tmp_path / "folder", turned)
    (tmp_path / "list.txt").write_text("\n".join(f"folder/{name}" for name in turned))
    (tmp_path / "a.tar").write_bytes(files.tar_bytes(turned))
    for way in ("folder", "list.txt", "a.tar"):
        options = {"augment": Augment.none(32), "shuffle": False, "dtype": torch.uint8}
        (upright,) = Loader(tmp_path / way, exif=True, **options).epoch(0)
        for found in upright.images:
            np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), np.asarray(image))
        (stored,) = Loader(tmp_path / way, **options).epoch(0)
        assert len({found.numpy().tobytes() for found in stored.images}) == 8


@pytest.mark.parametrize("exact", [False, True])
def test_the_same_jpeg_files_give_the_same_bits_from_every_source(tmp_path, files, exact):
    images, _ = files.pictures(9, 150)
    encoded = {f"{i}.jpg": files.encode(image, "JPEG", quality=90) for i, image in enumerate(images)}
    encoded["8.jpg"] = files.encode(images[8], "JPEG", progressive=True)  # one for Pillow
    files.write_files(tmp_path / "folder", encoded)
    (tmp_path / "list.csv").write_text("file\n" + "\n".join(f"folder/{name}" for name in encoded))
    (tmp_path / "a.tar").write_bytes(files.tar_bytes(encoded))
    ways = ["folder", "list.csv", "a.tar"]
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"image": list(encoded.values())}), tmp_path / "a.parquet")
        ways.append("a.parquet")
    for epoch in (0, 1):
        found = []
        for way in ways:
            options = {"batch_size": 4, "augment": Augment.sela(64), "seed": 5, "exact": exact}
            found.append([batch.images for batch in Loader(tmp_path / way, **options).epoch(epoch)])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


BINARY = {
    "idx": "train-images-idx3-ubyte",
    "cifar-10 python": "data_batch_1",
    "cifar-10 archive": "",
    "svhn": "train_32x32.mat",
    "npz": "",
    "npy": "",
    "tar": "",
    "csv": "",
    "txt": "",
    "parquet": "",
}


@pytest.mark.parametrize("name", BINARY)
def test_changed_bytes_give_images_or_a_named_error(tmp_path, files, name):
    needs(name)
    path = files.WRITERS[name](tmp_path)
    path = path / BINARY[name] if BINARY[name] else path
    whole = path.read_bytes()
    rng = np.random.default_rng(7)
    refused = []
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 5)):
            at = int(rng.integers(min(len(data), 400) if rng.random() < 0.7 else len(data)))
            data[at : at + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3)))
        path.write_bytes(data)
        try:
            source = open_source(path)
            source.read(len(source) - 1)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert not any("\n" in text for text in refused)


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


def test_d7_too_few_images_are_an_error_that_says_how_many(tmp_path, files):
    tiny = {**TINY, "progress": False, "image_size": 24}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: expected JPEG.*found none"):
        sela_ext.train(tmp_path / "empty", out=tmp_path / "a", **tiny)
    images, _ = files.pictures(5)
    with pytest.raises(DataError, match="expected at least 2 images, found 1"):
        sela_ext.train(images[:1], out=tmp_path / "b", **tiny)
    with pytest.raises(OptionError, match="clusters: expected at most the number of images, 5, found 6"):
        sela_ext.train(images, out=tmp_path / "c", **{**tiny, "clusters": 6})
    # A batch may be larger than the data: it then holds all of them.
    assert sela_ext.train(images, out=tmp_path / "d", **{**tiny, "batch_size": 64}).labels.shape == (1, 5)


@pytest.mark.slow
def test_train_takes_objects_too(tmp_path, files):
    images, labels = files.pictures()
    names, _ = files.write_images(tmp_path / "x")
    for i, data in enumerate([images, images[..., 0], [tmp_path / "x" / name for name in names]]):
        result = sela_ext.train(data, out=tmp_path / str(i), labels=labels, progress=False, image_size=24, **TINY)
        assert result.labels.shape == (1, 24)
