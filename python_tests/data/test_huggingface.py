import importlib
import importlib.util
import json
import sys

import numpy as np
import pytest
from PIL import Image

import sela_ext
from sela_ext.data import find_eval_source, huggingface, open_source
from sela_ext.errors import DataError

needs_arrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed: pip install 'sela_ext[huggingface]'"
)


@pytest.fixture(scope="module")
def datasets():
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed: pip install 'sela_ext[huggingface]'")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("datasets")
    module.disable_progress_bars()
    return module


@pytest.fixture
def made(datasets, files):
    """A Dataset of 24 pictures, labelled a, b, c, d."""
    images, labels = files.pictures()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))})
    column = [{"bytes": files.encode(image), "path": f"deep/{i}.png"} for i, image in enumerate(images)]
    return datasets.Dataset.from_dict({"img": column, "label": labels.tolist()}, features=features)


def test_a_dataset_is_read_as_encoded_bytes(made, files):
    images, labels = files.pictures()
    source = open_source(made)
    assert (source.kind, len(source), source.encoded) == ("huggingface", 24, True)
    assert source.class_names == list("abcd")
    np.testing.assert_array_equal(source.labels, labels)
    for i in (0, 7, 23):
        found = source.locate(i)
        assert isinstance(found.data, memoryview)
        assert found.data.readonly
        assert bytes(found.data) == files.encode(images[i])
        np.testing.assert_array_equal(source.read(i), images[i])
        np.testing.assert_array_equal(source.read(i), np.asarray(made[i]["img"]))
    assert source.names[7] == source.name(7) == "000007/7.png"


def test_rows_that_were_selected_shuffled_or_joined_are_followed(datasets, made, files):
    images, _ = files.pictures()
    shuffled = made.shuffle(seed=1)
    wanted = [np.asarray(row["img"]) for row in shuffled]
    for data, pixels in (
        (shuffled, wanted),
        (shuffled.select([3, 5, 4]), [wanted[i] for i in (3, 5, 4)]),
        (made.select(range(5, 11)), list(images[5:11])),
        (made.select([20, 2]), [images[20], images[2]]),
        (datasets.concatenate_datasets([made.select(range(4, 8)), made]), [*images[4:8], *images]),
    ):
        source = open_source(data)
        assert len(source) == len(pixels)
        for i, picture in enumerate(pixels):
            np.testing.assert_array_equal(source.read(i), picture)
        assert source.labels.tolist() == list(data["label"])


def test_a_dict_of_splits_gives_train_and_test(datasets, made):
    data = datasets.DatasetDict({"train": made.select(range(20)), "validation": made.select(range(20, 24))})
    assert len(open_source(data)) == 20
    assert len(find_eval_source(data)) == 4
    assert find_eval_source(datasets.DatasetDict({"train": made})) is None
    assert find_eval_source(made) is None
    assert len(open_source(datasets.DatasetDict({"only": made}))) == 24
    with pytest.raises(DataError, match='expected a split "train", found a, b'):
        open_source(datasets.DatasetDict({"a": made, "b": made}))


def test_images_that_are_files_are_opened_by_their_paths(datasets, files, tmp_path):
    names, _ = files.write_images(tmp_path, 5)
    data = datasets.Dataset.from_dict({"image": [str(tmp_path / name) for name in names]})
    source = open_source(data.cast_column("image", datasets.Image()))
    assert source.locate(2).path == str(tmp_path / names[2])
    np.testing.assert_array_equal(source.read(2), files.pictures(5)[0][2])
    assert source.labels is None


def test_what_was_saved_to_disk_is_memory_mapped(datasets, made, files, tmp_path):
    made.save_to_disk(tmp_path / "one", num_shards=3)
    source = open_source(tmp_path / "one")
    np.testing.assert_array_equal(source.read(23), files.pictures()[0][23])
    assert source.class_names == list("abcd")
    assert find_eval_source(tmp_path / "one") is None
    datasets.DatasetDict({"train": made, "test": made.select(range(4))}).save_to_disk(tmp_path / "both")
    assert len(open_source(str(tmp_path / "both"))) == 24
    assert len(find_eval_source(str(tmp_path / "both"))) == 4


def test_files_named_in_the_state_must_lie_in_the_folder(made, tmp_path):
    made.save_to_disk(tmp_path / "x")
    state = json.loads((tmp_path / "x" / "state.json").read_text())
    for name in ("../x.arrow", "/etc/passwd", "absent.arrow", 3):
        (tmp_path / "x" / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match="expected files of this folder"):
            open_source(tmp_path / "x")
    (tmp_path / "x" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="expected the state of a saved data set"):
        open_source(tmp_path / "x")


@pytest.mark.slow
def test_a_dataset_trains(made, tmp_path):
    result = sela_ext.train(
        made, out=tmp_path / "run", epochs=1, batch_size=8, clusters=3, heads=1, projection=8, image_size=24,
        threads=1, progress=False,
    )  # fmt: skip
    assert result.labels.shape == (1, 24)


def test_several_image_columns_need_a_choice(datasets, made, files):
    both = made.add_column("other", [None] * 24)
    assert len(open_source(both)) == 24
    features = datasets.Features({"left": datasets.Image(), "right": datasets.Image()})
    column = [{"bytes": files.encode(files.pictures(1)[0][0]), "path": None}]
    data = datasets.Dataset.from_dict({"left": column, "right": column}, features=features)
    with pytest.raises(DataError, match="expected one image column, found left, right; take the others out"):
        open_source(data)
    assert len(open_source(data.rename_column("left", "image"))) == 1
    with pytest.raises(DataError, match="expected a column of type Image, found the columns label"):
        open_source(made.remove_columns("img"))
    with pytest.raises(DataError, match="at least one image"):
        open_source(made.select([]))


def test_an_image_without_bytes_or_path_is_named(datasets, made, files):
    features = datasets.Features({"image": datasets.Image()})
    column = [{"bytes": files.encode(files.pictures(1)[0][0]), "path": None}, None, {"bytes": b"text", "path": None}]
    source = open_source(datasets.Dataset.from_dict({"image": column}, features=features))
    assert source.names == ["000000", "000001", "000002"]
    assert source.read(0).shape == (32, 32, 3)
    with pytest.raises(DataError, match="row 1: expected the bytes of an image or a path, found neither"):
        source.read(1)
    with pytest.raises(DataError, match="row 2: not an image"):
        source.read(2)


@needs_arrow
def test_parquet_files_are_read(files, tmp_path):
    path = files.write_parquet(tmp_path / "train-00000-of-00001.parquet")
    source = open_source(path)
    images, labels = files.pictures()
    for i in range(24):
        np.testing.assert_array_equal(source.read(i), images[i])
    np.testing.assert_array_equal(source.labels, labels)
    assert source.class_names == list("abcd")
    files.write_parquet(tmp_path / "test-00000-of-00001.parquet", 5, seed=9)
    files.write_parquet(tmp_path / "train-00001-of-00001.parquet", 7, seed=8)
    assert len(open_source(tmp_path)) == 31
    judged = find_eval_source(tmp_path)
    np.testing.assert_array_equal(judged.read(4), files.pictures(5, seed=9)[0][4])


@needs_arrow
def test_plain_parquet_without_types_is_understood(files, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, _ = files.pictures(3)
    encoded = [files.encode(image) for image in images]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": encoded, "label": [4, None, 2]}), path)
    source = open_source(path)
    assert source.labels.tolist() == [4, -1, 2]
    np.testing.assert_array_equal(source.read(2), images[2])
    pq.write_table(pa.table({"image": encoded, "label": ["x", "y", "z"]}), path)
    assert open_source(path).labels is None
    for table, match in (
        ({"text": ["a"]}, "expected a column of type Image, found the columns text"),
        ({"image": pa.array([], pa.binary())}, "at least one image"),
        ({"image": encoded, "label": [1, 2, -7]}, "expected labels in 0"),
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(DataError, match=match):
            open_source(path)


@needs_arrow
def test_damaged_parquet_is_refused(files, tmp_path):
    path = files.write_parquet(tmp_path / "x.parquet", 3)
    data = path.read_bytes()
    for size in (4, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"x\.parquet: cannot be read"):
            open_source(path)
    path.write_bytes(b"PAR1" + bytes(1000) + b"\xff\xff\xff\x7fPAR1")
    with pytest.raises(DataError, match="cannot be read"):
        open_source(path)


@needs_arrow
def test_parquet_beyond_the_memory_is_refused(files, tmp_path, monkeypatch):
    path = files.write_parquet(tmp_path / "x.parquet")
    monkeypatch.setattr(huggingface, "free_memory", lambda: 1000)
    with pytest.raises(DataError, match="more than half of the free memory"):
        open_source(path)


@needs_arrow
def test_an_old_pyarrow_is_refused(files, tmp_path, monkeypatch):
    path = files.write_parquet(tmp_path / "x.parquet")
    monkeypatch.setattr("pyarrow.__version__", "13.0.0")
    with pytest.raises(
        DataError, match=r"expected pyarrow >= 14\.0\.1, which is safe on foreign files, found 13\.0\.0"
    ):
        open_source(path)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"expected pyarrow .*pip install 'sela_ext\[huggingface\]'"):
        open_source(tmp_path / "x.parquet")


def test_other_data_need_neither_library(tmp_path, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in set(files.WRITERS) - {"parquet"}:
        (tmp_path / name).mkdir()
        assert len(open_source(files.WRITERS[name](tmp_path / name))) > 0


def test_dictionaries_of_other_things_are_no_data():
    for data in ({}, {"train": 3}, {"train": Image.open}):
        with pytest.raises(DataError, match="found dict"):
            open_source(data)
