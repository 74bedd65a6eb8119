"""What is done with columns on the card: Anderson's steps, and the margins of columns among rows. A part of gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import common
import numpy as np
import torch
from gpu_logits import LAM, SEED, random_logits

from sela_ext import kernels
from sela_ext.kernels.anderson import anderson_step
from sela_ext.kernels.anderson_device import STATE
from sela_ext.kernels.check_anderson import UNIT, anderson_cases
from sela_ext.kernels.check_cases import uniform
from sela_ext.kernels.self_check import OnCard

if TYPE_CHECKING:
    from gpu import Card

MEMORY = 10  # pairs of differences that a step looks at
TURNS = 16  # steps of one timed run: a single one is shorter than what a launch takes


def anderson_case(card: Card, cols: int, copy: float, rounds: int) -> list[dict[str, Any]]:
    """Steps between two passes, each with the full memory: the kernel, torch on the card, and the way over the host.

    The bytes are those of one step: memory, sums and points, once. It is one block's work: what counts are the
    microseconds beside those of a pass.
    """
    cols = max(31, cols // card.tiny)
    rng = np.random.default_rng(SEED)
    target = 0.5 + rng.random(cols)
    target /= target.sum()
    # Near one another, so that no error sends the iterations back to the best point.
    shares = target * np.exp(0.1 + 0.01 * rng.standard_normal((TURNS, cols)))
    sums = torch.from_numpy(np.rint(shares / UNIT).astype(np.int64)).to(card.place)
    points = torch.from_numpy(rng.standard_normal((TURNS, cols))).to(card.place)
    aim, known = torch.from_numpy(target).to(card.place), torch.from_numpy(rng.standard_normal((2, MEMORY, cols)))
    steps, changes = known.to(card.place)

    def in_torch() -> Any:
        found = []
        for units, g in zip(sums, points, strict=True):
            f = aim.log() - (units * UNIT).log()
            f = f - aim @ f
            scale = changes.norm(dim=1)
            gram = (changes / scale[:, None]) @ (changes / scale[:, None]).T
            gamma = torch.linalg.solve(gram, (changes / scale[:, None]) @ f) / scale
            found.append(g + f - gamma @ (steps + changes))
        return found

    def over_the_host() -> Any:
        found = []
        for units, g in zip(sums, points, strict=True):
            f = np.log(target) - np.log(units.cpu().numpy() * UNIT)
            found.append(
                torch.from_numpy(g.cpu().numpy() + anderson_step(f - target @ f, *known.numpy())).to(card.place)
            )
        return found

    works: dict[str, Callable[[], Any]] = {"torch": in_torch, "over the host": over_the_host}
    if card.device is not None:
        for what, differs in anderson_cases(OnCard(card.device), uniform):
            difference = differs()
            if difference is not None:
                raise SystemExit(f"no agreement: {what}: {difference}; nothing is timed")
        works = {"sela_ext, kernel alone": anderson_launches(card, sums, points, aim), **works}
    else:
        first, second = in_torch()[0], over_the_host()[0]
        if not torch.allclose(first, second, rtol=1e-6, atol=1e-6):
            raise SystemExit("no agreement: torch's step is not the host's; nothing is timed")
    seconds = {name: value / TURNS for name, value in card.medians(works, rounds).items()}
    moved = 8 * cols * (2 * MEMORY + 3 + 2 * 4)
    table, recorded = [], []
    for label, value in seconds.items():
        share = moved / 1e9 / value / copy if label.startswith("sela_ext") else None
        table.append((label, value * 1e6, share and f"{share:.2%}"))
        recorded.append({"case": "anderson", "what": label, "cols": cols, "seconds": value, "bytes": moved})
        recorded[-1]["share_of_copy"] = share
    common.table(
        f"Anderson's step, {cols} columns, {MEMORY} pairs; steps of small problems are numpy's",
        ("", "us", "of copy bandwidth"),
        table,
    )
    return recorded


def anderson_launches(card: Card, sums: torch.Tensor, points: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """Launches of the kernel, one per row of the sums and the points; the state goes on from run to run."""
    assert card.device is not None
    device, core, cols = card.device, card.device.core, len(target)
    vectors = torch.zeros(core.ANDERSON_VECTORS, cols, dtype=torch.float64, device=card.place)
    state = torch.zeros(STATE.itemsize // 8 + core.ANDERSON_MEMORY**2, dtype=torch.float64, device=card.place)
    following = torch.empty_like(target)

    def launch() -> None:
        for units, g in zip(sums, points, strict=True):
            core.anderson_step_cuda(
                *(tensor.data_ptr() for tensor in (units, g, following, target, vectors, state)),
                *(cols, UNIT, 1e-9, 3.0, 1e9, True, False, device.stream()),
            )

    return launch


def margins_case(card: Card, rows: int, cols: int, copy: float, rounds: int) -> list[dict[str, Any]]:
    """The four smallest losses of each column among all rows: kernels with their result on the host, and torch."""
    rows = max(600, rows // card.tiny)
    logits = random_logits(card, rows, cols, torch.float16)
    prices = np.random.default_rng(SEED).standard_normal(cols)
    labels = kernels.sinkhorn_pass(logits, prices, scale=LAM, want_labels=True).labels.cpu().numpy()
    some = logits[:2000]
    found = kernels.column_margins(some, prices, labels[:2000], scale=LAM)
    expected = kernels.column_margins(some.cpu().numpy(), prices, labels[:2000], scale=LAM)
    with np.errstate(invalid="ignore"):
        wrong = ~((found == expected) | (np.abs(found - expected) <= 1e-4))
    if wrong.any():
        m, column = (int(n) for n in np.argwhere(wrong)[0])
        raise SystemExit(
            f"no agreement: loss {m} of column {column}: expected {expected[m, column]:.9g}, found "
            f"{found[m, column]:.9g}; nothing is timed"
        )
    price = torch.from_numpy(prices).to(card.place, torch.float32)

    def in_torch() -> Any:
        best = torch.full((4, cols), float("inf"), device=card.place)
        for part in logits.split(max(4, (1 << 27) // cols)):
            score = LAM * part.float() + price
            loss = score.amax(1, keepdim=True) - score
            loss.masked_fill_(loss <= 0, float("inf"))
            best = torch.cat([best, loss.topk(min(4, len(loss)), dim=0, largest=False).values]).topk(
                4, dim=0, largest=False
            )[0]
        return best.cpu()

    works: dict[str, Callable[[], Any]] = {
        "sela_ext, to the host": lambda: kernels.column_margins(logits, prices, labels, scale=LAM),
        "torch scale + prices + topk": in_torch,
    }
    moved = rows * (cols * 2 + 4)
    table, recorded = [], []
    for label, value in card.medians(works, rounds).items():
        share = moved / 1e9 / value / copy if label.startswith("sela_ext") else None
        table.append((label, value * 1e3, share and f"{share:.0%}"))
        recorded.append({"case": "column margins", "what": label, "rows": rows, "cols": cols, "seconds": value})
        recorded[-1].update({"bytes": moved, "share_of_copy": share})
    common.table(
        f"Margins of columns, {rows} x {cols} float16; they agree with the CPU's",
        ("", "ms", "of copy bandwidth"),
        table,
    )
    return recorded
