"""Runs to report on, and pages to look into."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import numpy as np

from sela_ext.report import write_report
from sela_ext.report.overview import Overview, lay_out, map_rows, nearest_clusters

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
        self.source = text
        self.tags, self.open, self.ids, self.text, self.scripts, self.styles = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if "id" in dict(attributes):
            self.ids.append(dict(attributes)["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append([dict(attributes), ""])

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside in ("script", "style"):
            (self.scripts if inside == "script" else self.styles)[-1][1] += data
        else:
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def data(self, name):
        """The value in the script element of data with this id; None where there is none."""
        found = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return json.loads(found[0]) if found else None

    def allows_only_its_own(self):
        """Whether the policy names the one program and the one style of the page, by their contents, and no more."""
        running = [text for attributes, text in self.scripts if attributes.get("type") != "application/json"]
        (policy,) = [meta["content"] for meta in self.all("meta") if "http-equiv" in meta]
        style, script = (
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in (self.styles[0][1], running[0])
        )
        return (
            (len(running), len(self.styles)) == (1, 1)
            and all(set(attributes) <= {"type", "id"} for attributes, _ in self.scripts)
            and policy
            == f"default-src 'none'; img-src data:; style-src {style}; script-src {script}; base-uri 'none'; "
            "form-action 'none'"
        )

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


def add_overview(folder, labels, names=("a cat", "a dog", "a hen"), head=0, width=5):
    """Write report.npz: features around the class, which is the label of head 0 modulo the number of names."""
    rng = np.random.default_rng(0)
    truth = (labels[0] % len(names)).astype(np.int32)
    index = map_rows(labels.shape[1], 100)
    features = rng.normal(size=(len(names), width))[truth[index]] * 4 + rng.normal(size=(index.size, width))
    tsne, pca = lay_out(features)
    clusters = int(labels[head].max()) + 1
    near = nearest_clusters(rng.normal(size=(clusters, width)), np.ones(clusters, bool))
    made = Overview(index, tsne, pca, head, near, truth, np.array(names))
    (folder / "report.npz").write_bytes(made.to_bytes())
    return made


def grey(index):
    return np.full((8, 8), index % 256, dtype=np.uint8)


def render(folder, read_image=grey):
    path = write_report(folder, read_image)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def write_log(folder, events):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
