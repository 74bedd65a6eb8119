"""Started by test_shared_work.py: ranks that exchange rows, fill a bank, label, take turns, and say what they got."""

import sys
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from sela_ext.assign import shard_rows
from sela_ext.data import Augment, Loader, open_source
from sela_ext.errors import DataError, OptionError
from sela_ext.models import Heads, Network, build_backbone, build_vector_backbone
from sela_ext.training.bank import Bank
from sela_ext.training.embedding import Arithmetic, embed, to_first, to_owners
from sela_ext.training.labelling import label_pass
from sela_ext.training.launch import launch
from sela_ext.training.ranks import Ranks
from sela_ext.training.turns import turns

CPU = torch.device("cpu")
FLOAT = Arithmetic(CPU, torch.float32)
IMAGES = 1001


def images():
    """Noise, a few of them unreadable where asked for."""
    generator = np.random.Generator(np.random.Philox(7))
    return generator.integers(0, 256, (IMAGES, 16, 16), dtype=np.uint8)


def network():
    torch.manual_seed(3)
    found = build_backbone("small-resnet", channels=1, image_size=(16, 16))
    return Network(found.module, found.feature_dim, [10, 7], head_kind="cosine", channels_in=1, name="small-resnet")


def looked_at(ranks, train_mode, model=None):
    source = open_source(images())
    return embed(
        model or network(), source, Augment.none(16), FLOAT, batch_size=128, train_mode=train_mode, keep_features=True,
        seed=5, threads=1, ranks=ranks,
    )  # fmt: skip


def rows(ranks):
    """Rows that are dealt out, gathered, and brought to the first."""
    own = torch.arange(ranks.rank * 100, ranks.rank * 100 + 5 + ranks.rank, dtype=torch.float16)[:, None]
    target = torch.arange(len(own)) % ranks.world_size
    nobody = torch.zeros((0, 2)) if ranks.rank else torch.ones((3, 2))
    return {
        "dealt": ranks.deal(own, target),
        "gathered": ranks.gather_rows(own),
        "first": list(ranks.rows_to_first(own)),
        "empty": ranks.gather_rows(nobody),
        "least": ranks.least(5.0 - ranks.rank),
        "totals": ranks.totals([1.0, float(ranks.rank)]),
        "bytes": ranks.broadcast_bytes(bytes(range(256)) if ranks.first else None),
        "nothing": ranks.broadcast_bytes(None),
        "led": ranks.lead(lambda: {"by": ranks.rank}),
    }


def failures(ranks):
    """The same error on all ranks, whichever has it."""
    found = []
    for victim, error in ((None, OptionError("out: no")), (1, DataError("image 7: no"))):

        def work(victim=victim, error=error):
            if victim in (None, ranks.rank):
                raise error

        try:
            ranks.together(work)
        except (OptionError, DataError) as caught:
            found.append((type(caught).__name__, str(caught), caught.of_all_ranks))
    return {"failures": found, "fine": ranks.together(lambda: ranks.rank)}


def bank(ranks):
    """What steps of all ranks write: every image twice, the second time another embedding."""
    kept = Bank(IMAGES, CPU, ranks)
    empty = to_owners(looked_at(ranks, True), IMAGES, ranks)
    kept.fill(torch.zeros_like(empty.embeddings), torch.zeros_like(empty.valid))
    for epoch in range(2):
        order = torch.from_numpy(np.random.Generator(np.random.Philox(epoch)).permutation(IMAGES))
        for start in range(0, IMAGES, 60):
            mine = order[start : start + 60][ranks.rank :: ranks.world_size]
            kept.write(mine, (mine + 2000 * epoch)[:, None].expand(-1, empty.embeddings.shape[1]).float())
    whole = kept.state()
    again = Bank(IMAGES, CPU, ranks)
    again.load(ranks.broadcast(whole))
    return {"bank": whole, "back": again.embeddings, "own": kept.embeddings}


def labels(ranks):
    """A label pass from a first look, of all images and of some."""
    seen = looked_at(ranks, True)
    owned = to_owners(seen, IMAGES, ranks)
    whole = to_first(seen, IMAGES, ranks)
    torch.manual_seed(1)
    heads = Heads(owned.embeddings.shape[1], [10, 300], "cosine", 0.07)
    previous = np.zeros((2, IMAGES), np.int32)
    options = {"lam": 25.0, "tol": 1e-4, "threads": 1, "truth": np.arange(IMAGES) % 10, "ranks": ranks}
    result = label_pass(heads, owned.embeddings, owned.valid, previous, **options)
    some = owned.valid.clone()
    some[::50] = False
    partial = label_pass(heads, owned.embeddings, some, previous, **options)
    own = shard_rows(IMAGES, ranks.world_size, ranks.rank)
    even = owned.valid & (torch.arange(own.start, own.stop) % 20 > 0)
    bounded = label_pass(heads, owned.embeddings, even, previous, size_bounds=[1.0, 1.5], which=[0], **options)
    estimated = label_pass(heads, owned.embeddings, owned.valid, previous, marginals="estimated", **options)
    return {
        "embeddings": whole.embeddings,
        "features": whole.features,
        "labels": torch.from_numpy(result.labels),
        "confidence": torch.from_numpy(result.confidence),
        "potentials": [torch.from_numpy(result.potentials[head]) for head in range(2)],
        "records": [{k: v for k, v in record.items() if k != "cross_entropy"} for record in result.heads],
        "cross_entropy": [record["cross_entropy"] for record in result.heads],
        "spread": result.spread,
        "masked": (result.masked, partial.masked),
        "partial": torch.from_numpy(partial.labels),
        "bounded": torch.from_numpy(bounded.labels[0]),
        "estimated": torch.from_numpy(estimated.labels),
    }


def vectors(ranks):
    """Vectors that are read where they lie, some of them no numbers: as ranks own them, and as the first has them."""
    lying = np.random.Generator(np.random.Philox(8)).normal(size=(IMAGES, 12)).astype(np.float32)
    lying[5, 3], lying[700] = np.nan, np.inf
    source = open_source(lying)
    backbone = build_vector_backbone("identity", torch.zeros(12), torch.tensor(2.0))
    plain = Network(backbone.module, 12, [10, 7], head_kind="cosine", name="identity")
    projected = Network(backbone.module, 12, [10, 7], projection=6, head_kind="cosine", name="identity")
    torch.manual_seed(2)
    heads = Heads(12, [10, 7], "cosine", 0.1)
    found = []
    for one in (plain, projected):
        torch.manual_seed(4)
        for parameter in one.parameters():
            parameter.data.normal_()
        seen = embed(
            one, source, Augment.none(16), FLOAT, batch_size=128, keep_features=True, threads=1, on_bad_image="skip",
            ranks=ranks,
        )  # fmt: skip
        owned, own = to_owners(seen, IMAGES, ranks), shard_rows(IMAGES, ranks.world_size, ranks.rank)
        again = to_first(replace(owned, rows=torch.arange(own.start, own.stop)), IMAGES, ranks)
        found += [to_first(seen, IMAGES, ranks), again]
        if one is plain:
            result = label_pass(
                heads, owned.embeddings, owned.valid, np.zeros((2, IMAGES), np.int32), lam=10.0, tol=1e-3, threads=1,
                ranks=ranks,
            )  # fmt: skip
    return {
        "vectors": [(one.features.cpu(), one.embeddings.cpu(), one.valid) for one in found],
        "vector labels": torch.from_numpy(result.labels),
        "vector masked": result.masked,
    }


def norms_over_ranks(ranks):
    """A look at all images in train mode, with batch norms that steps have look at the images of all ranks."""
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    seen = looked_at(ranks, True, shared)
    left = [name for name, module in shared.named_modules() if "forward" in vars(module)]
    return {"with shared norms": to_first(seen, IMAGES, ranks).embeddings, "left": left}


def unreadable(ranks):
    """Eight of 400 images that cannot be read, seven of them together: within a limit of 2%, beyond one of 1.75%."""
    bad = (0, 10, 20, 30, 40, 50, 60, 330)

    class Spoiled(torch.utils.data.Dataset):
        def __len__(self):
            return 400

        def __getitem__(self, index):
            if index in bad:
                raise OSError("no picture")
            return images()[index]

    found = []
    for limit in (0.02, 0.0175):
        try:
            seen = embed(
                network(), open_source(Spoiled()), Augment.none(16), FLOAT, batch_size=128 // ranks.world_size,
                threads=1, on_bad_image="skip", max_bad_fraction=limit, ranks=ranks,
            )  # fmt: skip
            found.append(sorted(index for index, _, _ in seen.bad))
        except DataError as error:
            found.append(str(error))
    return {"unreadable": found, "bad": list(bad)}


def steps(ranks):
    """Images, place and weight of every step of an epoch from the start, from the middle, and from its end."""
    found = {}
    for name, count, batch, position, order in (
        ("whole", 100, 12, 0, None),
        ("rest", 100, 12, 48, None),
        ("done", 100, 12, 100, None),
        ("odd", 100, 12, 0, np.arange(25, dtype=np.int64) % 7),
    ):
        loader = Loader(
            images()[:count], batch_size=batch // ranks.world_size, augment=Augment.none(16), seed=1, shuffle=True,
            threads=1, rank=ranks.rank, world_size=ranks.world_size,
        )  # fmt: skip
        found[name] = [
            (None if turn.batch is None else turn.batch.index.tolist(), turn.position, turn.images, turn.share)
            for turn in turns(
                loader, ranks, epoch=2, position=position, order=order, batch_size=batch, drop_last=False,
                uneven=name == "rest",
            )
        ]  # fmt: skip
        loader.close()
    return {"steps": found}


def work():
    """Everything, on every rank; rank 0 gives what all of them found."""
    torch.set_num_threads(1)
    with Ranks.join(CPU, timeout=60, silence=60) as ranks:
        found = {}
        for part in (rows, failures, bank, labels, vectors, norms_over_ranks, unreadable, steps):
            found.update(part(ranks))
        return ranks.gather(found)


if __name__ == "__main__":
    torch.save(launch(work, (), int(sys.argv[1])) if int(sys.argv[1]) > 1 else work(), sys.argv[2])
