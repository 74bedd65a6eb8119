import io
import json

import numpy as np
import pytest
from PIL import Image

import sela_ext
from sela_ext.data import open_source
from sela_ext.errors import DataError

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


def test_parquet_holds_the_labels(digits_run, tmp_path):
    written = sela_ext.export(digits_run, tmp_path / "labels.parquet", "parquet")
    table = parquet.read_table(written.path)
    with np.load(digits_run / "labels.npz") as saved:
        assert table["name"].to_pylist() == [str(name) for name in saved["names"]]
        for head in range(3):
            assert np.array_equal(table[f"label_{head}"].to_numpy(), saved["labels"][head])
            assert np.array_equal(table[f"confidence_{head}"].to_numpy(), saved["confidence"][head])
    told = json.loads(table.schema.metadata[b"sela"])
    assert told["clusters"] == [10, 7, 10]
    assert [sum(sizes) for sizes in told["sizes"]] == [1797] * 3
    described = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(described) == table.column_names
    assert described["label_0"] == {"dtype": "int32", "_type": "Value"}


def test_parquet_holds_features_of_the_network_or_given_ones(digits_run, tmp_path):
    written = sela_ext.export(digits_run, tmp_path / "a.parquet", "parquet", head="best", embeddings=True, threads=1)
    column = parquet.read_table(written.path)["embedding"].combine_chunks()
    expected = sela_ext.embed(digits_run, "digits", threads=1)
    assert np.array_equal(column.flatten().to_numpy().reshape(1797, -1), expected)
    np.save(tmp_path / "given.npy", expected[:, :7].astype(np.float16))
    given = sela_ext.export(digits_run, tmp_path / "b.parquet", "parquet", embeddings=str(tmp_path / "given.npy"))
    column = parquet.read_table(given.path)["embedding"].combine_chunks()
    assert column.type.list_size == 7
    assert np.allclose(column.flatten().to_numpy().reshape(-1, 7), expected[:, :7], rtol=1e-2, atol=1e-2)
    for wrong in (expected[:5], np.zeros((1797, 2), np.int64), str(tmp_path / "absent.npy")):
        with pytest.raises(DataError, match="embeddings: "):
            sela_ext.export(digits_run, tmp_path / "c.parquet", "parquet", embeddings=wrong)
    assert not (tmp_path / "c.parquet").exists()


def test_features_are_written_as_an_array(digits_run, tmp_path):
    written = sela_ext.export(digits_run, tmp_path / "features.npy", "npy", threads=1)
    found = np.load(written.path)
    assert found.dtype == np.float32
    assert np.array_equal(found, sela_ext.embed(digits_run, "digits", threads=1))


def test_images_in_parquet_are_the_files_and_can_be_trained_on(files_run, odd_files, tmp_path):
    written = sela_ext.export(files_run, tmp_path / "all.parquet", "parquet", head="best", images=True)
    table = parquet.read_table(written.path)
    own = open_source(str(odd_files))
    assert [one["bytes"] for one in table["image"].to_pylist()] == [own.encoded_bytes(i) for i in range(len(own))]
    assert table["name"].to_pylist() == own.names
    again = open_source(str(written.path))
    assert len(again) == 20
    assert np.array_equal(again.read(3), own.read(3))


def test_pixels_in_parquet_are_png_files(digits_run, tmp_path):
    written = sela_ext.export(digits_run, tmp_path / "all.parquet", "parquet", images=True)
    first = parquet.read_table(written.path)["image"][1796].as_py()
    assert first["path"] == "digits/01796.png"
    pixels = np.asarray(Image.open(io.BytesIO(first["bytes"])))
    assert np.array_equal(pixels, open_source("digits").read(1796)[..., 0])
