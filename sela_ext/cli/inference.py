"""`sela evaluate`, `sela predict` and `sela embed`: what a trained network is used for."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sela_ext.cli.parser import check_can_write, result_file, result_table
from sela_ext.errors import OptionError

_SUBJECT = (
    "a run folder, one of its checkpoints, a file of released weights, NAME:WEIGHTS (resnet18:IMAGENET1K_V1, or "
    "resnet18:file.pth), random:NAME, or pixels"
)


def add_commands(commands: Any) -> None:
    """Add `evaluate`, `predict` and `embed`."""
    evaluate = commands.add_parser(
        "evaluate",
        help="judge labels and features against true labels",
        description="Cluster metrics, nearest neighbours, linear probes, probes of every layer and learning from few "
        "labels, on labelled data sets. Published figures stand beside where they exist.",
        epilog="examples: sela evaluate runs/digits | sela evaluate random:small-resnet --data digits | "
        "sela evaluate alexnet.pth --data imagenet --data places --what knn,alexnet --crops 10 --json figures.json",
    )
    evaluate.add_argument("run_folder", metavar="run", help=_SUBJECT)
    evaluate.add_argument(
        "--data",
        action="append",
        help="labelled images, as for train; TRAIN::TEST names both parts; repeat it for several sets "
        "(default: those of the run)",
    )
    evaluate.add_argument(
        "--what",
        default="clusters,knn,linear",
        help="of clusters, knn, linear, layers (or alexnet), few-shot, with commas (default clusters,knn,linear)",
    )
    evaluate.add_argument("--json", metavar="FILE", help="write the whole report here; - is standard output")
    evaluate.add_argument(
        "--k",
        type=_numbers,
        default=None,
        help="neighbours, one or several (default 20,10,50,200; the first is the figure called knn)",
    )
    evaluate.add_argument("--sigma", type=float, default=0.1, help="temperature of the neighbours' votes (default 0.1)")
    evaluate.add_argument("--pca", type=int, help="principal directions that kNN sees (default: the features)")
    evaluate.add_argument("--probe", default="logistic", help="of linear: logistic, sgd or augmented")
    evaluate.add_argument("--schedule", help="of probes by SGD: resnet, resnet-146, alexnet or alexnet-paper")
    evaluate.add_argument("--epochs", type=int, help="stretch the schedule to so many")
    evaluate.add_argument("--crops", type=int, default=1, help="test views of the layers' probes: 1 or 10")
    evaluate.add_argument("--fractions", type=_shares, default=None, help="of the labels, few-shot (default 0.01,0.1)")
    evaluate.add_argument("--fine-tune", action="store_true", help="few-shot: train the whole network too")
    evaluate.add_argument("--seed", type=int, default=0, help="of random networks, probes, subsets (default 0)")
    evaluate.add_argument("--download", action="store_true", help="fetch torchvision's weights if they are not there")
    evaluate.add_argument("--no-progress", action="store_true", help="no bar")
    predict = commands.add_parser(
        "predict",
        help="label new images by a trained network",
        description="Labels by network and potentials, as in training: the balance of the training images is kept.",
        epilog="example: sela predict runs/photos --data new/photos --out labels.csv --head best",
    )
    predict.add_argument("run_folder", metavar="run", help="a run folder, a checkpoint, or released weights")
    predict.add_argument("--data", required=True, help="images or vectors, as for train")
    predict.add_argument("--out", required=True, help=".csv (index, name, label_0, ...), .npz (labels, names) or .npy")
    predict.add_argument("--head", help="best, or a number (default: all heads)")
    embed = commands.add_parser(
        "embed",
        help="features of images by a trained network",
        description="What the network's backbone gives in eval mode, without augmentation.",
        epilog="example: sela embed runs/photos --data new/photos --out features.npy",
    )
    embed.add_argument("run_folder", metavar="run", help=_SUBJECT)
    embed.add_argument("--data", required=True, help="images or vectors, as for train")
    embed.add_argument("--out", required=True, help=".npy (float32 [N, D]) or .npz (features, names)")
    for parser, action in ((evaluate, _evaluate), (predict, _predict), (embed, _embed)):
        parser.add_argument("--image-size", type=int, help="pixels (default: as in training; 224 for photographs)")
        parser.add_argument("--batch-size", type=int, default=256, help="images per forward pass (default 256)")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        parser.add_argument("--precision", default="auto", help="auto (the run's), float32, bfloat16 or float16")
        parser.add_argument("--threads", type=int, default=0, help="processor threads (default 0: all)")
        parser.add_argument("--on-bad-image", default="raise", help="raise, or skip")
        parser.set_defaults(run=action, parser=parser)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas, found {text}") from error


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers with commas, found {text}") from error


def _network_options(given: argparse.Namespace) -> dict[str, Any]:
    names = ("image_size", "batch_size", "device", "precision", "threads", "on_bad_image")
    return {name: getattr(given, name) for name in names}


def _evaluate(given: argparse.Namespace) -> int:
    from sela_ext.inference import evaluate
    from sela_ext.inference.table import show_report

    several = {} if given.k is None else {"k": given.k}
    if given.fractions is not None:
        several["fractions"] = given.fractions
    to_stdout = given.json == "-"
    if given.json and not to_stdout:
        check_can_write(given.json, "--json")
    report = evaluate(
        given.run_folder,
        given.data,
        given.what,
        sigma=given.sigma,
        pca=given.pca,
        probe=given.probe,
        schedule=given.schedule,
        epochs=given.epochs,
        crops=given.crops,
        fine_tune=given.fine_tune,
        seed=given.seed,
        download=given.download,
        progress=not given.no_progress and not to_stdout,
        **several,
        **_network_options(given),
    )
    if to_stdout:
        print(json.dumps(report))
        return 0
    show_report(report)
    if given.json:
        with result_table(given.json) as text:
            json.dump(report, text, indent=2)
        print(f"all of it in {given.json}")
    return 0


def _predict(given: argparse.Namespace) -> int:
    import numpy as np

    from sela_ext.data import open_source
    from sela_ext.inference import predict

    head = given.head
    if head is not None and head != "best":
        try:
            head = int(head)
        except ValueError as error:
            raise OptionError(f"--head: expected best or a number, found {head}") from error
    check_can_write(given.out, "--out")
    source = open_source(given.data)
    labels = np.atleast_2d(predict(given.run_folder, source, head=head, **_network_options(given)))
    if given.out.endswith(".npz"):
        with result_file(given.out) as file:
            np.savez(file, labels=labels, names=np.asarray(source.names, dtype=np.str_))
    elif given.out.endswith(".csv"):
        from sela_ext.data.csv_file import csv_writer

        with result_table(given.out) as table:
            writer = csv_writer(table)
            writer.writerow(["index", "name", *(f"label_{number}" for number in range(len(labels)))])
            writer.writerows([i, name, *labels[:, i].tolist()] for i, name in enumerate(source.names))
    else:
        with result_file(given.out) as file:
            np.save(file, labels if given.head is None else labels[0])
    skipped = int((labels[0] < 0).sum())
    print(
        f"{labels.shape[1]:,} images, labels of {len(labels)} head{'s' * (len(labels) > 1)} in {given.out}"
        + (f"; {skipped:,} could not be read" if skipped else "")
    )
    return 0


def _embed(given: argparse.Namespace) -> int:
    import numpy as np

    from sela_ext.data import open_source
    from sela_ext.inference import embed

    check_can_write(given.out, "--out")
    source = open_source(given.data)
    features = embed(given.run_folder, source, **_network_options(given))
    if given.out.endswith(".npz"):
        with result_file(given.out) as file:
            np.savez(file, features=features, names=np.asarray(source.names, dtype=np.str_))
    else:
        with result_file(given.out) as file:
            np.save(file, features)
    print(f"{features.shape[0]:,} images, features of {features.shape[1]:,} numbers in {given.out}")
    return 0
