import os
import stat

import numpy as np
import pytest

import sela_ext
from sela_ext.cli import main
from sela_ext.errors import OptionError, ResourceError
from sela_ext.export import destination
from sela_ext.export.destination import new_file, write_bytes


def sela(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(one) for one in arguments])
    shown = capsys.readouterr()
    return caught.value.code, shown.out, shown.err


def test_a_file_that_is_there_stays_unless_overwrite_is_said(digits_run, tmp_path):
    file = tmp_path / "backbone.pth"
    file.write_text("mine")
    with pytest.raises(OptionError, match=r"expected no file yet, found .*overwrite to replace it"):
        sela_ext.export(digits_run, file)
    assert file.read_text() == "mine"
    sela_ext.export(digits_run, file, overwrite=True)
    assert file.stat().st_size > 1000
    assert [entry.name for entry in tmp_path.iterdir()] == ["backbone.pth"]


def test_the_second_file_of_a_table_stays_too(digits_run, tmp_path):
    (tmp_path / "labels.sizes.csv").write_text("mine")
    with pytest.raises(OptionError, match=r"labels\.sizes\.csv"):
        sela_ext.export(digits_run, tmp_path / "labels.csv", "csv")
    assert [entry.name for entry in tmp_path.iterdir()] == ["labels.sizes.csv"]


def test_a_runs_own_files_are_not_replaced(digits_run):
    before = (digits_run / "labels.csv").read_bytes()
    with pytest.raises(OptionError, match="which belongs to a run"):
        sela_ext.export(digits_run, digits_run / "labels.csv", "csv", overwrite=True)
    assert (digits_run / "labels.csv").read_bytes() == before


def test_a_file_that_comes_meanwhile_stays(tmp_path):
    file = tmp_path / "late"

    def write():
        with new_file(file, overwrite=False) as partial:
            partial.write_text("ours")
            file.write_text("theirs")

    with pytest.raises(OptionError, match="expected no file yet"):
        write()
    assert file.read_text() == "theirs"
    assert [entry.name for entry in tmp_path.iterdir()] == ["late"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "old"
    file.write_text("old")

    def fail(error):
        with new_file(file, overwrite=True) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(ResourceError, match="make room"):
        fail(OSError(28, "No space left on device"))
    with pytest.raises(KeyError):
        fail(KeyError("other"))
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]

    def no_links(*given):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(destination.os, "link", no_links)
    write_bytes(tmp_path / "new", b"new", overwrite=False)
    assert (tmp_path / "new").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 2


def test_files_have_the_usual_permissions(tmp_path):
    write_bytes(tmp_path / "file", b"", overwrite=False)
    (tmp_path / "usual").touch()
    found, usual = (stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("file", "usual"))
    assert found == usual


@pytest.mark.parametrize(
    ("out", "format", "words"),
    [
        ("x.onnx", "torchvision", "say format onnx"),
        ("x.pth", "csv", r"expected a file of format csv \(\.csv\)"),
        ("x.pth", "tensorflow", "format: expected torchvision, safetensors"),
        ("absent/x.pth", "torchvision", "create .*absent first"),
        (".", "torchvision", "found the folder"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(digits_run, tmp_path, out, format, words):
    with pytest.raises(OptionError, match=words):
        sela_ext.export(digits_run, tmp_path / out, format)
    assert not list(tmp_path.iterdir())


def test_the_command_tells_the_format_by_the_suffix(capsys, digits_run, tmp_path):
    code, out, _ = sela(capsys, "export", digits_run, "--out", tmp_path / "labels.csv", "--head", "1")
    assert code == 0
    assert out.splitlines()[-1] == f"csv  {tmp_path / 'labels.csv'}"
    assert "head 1: 7 of 7 clusters used" in out
    code, _, err = sela(capsys, "export", digits_run, "--out", tmp_path / "labels")
    assert code == 2
    assert "--format: expected torchvision" in err
    code, _, err = sela(capsys, "export", digits_run, "--out", tmp_path / "labels.csv")
    assert code == 2
    assert err.count("\n") == 1
    code, _, err = sela(capsys, "export", tmp_path / "absent", "--out", tmp_path / "x.pth")
    assert code == 4
    code, out, _ = sela(capsys, "export", digits_run, "--out", tmp_path / "any", "--format", "npy", "--threads", "1")
    assert code == 0
    assert "1,797 rows of 128 numbers" in out


@pytest.mark.parametrize(
    ("format", "given"),
    [
        ("csv", {"embeddings": True}),
        ("npy", {"embeddings": np.zeros((1797, 2), np.float32)}),
        ("csv", {"images": True}),
        ("parquet", {"link": "hard"}),
        ("safetensors", {"opset": 20}),
        ("npy", {"head": 0}),
        ("onnx", {"data": "digits"}),
        ("torchvision", {"data": "digits"}),
    ],
)
def test_an_option_that_a_format_makes_no_use_of_is_refused(digits_run, tmp_path, format, given):
    (name,) = given
    with pytest.raises(OptionError, match=rf"{name}: expected format .* with it, found {format}; leave {name} out"):
        sela_ext.export(digits_run, tmp_path / "out", format, **given)
    assert not list(tmp_path.iterdir())
