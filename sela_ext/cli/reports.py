"""`sela report`."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from sela_ext.cli.parser import check_can_write
from sela_ext.errors import DataError, OptionError, SelaError, harmless

# Images on a map that is made again, where no number is given: as many as training puts there.
_POINTS = 800


def add_report(commands: Any) -> None:
    """Add `report`."""
    report = commands.add_parser(
        "report",
        help="write the report of a run again",
        description="Write the report of a run again, from what its folder holds: clusters, curves, options. Images "
        "are read from where they were in training, or from --data.",
        epilog="examples: sela report runs/photos | sela report runs/photos --out photos.html --data moved/photos | "
        "sela report runs/photos --map 2000",
    )
    report.add_argument("run_folder", help="run folder")
    report.add_argument("--out", help="file of the page (default report.html in the run folder)")
    report.add_argument("--data", help="where the images are now, if not where they were in training")
    report.add_argument(
        "--map",
        nargs="?",
        const=str(_POINTS),
        metavar="IMAGES",
        help="make the map of the embedding again, of so many images (default 800): the network is run over them, and "
        "report.npz in the run folder is replaced",
    )
    report.set_defaults(run=_report, parser=report)


def _report(given: argparse.Namespace) -> int:
    from sela_ext.data.orientation import read_upright
    from sela_ext.data.safe_files import read_json
    from sela_ext.report import write_report

    folder = Path(given.run_folder)
    if given.out is not None:
        check_can_write(given.out, "out")
    try:
        options = read_json(folder / "options.json")["options"]
        data, exif = options["data"], options.get("exif") is True
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: expected a run folder with options.json, found none that can be read") from error
    source: Any = None
    try:
        source = _labelled_images(folder, data if given.data is None else given.data)
    except (SelaError, OSError, ValueError, KeyError) as error:
        if given.data is not None or given.map is not None:
            raise
        print(harmless(f"the images cannot be shown: {error}"))
    if given.map is not None:
        from sela_ext.inference.overview import map_again

        assert source is not None  # or the error was raised above
        map_again(folder, source, _whole(given.map))
    read_image = None
    if source is not None and source.vectors is None:
        read_image = functools.partial(read_upright, source) if exif else source.read
    print(write_report(folder, read_image, out=None if given.out is None else Path(given.out)))
    return 0


def _labelled_images(folder: Path, data: Any) -> Any:
    """The images of a run, in the order in which they were labelled.

    Raises:
        DataError: they are not where they should be, or are others.
    """
    from sela_ext.data import open_source
    from sela_ext.data.npz import read_arrays

    if str(data).startswith("array "):
        raise DataError(f"they were given from memory: {data}")
    source = open_source(data)
    names = read_arrays(folder / "labels.npz", ["names"], "the names of the images").get("names")
    if names is None or names.tolist() != source.names:
        raise DataError(f"those in {data} are not the ones that were labelled")
    return source


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"map: expected a number of images, found {text}; say --map 2000, or --map alone") from None
