import itertools
import json
import math
import os
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from sela_ext.errors import DataError, ResourceError
from sela_ext.report import write_report

HOSTILE = [
    "<script>alert(1)</script>.png",
    '"><img src=x onerror=alert(2)>.png',
    "' onmouseover='alert(3)",
    "{{ 7 * 7 }}{% raw %}.png",
    "</title></style><b>bold</b>&amp;.png",
    "line\nbreak\x00\x1b[31m.png",
    "lone \udcff surrogate.png",
    "https://example.org/evil.png",
]
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that elements nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.ids, self.text, self.tables = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if "id" in dict(attributes):
            self.ids.append(dict(attributes)["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


def label_pass(number, clusters, converged=True):
    heads = [
        {
            "head": head,
            "clusters": k,
            "method": "anderson",
            "error": 0.004,
            "converged": converged,
            "passes": 6.5,
            "changed": 1 / (number + 1),
            "cross_entropy": math.log(k) * 0.9**number + 0.1 * head,
            "ln_k": math.log(k),
            "used": k,
            "size_min": 1,
            "size_max": 9,
            "nmi_previous": 0.5,
            "nmi": 0.6,
        }
        for head, k in enumerate(clusters)
    ]
    return {
        "event": "label_pass",
        "pass": number,
        "step": number * 10,
        "epoch": float(number),
        "masked": 0,
        "solve_seconds": 0.01,
        "heads": heads,
    }


def make_run(folder, n=333, clusters=(7, 3), names=None, metrics=True, truth=True):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(n)
    labels = np.stack([rng.permutation(np.arange(n) % k) for k in clusters]).astype(np.int32)
    names = np.array(names if names is not None else [f"image-{i}.png" for i in range(n)])
    confidence = rng.random(labels.shape, dtype=np.float32)
    np.savez(folder / "labels.npz", labels=labels, confidence=confidence, names=names)
    options = {
        "version": "0.1.0",
        "options": {"data": "digits", "precision": "bf16", "clusters": list(clusters), "budget": None},
        "reasons": {"precision": "the processor multiplies bf16"},
        "resolved": {"images": n, "device": "cpu"},
    }
    (folder / "options.json").write_text(json.dumps(options), encoding="utf-8")
    if metrics:
        events = [
            {"event": "step", "step": i, "epoch": i / 10, "loss": 3 / (i + 1), "lr": 0.1, "images_per_second": 9.0}
            for i in range(31)
        ]
        events += [label_pass(i, clusters) for i in range(3)]
        end = {"event": "end", "step": 31, "epoch": 3.0, "head": 0, "elapsed_seconds": 58.4, "heads": []}
        if truth:
            end |= {"nmi": 0.871, "ami": 0.87, "ari": 0.81, "accuracy": 0.905, "purity": 0.91, "knn": 0.99}
        events.append(end)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    return labels, confidence


def grey(index):
    return np.full((8, 8), index % 256, dtype=np.uint8)


def render(folder, read_image=grey):
    path = write_report(folder, read_image)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path):
    make_run(tmp_path / "run")
    page = render(tmp_path / "run")
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "audio", "video", "source"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name == "src":
                assert value.startswith("data:image/")
            if name in ("href", "xlink:href"):
                assert value.startswith("#")
                assert value[1:] in page.ids
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    policies = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_hostile_names_are_text_and_nothing_else(tmp_path):
    folder = tmp_path / "run <b>&"
    n = len(HOSTILE)
    make_run(folder, n=n, clusters=(2,), names=HOSTILE)
    path = write_report(folder, lambda i: grey(i) if i % 2 else 1 / 0)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert "<b>" not in text
    assert "onerror=alert(2)>" not in re.sub(r"&[a-z#0-9]+;", "", text.replace("&gt;", ""))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    titles = [a["title"] for _, a in page.tags if "title" in a]
    for name in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3], HOSTILE[4], HOSTILE[7]):
        assert any(title.startswith(f"{name}, confidence") for title in titles)
    assert not re.search(r"[\x00\x1b\ud800-\udfff]", text)
    assert len(titles) == n


def test_hostile_options_and_events_are_text_and_nothing_else(tmp_path):
    make_run(tmp_path)
    options = json.loads((tmp_path / "options.json").read_text(encoding="utf-8"))
    options["options"]["<i>name"] = "<script>x</script>"
    options["reasons"]["<i>name"] = "<script>y</script>"
    options["resolved"]["<i>fact"] = ["<script>z</script>"]
    options["version"] = "<script>v</script>"
    (tmp_path / "options.json").write_text(json.dumps(options), encoding="utf-8")
    event = label_pass(9, (7, 3))
    event["heads"][0]["method"] = "<script>m</script>"
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(event) + "\n")
    page = render(tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    for letter in "xyzvm":
        assert f"<script>{letter}</script>" in page.words


@pytest.mark.parametrize("n", [31, 1001])
def test_every_cluster_is_there_with_its_size_and_confidence(tmp_path, n):
    labels, confidence = make_run(tmp_path, n=n, clusters=(13, 3))
    page = render(tmp_path)
    found = re.findall(r"Cluster (\d+) (\d+) images? · mean confidence ([\d.]+)%", page.words)
    assert len(found) == 13
    for number, size, mean in found:
        members = labels[0] == int(number)
        assert int(size) == members.sum()
        assert float(mean) == pytest.approx(100 * confidence[0][members].mean(), abs=0.051)
    expected = sum(min(12, int((labels[0] == k).sum())) for k in range(13))
    assert len(page.all("img")) == expected
    assert all(image["alt"].startswith("image-") for image in page.all("img"))


def test_the_summary_tells_images_head_scores_solver_and_time(tmp_path):
    make_run(tmp_path)
    words = render(tmp_path).words
    assert "333 images were sorted into 7 clusters without using any labels; all 7 hold images" in words
    assert "Of heads 0 to 1, head 0 is shown, because its labels fit the network best" in words
    assert "91.0% of the images belong to the most frequent class of their cluster" in words
    for name, score in (("NMI", 0.871), ("AMI", 0.87), ("ARI", 0.81), ("Accuracy", 0.905), ("kNN", 0.99)):
        assert f"{name} {score:.3f}" in words
    assert "The label solver converged in all 3 label passes." in words
    assert "Training took 58.4 s over 3 epochs." in words
    assert "the processor multiplies bf16" in words


def test_without_true_labels_no_score_is_claimed(tmp_path):
    make_run(tmp_path, truth=False)
    text = render(tmp_path).words
    assert "true labels, which" not in text
    assert "kNN" not in text


def test_without_metrics_the_page_still_shows_the_clusters(tmp_path):
    labels, _ = make_run(tmp_path, metrics=False)
    page = render(tmp_path)
    assert "The run has no log" in page.words
    assert "curves" not in page.ids
    assert len(page.all("article")) == labels[0].max() + 1


def test_a_log_that_ends_in_half_a_line_is_no_obstacle(tmp_path):
    make_run(tmp_path)
    log = tmp_path / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    log.write_text("".join(lines[:-1]) + lines[-1][:25], encoding="utf-8")
    words = render(tmp_path).words
    assert "The log has no end after epoch 3: training was interrupted or is still running." in words


def test_before_an_evaluation_the_head_of_lowest_cross_entropy_is_shown(tmp_path):
    labels, _ = make_run(tmp_path, metrics=False)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(label_pass(0, (7, 3))) + "\n", encoding="utf-8")
    page = render(tmp_path)
    assert "Of heads 0 to 1, head 1 is shown" in page.words
    assert len(page.all("article")) == labels[1].max() + 1


def test_a_solver_that_did_not_converge_is_told(tmp_path):
    make_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(label_pass(3, (7, 3), converged=False)) + "\n")
    page = render(tmp_path)
    assert "In 1 of 4 label passes the label solver stopped before it converged (largest error 0.004)." in page.words
    assert '<td class="warn">0 of 2</td>' in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [a["class"] for a in page.all("tr") if "short" in a.get("class", "")] == ["short"]
    assert "notice" in [a.get("class") for a in page.all("p")]


def test_broken_values_in_events_are_no_obstacle(tmp_path):
    make_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"event": "step", "epoch": "x", "loss": NaN, "lr": null}\n{"event": "label_pass", "heads": 3}\n')
        log.write('{"event": "label_pass", "heads": [{"head": 0, "error": Infinity, "clusters": "many"}, 5]}\n')
        log.write('{"event": "end", "head": 99, "nmi": null, "elapsed_seconds": "long"}\n')
    assert len(render(tmp_path).all("article")) == 3  # head 1: the lowest cross-entropy


def test_images_that_cannot_be_read_leave_a_named_place(tmp_path):
    make_run(tmp_path, n=6, clusters=(2,))

    def read(index):
        if index == 3:
            raise OSError("truncated")
        return grey(index)

    page = render(tmp_path, read)
    assert "1 image could not be read." in page.words
    assert len(page.all("img")) == 5
    assert "image-3.png" in page.words


def test_without_a_reader_the_names_are_shown(tmp_path):
    make_run(tmp_path, n=6, clusters=(2,))
    page = render(tmp_path, None)
    assert page.all("img") == []
    assert "The images themselves were not at hand: their names stand in for them." in page.words
    assert "image-5.png" in page.words


def test_labels_alone_are_enough_of_a_labels_file(tmp_path):
    make_run(tmp_path)
    np.savez(tmp_path / "labels.npz", labels=np.array([[0, 1, -1, 1]], dtype=np.int32))
    page = render(tmp_path)
    assert "3 images were sorted into 7 clusters without using any labels (1 more image got no label)" in page.words
    assert any(image["alt"].startswith("image 3") for image in page.all("img"))


def test_headings_tables_and_pictures_can_be_read_aloud(tmp_path):
    make_run(tmp_path)
    page = render(tmp_path)
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in header for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    assert len(page.ids) == len(set(page.ids))
    for drawing in page.all("svg"):
        assert drawing["role"] == "img"
        assert drawing["aria-labelledby"] in page.ids
        assert drawing["aria-describedby"] in page.ids
    assert all(image.get("alt") for image in page.all("img"))


def test_many_images_and_clusters_stay_small_and_quick(tmp_path):
    n, clusters = 60_000, 3_001
    labels, _ = make_run(tmp_path, n=n, clusters=(clusters,))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.writelines(json.dumps(label_pass(i, (clusters,))) + "\n" for i in range(3, 1000))
        log.write(json.dumps({"event": "end", "head": 0, "epoch": 1000.0}) + "\n")
    noise = np.random.default_rng(0).integers(256, size=(200, 300, 3), dtype=np.uint8)
    start = time.perf_counter()
    page = render(tmp_path, lambda _: noise)
    assert time.perf_counter() - start < 30
    assert (tmp_path / "report.html").stat().st_size < 6e6
    assert len(page.all("article")) == 40
    assert "2,961 are left out" in page.words
    assert "200 of 1,000 are listed" in page.words
    (all_clusters,) = re.findall(r"All 3,001 clusters (.*) Cluster sizes", page.words)
    listed = {int(k): int(size) for k, size in re.findall(r"(\d+) (\d+) images?", all_clusters)}
    assert listed == dict(enumerate(np.bincount(labels[0], minlength=clusters).tolist()))


def test_the_same_run_gives_the_same_page(tmp_path):
    make_run(tmp_path)
    first = write_report(tmp_path, grey).read_bytes()
    assert write_report(tmp_path, grey).read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels.npz", "metrics.jsonl", "options.json", "report.html"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a run folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(DataError, match=r"options\.json: expected the options of a run, found no such file"):
        write_report(tmp_path)


def test_a_run_without_labels_is_refused(tmp_path):
    make_run(tmp_path)
    (tmp_path / "labels.npz").unlink()
    with pytest.raises(DataError, match=r"labels\.npz: expected the labels of a run, found no such file"):
        write_report(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"options": 3}', b"\xff\xfe"])
def test_damaged_options_are_refused(tmp_path, content):
    make_run(tmp_path)
    (tmp_path / "options.json").write_bytes(content)
    with pytest.raises(DataError, match=r"options\.json: expected"):
        write_report(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 10, 200])
def test_truncated_labels_are_refused(tmp_path, keep):
    make_run(tmp_path)
    content = (tmp_path / "labels.npz").read_bytes()
    (tmp_path / "labels.npz").write_bytes(content[:keep])
    with pytest.raises(DataError, match=r"labels\.npz: expected the labels of a run, cannot read them"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, r"shape \[heads, N\], found none"),
        ({"labels": np.zeros(3, np.int32)}, r"shape \[heads, N\], found int32 \[3\]"),
        ({"labels": np.zeros((1, 3))}, r"found float64 \[1, 3\]"),
        ({"labels": np.zeros((1, 0), np.int32)}, r"found int32 \[1, 0\]"),
        ({"labels": np.zeros((1, 3), np.int32), "confidence": np.zeros((1, 2))}, r"found float64 \[1, 2\]"),
        ({"labels": np.zeros((1, 3), np.int32), "names": np.array(["a"])}, "expected 3 names as text"),
        ({"labels": np.zeros((1, 1), np.int32), "names": np.array([{}], dtype=object)}, "cannot read them"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, arrays, message):
    make_run(tmp_path)
    np.savez(tmp_path / "labels.npz", **arrays)
    with pytest.raises(DataError, match=message):
        write_report(tmp_path)


def test_a_report_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    make_run(tmp_path)
    older = write_report(tmp_path, grey).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match=r"report\.html: cannot write the report: No space left on device"):
        write_report(tmp_path, grey)
    assert (tmp_path / "report.html").read_bytes() == older
    assert not list(tmp_path.glob(".report-*"))
