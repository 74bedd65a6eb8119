"""Take a run's network, labels and features elsewhere."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sela_ext.export.destination import Exported

__all__ = ["export"]


def export(
    run: Any,
    out: str | os.PathLike[str],
    format: str = "torchvision",
    *,
    head: int | str | None = None,
    data: Any = None,
    embeddings: Any = None,
    images: bool = False,
    link: str = "symbolic",
    opset: int = 18,
    overwrite: bool = False,
    model: Any = None,
    image_size: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "auto",
    threads: Any = "auto",
    on_bad_image: str = "raise",
) -> Exported:
    """Write a run's network, labels or features in a form that other programs read.

    Formats:

    * "torchvision" (.pth): a state dict of the backbone, under torchvision's names where it is one of torchvision's
      networks, else under its own. With `head`, that head is the network's last linear layer.
    * "safetensors" (.safetensors): the backbone under the same names; heads, projection and potentials as "sela.*",
      and what is needed to use them as text.
    * "onnx" (.onnx): images float32 [N, C, S, S] (or vectors [N, D]), normalised as in training, to features, and for
      heads logits and labels. Compared with torch where onnxruntime is installed.
    * "csv" (.csv): index, name, labels and confidence, as `fixed_labels` takes them; cluster sizes in a second file.
    * "parquet" (.parquet): the same columns, and on request features and the images themselves, as
      `datasets.load_dataset("parquet", ...)` reads them.
    * "npy" (.npy): features float32 [N, D].
    * "folders": a folder per cluster, with links to the image files or copies of them.

    Args:
        run: a run folder, a result of `sela_ext.train` or a checkpoint; for networks and features also what
            `sela_ext.embed` takes.
        out: file to write, in a folder that exists; for "folders" a folder that is absent or empty.
        format: one of the above.
        head: which heads: a number, "best" (the one that the run chose without labels), "all" or "none". Default: all
            of them in tables and safetensors, none in torchvision's and ONNX form, the best in folders.
        data: images that are not the run's own: the network labels them. Images that have the names of the run's own
            are those, at another place. Default: the images of the run.
        embeddings: in parquet: True for features by the network, or float [N, D], or a .npy file of them.
        images: in parquet: whether the images go into it, too.
        link: in folders: "symbolic", "hard" or "copy".
        opset: of ONNX, 18 .. 23.
        overwrite: replace the file that is there.
        model: the network of a run that was given one of the user's own.
        image_size: pixels; default: as in training.
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: of features: "auto" (the run's), "float32", "bfloat16" or "float16".
        threads: processor threads; "auto" = all.
        on_bad_image: "raise" or "skip": no label, features of NaN, no image.

    Returns:
        What was written: `path`, `format`, `lines` (what to know about it, for people) and `facts` (the same for
        programs).

    Raises:
        OptionError: an option out of range, a file that is there already, or a package that is not installed.
        CheckpointError: no run, a damaged one, or one without heads.
        DataError: the images are needed and not there, not the run's, or no files where files are linked.
        NumericsError: the network in ONNX form gives other features; nothing is written.
        ResourceError: the disk is full, or does not take links.

    Example:
        >>> import sela_ext, tempfile, os, numpy as np
        >>> folder = tempfile.mkdtemp()
        >>> images = np.random.default_rng(0).integers(0, 256, size=(60, 16, 16), dtype=np.uint8)
        >>> run = sela_ext.train(images, out=folder + "/run", clusters=[4, 3], epochs=1, progress=False)
        >>> written = sela_ext.export(run, folder + "/labels.csv", format="csv")
        >>> written.path.read_text().split()[0]
        'index,name,label_0,label_1,confidence_0,confidence_1'
    """
    from sela_ext.export.formats import write
    from sela_ext.export.request import Request

    request = Request(
        run=run,
        head=head,
        data=data,
        embeddings=embeddings,
        images=images,
        link=link,
        opset=opset,
        model=model,
        image_size=image_size,
        batch_size=batch_size,
        device=device,
        precision=precision,
        threads=threads,
        on_bad_image=on_bad_image,
    )
    return write(request, out, format, overwrite=overwrite)
