import fcntl
import os
import subprocess
import sys

import numpy as np
import pytest

from sela_ext.data import open_source, pack, pack_folder, verify_pack
from sela_ext.errors import OptionError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
OTHERS = IMAGES[::-1].copy()
OPTIONS = {"shard_bytes": 400, "threads": 1}  # three shards


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def unfinished(tmp_path):
    """The first two shards of three."""
    pack(IMAGES, tmp_path / "pack", **OPTIONS)
    (tmp_path / "pack" / "pack.json").unlink()
    (tmp_path / "pack" / "shard-00002.sela").unlink()
    return tmp_path / "pack"


# Every call that changes the folder may be the last one. A child ends before its k-th; what it leaves is resumed by a
# child that ends before its j-th, and then by one that lives.
DRIVER = """
import os, shutil, sys
from pathlib import Path
import numpy as np
from sela_ext.data import pack

images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
root = Path(sys.argv[1])

def child(out, last=None):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    calls = 0

    def watched(call, real):
        def one(*given, **options):
            nonlocal calls
            if calls == last:
                os._exit(9)
            calls += 1
            return call(*given, **options) if real else None
        return one

    for name in ("open", "ftruncate", "pwrite", "replace", "unlink", "fsync"):
        setattr(os, name, watched(getattr(os, name), name != "fsync"))
    try:
        pack(images, out, shard_bytes=400, threads=1)
    except BaseException as error:
        print(f"{out.name}: {error}", flush=True)
        os._exit(1)
    os._exit(0)

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

assert child(root / "unbroken") == 0
unbroken = contents(root / "unbroken")
first = kills = 0
while child(root / f"{first}", first) == 9:
    for second in range(40):
        out = root / f"{first}-{second}"
        if (root / f"{first}").exists():
            shutil.copytree(root / f"{first}", out)
        killed = child(out, second) == 9
        kills += killed
        assert child(out) == 0, out.name
        assert contents(out) == unbroken, out.name
        shutil.rmtree(out)
        if not killed:
            break
    first += 1
print(first, kills)
"""


@pytest.mark.slow
def test_a_packing_killed_before_any_of_its_calls_and_again_when_resumed_goes_on(tmp_path):
    done = subprocess.run([sys.executable, "-P", "-c", DRIVER, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, kills = map(int, done.stdout.split())
    assert first > 15
    assert kills > 200


def test_a_resumed_packing_does_not_write_its_description_again(unfinished, monkeypatch):
    monkeypatch.setattr("sela_ext.data.shard_format.ShardWriter.add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(IMAGES, unfinished, **OPTIONS)
    written = (unfinished / "packing.json").stat()
    with pytest.raises(KeyboardInterrupt):
        pack(IMAGES, unfinished, **OPTIONS)
    assert (unfinished / "packing.json").stat().st_mtime_ns == written.st_mtime_ns


def interrupt(*given):
    raise KeyboardInterrupt


@pytest.mark.parametrize("left", [None, b"", b'{"version": 1, "opt', b"[" * 100_000, b"\xff\xfe"])
def test_shards_whose_description_was_lost_are_known_by_their_number(tmp_path, unfinished, left):
    if left is not None:
        (unfinished / "packing.json").write_bytes(left)
    kept = (unfinished / "shard-00000.sela").stat().st_ino
    with pytest.raises(OptionError, match=r"packing\.json is missing or damaged, and the shards are not those of"):
        pack(OTHERS, unfinished, **OPTIONS)
    pack(IMAGES, unfinished, **OPTIONS)
    pack(IMAGES, tmp_path / "unbroken", **OPTIONS)
    assert contents(unfinished) == contents(tmp_path / "unbroken")
    assert (unfinished / "shard-00000.sela").stat().st_ino == kept


def test_a_lock_on_a_description_that_its_owner_has_removed_does_not_count(tmp_path, monkeypatch):
    """Another process ends between our opening of the file and our lock on it, and a third one begins."""
    out = tmp_path / "pack"
    out.mkdir()
    (out / "packing.json").touch()
    locked = pack_folder._lock
    others = []

    def lock(handle, folder):
        if not others:
            (out / "packing.json").unlink()
            others.append(open(out / "packing.json", "w"))  # noqa: SIM115
            fcntl.flock(others[0], fcntl.LOCK_EX)
        locked(handle, folder)

    monkeypatch.setattr(pack_folder, "_lock", lock)
    with pytest.raises(OptionError, match="another process is packing"):
        pack(IMAGES, out, **OPTIONS)
    assert [path.name for path in out.iterdir()] == ["packing.json"]
    others[0].close()
    pack(IMAGES, out, **OPTIONS)


def test_a_pack_that_is_finished_while_we_wait_for_the_lock_is_not_packed_over(tmp_path, monkeypatch):
    out = tmp_path / "pack"
    hold = pack_folder._hold

    def finish_first(*given):
        monkeypatch.undo()
        pack(OTHERS, out, **OPTIONS)
        return hold(*given)

    monkeypatch.setattr(pack_folder, "_hold", finish_first)
    with pytest.raises(OptionError, match="holds a pack of other images"):
        pack(IMAGES, out, **OPTIONS)
    assert verify_pack(out).images == 20
    np.testing.assert_array_equal(open_source(out).read(0), OTHERS[0])
    assert not (out / "packing.json").exists()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_but_a_file_is_taken_for_the_description(tmp_path, kind):
    out, precious = tmp_path / "pack", tmp_path / "precious"
    out.mkdir()
    precious.write_text("do not lose me")
    path = out / "packing.json"
    if kind == "link":
        path.symlink_to(precious)
    else:
        os.mkfifo(path)
    with pytest.raises(OptionError, match=r"expected a file, found something else: .*packing\.json; remove it"):
        pack(IMAGES, out, **OPTIONS)
    assert precious.read_text() == "do not lose me"


@pytest.mark.parametrize(
    "name", ["packing.json", "shard-00000.sela", "shard-00007.sela", "shard-00000.sela.partial", "bad_images.csv"]
)
def test_a_folder_with_the_name_of_a_packs_file_is_foreign(tmp_path, name):
    out = tmp_path / "pack"
    (out / name).mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(OptionError, match="found 1 other files"):
            pack(IMAGES, out, overwrite=overwrite, **OPTIONS)
    assert [path.name for path in out.iterdir()] == [name]
