import re
import shlex
from pathlib import Path

import pytest

from sela_ext.cli import main

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = {}
    for kind, block in re.findall(r"```(python|console)\n(.*?)```", TEXT, re.DOTALL):
        if kind == "python":
            exec(block, known)
            continue
        Path("labels.csv").unlink()
        Path("labels.sizes.csv").unlink()
        for line in block.splitlines():
            with pytest.raises(SystemExit) as caught:
                main([*shlex.split(line)[1:], "--threads", "1"])
            assert caught.value.code == 0, line
    assert "head 1: 7 of 7 clusters used" in capsys.readouterr().out
    assert Path("runs/second/labels.csv").exists()
    assert Path("resnet18.pth").exists()
