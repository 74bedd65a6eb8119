"""What we write holds hostile names as text: tables give them back exactly, pages and terminals do not obey them."""

import contextlib
import csv
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.distributed import TCPStore

import sela_ext
from sela_ext.cli import main
from sela_ext.data import open_source
from sela_ext.errors import DataError, harmless, one_line
from sela_ext.report import write_report
from sela_ext.training.fixed_labels import read_fixed_labels
from sela_ext.training.launch import _local_store, launch
from sela_ext.training.outputs import markdown_table
from sela_ext.training.progress import RunProgress
from sela_ext.training.run_folder import RunFolder

NAMES = [
    "plain.png",
    "line\nfeed.png",
    "carriage\rreturn.png",
    "both\r\nof them.png",
    "\x1b[2J\x1b]0;title\x07.png",
    "\x9b31m.png",
    "bell\x07 back\x08 delete\x7f.png",
    "'single' \"double\" `back`.png",
    'a "quoted", name; with\ttabs.png',
    "<script>alert(1)<script>.png",
    '" onerror="alert(2).png',
    "&lt;b&gt;.png",
    "=1+1.png",
    "=cmd|' -C calc'!A0.png",
    "+1.png",
    "-1.png",
    "@SUM(A1).png",
    "\ttab first.png",
    " blank first.png",
    "\u202egnp.exe",
    "\ufeffmark.png",
    "n" * 251 + ".png",
    "画像\u3000é.png",
    b"\xff\xfe not utf-8.png",
    "{{ 7 * 7 }}.png",
    "%s%n.png",
    "index",
]


@pytest.fixture
def images(tmp_path):
    """A folder with one image per name."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        with open(
            os.path.join(os.fsencode(folder), name if isinstance(name, bytes) else os.fsencode(name)), "wb"
        ) as file:
            Image.new("L", (9, 9), 5 * number).save(file, "PNG")
    return folder


@pytest.fixture
def run(images, tmp_path):
    """A run folder with labels of these images."""
    source = open_source(images)
    labels = np.arange(len(source), dtype=np.int32)[None] % 3
    folder = RunFolder.check(tmp_path / "run", resume=False, overwrite=False, data=str(images))
    folder.create()
    folder.write_options({"version": "0", "options": {"data": str(images)}, "reasons": {}, "resolved": {}})
    folder.write_labels(labels, np.full(labels.shape, 0.5, np.float32), source.names)
    folder.write_bad_images([(i, name, f"{name}: damaged") for i, name in enumerate(source.names)])
    return folder.path


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_names_of_every_kind_come_back_from_the_tables_as_they_are(images, run):
    source = open_source(images)
    assert len(source) == len(NAMES)
    assert {os.fsdecode(name) for name in NAMES if not isinstance(name, bytes)} < set(source.names)
    for table in ("labels.csv", "bad_images.csv"):
        found = rows(run / table)
        assert [row["name"] for row in found] == source.names
        assert [row["index"] for row in found] == [str(i) for i in range(len(source))]
    with np.load(run / "labels.npz", allow_pickle=False) as saved:
        assert saved["names"].tolist() == source.names


@pytest.mark.parametrize("file", ["labels.csv", "labels.npz", ""])
def test_labels_find_their_images_by_names_of_every_kind(images, run, file):
    source = open_source(images).subset(list(reversed(range(len(NAMES)))))
    fixed = read_fixed_labels(run / file, source)
    assert fixed.labels[0].tolist() == [i % 3 for i in reversed(range(len(NAMES)))]


def test_predictions_are_written_by_the_same_writer(images, tmp_path, monkeypatch):
    monkeypatch.setattr("sela_ext.inference.predict", lambda run, source, **how: np.zeros(len(source), np.int32))
    with pytest.raises(SystemExit) as end:
        main(["predict", "run", "--data", str(images), "--out", str(tmp_path / "new.csv")])
    assert end.value.code == 0
    assert [row["name"] for row in rows(tmp_path / "new.csv")] == open_source(images).names


def test_a_pack_gives_names_of_every_kind_back(images, tmp_path):
    sela_ext.pack(images, tmp_path / "pack", threads=1, progress=False)
    assert open_source(tmp_path / "pack").names == open_source(images).names


def test_one_long_name_does_not_make_the_table_of_names_long(tmp_path, monkeypatch):
    monkeypatch.setattr("sela_ext.training.run_folder.free_memory", lambda: 1 << 20)
    names = ["n" * 4000, *(f"{i}.png" for i in range(100))]
    folder = RunFolder(tmp_path)
    folder.open_logs()
    with contextlib.closing(folder):
        folder.write_labels(np.zeros((1, 101), np.int32), np.ones((1, 101), np.float32), names)
    with np.load(tmp_path / "labels.npz", allow_pickle=False) as saved:
        assert saved.files == ["labels", "confidence"]
    assert [row["name"] for row in rows(tmp_path / "labels.csv")] == names
    assert "labels.npz has no names" in (tmp_path / "train.log").read_text()


class Page(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


ELEMENTS = re.compile(r"iframe|object|embed|base|form|link|audio|video|source|b")


def test_a_report_of_hostile_names_holds_no_element_and_no_attribute_of_theirs(images, run):
    events = [
        {"event": "end", "step": 1, "head": 0, "warnings": NAMES[9:12], "heads": [{"head": 0, "method": NAMES[9]}]}
    ]
    events.append({"event": "label_pass", "pass": 1, "heads": [{"head": 0, "clusters": 3, "method": "</td><script>"}]})
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    options = {str(name): str(name) for name in NAMES}
    content = {"version": "<b>", "options": options, "reasons": options, "resolved": options}
    (run / "options.json").write_text(json.dumps(content))
    for read_image in (open_source(images).read, None):
        text = write_report(run, read_image).read_text(encoding="utf-8")
        page = Page(text)
        assert not [tag for tag, _ in page.tags if ELEMENTS.fullmatch(tag)]
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        shown = [value for _, a in page.tags for name, value in a.items() if name in ("src", "href")]
        assert all(value.startswith(("data:image/", "#")) for value in shown)
        scripts = re.findall(r"(?i)<script[^>]*>", text)
        assert scripts.count("<script>") == 1  # the page's own program; the others hold data
        assert all(re.fullmatch(r'<script( type="application/json" id="data-[a-z0-9-]+")?>', one) for one in scripts)
        assert len(re.findall(r"(?i)</script", text)) == len(scripts)
        assert not set(text) & set("\x00\x07\x08\x1b\x7f\x9b")


def test_the_command_line_names_hostile_files_without_obeying_them(images, tmp_path, capsys):
    for name in open_source(images).names:
        path = tmp_path / "bad" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\xff\xd8\xff damaged")
    for words in (
        ["pack", str(tmp_path / "bad"), "--out", str(tmp_path / "pack"), "--threads", "1"],
        ["doctor", str(tmp_path / "bad"), "--threads", "1"],
        ["train", "--data", str(tmp_path / "\x1b[2Jabsent"), "--out", str(tmp_path / "x")],
        ["report", str(tmp_path / "\x1b[2Jabsent")],
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        said = capsys.readouterr()
        assert end.value.code == 3
        assert len(said.err.splitlines()) == 1
        assert (said.out + said.err).replace("\n", "").isprintable()


def test_a_report_that_cannot_show_its_images_says_so_without_obeying_a_name(run, capsys):
    content = json.loads((run / "options.json").read_text())
    content["options"]["data"] = "\x1b[2J\nabsent\x9b"
    (run / "options.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        main(["report", str(run)])
    said = capsys.readouterr().out
    assert "the images cannot be shown" in said
    assert said.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(name, str)])
def test_errors_logs_and_progress_spell_out_what_a_terminal_would_obey(tmp_path, capsys, name):
    error = DataError(f"{name}: damaged")
    assert not set(str(error)) & set("\r\x07\x08\x1b\x7f\x9b\t\u202e\ufeff")
    assert one_line(name).isprintable() or "\u3000" in name
    folder = RunFolder(tmp_path)
    folder.open_logs()
    with contextlib.closing(folder):
        folder.log(f"bad image {name}")
    assert len((tmp_path / "train.log").read_text(encoding="utf-8").splitlines()) == 1
    with RunProgress(True) as progress:
        progress.say(name)
    assert not set(capsys.readouterr().out) & set("\r\x07\x08\x1b\x9b\u202e")


def test_names_that_harm_nobody_stay_as_they_are():
    for text in ("plain", "画像\u3000é.png", "two\nlines", "C:\\x", "👩‍🚀"[:1]):
        assert harmless(text) == text
    assert one_line("two\nlines") == "two\\nlines"
    assert harmless("\udcff") == "\\udcff"


def test_options_are_text_in_tensorboard_too():
    text = markdown_table({"data": "<img src=x>![x](http://a/b)|c`\n# d"}, {"data": "[link](http://a)"})
    assert len(text.splitlines()) == 3
    assert "<" not in text
    assert not re.search(r"(?<!\\)[\[\]`!]", text)
    assert len(re.findall(r"(?<!\\)\|", text.splitlines()[2])) == 4


def listening(processes, path=None):
    """Addresses, in hex, at which processes wait for others; also written to a file."""
    sockets = set()
    for process in processes:
        for handle in os.listdir(f"/proc/{process}/fd"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(f"/proc/{process}/fd/{handle}"))
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if os.path.exists(table) else ():
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.append(fields[1])
    if path is not None:
        Path(path).write_text(json.dumps(found))
    return found


THIS_MACHINE = "0100007F"
needs_sockets = pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads the kernel's table of sockets")


@needs_sockets
def test_the_store_of_ranks_on_one_machine_cannot_be_reached_from_another():
    before = set(listening([os.getpid()]))
    store = _local_store(TCPStore)
    try:
        (address,) = set(listening([os.getpid()])) - before
        assert address == f"{THIS_MACHINE}:{store.port:04X}"
        found = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        found.set("a", "b")
        assert store.get("a") == b"b"
    finally:
        del store


@pytest.mark.slow
@needs_sockets
def test_ranks_on_one_machine_listen_on_the_loopback_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    work = (
        "import importlib.util, os, torch\n"
        "from sela_ext.training.ranks import Ranks\n"
        "spec = importlib.util.spec_from_file_location('written', file)\n"
        "written = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(written)\n"
        "with Ranks.join(torch.device('cpu'), timeout=100, silence=60) as ranks:\n"
        "    ranks.barrier()\n"
        "    written.listening([os.getpid(), os.getppid()], f'{out}/{ranks.rank}')\n"
        "    ranks.barrier()\n"
    )
    launch(exec, (work, {"file": __file__, "out": str(tmp_path)}), 2)  # what new processes can import by name
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert len(found) >= 2  # the store, and gloo
        assert {address.split(":")[0] for address in found} == {THIS_MACHINE}
