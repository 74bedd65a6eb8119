import itertools
import json
import os
import re
import resource

import numpy as np
import pytest
import torch
from report_runs import HOSTILE, Page, add_overview, grey, label_pass, make_run, render, write_log

from sela_ext.errors import DataError, ResourceError
from sela_ext.report import write_report
from sela_ext.report.overview import Overview, map_rows

SECTIONS = ["clusters", "map", "classes", "heads", "sizes", "curves", "passes", "filters", "bad", "options"]


@pytest.fixture
def full_run(tmp_path):
    """A run with everything that a page can show, under names that try to break it."""
    folder = tmp_path / "run"
    n = 131
    names = [HOSTILE[i % len(HOSTILE)] + str(i) for i in range(n)]
    labels, _ = make_run(folder, n=n, clusters=(7, 3), names=names)
    add_overview(folder, labels, names=tuple(HOSTILE[:5]))
    (folder / "bad_images.csv").write_text('index,name,reason\n3,"<script>alert(4)</script>.png",<b>damaged</b>\n')
    weights = {"backbone": {"stem.0.weight": torch.randn(12, 3, 3, 3)}, "clusters": [7, 3], "heads": {}}
    torch.save(weights, folder / "network.pt")
    return folder


def test_the_page_asks_for_nothing_from_elsewhere(full_run):
    page = render(full_run)
    names = {tag for tag, _ in page.tags}
    assert not names & {"link", "iframe", "object", "embed", "base", "form", "audio", "video", "source"}
    for tag, attributes in page.tags:
        assert "style" not in attributes
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name == "src":
                assert value.startswith("data:image/")
            if name in ("href", "xlink:href"):
                assert value.startswith("#")
                assert value[1:] in page.ids
    (_, style), *others = page.styles
    assert not others
    assert not re.search(r"https?:|@import|expression", style)
    assert all(
        found.startswith(('"data:image/png', '"data:image/jpeg')) for found in re.findall(r"url\(([^)]*)", style)
    )
    assert page.allows_only_its_own()


def test_what_is_in_scripts_cannot_end_them(full_run):
    page = render(full_run)
    assert page.data("data-map")["classes"] == {str(i): name for i, name in enumerate(HOSTILE[:5])}
    for _, text in page.scripts[:-1]:
        assert not set(text) & set("<>&")
        assert text.isascii()
    running = page.scripts[-1][1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|setAttribute\(.style", running)
    assert page.source.count("<script>") == 1
    assert page.source.count("</script>") == len(page.scripts) >= 5


def test_hostile_names_are_text_and_nothing_else(tmp_path):
    folder = tmp_path / "run <b>&"
    n = len(HOSTILE)
    make_run(folder, n=n, clusters=(2,), names=HOSTILE)
    path = write_report(folder, lambda i: grey(i) if i % 2 else 1 / 0)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "<script>alert" not in text
    assert page.allows_only_its_own()
    assert not page.all("b")
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
    assert page.allows_only_its_own()
    assert not page.all("i")
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
    expected = sum(min(96, int((labels[0] == k).sum())) for k in range(13))
    images = [attributes for attributes in page.all("span") if attributes.get("role") == "img"]
    assert len(images) == expected
    assert all(image["title"].startswith("image-") for image in images)


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
    assert len([one for one in page.all("span") if one.get("role") == "img"]) == 5
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
    assert any(image.get("title", "").startswith("image 3") for image in page.all("span"))


def test_headings_tables_and_pictures_can_be_read_aloud(full_run):
    page = render(full_run)
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"
    assert [len(page.all(landmark)) for landmark in ("main", "nav")] == [1, 1]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in header for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 10
    assert len(page.ids) == len(set(page.ids))
    for drawing in page.all("svg"):
        if drawing.get("aria-hidden") != "true":  # the map, whose plot has the name
            assert drawing["role"] == "img"
            assert drawing["aria-labelledby"] in page.ids
            assert drawing["aria-describedby"] in page.ids
    assert all(image.get("alt") for image in page.all("img"))
    for section in [*page.all("section"), *page.all("article"), *page.all("dialog")]:
        assert section["aria-labelledby"] in page.ids
    for plot in [attributes for _, attributes in page.tags if attributes.get("tabindex") == "0"]:
        assert plot["aria-label"]
        assert plot["role"] in ("region", "group")
    images = [one for one in page.all("span") if one.get("role") == "img"]
    assert images
    assert all(one["title"] for one in images)
    assert page.all("label")  # each around its control
    assert len(page.all("select")) + len(page.all("input")) == len(page.all("label"))


def test_everything_that_a_run_holds_is_on_its_page(full_run):
    page = render(full_run)
    found = [attributes["aria-labelledby"] for attributes in page.all("section")]
    assert found == SECTIONS
    linked = {link["href"] for link in page.all("a") if not link["href"].startswith("#cluster-")}
    assert linked == {f"#{name}" for name in found}
    assert "3 <script>alert(4)</script>.png <b>damaged</b>" in page.words
    assert "All 12 filters of the first layer that learns, 3 x 3 pixels in colour." in page.words
    assert "Nearest clusters are those most alike in the direction of their mean features." in page.words


def test_what_a_run_does_not_hold_is_not_on_its_page(tmp_path):
    make_run(tmp_path, clusters=(5,), metrics=False)
    page = render(tmp_path)
    assert [attributes["aria-labelledby"] for attributes in page.all("section")] == ["clusters", "sizes", "options"]
    assert "purity" not in page.words
    assert page.data("data-map") is None


def test_true_classes_are_told_in_cards_edges_and_the_table(tmp_path):
    labels, _ = make_run(tmp_path, n=70, clusters=(7, 2))
    truth = add_overview(tmp_path, labels).truth
    page = render(tmp_path)
    for image in [one for one in page.all("span") if one.get("role") == "img"]:
        index = int(re.match(r"image-(\d+)", image["title"])[1])
        assert image["title"].endswith(f"class {('a cat', 'a dog', 'a hen')[truth[index]]}")
        assert f"e{truth[index]}" in image["class"].split()
    assert re.search(r"Cluster 0 10 images · mean confidence \S+ · purity 100.0% · entropy 0.00 a cat 100%", page.words)
    # Clusters 0, 3 and 6 are the first class, 1 and 4 the second, 2 and 5 the third; rows are classes.
    assert "class 0 3 6 1 4 2 5 all a cat 10 10 10 30 a dog 10 10 20 a hen 10 10 20" in page.words


def test_the_map_holds_its_images_and_their_thumbnails(tmp_path):
    labels, _ = make_run(tmp_path, n=333, clusters=(7, 2))
    overview = add_overview(tmp_path, labels)
    page = render(tmp_path)
    data = page.data("data-map")
    assert data["names"] == [f"image-{i}.png" for i in overview.index]
    assert data["cluster"] == labels[0][overview.index].tolist()
    assert data["truth"] == overview.truth[overview.index].tolist()
    classes = [one["class"].split() for one in page.all("span") if one.get("role") == "img"]
    for sheet, x, y in data["thumbnails"]:
        assert any(found[:4] == ["t", f"s{sheet}", f"x{x}", f"y{y}"] for found in classes)
    for places in data["layouts"].values():
        assert np.min(places) == 0
        assert np.max(places) == 1000


def test_heads_are_compared_by_all_their_labels(tmp_path):
    labels, _ = make_run(tmp_path, n=210, clusters=(7, 2, 5))
    page = render(tmp_path)
    data = page.data("data-heads")
    assert sorted(data["matches"]) == ["1", "2"]
    for head, matches in data["matches"].items():
        for k, found in zip(data["clusters"], matches, strict=True):
            counts = np.bincount(labels[int(head)][labels[0] == k])
            assert found[0] == [int(counts.argmax()), round(100 * counts.max() / counts.sum())]
            assert [share for _, share in found] == sorted((share for _, share in found), reverse=True)


def big_run(folder, n, clusters, heads, names=()):
    """A run of a million images or so, with all that a report shows."""
    rng = np.random.default_rng(0)
    named = {"names": np.array(names)} if len(names) else {}
    labels = rng.integers(clusters, size=(heads, n)).astype(np.int32)
    confidence = rng.random((heads, n), dtype=np.float32)
    np.savez(folder / "labels.npz", labels=labels, confidence=confidence, **named)
    (folder / "options.json").write_text('{"options": {"data": "x"}, "resolved": {}}')
    index = map_rows(n)
    places = rng.random((index.size, 2)).astype(np.float32)
    near = rng.integers(clusters, size=(clusters, 6)).astype(np.int32)
    truth = rng.integers(1000, size=n).astype(np.int32)
    classes = np.array([f"class <&> number {i}" for i in range(1000)])
    (folder / "report.npz").write_bytes(Overview(index, places, places[::-1], 0, near, truth, classes).to_bytes())
    events = [label_pass(i, (clusters,) * heads) for i in range(300)]
    write_log(folder, [*events, {"event": "end", "head": 0, "epoch": 1000.0}])


def check_big_page(folder, clusters, side):
    noise = np.random.default_rng(1).integers(256, size=(side, side, 3), dtype=np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    page = render(folder, lambda _: noise)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kB
    assert (folder / "report.html").stat().st_size < 15e6
    assert len(page.all("article")) == clusters
    assert "200 of 300 are listed" in page.words
    assert "30 of 1,000, the largest" in page.words


@pytest.mark.parametrize("side", [32, pytest.param(200, marks=pytest.mark.slow)])
def test_thousands_of_clusters_of_noise_stay_below_15_mb(tmp_path, side):
    names = ["<\"&'>" * 20 + f"{i:05d}" for i in range(60_007)]  # every character takes five
    big_run(tmp_path, n=60_007, clusters=3_001, heads=3, names=names)
    check_big_page(tmp_path, 3_001, side)


@pytest.mark.slow
@pytest.mark.parametrize("side", [48, 49, 400])
def test_a_million_images_and_ten_heads_stay_below_15_mb(tmp_path, side):
    big_run(tmp_path, n=1_000_003, clusters=3_001, heads=10)
    check_big_page(tmp_path, 3_001, side)


def test_more_clusters_than_a_page_holds_are_listed_by_size(tmp_path):
    n, clusters = 20_000, 4_001
    labels, _ = make_run(tmp_path, n=n, clusters=(clusters,))
    page = render(tmp_path)
    assert len(page.all("article")) == 3200
    assert "801 are left out" in page.words
    (others,) = re.findall(r"801 clusters without a card (.*) Previous", page.words)
    listed = {int(k): int(size) for k, size in re.findall(r"(\d+) (\d+) images?", others)}
    sizes = np.bincount(labels[0], minlength=clusters)
    assert len(listed) == 801
    assert all(sizes[k] == size for k, size in listed.items())


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
