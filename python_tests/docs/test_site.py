"""The pages know everything that they are to know: public names, warnings, one another."""

import ast
import re

import pytest

import sela_ext
from sela_ext import kernels


def text_of(root, name):
    return (root / name).read_text(encoding="utf-8")


def nav_of(root):
    return re.findall(r"^\s+- (\S+\.md)$", text_of(root, "mkdocs.yml"), re.MULTILINE)


def test_every_public_name_is_on_the_page_of_the_interface(documents):
    root, _ = documents
    entry = r"^::: (\S+)\n    options:\n      heading: sela_ext\.(\w+)$"
    found = re.findall(entry, text_of(root, "docs/api.md"), re.MULTILINE)
    names = [name for name in sela_ext.__all__ if not name.startswith("__")]
    assert sorted(name for _, name in found) == sorted(names)
    for path, name in found:
        value = getattr(sela_ext, name)
        assert path == f"{value.__module__}.{value.__qualname__}"


def test_every_public_kernel_is_on_the_page_of_the_parts(documents):
    root, _ = documents
    entry = r"^::: (\S+)\n    options:\n(?:      filters: .*\n)?(?:      members: \[(.*)\]\n)?"
    pages = text_of(root, "docs/api.md") + text_of(root, "docs/api_parts.md")
    found = {path: members.split(", ") if members else None for path, members in re.findall(entry, pages, re.MULTILINE)}
    missing = []
    for name in kernels.__all__:
        value = getattr(kernels, name)
        if not callable(value) or f"{value.__module__}.{name}" in found:
            continue
        members = found.get(value.__module__, [])
        if members is not None and name not in members:
            missing.append(f"{value.__module__}.{name}")
    assert missing == []


def test_every_page_has_its_place(documents):
    root, _ = documents
    pages = {path.relative_to(root / "docs").as_posix() for path in (root / "docs").rglob("*.md")}
    made = {"options.md"} | {f"notebooks/{path.stem}.md" for path in (root / "docs/notebooks").glob("*.ipynb")}
    assert sorted(nav_of(root)) == sorted(pages | made)


def test_links_between_pages_lead_somewhere(documents):
    root, _ = documents
    made = {"options.md"}
    dead = []
    for page in sorted((root / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", target) or target in made:
                continue
            if not (page.parent / target).exists():
                dead.append(f"{page.name}: {target}")
    assert dead == []


def messages_of(source):
    """First words, up to the colon, of every warning in the table of symptoms."""
    nodes = list(ast.walk(ast.parse(source)))
    constants = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    docstrings = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, ast.FunctionDef)]
    texts = [text for text in constants if re.match(r"[a-zA-Z ]+: ", text)]
    return {text.split(":")[0] for text in texts if not any(text in words for words in docstrings)}


def test_every_warning_of_a_run_is_a_question(documents):
    root, _ = documents
    found = messages_of(text_of(root, "sela_ext/training/symptoms.py"))
    assert {"collapsed", "K too large", "labels frozen", "solver not converged"} <= found
    page = " ".join(text_of(root, "docs/faq.md").split())
    missing = [words for words in found | {"learning rate too high", "nothing learnt"} if f"**{words}" not in page]
    assert missing == []


def test_every_error_that_the_questions_name_is_said_somewhere(documents):
    root, _ = documents
    source = " ".join(path.read_text(encoding="utf-8") for path in sorted((root / "sela_ext").rglob("*.py")))
    for words in (
        "out: expected an empty or absent folder",
        "out: expected a folder that no run is using",
        "resume: the run in this folder was started differently",
        "no CUDA device",
        "this torch is built without CUDA",
        "the compiled core (sela_ext._core) cannot be loaded",
        "unknown option",
        "or a torchvision name",
    ):
        assert words in source, words
        assert words.replace(" (sela_ext._core)", "") in " ".join(text_of(root, "docs/faq.md").split()), words


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning(documents, tmp_path, monkeypatch):
    build = pytest.importorskip("mkdocs.commands.build", reason="mkdocs is not installed: pip install '.[docs]'")
    config = pytest.importorskip("mkdocs.config")
    pytest.importorskip("material")
    root, _ = documents
    monkeypatch.chdir(root)
    build.build(config.load_config("mkdocs.yml", strict=True, site_dir=str(tmp_path / "site")))
    method = (tmp_path / "site/method.html").read_text(encoding="utf-8")
    assert method.count("<math") > 50
    assert "arithmatex" not in method
    assert "label_tol" in (tmp_path / "site/options.html").read_text(encoding="utf-8")
