"""What the parts of one training run share, and how it is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sela_ext.assign import shard_rows
from sela_ext.data import Augment, Loader, Source, VectorLoader
from sela_ext.data.loader import Batch
from sela_ext.data.residency import ResidentImages, to_device
from sela_ext.errors import OptionError
from sela_ext.kernels import IndexStore, device_verdict
from sela_ext.kernels.device import indexed, on_card, usable
from sela_ext.models import Backbone, Network, build_backbone, build_vector_backbone
from sela_ext.training.averaging import WeightAverage
from sela_ext.training.compilation import compile_backbone, uncompiled
from sela_ext.training.crops import parse_crops
from sela_ext.training.embedding import Arithmetic, Embedded, embed, open_index, to_first, to_owners
from sela_ext.training.machine import Interrupt
from sela_ext.training.optimizers import build_optimizer
from sela_ext.training.options import Options
from sela_ext.training.progress import Stage, no_stage
from sela_ext.training.ranks import Ranks
from sela_ext.training.resolve import Plan
from sela_ext.training.run_folder import RunFolder
from sela_ext.training.small_maps import unmet_weights
from sela_ext.training.split import Images, has_labels
from sela_ext.training.update import Update
from sela_ext.training.vector_options import scale_of

Found = TypeVar("Found")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StepOutput:
    """The forward pass of a step.

    Attributes:
        loss: scalar; the loop takes its gradient.
        embedding: what the heads saw, [B, E], or [V B, E] for V views; `Recipe.after_step` may keep it.
        parts: further scalars for the log, by name.
    """

    loss: Tensor
    embedding: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Run:
    """One training run.

    Attributes:
        plan: options without any "auto", and what follows from them.
        images: what is trained on, held out and judged.
        folder: where results go.
        interrupt: what a signal does.
        arithmetic: device and precision.
        network: backbone, projection and heads.
        backbone: what was asked for by `model`.
        update: from losses to steps of the optimiser; holds optimiser, loss scaler and averaged network.
        indexes: of the loaders of "train", "held" and "judged" images.
        half_resolution: share of the steps at half resolution.
        drop_last: whether the last, short batch of an epoch is left out.
        per_epoch: images of an epoch.
        ranks: the processes that share the run.
        replica: the network as torch's DistributedDataParallel has it, which averages gradients over ranks; None with
            one process.
        residents: images that are kept on the device, by the same names; see `sela_ext.training.resident`.
        stage: shows that something other than steps is going on, see `sela_ext.training.progress`.
        labels: int32 [heads, N]; a label pass replaces them, and nothing changes them in place.
        state: counters; saved with every checkpoint.
        at_end: whether training is over: the evaluation then makes what the report shows, too.
    """

    plan: Plan
    images: Images
    folder: RunFolder
    interrupt: Interrupt
    arithmetic: Arithmetic
    network: Network
    backbone: Backbone
    update: Update
    indexes: Mapping[str, IndexStore | None]
    half_resolution: float
    drop_last: bool
    per_epoch: int
    ranks: Ranks = field(default_factory=Ranks)
    replica: nn.Module | None = None
    residents: dict[str, ResidentImages] = field(default_factory=dict)
    stage: Stage = no_stage
    labels: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    state: dict[str, Any] = field(default_factory=dict)
    at_end: bool = False
    _table: tuple[NDArray[np.int32], Tensor] | None = field(default=None, repr=False)

    @property
    def evaluated(self) -> Network:
        """The network that is evaluated and kept: the average where there is one, else the one that is trained."""
        return self.network if self.update.average is None else self.update.average.network

    @property
    def options(self) -> Options:
        """The options, none of them "auto"."""
        return self.plan.options

    @property
    def source(self) -> Source:
        """The N training images."""
        return self.images.train

    @property
    def truth(self) -> NDArray[np.int64] | None:
        """True labels int64 [N], -1 where unknown; for records and metrics only. None where none are known."""
        return self.source.labels if has_labels(self.source) else None

    @property
    def share_done(self) -> float:
        """Share of the run that is done, by images or by the clock; 1 and more at the end."""
        if self.plan.budget_seconds is not None:
            return float(self.state["seconds"] / self.plan.budget_seconds)
        return float(self.state["seen"] / (self.per_epoch * self.options.epochs))

    @property
    def epochs_done(self) -> float:
        """Epochs that are done, with the part of the present one."""
        return float(self.state["seen"] / self.per_epoch)

    def targets(self, batch: Batch) -> Tensor:
        """Labels of a batch's images, int64 [heads, B] on the device, from a table that is kept there."""
        if self._table is None or self._table[0] is not self.labels:
            self._table = self.labels, to_device(self.labels, self.arithmetic.device)
        return self._table[1][:, batch.placed].long()

    def make_loader(self, views: Sequence[Augment]) -> Loader | VectorLoader:
        """The loader of the training steps, with one view of every image per entry of `views`."""
        opt, ranks = self.options, self.ranks
        if self.plan.vectors is not None:
            return VectorLoader(
                self.source,
                batch_size=opt.batch_size // ranks.world_size,
                rank=ranks.rank,
                world_size=ranks.world_size,
                view=self.plan.vectors,
                views=len(views),
                seed=opt.seed,
                shuffle=True,
                threads=opt.threads,
                drop_last=self.drop_last,
                device=self.arithmetic.device,
                on_bad_image=opt.on_bad_image,
                max_bad_fraction=opt.max_bad_fraction,
            )
        return Loader(
            self.source,
            batch_size=opt.batch_size // ranks.world_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            augment=views[0] if len(views) == 1 else list(views),
            seed=opt.seed,
            shuffle=True,
            dtype=self.arithmetic.dtype,
            channels_last=True,
            threads=opt.threads,
            drop_last=self.drop_last,
            device=self.arithmetic.device,
            on_bad_image=opt.on_bad_image,
            max_bad_fraction=opt.max_bad_fraction,
            exact=opt.exact,
            exif=opt.exif,
            index=self.indexes["train"],
            resident=self.residents.get("train", False),
        )

    def embed(
        self, augment: Augment, *, train_mode: bool = False, epoch: int = 0, keep_features: bool = False
    ) -> Embedded:
        """Run the network over all training images; see `sela_ext.training.embedding.embed`.

        Returns:
            The rows that this rank owns, in order: all with one process.
        """
        opt = self.options
        if not train_mode:
            self.share_statistics(self.network)
        with self.stage("looking at all images", len(self.source)) as advance:
            seen = embed(
                self.network,
                self.source,
                augment,
                self.arithmetic,
                batch_size=max(64, min(512, opt.batch_size)),
                train_mode=train_mode,
                keep_features=keep_features,
                seed=opt.seed,
                epoch=epoch,
                threads=opt.threads,
                on_bad_image=opt.on_bad_image,
                max_bad_fraction=opt.max_bad_fraction,
                exact=opt.exact,
                exif=opt.exif,
                index=self.indexes["train"],
                resident=self.residents.get("train"),
                advance=advance,
                ranks=self.ranks,
            )
            return to_owners(seen, len(self.source), self.ranks)

    def whole(self, seen: Embedded) -> Embedded:
        """What all ranks own, in order, on rank 0; the others get no rows."""
        if not self.ranks.several:
            return seen
        own = shard_rows(len(self.source), self.ranks.world_size, self.ranks.rank)
        rows = torch.arange(own.start, own.stop, device=seen.valid.device)
        return to_first(replace(seen, rows=rows), len(self.source), self.ranks)

    def on_first(self, work: Callable[[], Found]) -> Found:
        """Have rank 0 do something as if it were alone, and give all ranks what came of it; see `Ranks.lead`."""

        def alone() -> Found:
            ranks, self.ranks = self.ranks, Ranks()
            try:
                return work()
            finally:
                self.ranks = ranks

        return self.ranks.lead(alone) if self.ranks.several else work()

    def close(self) -> None:
        """Close the indexes, and let go of images on the device.

        Whoever keeps the run, as the traceback of an error does, does not keep them.
        """
        for images in self.residents.values():
            images.close()
        for store in self.indexes.values():
            if store is not None:
                store.close()

    def replicate(self) -> None:
        """Have gradients averaged over ranks from now on; all ranks get rank 0's weights."""
        if self.ranks.several:
            examples = _examples(self.plan, self.source, self.half_resolution, self.arithmetic.device, self.ranks)
            self.replica = _replicate(self.network, next(examples)[:2], self.arithmetic.device)

    def step(self, forward: Callable[[Batch], StepOutput], batch: Batch) -> StepOutput:
        """Do the forward pass of a step such that the backward pass will average the gradients over ranks."""
        if self.replica is None:
            return forward(batch)
        loss, embedding, parts = self.replica(lambda: forward(batch))
        return StepOutput(loss, embedding, parts)

    def share_statistics(self, network: nn.Module) -> None:
        """Give every rank the batch norms' statistics of rank 0, before a network looks at images in eval mode."""
        self.ranks.broadcast_tensors(list(network.buffers()))


class _Replica(nn.Module):
    """The module that DistributedDataParallel holds: its forward pass is that of a whole step, heads and loss too."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Callable[[], StepOutput]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What `work` gives, which runs the network, in parts among which tensors are found."""
        output = work()
        return output.loss, output.embedding, output.parts


def make_run(plan: Plan, images: Images, folder: RunFolder, interrupt: Interrupt, ranks: Ranks | None = None) -> Run:
    """Build network and optimiser, and look where entry points of JPEG files are kept.

    Raises:
        OptionError: options that the network cannot fulfil.
        ResourceError: the device cannot be used.
    """
    opt, source = plan.options, images.train
    ranks = ranks or Ranks()
    device = device_of(opt.device, ranks)
    first_use(device, folder.log)
    torch.manual_seed(opt.seed)
    size = plan.augment.size
    if source.vectors is not None:
        mean = source.vectors.statistics(opt.threads).mean
        scale = scale_of(source.vectors, opt.feature_scale, opt.threads)
        backbone = build_vector_backbone(opt.model, torch.from_numpy(mean), torch.from_numpy(scale))
    else:
        backbone = build_backbone(opt.model, channels=source.channels, image_size=(size, size))
    half_resolution = _half_resolution(plan, backbone)
    if device.type == "cpu" and opt.precision == "bfloat16" and source.vectors is None:
        plan = _without_small_maps(plan, backbone, half_resolution)
        opt = plan.options
    arithmetic = Arithmetic(device, _DTYPES[opt.precision])
    network = Network(
        backbone.module,
        backbone.feature_dim,
        opt.clusters,
        projection=opt.projection,
        head_kind=opt.head_kind,
        temperature=opt.temperature,
        channels_in=backbone.channels_in,
        name=backbone.name,
        rotation=opt.rotnet,
    ).to(arithmetic.device)
    network.to(memory_format=torch.channels_last)
    network.train()
    # Entry points of JPEG files, kept beside the run: every pass over the images, and every resume, finds them.
    parts = {"train": source, "held": images.held, "judged": None if images.judged is images.held else images.judged}
    # The last, short batch of an epoch is left out when it is less than half a batch: its statistics are noise.
    count, short = len(source), len(source) % opt.batch_size
    # The sampler of clusters sees to it itself, so that all clusters are drawn equally often.
    drop_last = opt.sampler == "images" and count > opt.batch_size and 0 < short < opt.batch_size / 2
    if opt.compile:
        reason = compile_backbone(
            network, _examples(plan, source, half_resolution, arithmetic.device, ranks), arithmetic
        )
        if reason:
            plan.reasons["compile"] = f"not used: {reason}"
    if opt.sync_batch_norm:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    if ranks.rank:  # the same weights everywhere, but other dropout
        torch.manual_seed((opt.seed + 1_000_003 * ranks.rank) % 2**63)
    update = Update(
        network,
        build_optimizer(opt, network),
        torch.amp.GradScaler(arithmetic.device.type, enabled=arithmetic.dtype is torch.float16),
        opt.accumulate,
        WeightAverage(network, opt.ema) if opt.ema else None,
    )
    return Run(
        plan=plan,
        images=images,
        folder=folder,
        interrupt=interrupt,
        arithmetic=arithmetic,
        network=network,
        backbone=backbone,
        update=update,
        indexes={
            name: open_index(part, opt.index, folder.index, name, ranks.rank)
            for name, part in parts.items()
            if part is not None
        },
        half_resolution=half_resolution,
        drop_last=drop_last,
        per_epoch=count - short if drop_last else count,
        ranks=ranks,
    )


def device_of(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank.

    Raises:
        OptionError: one device was named for several ranks.
    """
    device = torch.device(name)
    if not ranks.several or device.type != "cuda":
        return device
    if ":" in name:
        raise OptionError(f"device: expected cuda with {ranks.world_size} ranks, one device each; found {name}")
    return ranks.device


def _replicate(network: Network, example: Tensor, device: torch.device) -> nn.Module:
    """The network with gradients that are averaged over ranks while the backward pass goes on.

    Parameters that a step leaves without a gradient are looked for only where there are some: it takes time.
    """
    from torch.nn.parallel import DistributedDataParallel

    # Rank 0's batch norms count, and are given to all where they are used: not in every step.
    known = inspect.signature(DistributedDataParallel).parameters
    unsynced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.14
    options: dict[str, Any] = {unsynced: False}
    return DistributedDataParallel(
        _Replica(network),
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=_has_idle_parameters(network, example),
        **options,
    )


def first_use(device: torch.device, log: Callable[[str], None]) -> None:
    """Have a CUDA device checked before any work: one that the check breaks costs nothing yet. Logs the verdict.

    Raises:
        ResourceError: the device cannot be used.
    """
    if on_card(device):
        place = indexed(device)
        usable(place)
        log(f"device {device_verdict(place)}")


def _examples(
    plan: Plan, source: Source, half_resolution: float, device: torch.device, ranks: Ranks
) -> Iterator[Tensor]:
    """A batch of every shape that the network of a rank sees in training."""
    opt = plan.options
    batch = min(opt.batch_size, len(source)) // ranks.world_size
    if source.vectors is not None:
        yield torch.zeros(batch, source.vectors.width, device=device)
        return
    if opt.crops is not None:
        shapes = [(group.count * batch, group.size) for group in parse_crops(opt.crops)]
    else:
        shapes = [(batch * (4 if opt.rotnet else 1), side) for side in _sides(plan, half_resolution)]
    for rows, side in shapes:
        images = torch.zeros(rows, source.channels, side, side, device=device)
        yield images.contiguous(memory_format=torch.channels_last)


def _sides(plan: Plan, half_resolution: float) -> list[int]:
    """Heights and widths of the images that the network sees in training, pixels."""
    if plan.options.crops is not None:
        return [group.size for group in parse_crops(plan.options.crops)]
    size = plan.augment.size
    return [size, size // 2] if 0 < half_resolution < 1 else [size // 2 if half_resolution else size]


def _without_small_maps(plan: Plan, backbone: Backbone, half_resolution: float) -> Plan:
    """The plan with float32, where bfloat16 would compute wrong gradients, see Note [Weights that meet nothing].

    Raises:
        OptionError: bfloat16 was asked for.
    """
    problem = unmet_weights(backbone.module, backbone.channels_in, _sides(plan, half_resolution))
    if not problem:
        return plan
    if "precision" in plan.asked:
        raise OptionError(
            f"precision: expected float32 on the CPU for maps this small ({problem}), of which bfloat16 computes wrong "
            "gradients; leave precision out, or take larger images"
        )
    plan.reasons["precision"] = f"bfloat16 computes wrong gradients of maps this small on the CPU: {problem}"
    return replace(plan, options=replace(plan.options, precision="float32"))


def _half_resolution(plan: Plan, backbone: Backbone) -> float:
    """Share of the steps at half resolution; none where the network takes one size only.

    Raises:
        OptionError: it was asked for, and the network cannot.
    """
    share, half = plan.options.half_resolution, plan.augment.size // 2
    if not share:
        return 0.0
    try:
        found = build_backbone(backbone.module, channels=backbone.channels_in, image_size=(half, half))
        if found.feature_dim == backbone.feature_dim:
            return share
        problem = f"{found.feature_dim} features instead of {backbone.feature_dim}"
    except OptionError as error:
        problem = str(error)
    if "half_resolution" in plan.asked:
        raise OptionError(f"half_resolution: expected a network that takes {half} x {half} too; {problem}")
    plan.reasons["half_resolution"] = f"not used: the network does not take {half} x {half}"
    return 0.0


def _has_idle_parameters(network: Network, example: Tensor) -> bool:
    """Whether some parameters have no part in what the network gives for images [2, C, S, S]; nothing is changed."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    was_training = network.training
    network.eval()
    try:
        with uncompiled(network):
            embedding = network(example).float()
        total = network.heads(embedding).sum()
        if network.rotation is not None:
            total = total + network.rotation(embedding).sum()
        return any(gradient is None for gradient in torch.autograd.grad(total, trained, allow_unused=True))
    finally:
        network.train(was_training)
