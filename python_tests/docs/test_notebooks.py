"""The notebooks are executed from top to bottom: with less data, fewer epochs, and no other change."""

import ast
import re

import matplotlib
import pytest

NOTEBOOKS = {
    "docs/notebooks/digits.ipynb": {"epochs": 4, "out": "run"},
    "docs/notebooks/own_images.ipynb": {"folder": "my/photos", "out": "run", "clusters": 6, "budget": "3s"},
}


def code_of(cell):
    return "".join(cell["source"])


def parameters_of(cells):
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(code_of(cell)).body}


def execute(cells, parameters):
    """Runs the code cells as Jupyter would; the last expression of each is shown."""
    known = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        tree = ast.parse(code_of(cell), f"cell {number}")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), known)
        if "parameters" in cell["metadata"].get("tags", []):
            known.update(parameters)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), known))
    return known, shown


@pytest.fixture
def pictures(monkeypatch):
    """Counts the figures that are shown."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = []
    monkeypatch.setattr(plt, "show", lambda: (count.append(len(plt.gcf().axes)), plt.close("all")))
    return count


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(stand_ins, read_notebook, pictures, name):
    cells = read_notebook(name)["cells"]
    assert set(NOTEBOOKS[name]) <= set(parameters_of(cells))
    known, shown = execute(cells, NOTEBOOKS[name])
    assert pictures
    assert all(pictures)
    assert len(shown) >= 4
    assert known["result"].report.exists()
    if "digits" in name:
        assert known["result"].metrics["nmi"] > 0.3
        assert shown[-1] == 1.0  # predict gives the labels of the run
    else:
        assert (stand_ins / "run/sorted").is_dir()
        assert known["sizes"].sum() == 48


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_hold_no_outputs_and_no_magic(read_notebook, name):
    notebook = read_notebook(name)
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            assert not re.search(r"^\s*[%!]", code_of(cell), re.MULTILINE)


def test_every_notebook_is_executed(documents):
    root, _ = documents
    assert sorted(NOTEBOOKS) == sorted(path.relative_to(root).as_posix() for path in root.rglob("docs/**/*.ipynb"))
