import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_of_the_page_run_and_give_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "embeddings.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    sizes, run, several = {}, {}, {}
    exec(blocks[0], sizes)  # the page's own code
    exec(blocks[1], run)
    exec(blocks[2], several)
    assert run["result"].labels.shape == (4, 1797)
    assert set(sizes["model"].cluster_sizes_.tolist()) == {179, 180}
    assert several["model"].n_clusters_ == 4


def test_the_table_is_what_the_recorded_rows_give():
    bench = ROOT / "bench" / "embeddings.py"
    found = subprocess.run([sys.executable, str(bench), "--check"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
