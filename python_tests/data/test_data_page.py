"""docs/data.md says what the readers do."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from sela_ext.data import decode, folder, open_source, table
from sela_ext.data.cifar import KINDS
from sela_ext.data.manifest import MANIFEST

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_example_gives_what_it_says():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    lines = [line.partition("#") for line in code.splitlines() if line.strip()]
    session = "".join(f">>> {left.rstrip()}\n" + (f"{right.strip()}\n" if right else "") for left, _, right in lines)
    test = doctest.DocTestParser().get_doctest(session, {}, "data.md", str(PAGE), 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.summarize(verbose=False) == (0, 4)


def listed(start, end, text=TEXT):
    return re.findall(r"[a-z_]+", re.search(f"{start}(.*?){end}", text, re.DOTALL)[1].replace(" or ", " "))


def test_the_columns_of_tables_are_those_of_the_reader():
    assert tuple(listed("Exactly one column is named ", ", at\nmost")) == table.PATH_COLUMNS
    assert tuple(listed(r"at\nmost one ", "; others are ignored")) == table.LABEL_COLUMNS
    note = " ".join(table.__doc__.split())
    assert tuple(listed("Exactly one of ", " holds the path", note)) == table.PATH_COLUMNS
    assert tuple(listed("at most one of ", " its true label", note)) == table.LABEL_COLUMNS


@pytest.mark.parametrize(
    "name",
    sorted({name for kind in KINDS for name in (kind.train[0], kind.meta)} - {"batches.meta", "batches.meta.txt"}),
)
def test_the_files_of_cifar_are_named(name):
    assert f"`{name}`" in TEXT


def test_limits_and_words_are_those_of_the_readers():
    assert f"{decode.MAX_PIXELS:,} pixels" in TEXT
    assert set(folder.EVAL_FOLDERS) >= {"test", "val", "validation"}
    assert all(suffix in TEXT for suffix in table.SUFFIXES)


def test_every_kind_of_source_is_listed(tmp_path, files):
    rows = re.search(r"\| `data` .*?\n\n", TEXT, re.DOTALL)[0]
    words = {
        "folder": "folder of image",
        "table": "`.csv`",
        "array": "`.npy`",
        "npz": "`.npz`",
        "idx": "IDX",
        "tar": "tar of images",
    }
    words |= {
        "cifar-10": "CIFAR-10",
        "cifar-100": "CIFAR-100",
        "stl-10": "STL-10",
        "svhn": "SVHN",
        "huggingface": "Hugging Face",
    }
    for name, write in files.WRITERS.items():
        if name != "parquet":
            (tmp_path / name).mkdir()
            assert words[open_source(write(tmp_path / name)).kind] in rows, name
    assert MANIFEST in rows


def test_functions_that_are_named_exist():
    for module, name in re.findall(r"`(sela_ext(?:\.\w+)*)\.(\w+)`", TEXT):
        assert hasattr(importlib.import_module(module), name), name
