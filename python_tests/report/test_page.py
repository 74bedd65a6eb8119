"""The report of synthetic run folders: what the page shows, and that it shows it alone and safely."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sela_ext.errors import DataError, ResourceError
from sela_ext.report import write_report

_VOID = {"meta", "img"}


class _Page(HTMLParser):
    """The page as a browser takes it: every start tag with its attributes, the text of every element by tag."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.raw = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[tuple[str, list[str]]] = []  # class of the row, its cells
        self.text = ""
        self.style = ""
        self._open: list[str] = []
        self.feed(self.raw)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append((tag, given))
        if tag == "tr":
            self.rows.append((given.get("class", ""), []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.style += data
            return
        self.text += data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][1][-1] += data

    def clusters(self) -> dict[int, int]:
        """Return number -> size, as the contact sheet tells it."""
        found = re.findall(r"Cluster (\d+)\s+([\d,]+) images? ·", self.text)
        return {int(number): int(size.replace(",", "")) for number, size in found}

    def all_clusters(self) -> dict[int, int]:
        """Return number -> size, as the list of all clusters tells it."""
        listed = self.text[
            self.text.index(" clusters\n", self.text.index("All ")) : self.text.index("Cluster sizes and")
        ]
        return {int(n): int(size.replace(",", "")) for n, size in re.findall(r"(\d+) ([\d,]+) images?", listed)}

    def images(self) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]

    def missing(self) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if attributes.get("class") == "missing"]


def _head(head: int, clusters: int, **values: Any) -> dict[str, Any]:
    common = {"method": "anderson", "error": 0.004, "converged": True, "passes": 9.0, "changed": 0.25}
    return {"head": head, "clusters": clusters, "cross_entropy": 0.1, **common, **values}


def _write_run(
    path: Path,
    labels: np.ndarray,
    *,
    confidence: np.ndarray | None = None,
    names: list[str] | None = None,
    events: list[dict[str, Any]] | None = None,
    options: dict[str, Any] | None = None,
) -> Path:
    path.mkdir(exist_ok=True)
    stored = {
        "version": "1.2.3",
        "options": {"lr": 0.05, "epochs": 7, "data": "photos"},
        "reasons": {"lr": "because the batch is small"},
        "resolved": {"images": labels.shape[1], "device": "cpu", "augment": {"size": 32, "mean": [0.5, 0.25]}},
    }
    (path / "options.json").write_text(json.dumps(stored if options is None else options))
    rng = np.random.default_rng(5)
    np.savez(
        path / "labels.npz",
        labels=labels.astype(np.int32),
        confidence=rng.random(labels.shape, dtype=np.float32) if confidence is None else confidence,
        names=np.array([f"image_{i}.png" for i in range(labels.shape[1])] if names is None else names),
    )
    if events is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def _events() -> list[dict[str, Any]]:
    """Log two label passes of two heads, the second not converged, and an end with true labels."""
    events: list[dict[str, Any]] = [
        {"event": "step", "step": step, "epoch": step / 10, "loss": 3.0 / step, "lr": 0.05} for step in range(1, 41)
    ]
    for number, converged in ((1, True), (2, False)):
        heads = [
            _head(0, 3, cross_entropy=0.9, nmi=0.4),
            _head(1, 5, cross_entropy=0.2, nmi=0.5, converged=converged, error=0.07),
        ]
        line = {"event": "label_pass", "pass": number, "step": 10, "epoch": 1.0, "masked": 0, "solve_seconds": 0.125}
        events.append({**line, "heads": heads})
    scores = {"nmi": 0.611, "ami": 0.522, "ari": 0.433, "accuracy": 0.744, "purity": 0.755, "knn": 0.866, "linear": 0.9}
    end = {"event": "end", "step": 40, "epoch": 4.0, "head": 1, "elapsed_seconds": 75.0}
    return [*events, {**end, **scores, "heads": [_head(0, 3, nmi=0.4), _head(1, 5, nmi=0.611)]}]


def _labels(images: int = 101) -> np.ndarray:
    index = np.arange(images)
    return np.stack([index % 3, index * index % 5])


def _read(index: int) -> np.ndarray:
    return np.full((31, 33, 3), index % 256, dtype=np.uint8)


def _page(run: Path, read_image: Any = _read) -> _Page:
    path = write_report(run, read_image)
    assert path == run / "report.html"
    return _Page(path)


def test_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = _page(_write_run(tmp_path, _labels(), names=[f"http://host/{i}.png" for i in range(101)], events=_events()))
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "script", "iframe", "object", "embed", "base", "form"})
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
        assert {"srcset", "poster", "action", "background", "xlink:href"}.isdisjoint(attributes)
        assert "url(" not in attributes.get("style", "")
    assert not re.search(r"@import|url\(|https?:", page.style)
    assert page.images()


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = [
        "<script>alert(1)</script>.png",
        "\"><img src=x onerror='alert(2)'>",
        "</style></title><b>bold</b>",
        "{{ 7 * 7 }}{% raw %}",
        "Größe 画像 \U0001f600.png",
        "right\u202eto left\x00\x1b[31m",
        "half \ud800 a character",
        "long/" * 100 + "end.png",
    ]
    options = {
        "version": "<i>1</i>",
        "options": {"<b>lr</b>": "<u>0.1</u>"},
        "reasons": {"<b>lr</b>": "</td><script>why</script>"},
        "resolved": {"<s>fact</s>": ["<s>", "&amp;"]},
    }
    labels = np.zeros((1, len(hostile)), dtype=np.int32)
    events = [{"event": "label_pass", "heads": [_head(0, 1, method="<em>m</em>")]}]
    run = _write_run(tmp_path / "a <b>run", labels, names=hostile, options=options, events=events)
    for read_image in (_read, None):
        page = _page(run, read_image)
        used = {tag for tag, _ in page.tags}
        assert used.isdisjoint({"script", "i", "u", "s", "em"})
        shown = page.images() if read_image else page.missing()
        texts = " ".join(attributes["title"] for attributes in shown)
        for name in hostile[:5]:
            assert name in texts
        assert "end.png" in texts
        assert not set("\u202e\x00\x1b\ud800") & set(page.raw)
        assert "</td><script>why</script>" in page.text
        assert "a <b>run" in page.text
        assert "<em>m</em>" in page.text
        assert ["<s>fact</s>", "<s>, &amp;"] in [cells for _, cells in page.rows]


def test_every_cluster_is_shown_with_its_size_and_its_most_confident_images(tmp_path: Path) -> None:
    labels = _labels()
    confidence = np.random.default_rng(3).random(labels.shape, dtype=np.float32)
    page = _page(_write_run(tmp_path, labels, confidence=confidence, events=_events()))
    sizes = np.bincount(labels[1], minlength=5)
    assert page.clusters() == {k: int(sizes[k]) for k in range(5) if sizes[k]}
    assert page.all_clusters() == {k: int(sizes[k]) for k in range(5)}
    titles = [attributes["title"] for attributes in page.images()]
    for cluster in np.flatnonzero(sizes):
        members = np.flatnonzero(labels[1] == cluster)
        best = members[np.argsort(-confidence[1][members])][:12]
        wanted = [f"image_{i}.png, confidence {100 * confidence[1][i]:.1f}%" for i in best]
        place = titles.index(wanted[0])
        assert titles[place : place + len(best)] == wanted


def test_page_says_what_was_found(tmp_path: Path) -> None:
    page = _page(_write_run(tmp_path, _labels(), events=_events()))
    assert "101 images sorted into 5 clusters without using any labels; 3 of 5 hold images" in page.text
    assert "Of heads 0 to 1, head 1 is shown, because" in page.text
    assert "75.5% of the images belong to the most frequent class" in page.text
    assert "Training took 1 min 15 s over 4 epochs." in page.text
    for score in ("0.611", "0.522", "0.433", "0.744", "0.755", "0.866", "0.900"):
        assert score in page.text
    titles = ("Training loss", "Learning rate", "Labels that changed", "Cross-entropy of each head", "Agreement with")
    assert all(title in page.text for title in titles)


def test_options_are_listed_with_their_reasons(tmp_path: Path) -> None:
    rows = [cells for _, cells in _page(_write_run(tmp_path, _labels(), events=_events())).rows]
    assert ["lr", "0.05", "because the batch is small"] in rows
    assert ["epochs", "7", ""] in rows
    assert ["augment", "size: 32; mean: 0.5, 0.25"] in rows


def test_a_solver_that_did_not_converge_is_pointed_out(tmp_path: Path) -> None:
    page = _page(_write_run(tmp_path, _labels(), events=_events()))
    passes = {cells[0]: (kind, cells) for kind, cells in page.rows if "anderson" in cells}
    assert passes["1"] == ("", ["1", "1.00", "10", "anderson", "2 of 2", "0.07", "18.0", "25.0%", "0", "0.125"])
    assert passes["2"][0] == "short"
    assert passes["2"][1][4] == "1 of 2"
    assert "In 1 of 2 label passes the label solver stopped before it converged (largest error 0.07)." in page.text
    assert "The label solver converged in" not in page.text


def test_a_solver_that_converged_is_not(tmp_path: Path) -> None:
    events = [event for event in _events() if event.get("pass") != 2]
    page = _page(_write_run(tmp_path, _labels(), events=events))
    assert "The label solver converged in its one label pass." in page.text
    assert {kind for kind, _ in page.rows} == {"", "chosen"}
    assert "notice" not in [attributes.get("class") for _, attributes in page.tags]


def test_clusters_near_guessing_and_masked_images_are_pointed_out(tmp_path: Path) -> None:
    events = [{"event": "label_pass", "pass": 1, "masked": 17, "heads": [_head(0, 3, cross_entropy=1.09)]}]
    page = _page(_write_run(tmp_path, _labels()[:1], events=events))
    assert "can hardly tell these clusters apart: its cross-entropy is 1.09" in page.text
    assert "Up to 17 images had no usable output" in page.text


@pytest.mark.parametrize("events", [None, [], [{"event": "step"}, {"event": "label_pass"}, {"event": "end"}]])
def test_a_run_without_metrics_has_a_report(tmp_path: Path, events: list[dict[str, Any]] | None) -> None:
    labels = _labels()[:1]
    page = _page(_write_run(tmp_path, labels, events=events))
    assert page.clusters() == {0: 34, 1: 34, 2: 33}
    assert ("The run has no log" in page.text) == (not events)
    assert "true labels" not in page.text


def test_a_run_without_true_labels_has_no_scores(tmp_path: Path) -> None:
    true_only = {"nmi", "ami", "ari", "accuracy", "purity", "knn", "linear"}
    events = [{key: value for key, value in event.items() if key not in true_only} for event in _events()]
    for event in events:
        for entry in event.get("heads", []):
            entry.pop("nmi", None)
    page = _page(_write_run(tmp_path, _labels(), events=events))
    assert not re.search(r"NMI|kNN|Measured against", page.text)
    assert "Training loss" in page.text


def test_an_interrupted_run_says_so_and_its_last_half_line_is_left_out(tmp_path: Path) -> None:
    run = _write_run(tmp_path, _labels(), events=_events()[:-1])
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"event": "step", "step": 99, "epo')
    page = _page(run)
    assert "The log has no end after epoch 1: training was interrupted or is still running." in page.text
    assert "could not be read" not in page.text


def test_before_an_evaluation_the_head_of_lowest_cross_entropy_is_shown(tmp_path: Path) -> None:
    assert "Clusters of head 1" in _page(_write_run(tmp_path, _labels(), events=_events()[:-1])).text


def test_heads_of_different_k_have_their_own_rows(tmp_path: Path) -> None:
    rows = [cells for _, cells in _page(_write_run(tmp_path, _labels(), events=_events())).rows]
    assert ["0", "3", "3", "33 – 34", "0.100 of 1.099", "0.400"] in rows
    assert ["1 (shown)", "5", "3", "0 – 40", "0.100 of 1.609", "0.611"] in rows


def test_without_images_their_names_stand_in(tmp_path: Path) -> None:
    page = _page(_write_run(tmp_path, _labels()), None)
    assert not page.images()
    assert len(page.missing()) == 3 * 12
    assert "The images themselves were not at hand" in page.text


def test_images_that_cannot_be_read_are_placeholders_and_counted(tmp_path: Path) -> None:
    def read(index: int) -> np.ndarray:
        if index % 2:
            raise RuntimeError("no such image")
        return np.zeros((5, 5), dtype=np.float64) if index == 0 else _read(index)

    labels = np.zeros((1, 7), dtype=np.int32)
    page = _page(_write_run(tmp_path, labels), read)
    assert sorted(a["title"].split(",")[0] for a in page.missing()) == [f"image_{i}.png" for i in (0, 1, 3, 5)]
    assert len(page.images()) == 3
    assert "4 images could not be read." in page.text


def test_skipped_images_belong_to_no_cluster(tmp_path: Path) -> None:
    labels = _labels()[:1].copy()
    labels[0, :31] = -1
    page = _page(_write_run(tmp_path, labels))
    assert sum(page.clusters().values()) == 70
    assert "(31 were skipped)" in page.text
    shown = {int(re.sub(r"\D", "", a["title"].split(".")[0])) for a in page.images()}
    assert min(shown) >= 31


def test_a_run_of_skipped_images_only_has_a_report(tmp_path: Path) -> None:
    page = _page(_write_run(tmp_path, np.full((1, 33), -1)))
    assert page.clusters() == {}
    assert "0 images sorted into 1 cluster" in page.text


def test_unknown_confidence_is_a_dash(tmp_path: Path) -> None:
    labels = np.zeros((1, 3), dtype=np.int32)
    page = _page(_write_run(tmp_path, labels, confidence=np.full((1, 3), np.nan, dtype=np.float32)))
    assert "3 images · mean confidence –" in page.text


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (31, 33, 3), (48, 48, 1)])
def test_tiny_images_are_embedded_as_they_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    page = _page(_write_run(tmp_path, np.zeros((1, 1), dtype=np.int32)), lambda index: image)
    (shown,) = page.images()
    assert shown["class"] == "tiny"
    kind, data = shown["src"].split(",")
    assert kind == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), image.squeeze())


@pytest.mark.parametrize("shape", [(400, 301, 3), (97, 600, 1), (1, 1000)])
def test_large_images_become_thumbnails(tmp_path: Path, shape: tuple[int, ...]) -> None:
    page = _page(_write_run(tmp_path, np.zeros((1, 1), dtype=np.int32)), lambda index: np.full(shape, 200, np.uint8))
    (shown,) = page.images()
    thumbnail = Image.open(io.BytesIO(base64.b64decode(shown["src"].split(",")[1])))
    assert max(thumbnail.size) == 96
    assert thumbnail.mode == ("RGB" if shape[-1] == 3 else "L")
    assert np.abs(np.asarray(thumbnail).astype(int) - 200).max() <= 3


def test_a_thousand_clusters_of_sixty_thousand_images_stay_small_and_fast(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 1000, (4, 60_000))
    labels[0][labels[0] == 7] = 8
    events = [{"event": "step", "epoch": i / 100, "loss": 1.0 / (i + 1), "lr": 0.1} for i in range(20_000)]
    events += [
        {"event": "label_pass", "pass": i, "epoch": float(i), "heads": [_head(head, 1000) for head in range(4)]}
        for i in range(300)
    ]
    run = _write_run(tmp_path, labels, events=events)
    photo = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)  # noise: the worst case for JPEG
    start = time.perf_counter()
    page = write_report(run, lambda index: photo)
    assert time.perf_counter() - start < 15
    assert page.stat().st_size < 5_000_000
    parsed = _Page(page)
    sizes = np.bincount(labels[0], minlength=1000)
    assert parsed.all_clusters() == dict(enumerate(sizes.tolist()))
    shown = parsed.clusters()
    assert len(shown) == 40
    assert all(sizes[k] == size for k, size in shown.items())
    assert "40 of 999 clusters are shown" in parsed.text
    assert "200 of 300 are listed" in parsed.text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = _write_run(tmp_path, _labels(), events=_events())
    first = write_report(run, _read).read_bytes()
    assert write_report(run, _read).read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == ["labels.npz", "metrics.jsonl", "options.json", "report.html"]


@pytest.mark.parametrize("name", ["options.json", "labels.npz"])
@pytest.mark.parametrize("content", [None, b"", b"\x80 nonsense", b"[]"])
def test_a_run_without_a_sound_file_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    run = _write_run(tmp_path, _labels())
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a run folder"):
        write_report(tmp_path / "none")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(5, np.int32)}, r"shape \[heads, N\], found int32 \[5\]"),
        ({"labels": np.zeros((1, 5), np.float32)}, "expected integer labels"),
        ({"labels": np.zeros((1, 0), np.int32)}, "expected integer labels"),
        ({"confidence": np.zeros((1, 5), np.float32)}, "found none"),
        ({"labels": np.zeros((1, 5), np.int32), "confidence": np.zeros((1, 4), np.float32)}, "confidence per label"),
        ({"labels": np.zeros((1, 5), np.int32), "names": np.array(["a"])}, "expected 5 names"),
        ({"labels": np.zeros((1, 1), np.int32), "names": np.array([{"a": 1}])}, "cannot read"),
    ],
)
def test_inconsistent_labels_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    run = _write_run(tmp_path, _labels())
    np.savez(run / "labels.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        write_report(run)


def test_a_report_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = _write_run(tmp_path, _labels())
    (run / "report.html").mkdir()
    with pytest.raises(ResourceError, match=r"report\.html: cannot write the report"):
        write_report(run, None)
    assert sorted(path.name for path in run.iterdir()) == ["labels.npz", "options.json", "report.html"]
