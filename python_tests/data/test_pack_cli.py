import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sela_ext.cli import main
from sela_ext.data import open_source


def sela(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (60 + i, 200, 3), dtype=np.uint8)
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "ab"[i % 2] / f"{i:02d}.jpg")
    return root


def test_pack_and_verify(capsys, tmp_path, photos):
    out = tmp_path / "pack"
    status, printed, err = sela(capsys, "pack", photos, "--out", out, "--shard-bytes", "40K", "--threads", 2)
    assert (status, err) == (0, "")
    assert printed.startswith(f"{out}: 12 images (12 JPEG) in ")
    assert printed.count("\n") == 1
    assert len(list(out.glob("shard-*.sela"))) > 2
    assert open_source(out).names == open_source(photos).names
    status, printed, err = sela(capsys, "pack", "--verify", out)
    assert (status, err) == (0, "")
    assert "all checksums match" in printed


def test_damage_is_one_line_and_status_3(capsys, tmp_path, photos):
    sela(capsys, "pack", photos, "--out", tmp_path / "pack")
    shard = tmp_path / "pack" / "shard-00000.sela"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    status, printed, err = sela(capsys, "pack", "--verify", tmp_path / "pack")
    assert (status, printed) == (3, "")
    assert "shard-00000.sela: image 0 does not match its checksum" in err
    assert err.count("\n") == 1


def test_options_reach_the_packing(capsys, tmp_path, photos):
    (photos / "a" / "zz.jpg").write_bytes(b"")
    status, _, err = sela(capsys, "pack", photos, "--out", tmp_path / "pack")
    assert status == 3
    assert "zz.jpg: empty file" in err
    options = ["--on-bad-image", "skip", "--max-bad-fraction", 0.1, "--max-side", 50, "--quality", 40, "--no-progress"]
    status, printed, _ = sela(capsys, "pack", photos, "--out", tmp_path / "pack", *options)
    assert status == 0
    assert "1 skipped" in printed
    assert open_source(tmp_path / "pack").read(0).shape == (15, 50, 3)
    np.save(tmp_path / "labels.npy", np.arange(1797) % 7)
    status, _, err = sela(capsys, "pack", "digits", "--out", tmp_path / "pack", "--labels", tmp_path / "labels.npy")
    assert status == 2
    assert "use overwrite" in err
    more = ["--labels", tmp_path / "labels.npy", "--overwrite", "--raw", "no"]
    status, printed, _ = sela(capsys, "pack", "digits", "--out", tmp_path / "pack", *more)
    assert "(1,797 PNG)" in printed
    assert open_source(tmp_path / "pack").labels.tolist() == (np.arange(1797) % 7).tolist()
    status, _, err = sela(capsys, "pack", "digits", "--out", tmp_path / "pack", *more[:2], "--no-resume", "--raw", "no")
    assert status == 2
    assert "use resume or overwrite" in err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["pack"], 2, "expected DATA and --out, or --verify PACK"),
        (["pack", "digits"], 2, "expected DATA and --out"),
        (["pack", "digits", "--out", "x", "--quallity", "5"], 2, "did you mean --quality?"),
        (["pack", "digits", "--out", "x", "--quality", "0"], 2, "quality: expected a whole number 1..100"),
        (["pack", "digits", "--out", "x", "--raw", "perhaps"], 2, "--raw"),
        (["pack", "digits", "--out", "x", "--shard-bytes", "big"], 2, "expected a number of bytes such as"),
        (["pack", "digits", "--out", "x", "--threads", "0"], 2, "threads: expected a whole number >= 1"),
        (["pack", "", "--out", "x"], 3, "found an empty path"),
        (["pack", "absent", "--out", "x"], 3, "absent: no such file or folder"),
        (["pack", "--verify", "absent"], 3, "expected the folder of a pack"),
        (["pack", "digits", "--verify", "absent"], 2, "expected nothing but a pack"),
    ],
)
def test_mistakes_are_one_line_with_their_exit_status(capsys, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = sela(capsys, *arguments)
    assert code == status
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option_of_the_function(capsys):
    import inspect

    from sela_ext.data import pack

    status, out, _ = sela(capsys, "pack", "--help")
    assert status == 0
    for name in inspect.signature(pack).parameters:
        assert name == "data" or "--" + name.replace("_", "-") in out


def test_training_on_the_pack_gives_the_labels_of_training_on_the_files(capsys, tmp_path, photos):
    sela(capsys, "pack", photos, "--out", tmp_path / "pack")
    options = ["--epochs=1", "--batch-size=4", "--clusters=3", "--heads=1", "--projection=8", "--threads=1"]
    labels = []
    for data in (photos, tmp_path / "pack"):
        run = tmp_path / f"run-{data.name}"
        status, _, err = sela(capsys, "train", "--data", data, "--out", run, "--image-size=24", *options)
        assert (status, err) == (0, "")
        with np.load(run / "labels.npz") as saved:
            labels.append((saved["labels"].tolist(), saved["confidence"].tolist(), saved["names"].tolist()))
    assert labels[0] == labels[1]


def test_a_terminal_shows_a_bar(tmp_path, photos):
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "sela_ext", "pack", str(photos), "--out", str(tmp_path / "pack")],
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        cwd=tmp_path,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(master)
    out, _ = child.communicate()
    assert child.returncode == 0
    assert b"packing" in shown
    assert b"12/12" in shown
    assert out.startswith(str(tmp_path / "pack").encode())


def test_an_interrupt_ends_it_with_130_and_the_same_command_goes_on(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (300, 500, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png", compress_level=1)
    for i in range(4, 240):
        os.link(root / f"{i % 4}.png", root / f"{i}.png")
    arguments = ["pack", str(root), "--out", str(tmp_path / "pack"), "--shard-bytes", "1M", "--threads", "1"]
    command = [sys.executable, "-P", "-m", "sela_ext", *arguments]
    interrupted = """
import os, signal, sys
replace = os.replace
def then_interrupt(source, target, **more):
    replace(source, target, **more)
    if os.fspath(target).endswith("shard-00001.sela"):
        os.kill(os.getpid(), signal.SIGINT)
os.replace = then_interrupt
from sela_ext.cli import main
main(sys.argv[1:])
"""
    child = subprocess.run([sys.executable, "-P", "-c", interrupted, *arguments], cwd=tmp_path, capture_output=True)
    assert (child.returncode, child.stdout, child.stderr) == (130, b"", b"")
    left = sorted(path.name for path in (tmp_path / "pack").iterdir())
    assert "pack.json" not in left
    assert not any(name.endswith(".partial") for name in left)
    times = {name: (tmp_path / "pack" / name).stat().st_mtime_ns for name in left if name.startswith("shard-")}
    assert len(times) >= 2
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert b"240 images (240 PNG)" in done.stdout
    assert {name: (tmp_path / "pack" / name).stat().st_mtime_ns for name in times} == times
