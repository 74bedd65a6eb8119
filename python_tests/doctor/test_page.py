import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import sela_ext
from sela_ext.cli import main

HOSTILE = [
    "<script>alert(1)<%2Fscript>.jpg",
    '"><img src=x onerror=alert(2)>.jpg',
    "' onmouseover='alert(3).jpg",
    "{{ 7 * 7 }}{% raw %}.jpg",
    "line\nbreak\x1b[31m.jpg",
    "[bold]rich[not a tag.jpg",
    "&amp;&lt;.jpg",
]
VOID = {"meta", "img", "br", "hr", "input", "link"}
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """Tags, text and ids; checks that elements nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture
def spoilt(fill, tmp_path):
    """A folder with a bit of everything, under hostile names."""
    folder = fill("data/train/a", 30).parent
    fill("data/train/b <i>class</i>", 12, first=30)
    fill("data/test/a", 6, first=200)
    for seed, name in enumerate(HOSTILE):
        shutil.copy(folder / f"a/{seed:04d}.jpg", folder / "a" / name)
        (folder / "b <i>class</i>" / f"bad {name}").write_bytes(b"<b>no picture</b>")
    with open(os.fsencode(folder / "a") + b"/not utf-8 \xff.jpg", "wb") as file:
        file.write((folder / "a/0020.jpg").read_bytes())
    Image.open(folder / "a/0011.jpg").resize((90, 70)).save(folder / "a" / "near.png")
    shutil.copy(folder / "a/0001.jpg", tmp_path / "data/test/a/leak.jpg")
    return tmp_path / "data"


def write(data, target, **options):
    result = sela_ext.doctor(data, out=target, threads=2, **options)
    text = target.read_text(encoding="utf-8")
    return result, Page(text), text


def test_the_page_asks_for_nothing_from_elsewhere(spoilt, tmp_path):
    _, page, text = write(spoilt, tmp_path / "page.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "video"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name == "src":
                assert value.startswith("data:image/")
            if name == "href":
                assert value[0] == "#"
                assert value[1:] in page.ids
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    policies = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_hostile_names_are_text_and_nothing_else(spoilt, tmp_path):
    result, page, _ = write(spoilt, tmp_path / "page.html")
    assert result["bad"]["count"] == len(HOSTILE)
    assert "<script>alert(1)" in page.words
    assert "{{ 7 * 7 }}" in page.words
    assert "not utf-8 \\xff.jpg" in page.words
    assert "\x1b" not in page.words
    assert "b <i>class</i>" in page.words
    assert not [1 for tag, attributes in page.tags if tag == "img" and not attributes["src"].startswith("data:")]


def test_the_page_says_what_was_found(spoilt, tmp_path):
    result, page, _ = write(spoilt, tmp_path / "page.html")
    for finding in result["findings"]:
        assert finding["text"][1:] in page.words
    assert "sela train --data" in page.words
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) >= 8


def test_a_clean_set_says_so(fill, tmp_path):
    _, page, _ = write(fill("photos", 104), tmp_path / "page.html")
    assert "Nothing wrong was found" in page.words


def test_the_page_stays_small_for_many_duplicates_and_classes(tmp_path):
    rng = np.random.default_rng(0)
    images = np.repeat(rng.integers(0, 256, (400, 100, 100, 3), dtype=np.uint8), 3, axis=0)
    write(images, tmp_path / "page.html", labels=np.arange(1200))
    assert (tmp_path / "page.html").stat().st_size < 1_000_000


def test_a_vanished_image_costs_its_thumbnail_only(fill, tmp_path, monkeypatch):
    folder = fill("photos", 20)
    shutil.copy(folder / "0001.jpg", folder / "same.jpg")
    from sela_ext.doctor import page as page_module  # the module; the name on the package is the function's

    def gone(image):
        raise OSError("gone")

    monkeypatch.setattr(page_module, "data_uri", gone)
    _, page, _ = write(folder, tmp_path / "page.html")
    assert "not at hand" in page.words


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_page_without_complaint(spoilt, tmp_path):
    result, _, _ = write(spoilt, tmp_path / "page.html")
    (tmp_path / "profile").mkdir()
    command = [
        *("timeout", "40", CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
        *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--window-size=1200,1600", f"--screenshot={tmp_path / 'page.png'}", "--dump-dom"),
        (tmp_path / "page.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode == 124:
        pytest.skip("chromium did not answer within 40 s")
    shown = Page(done.stdout.decode("utf-8").removeprefix("<!DOCTYPE html>"))
    assert len([1 for tag, attributes in shown.tags if "finding" in attributes.get("class", "").split()]) == len(
        result["findings"]
    )
    assert "script" not in {tag for tag, _ in shown.tags}
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert pixels.std() > 5


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *map(str, arguments)])
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


def test_the_command_line_prints_and_writes(capsys, spoilt, tmp_path):
    status, out, err = run(
        capsys, spoilt, "--json", tmp_path / "r.json", "--out", tmp_path / "p.html", "--threads", 2, "--sample", 40
    )
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert result["schema"] == 1
    assert result["data"]["sampled"]
    assert "sela train --data" in out
    assert (tmp_path / "p.html").exists()


def test_the_command_line_survives_hostile_names(capsys, spoilt):
    status, out, _ = run(capsys, spoilt, "--threads", 2)
    assert status == 0
    assert "\x1b[31m" not in out
    assert "cannot be read" in out


def test_nothing_readable_ends_with_status_3_and_one_line(capsys, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    status, _, err = run(capsys, tmp_path)
    assert status == 3
    assert err.count("\n") == 1
    assert "none of the images can be read: a.jpg: empty file" in err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["absent"], 3, "absent: no such file"),
        (["digits", "--sample", "0"], 2, "sample: expected"),
        (["digits", "--jsn", "x"], 2, "did you mean --json?"),
        (["digits", "--out", "no/such/page.html"], 2, "create the folder first"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == status
    assert message in err
    assert err.count("\n") == 1
