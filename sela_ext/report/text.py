"""Numbers and names as a page holds them, and the templates' filters of these names."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What could end a script element, or begin a comment or an entity in it.
_IN_SCRIPTS = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def environment(*folders: Path) -> jinja2.Environment:
    """Templates of the report and of `folders`, with escaping, and filters for numbers and names."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_without_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(fixed=fixed, percent=percent, small=small, plain=plain, share=share, data=script_data)
    return made


def fixed(value: float, digits: int = 3) -> str:
    """Write a number with so many digits after the point, a dash for none."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "\N{EN DASH}"


def percent(value: float, digits: int = 1) -> str:
    """Write a share as percent, a dash for none."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "\N{EN DASH}"


def share(value: float) -> str:
    """Write a number for the page's script, empty for none."""
    return f"{value:.4f}" if math.isfinite(value) else ""


def small(value: float) -> str:
    """Write an error with two digits, a dash for none."""
    return f"{value:.2g}" if math.isfinite(value) else "\N{EN DASH}"


def plain(text: Any, longest: int = 120) -> str:
    """Make a file name printable: no control characters or halves of characters, the end kept where it is long."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return clean if len(clean) <= longest else "\N{HORIZONTAL ELLIPSIS}" + clean[-longest:]


def script_data(value: Any) -> Markup:
    """Write a value as the JSON of a script element: ASCII, and without any character that HTML looks at.

    Example:
        >>> "<" in script_data({"name": "</script><b>"}), script_data([1, 0.5])
        (False, Markup('[1,0.5]'))
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character, escape in _IN_SCRIPTS.items():
        text = text.replace(character, escape)
    return Markup(text)


def source_hash(text: str) -> str:
    """A script or style as a content security policy names it."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def read_templates(*names: str) -> str:
    """Files of the templates' folder, one after the other, as they are."""
    return "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def _without_controls(value: Any) -> Any:
    """A value as a page may hold it: text without control characters but ends of lines and tabs."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value
