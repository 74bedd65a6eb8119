"""The picture of a report in README and docs: its clusters, and its map beside them.

    sela train --data digits --out runs/digits
    python docs/report_picture.py runs/digits/report.html docs/report.png

Needs Chromium.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT, SCALE = 1240, 1190, 0.62
# What is left out of the page where a part of it is to come first.
PARTS = {
    "clusters": "body > header",
    "map": 'body > header, nav, section[aria-labelledby="clusters"]',
}


def screenshot(page: Path, folder: Path, part: str) -> Image.Image:
    """The page with a part first: a copy of it has one more style, and no policy that forbids it."""
    text = page.read_text(encoding="utf-8")
    copy = folder / f"{part}.html"
    hidden = f"<style>{PARTS[part]} {{ display: none !important }}</style>"
    copy.write_text(re.sub(r"<meta http-equiv=[^>]*>", hidden, text, count=1), encoding="utf-8")
    target = folder / f"{part}.png"
    command = [
        *("chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"),
        *(f"--user-data-dir={folder / 'profile'}", f"--screenshot={target}", copy.as_uri()),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return Image.open(target).convert("RGB")


def main(page: str, out: str) -> None:
    """Put the parts side by side."""
    with tempfile.TemporaryDirectory() as folder:
        shown = [screenshot(Path(page).resolve(), Path(folder), part) for part in PARTS]
    both = Image.new("RGB", (WIDTH * len(shown), HEIGHT))
    for place, one in enumerate(shown):
        both.paste(one, (place * WIDTH, 0))
    small = both.resize((round(both.width * SCALE), round(both.height * SCALE)), Image.Resampling.LANCZOS)
    small.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
