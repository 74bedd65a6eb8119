"""Options of a run from a file: YAML or JSON written by hand, or the options.json of an earlier run.

Nothing in such a file is ever built by its type: YAML is taken apart into keys and texts, and a text becomes a value as
on the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sela_ext.data import Augment
from sela_ext.data.safe_files import read_bounded
from sela_ext.errors import OptionError, SelaError, one_line, shown
from sela_ext.training.option_text import read_option
from sela_ext.training.options import Options, check
from sela_ext.training.presets import PRESETS
from sela_ext.training.run_folder import describe_value

# As long as any options could be: lists of file names belong into files of their own.
_MOST_BYTES = 1 << 20
_MOST_DEPTH = 8
# Of data given from memory options.json holds a description, see `run_folder.describe_value`.
_DESCRIBED = re.compile(r"(?:array \w+ \[|(?:list|tuple) of \d+, checksum )")
# What may be said beside the options.json of a run without anything being chosen anew: it does not ask for another run.
_NEUTRAL = frozenset(
    {
        *("out", "resume", "overwrite", "dry_run", "callbacks", "wandb", "progress", "log_every", "checkpoint_seconds"),
        *("seed", "threads", "device", "precision", "rank_timeout", "rank_silence", "evaluate_every", "index"),
    }
)
# Those of them that options.json holds and that are nobody's wish for the next run.
_OF_ONE_RUN = frozenset({"resume", "overwrite", "dry_run", "callbacks", "devices"})
_FIELDS = {spec.name: spec for spec in dataclasses.fields(Options)}
_KEYS = ("data", "out", *(name for name in _FIELDS if name != "callbacks"))


@dataclass(frozen=True)
class Kept:
    """What an earlier run chose for itself, to be taken again.

    Attributes:
        values: by option.
        reasons: of that time.
        devices: processes that shared the run; another number chooses anew.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    devices: int = 1

    def without(self, names: Any) -> Kept:
        """The same without some options."""
        return Kept(
            {name: value for name, value in self.values.items() if name not in names}, self.reasons, self.devices
        )


@dataclass(frozen=True)
class Config:
    """What a file says.

    Attributes:
        path: the file.
        options: by name, "data" and "out" among them where the file has them.
        kept: what was "auto" in the run whose options.json this is; empty for files written by hand.
    """

    path: Path
    options: dict[str, Any]
    kept: Kept = field(default_factory=Kept)


def read_config(path: str | os.PathLike[str]) -> Config:
    r"""Read options from a YAML or JSON file, or from the options.json of a run.

    Args:
        path: the file. Keys are options of `train`, with underscores or dashes, and `data` and `out`; values are as on
            the command line, several numbers as a list. File names in it are relative to where the program runs.

    Raises:
        OptionError: it cannot be read; a key that is unknown (names the nearest one) or there twice; a value of the
            wrong type or outside its range. Names the line.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "run.yaml")
        >>> _ = file.write_text("data: digits\nepochs: 5\nlr: 1e-3\nsize-bounds: [0.5, 2]\n")
        >>> read_config(file).options
        {'data': 'digits', 'epochs': 5, 'lr': 0.001, 'size_bounds': [0.5, 2]}
    """
    file = Path(path).expanduser()
    try:
        text = read_bounded(file, _MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        raise OptionError(
            f"config: expected a YAML or JSON file of options, found {shown(str(path))}: {reason}"
        ) from error
    entries = _json_entries(file, text) if text.lstrip().startswith("{") else _yaml_entries(file, text)
    if {"options", "reasons", "resolved"} <= set(entries):
        return _config_of_run(file, {name: value for name, (_, value) in entries.items()})
    return Config(file, _checked(file, entries))


def merge(config: Config, data: Any, out: Any, options: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any], Kept]:
    """What the caller says over what the file says.

    Args:
        config: of the file.
        data: the caller's; None = the file's.
        out: the same.
        options: the caller's.

    Returns:
        Data, out, options, and what is taken again from an earlier run: nothing where another run is asked for.

    Raises:
        OptionError: the file says only in words what data or options were.
    """
    said = {**options, **({} if data is None else {"data": data}), **({} if out is None else {"out": out})}
    merged = {**config.options, **said}
    for name, value in merged.items():
        if name not in said and isinstance(value, str) and _DESCRIBED.match(value):
            raise OptionError(
                f"{name}: expected a path or a value in {config.path}, found {shown(value)}, which came from memory; "
                f"give {name} as well"
            )
    others = [
        name
        for name, value in said.items()
        if name not in _NEUTRAL and describe_value(value) != describe_value(config.options.get(name))
    ]
    kept = Kept() if others else config.kept.without(said)
    return merged.pop("data", None), merged.pop("out", None), merged, kept


def _config_of_run(file: Path, content: Mapping[str, Any]) -> Config:
    """What was asked for in a run, and what it chose."""
    found, reasons, given = content["options"], content["reasons"], content.get("given")
    if not isinstance(found, dict) or not isinstance(reasons, dict) or not isinstance(given, (list, type(None))):
        raise OptionError(f"config: expected the options.json of a run, found another content in {file}")
    plain = {spec.name: spec.default for spec in _FIELDS.values()}
    if given is None:  # of a version that did not write down what was asked for
        given = [name for name in found if name not in reasons and name in plain and found[name] != plain[name]]
    values = {name: _augment(name, value) for name, value in found.items() if name in _FIELDS}
    # What a preset said and the data did not allow is chosen again, and not asked for.
    preset = PRESETS[found["preset"]].options if found.get("preset") in PRESETS else {}
    named = [name for name in given if name in values and name not in _OF_ONE_RUN]
    asked = {name: values[name] for name in named if not (name in reasons and name in preset)}
    entries = {name: (0, value) for name, value in asked.items()}
    if isinstance(found.get("data"), str):
        entries["data"] = (0, found["data"])
    chosen = {
        name: values[name]
        for name in reasons
        if name in values and name not in _OF_ONE_RUN and not _is_a_word(name, values[name], found)
    }
    for name, value in chosen.items():
        _check(file, 0, name, value)
    devices = found.get("devices")
    kept = Kept(chosen, {name: str(reasons[name]) for name in chosen}, devices if isinstance(devices, int) else 1)
    return Config(file, _checked(file, entries), kept)


def _is_a_word(name: str, value: Any, found: Mapping[str, Any]) -> bool:
    """Whether options.json holds a name for what was chosen, which cannot be asked for by it."""
    return (name == "augment" and value == "small") or (
        name in ("epochs", "label_passes") and found.get("budget") is not None
    )


def _augment(name: str, value: Any) -> Any:
    """An augmentation that was given by its fields."""
    if name not in ("augment", "label_augment") or not isinstance(value, dict) or set(value) != {"Augment"}:
        return value
    fields: Any = value["Augment"]
    known = {spec.name for spec in dataclasses.fields(Augment)}
    if not isinstance(fields, dict) or not set(fields) <= known:
        raise OptionError(f"{name}: expected the fields of a sela_ext.Augment, found {shown(fields)}")
    plain: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in fields.items()}
    return Augment(**plain)


def _checked(file: Path, entries: Mapping[str, tuple[int, Any]]) -> dict[str, Any]:
    """Names and values of options, each by its own rules.

    Raises:
        OptionError: names file and line.
    """
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, (line, value) in entries.items():
        name = key.replace("-", "_")
        if name not in _KEYS:
            near = difflib.get_close_matches(name, _KEYS, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; sela train --help lists all"
            raise OptionError(f"{_at(file, line)}unknown option {shown(key)}{hint}")
        if name in found:
            raise OptionError(
                f"{_at(file, line)}expected {name} once, found it in line {lines[name]} too; leave one out"
            )
        if name in ("data", "out"):
            parts = value if isinstance(value, list) and name == "data" else [value]
            if not parts or not all(isinstance(one, str) and one for one in parts):
                raise OptionError(f"{_at(file, line)}{name}: expected a path, found {shown(value)}")
        else:
            _check(file, line, name, value)
        found[name], lines[name] = value, line
    return found


def _check(file: Path, line: int, name: str, value: Any) -> None:
    spec = _FIELDS[name]
    if value == spec.default and type(value) is type(spec.default):
        return
    try:
        if isinstance(value, dict):
            raise OptionError(f"{name}: expected a value or a list, found a table")
        check(spec, value)
    except OptionError as error:
        raise OptionError(f"{_at(file, line)}{error}") from error


def _at(file: Path, line: int) -> str:
    return f"{file}:{line}: " if line else f"{file}: "


def _json_entries(file: Path, text: str) -> dict[str, tuple[int, Any]]:
    """The keys of a JSON object, each with the line that it is in."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in found:
            if key in seen:
                line = [match.start() for match in re.finditer(re.escape(json.dumps(key)) + r"\s*:", text)][-1:]
                number = text.count("\n", 0, line[0]) + 1 if line else 0
                raise OptionError(f"{_at(file, number)}expected {shown(key)} once, found it twice; leave one out")
            seen[key] = value
        return seen

    try:
        content = json.loads(text, object_pairs_hook=pairs)
    except SelaError:
        raise
    except json.JSONDecodeError as error:
        raise OptionError(f"{_at(file, error.lineno)}expected JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{file}: expected JSON: {error}") from error
    entries = {}
    for key, value in content.items():
        match = re.search(re.escape(json.dumps(key)) + r"\s*:", text)
        entries[key] = (text.count("\n", 0, match.start()) + 1 if match else 0, value)
    return entries


def _yaml_entries(file: Path, text: str) -> dict[str, tuple[int, Any]]:
    """The keys of a YAML mapping, each with its line; values are texts, numbers, truth values, nothing, or lists."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise OptionError(
            f"{_at(file, mark.line + 1 if mark else 0)}expected YAML: {one_line(str(error.problem))}"
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise OptionError(f"{file}: expected YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise OptionError(
            f"{_at(file, root.start_mark.line + 1)}expected lines such as epochs: 50, found {_words(text)}"
        )
    entries: dict[str, tuple[int, Any]] = {}
    for key, node in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise OptionError(f"{_at(file, line)}expected the name of an option, found a list or table")
        if key.value in entries:
            first = entries[key.value][0]
            raise OptionError(
                f"{_at(file, line)}expected {shown(key.value)} once, found it in line {first} too; leave one out"
            )
        entries[key.value] = (line, _yaml_value(file, key.value.replace("-", "_"), node, 0))
    return entries


def _yaml_value(file: Path, name: str, node: Any, depth: int) -> Any:
    """A scalar as the command line reads it, or a list of such."""
    import yaml

    where = _at(file, node.start_mark.line + 1)
    if node.tag not in ("tag:yaml.org,2002:" + kind for kind in _TAGS) or depth > _MOST_DEPTH:
        raise OptionError(f"{where}{name}: expected a value or a list of values, found {shown(str(node.tag))}")
    if isinstance(node, yaml.SequenceNode):
        return [_yaml_value(file, name, one, depth + 1) for one in node.value]
    text: str = node.value
    if node.style is not None:  # in quotes: a text whatever it looks like
        return text
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    kind = _FIELDS[name].metadata["kind"] if name in _FIELDS else "str"
    words = {"true": True, "false": False}
    if kind == "bool":
        words |= {"yes": True, "no": False, "on": True, "off": False}
    if kind != "str" and text.lower() in words:
        return words[text.lower()]
    return read_option(_FIELDS[name], text, alone=depth == 0) if name in _FIELDS else text


_TAGS = ("str", "int", "float", "bool", "null", "seq", "timestamp")


def _words(text: str) -> str:
    return shown(text.strip().splitlines()[0]) if text.strip() else "nothing"
