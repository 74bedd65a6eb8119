"""Labels of exact sizes on the card, and logits that are computed when they are read: a part of gpu.py."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import common
import numpy as np
import torch
from gpu_logits import LAM, SEED, random_logits

import sela_ext
from sela_ext import kernels
from sela_ext.assign.features import DEVICE_ENTRIES, pass_seconds
from sela_ext.assign.sources import logits_pass
from sela_ext.kernels.check_cases import list_difference

if TYPE_CHECKING:
    from gpu import Card


def lists_case(card: Card, rows: int, cols: int, copy: float, rounds: int) -> list[dict[str, Any]]:
    """Candidate lists of all rows, and of those that lose (none of them does): kernel, call, and torch's topk."""
    rows = max(600, rows // card.tiny)
    logits = random_logits(card, rows, cols, torch.float16)
    prices = np.random.default_rng(SEED).standard_normal(cols)
    labels = kernels.sinkhorn_pass(logits, prices, scale=LAM, want_labels=True).labels.cpu().numpy()
    some = logits[:2000]
    options: dict[str, Any] = {"scale": LAM, "count": 4, "tie": 2e-5}
    found = kernels.find_candidates(some, prices, labels[:2000], **options)
    expected = kernels.find_candidates(some.cpu().numpy(), prices, labels[:2000], **options)
    difference = list_difference(found, expected)
    if difference is not None:
        raise SystemExit(f"no agreement: candidate lists, K = {cols}: {difference}; nothing is timed")
    price = torch.from_numpy(prices).to(card.place, torch.float32)

    def topk() -> Any:
        parts = logits.split(max(1, (1 << 27) // cols))
        return [(LAM * part.float() + price).topk(4, sorted=False) for part in parts]

    seconds = card.medians(
        {
            "sela_ext, lists to the host": lambda: kernels.find_candidates(logits, prices, labels, **options),
            "sela_ext, rows that lose": lambda: kernels.find_candidates(logits, prices, labels, slack=1e-3, **options),
            "torch scale + prices + topk": topk,
        },
        rounds,
    )
    moved = rows * (cols * 2 + 20 + 80)
    table, recorded = [], []
    for label, value in seconds.items():
        share = moved / 1e9 / value / copy if label.startswith("sela_ext") else None
        table.append((label, value * 1e3, share and f"{share:.0%}"))
        recorded.append(
            {
                "case": "candidate lists",
                "what": label,
                "rows": rows,
                "cols": cols,
                "seconds": value,
                "bytes": moved,
                "share_of_copy": share,
            }
        )
    common.table(
        f"Candidate lists, {rows} x {cols} float16, 4 columns; the lists are the CPU's, number by number",
        ("", "ms", "of copy bandwidth"),
        table,
    )
    return recorded


def computed_case(card: Card, rows: int, cols: int, dim: int, copy: float, rounds: int) -> list[dict[str, Any]]:
    """One pass over logits that are computed, by the chosen tile and by the largest, against one over stored ones.

    The model is `pass_seconds` with this card's copy bandwidth and the rate of a product that is measured here.
    """
    rows = max(600, rows // card.tiny)
    generator = torch.Generator(card.place).manual_seed(SEED)
    features = torch.randn(rows, dim, generator=generator, device=card.place).half()
    weight = torch.randn(cols, dim, generator=generator, device=card.place) / dim**0.5
    g = np.zeros(cols)
    table, recorded = [], []
    stored = {dtype: (features.float() @ weight.T).to(dtype) for dtype in (torch.float16, torch.float32)}
    before = kernels.sinkhorn_pass(stored[torch.float32], g, scale=LAM).lse
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            logits = sela_ext.FeatureLogits(features, weight)
            distance = float((logits_pass(logits, g, scale=LAM).lse - before).abs().median())
            if not distance < (1e-2 if precision == "highest" else 1.0):
                raise SystemExit(f"no agreement: computed logits, log-sum-exp differs by {distance:.2g} nats")
            some = features[: min(rows, 1 << 14)].float()
            competitors: dict[str, Callable[[], Any]] = {
                f"computed, tiles of {logits.tile_rows}": lambda logits=logits: logits_pass(
                    logits, g, scale=LAM, reference=before
                )
            }
            largest = sela_ext.FeatureLogits(features, weight)
            largest.set_tile_rows(min(-(-rows // 128) * 128, 128 * max(1, DEVICE_ENTRIES // (128 * max(cols, dim)))))
            if largest.tile_rows != logits.tile_rows:
                competitors[f"computed, tiles of {largest.tile_rows}"] = lambda logits=largest: logits_pass(
                    logits, g, scale=LAM, reference=before
                )
            competitors["product alone"] = lambda some=some: some @ weight.T
            if precision == "highest":
                for dtype, matrix in stored.items():
                    name = f"stored, {str(dtype).removeprefix('torch.')}"
                    competitors[name] = lambda matrix=matrix: kernels.sinkhorn_pass(
                        matrix, g, scale=LAM, reference=before
                    )
            seconds = card.medians(competitors, rounds)
        finally:
            torch.set_float32_matmul_precision("highest")
        rate = 2 * len(some) * cols * dim / seconds.pop("product alone")
        for label, value in seconds.items():
            expected = pass_seconds(
                rows,
                cols,
                dim,
                size=None if label.startswith("computed") else 2 if label.endswith("16") else 4,
                copy=copy * 1e9,
                flops=rate,
            )
            table.append((f"{label}, {precision}", value * 1e3, expected * 1e3, rate / 1e12))
            recorded.append(
                {
                    "case": "computed logits",
                    "what": label,
                    "precision": precision,
                    "rows": rows,
                    "cols": cols,
                    "dim": dim,
                    "seconds": value,
                    "model_seconds": expected,
                    "tflops": rate / 1e12,
                }
            )
    header = ("", "ms", "model, ms", "TFLOP/s of the product")
    common.table(f"One pass, {rows} x {cols} from {dim} features", header, table)
    return recorded


def certificate_case(card: Card) -> list[dict[str, Any]]:
    """Exact balance and a certificate, as a label pass would have them, the logits on the device."""
    rows, cols = (1500, 60) if card.dry else (200_000, 1000)
    logits = random_logits(card, rows, cols, torch.float32)
    table, recorded = [], []
    seconds: dict[str, float] = {}

    def timed(what: str, function: Callable[[], Any]) -> Any:
        card.wait()
        begin = time.perf_counter()
        result = function()
        card.wait()
        seconds[what] = time.perf_counter() - begin
        return result

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timed("argmax labels", lambda: sela_ext.assign(logits, tol=1e-3))
        exact = timed("exact sizes", lambda: sela_ext.assign(logits, tol=1e-3, balance="exact"))
    certificate = timed("certificate", lambda: sela_ext.verify(logits, exact))
    if not certificate.exact:
        raise SystemExit("no agreement: the certificate finds other sizes than the exact ones")
    for what, value in seconds.items():
        table.append((what, value))
        recorded.append({"case": "label step", "what": what, "rows": rows, "cols": cols, "seconds": value})
    words = f"Labels, {rows} x {cols} float32; certified gap {certificate.label_gap:.2g} nats"
    common.table(words, ("", "seconds"), table)
    return recorded
