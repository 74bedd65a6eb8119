"""What the documentation's build does beside MkDocs.

Formulas become MathML, so that pages fetch nothing; notebooks become pages; so do the options of a run, which are read
from the source without importing it.
"""

from __future__ import annotations

import ast
import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(\\\(|\\\[)(.*?)(\\\)|\\\])</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add a page for every notebook; the notebook itself can be downloaded from it."""
    for file in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        page = f"notebooks/{file.stem}.md"
        text = notebook_page(json.loads(file.read_text(encoding="utf-8")), file.name)
        files.append(File.generated(config, page, content=text))
    source = Path(config.docs_dir).parent / "sela_ext/training/options.py"
    files.append(File.generated(config, "options.md", content=options_page(source.read_text(encoding="utf-8"))))
    return files


def options_page(source: str) -> str:
    """A table of the fields of `Options`, by the headings that comments between them make."""
    (found,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Options")
    lines = [
        "# Options of a run",
        "",
        "All of `sela train` (with dashes: `--label-tol`), `sela_ext.train`, and of [files of options](quickstart.md). "
        "`auto` is chosen from data and machine; options.json says what it became, and why.",
    ]
    comments = {number: line.strip() for number, line in enumerate(source.splitlines(), 1)}
    for field in found.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.value, ast.Call):
            continue
        above = comments[field.lineno - 1]
        if above.startswith("# "):
            lines += ["", f"## {above[2:]}", "", "| Option | Default | |", "|---|---|---|"]
        default, text = field.value.args
        shown = "auto" if isinstance(default, ast.Name) else str(ast.literal_eval(default))
        words = ast.literal_eval(text).replace("|", "\\|").replace("*", "\\*")
        choices = [ast.literal_eval(k.value) for k in field.value.keywords if k.arg == "choices"]
        words += f" ({', '.join(choices[0])})" if choices and choices[0] else ""
        lines.append(f"| `{ast.unparse(field.target)}` | {shown} | {words} |")
    return "\n".join(lines) + "\n"


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """The cells as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts.insert(1, f"[This page as a notebook]({name})")
    return "\n\n".join(parts) + "\n"


def on_page_content(content: str, **_: Any) -> str:
    r"""Replace \(...\) and \[...\] as the extension arithmatex leaves them."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        found = str(convert(html.unescape(match[3]), display=display))
        if "\\" in found:
            raise PluginError(f"expected formulas that latex2mathml knows, found {match[3]}")
        return found

    return _FORMULA.sub(mathml, content)
