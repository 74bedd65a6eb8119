"""A training step beside a plain loop in PyTorch and torchvision, and what else an epoch spends its time on.

    python bench/training.py [--quick] [--only NAME ...] [--threads N] [--no-record]

Both train the same network with the same batch, optimiser and arithmetic. Agreement comes first: on one batch, with
the same weights and in float32, both have the same loss. Timed are the whole step, its arithmetic alone (one batch
again and again) and the images alone; our steps at half resolution are switched off. Rates are images per second of
processor time of the whole process, with one thread and no worker processes, rivals in turn, medians; --threads 2 or
more times by the wall clock, with so many threads of ours beside so many workers.

Shares are of one epoch of ours: a label pass from the bank at its end, the solver in it, an evaluation, and by the
wall clock the time that steps wait for images. The plain loop's label pass is a look at all images in eval mode, then
Sinkhorn's iterations; it is timed too. The parts: 32 (Fashion-MNIST, or generated images where it is absent; the
digits with --quick) and 224 (generated JPEG files, a ResNet-18).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
import numpy as np
import torch
import training_targets as names
from training_plain import PlainLoop

PARTS = ("32", "224")
FASHION = Path("/usr/share/datasets/fashion-mnist")
SMALL_IMAGES, LARGE_IMAGES, LARGE_QUICK = 60_000, 160, 96
PLAIN_IMAGES = 5_000  # as many the plain loop's label pass is timed on, which takes minutes for all
AGREE = 1e-4  # largest difference of the losses


class DisagreementError(Exception):
    """Two programs that are compared do not compute the same."""


@dataclass
class Bench:
    """What the parts share."""

    folder: Path
    quick: bool
    mode: str
    threads: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, question: str, case: str, part: str, what: str, **values: Any) -> None:
        """Keep a row."""
        self.rows.append(
            {
                "question": question,
                "case": case,
                "part": part,
                "what": what,
                "mode": self.mode,
                "threads": self.threads,
                "clock": "processor" if self.threads == 1 else "wall",
                **values,
            }
        )

    def clock(self) -> float:
        """Seconds: of the processor with one thread, by the wall with more."""
        return time.process_time() if self.threads == 1 else time.perf_counter()

    def spent(self, function: Callable[[], Any]) -> float:
        """Seconds of a call."""
        start = self.clock()
        function()
        return self.clock() - start


@dataclass
class Ours:
    """A run of ours, ready for its first step."""

    run: Any
    recipe: Any
    loader: Any
    epoch: int = 0

    def batches(self) -> Iterator[Any]:
        """The batches of the next epoch. Nothing is read before it begins, so that its first ones are timed too."""
        self.epoch += 1
        yield from self.loader.epoch(self.epoch)

    def step(self, batch: Any) -> None:
        """What the training loop does with a batch; the loss of the step before is read meanwhile."""
        output = self.recipe.step(batch)
        self.run.update.take(output.loss)
        self.recipe.after_step(batch, output)


@contextmanager
def prepared(bench: Bench, name: str, data: Any, **options: Any) -> Iterator[Ours]:
    """A run of ours as `sela_ext.train` makes it, up to its first step."""
    from sela_ext.training.machine import Interrupt, torch_settings
    from sela_ext.training.options import make_options
    from sela_ext.training.recipes import RECIPES
    from sela_ext.training.resolve import resolve
    from sela_ext.training.run import make_run
    from sela_ext.training.run_folder import RunFolder
    from sela_ext.training.snapshot import first_state
    from sela_ext.training.split import choose_images

    given = {"threads": bench.threads, "progress": False, "half_resolution": 0.0, "epochs": 10, **options}
    chosen = make_options(given)
    folder = RunFolder.check(bench.folder / name, resume=False, overwrite=False, data=data)
    images = choose_images(data, chosen)
    plan = resolve(chosen, set(given), images.train, digits=isinstance(data, str) and data == "digits")
    folder.create()
    with ExitStack() as stack:
        stack.enter_context(torch_settings(plan.options.threads))
        run = make_run(plan, images, folder, stack.enter_context(Interrupt()))
        run.state.update(first_state())
        recipe = RECIPES[plan.options.method](run)
        run.labels = recipe.first_labels()
        loader = run.make_loader(recipe.views())
        stack.callback(loader.close)
        recipe.begin()
        run.labels = recipe.relabel(None).labels
        yield Ours(run, recipe, loader)


def agree(case: str, ours: Ours, plain: PlainLoop) -> float:
    """The difference of the losses of one batch, in float32.

    Raises:
        DisagreementError: it is not rounding.
    """
    run = ours.run
    batch = next(iter(ours.loader.epoch(0)))
    images = batch.images.float()
    with torch.no_grad():
        logits = run.network.heads.split(run.network.heads(run.network(images)))
        losses = [torch.nn.functional.cross_entropy(z, t) for z, t in zip(logits, run.targets(batch), strict=True)]
        kept, plain.dtype = plain.dtype, torch.float32
        theirs = float(plain.loss(images, batch.index))
        plain.dtype = kept
    difference = abs(float(torch.stack(losses).mean()) - theirs)
    if not difference <= AGREE:
        raise DisagreementError(
            f"{case}: expected the same loss within {AGREE}, found a difference of {difference:.2g}"
        )
    return difference


def in_turn(bench: Bench, competitors: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Median images per second of each; a call says how many images it was."""
    rates: dict[str, list[float]] = {name: [] for name in competitors}
    for function in competitors.values():
        function()
    for _ in range(rounds):
        for name, function in competitors.items():
            start = bench.clock()
            count = function()
            rates[name].append(count / (bench.clock() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def steps_of(bench: Bench, case: str, ours: Ours, images: Any, *, batches: int, rounds: int, crop: bool) -> PlainLoop:
    """Rates of the step and of its parts, ours and theirs."""
    run, opt = ours.run, ours.run.options
    sgd = {key: getattr(opt, key) for key in ("lr", "momentum", "nesterov", "weight_decay")}
    labels = torch.from_numpy(run.labels).long()
    given = (run.network, images, run.plan.augment, labels, opt.batch_size, sgd, run.arithmetic.dtype)
    workers = 0 if bench.threads == 1 else bench.threads
    plains = {
        names.PLAIN: PlainLoop(*given, workers=workers, crop=crop),
        names.PLAIN_LAST: PlainLoop(*given, channels_last=True, workers=workers, crop=crop),
    }
    differences = {what: agree(case, ours, plain) for what, plain in plains.items()}
    print(f"\n{case}: the losses of a batch differ by {max(differences.values()):.1e}", flush=True)

    batch = next(iter(ours.loader.epoch(0)))
    fixed = {what: next(iter(plain.batches())) for what, plain in plains.items()}

    def our_whole() -> int:
        seen = 0
        with closing(ours.batches()) as some:
            for one in islice(some, batches):
                ours.step(one)
                seen += len(one.index)
        return seen

    def our_data() -> int:
        return sum(len(one.index) for one in ours.batches())

    def our_compute() -> int:
        for _ in range(batches):
            ours.step(batch)
        return batches * opt.batch_size

    def their_whole(plain: PlainLoop) -> int:
        seen = 0
        for pictures, index in islice(plain.batches(), batches):
            plain.step(pictures, index)
            seen += len(index)
        return seen

    def their_data(plain: PlainLoop) -> int:
        return sum(len(index) for _, index in islice(plain.batches(), batches))

    def their_compute(plain: PlainLoop, what: str) -> int:
        for _ in range(batches):
            plain.step(*fixed[what])
        return batches * opt.batch_size

    for part, mine, others in (
        (names.WHOLE, our_whole, {w: lambda p=p: their_whole(p) for w, p in plains.items()}),
        (names.COMPUTE, our_compute, {w: lambda p=p, w=w: their_compute(p, w) for w, p in plains.items()}),
        (names.DATA, our_data, {names.PLAIN: lambda: their_data(plains[names.PLAIN])}),
    ):
        rates = in_turn(bench, {names.OURS: mine, **others}, rounds)
        for what, rate in rates.items():
            bench.add(
                "rate",
                case,
                part,
                what,
                images_per_second=rate,
                batch_size=opt.batch_size,
                network=run.network.name,
                precision=opt.precision,
                image_size=run.plan.augment.size,
                loss_difference=differences.get(what, 0.0),
            )
    return plains[names.PLAIN]


def shares_of(bench: Bench, case: str, ours: Ours, plain: PlainLoop, *, batches: int, evaluation: bool) -> None:
    """What an epoch of ours spends beside its steps; and the plain loop's label pass, which grows with the images."""
    from sela_ext.training import labelling

    run, opt, recipe = ours.run, ours.run.options, ours.recipe
    rate = names.rate(bench.rows, case, names.WHOLE, names.OURS)
    assert rate is not None
    epoch = len(run.source) / rate
    waited, begun = ours.loader.wait_seconds, time.perf_counter()
    with closing(ours.batches()) as some:
        for batch in islice(some, batches):
            ours.step(batch)
        wait = (ours.loader.wait_seconds - waited) / (time.perf_counter() - begun)
    heads = run.network.heads

    def passed() -> Any:
        return labelling.label_pass(
            heads,
            recipe.bank.embeddings,
            recipe.bank.valid,
            run.labels,
            lam=opt.lam,
            tol=opt.label_tol,
            threads=bench.threads,
            start=recipe.potentials,
        )

    found = passed()
    seconds = min(bench.spent(passed) for _ in range(3))
    solving = min(solver_seconds(bench, passed) for _ in range(3))
    common_values = {"images": len(run.source), "heads": len(heads.clusters), "epoch_seconds": epoch}

    def add(part: str, value: float, what: str = names.OURS, share: float | None = None) -> None:
        of_epoch = value / epoch if share is None else share
        bench.add("share", case, part, what, share=of_epoch, seconds=value, **common_values)

    add(names.WAIT, wait * epoch, share=wait)
    add(names.LABELS, seconds)
    add(names.SOLVER, min(solving, seconds))
    if evaluation:
        add(names.EVALUATION, bench.spent(recipe.evaluate))
    some_images = min(PLAIN_IMAGES, len(run.source))
    plain.looking.images = plain.looking.images[:some_images]
    collect = bench.spent(lambda: setattr(plain, "seen", plain.collect())) * len(run.source) / some_images
    solve = bench.spent(lambda: plain.solve(plain.seen, opt.lam, opt.label_tol)) * len(run.source) / some_images
    add(names.LABELS, collect + solve, names.PLAIN)
    add(names.SOLVER, solve, names.PLAIN)
    print(f"  label pass: {found.describe()}", flush=True)


def solver_seconds(bench: Bench, passed: Callable[[], Any]) -> float:
    """Seconds of a label pass that the assignments take, all heads together."""
    from sela_ext.training import labelling

    spent = []
    solve = labelling.assign_silently

    def timed(*given: Any, **options: Any) -> Any:
        start = bench.clock()
        found = solve(*given, **options)
        spent.append(bench.clock() - start)
        return found

    labelling.assign_silently = timed
    try:
        passed()
    finally:
        labelling.assign_silently = solve
    return sum(spent)


def small(bench: Bench) -> None:
    """32 px, the fast recipe."""
    if bench.quick:
        data: Any = "digits"
    else:
        data = small_images(SMALL_IMAGES)
    with prepared(bench, "small", data, clusters=[128] * 4 + [10] * 8 if not bench.quick else 10) as ours:
        images = [ours.run.source.read(i) for i in range(len(ours.run.source))]
        plain = steps_of(
            bench,
            names.SMALL,
            ours,
            images,
            batches=4 if bench.quick else 8,
            rounds=2 if bench.quick else 3,
            crop=False,
        )
        shares_of(bench, names.SMALL, ours, plain, batches=24, evaluation=True)


def small_images(count: int) -> np.ndarray[Any, Any]:
    """Grey images uint8 [N, 28, 28, 1]: of Fashion-MNIST, or blurred noise."""
    from sela_ext.data.opening import open_source

    if FASHION.is_dir():
        source = open_source(FASHION)
        return np.stack([source.read(i) for i in range(min(count, len(source)))])
    coarse = torch.rand(count, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (28, 28), mode="bilinear")
    return (fine * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def large(bench: Bench) -> None:
    """224 px from JPEG files, a ResNet-18."""
    from PIL import Image

    folder = bench.folder / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for i in range(LARGE_QUICK if bench.quick else LARGE_IMAGES):
        coarse = rng.integers(0, 256, (24, 32, 3), np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        paths.append(str(folder / f"{i:04}.jpg"))
        image.save(paths[-1], quality=90)
    options = {
        "model": "resnet18",
        "image_size": 224,
        "batch_size": 16 if bench.quick else 32,
        "clusters": 10,
        "heads": 10,
    }
    with prepared(bench, "large", paths, augment="sela", label_source="bank", init="predictions", **options) as ours:
        plain = steps_of(
            bench, names.LARGE, ours, paths, batches=1 if bench.quick else 2, rounds=1 if bench.quick else 2, crop=True
        )
        if not bench.quick:
            shares_of(bench, names.LARGE, ours, plain, batches=3, evaluation=False)


def report(bench: Bench) -> None:
    """Print what the rows say."""
    for case in dict.fromkeys(row["case"] for row in bench.rows):
        rates = [row for row in bench.rows if row["case"] == case and row["question"] == "rate"]
        clock = "of processor time" if bench.threads == 1 else "by the wall clock"
        common.table(
            f"{case}: images per second {clock} ({rates[0]['network']}, {rates[0]['precision']}, "
            f"{rates[0]['batch_size']} per batch)",
            ("", "", "images/s"),
            [(row["part"], row["what"], row["images_per_second"]) for row in rates],
        )
        shares = [row for row in bench.rows if row["case"] == case and row["question"] == "share"]
        if shares:
            common.table(
                f"{case}: of an epoch of {shares[0]['images']:,} images, {shares[0]['epoch_seconds']:.2f} s",
                ("", "", "seconds", "share"),
                [(row["part"], row["what"], row["seconds"], f"{row['share']:.2%}") for row in shares],
            )
    common.table("Targets, from the rows of this run", names.HEADER, names.lines(bench.rows))


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.set_defaults(threads=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=PARTS, help=f"run only these: {', '.join(PARTS)}")
    options = parser.parse_args()
    facts = common.machine() | {"load": round(os.getloadavg()[0], 2)}
    common.print_machine(facts, options.threads)
    start = time.perf_counter()
    mode = "only" if options.only else "quick" if options.quick else "full"
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.quick, mode, options.threads)
        for part, function in zip(PARTS, (small, large), strict=True):
            if part in (options.only or PARTS):
                try:
                    function(bench)
                except DisagreementError as error:
                    raise SystemExit(f"no agreement, {error}") from error
    report(bench)
    print(f"\n{time.perf_counter() - start:.0f} s in all, load now {os.getloadavg()[0]:.1f}")
    if not options.no_record:
        print(f"{len(bench.rows)} rows appended to {common.record('training', bench.rows, facts)}")


if __name__ == "__main__":
    main()
