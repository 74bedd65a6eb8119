import os
import shutil
from collections import namedtuple

import pytest
import torch

from sela_ext.errors import CheckpointError, ResourceError
from sela_ext.training.checkpoint import load_checkpoint, save_checkpoint


def state(step):
    return {"step": step, "weights": torch.arange(1000.0) + step, "nested": {"names": ["a", "b"], "none": None}}


def test_what_was_saved_comes_back(tmp_path):
    save_checkpoint(tmp_path, 7, state(7))
    loaded = load_checkpoint(tmp_path)
    assert loaded["step"] == 7
    assert loaded["nested"] == {"names": ["a", "b"], "none": None}
    assert torch.equal(loaded["weights"], torch.arange(1000.0) + 7)


def test_a_folder_without_checkpoints_holds_none(tmp_path):
    assert load_checkpoint(tmp_path / "absent") is None


def test_the_last_two_are_kept_and_the_newest_step_is_used(tmp_path):
    for step in (5, 30, 100):
        save_checkpoint(tmp_path, step, state(step))
    os.utime(tmp_path / "step-000000000030.ckpt")  # a younger clock does not make it newer
    assert len(list(tmp_path.iterdir())) == 2
    assert load_checkpoint(tmp_path)["step"] == 100


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    path.write_bytes(b"PK\x03\x04" * 100)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, foreign])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    save_checkpoint(tmp_path, 1, state(1))
    damage(save_checkpoint(tmp_path, 2, state(2)))
    with pytest.warns(UserWarning, match=r"step-000000000002.*step-000000000001"):
        assert load_checkpoint(tmp_path)["step"] == 1


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    truncate(save_checkpoint(tmp_path, 1, state(1)))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints can be read"):
        load_checkpoint(tmp_path)


def test_stale_temporaries_are_removed(tmp_path):
    save_checkpoint(tmp_path, 1, state(1))
    (tmp_path / "step-000000000002.ckpt.partial").write_bytes(b"half")
    assert load_checkpoint(tmp_path)["step"] == 1
    assert not list(tmp_path.glob("*.partial"))


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_code_in_a_checkpoint_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path, 1, {"weights": Evil()})
    with pytest.raises(CheckpointError, match="expected tensors and plain values"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_is_one_error_and_spares_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, state(1))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(ResourceError, match="free bytes, found 0"):
        save_checkpoint(tmp_path, 2, state(2))
    assert load_checkpoint(tmp_path)["step"] == 1


def test_a_write_that_fails_midway_spares_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, state(1))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"step-000000000002.*No space left"):
        save_checkpoint(tmp_path, 2, state(2))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000001.ckpt"]


def test_a_damaged_later_checkpoint_goes_when_the_run_goes_on(tmp_path):
    save_checkpoint(tmp_path, 50, state(50))
    truncate(save_checkpoint(tmp_path, 100, state(100)))
    save_checkpoint(tmp_path, 60, state(60))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000050.ckpt", "step-000000000060.ckpt"]
    assert load_checkpoint(tmp_path)["step"] == 60
