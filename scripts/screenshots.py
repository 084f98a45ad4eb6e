"""Makes docs/figures/report-1280.png and report-390.png: the report of a result, in Chromium, 1280 and 390 pixels wide.

    python scripts/screenshots.py RESULT

Each shows the first HEIGHT pixels in 256 colours: the page has few colours, so it loses little, and the files stay
small.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "src")]

from browser import browser, find  # noqa: E402

from leangrid.report.views import rewrite_report  # noqa: E402

HEIGHT = {1280: 2560, 390: 2560}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a directory that leangrid quantize wrote")
    options = parser.parse_args()
    program = find()
    if program is None:
        raise SystemExit("no Chromium here: name one in $CHROMIUM")
    page = rewrite_report(options.result).resolve()
    with tempfile.TemporaryDirectory() as folder, browser(program) as opened:
        for width, height in HEIGHT.items():
            opened.open(page.as_uri(), width)
            shot = Path(folder) / f"{width}.png"
            opened.screenshot(shot, height)
            image = Image.open(shot).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            image.save(ROOT / "docs" / "figures" / f"report-{width}.png", optimize=True)


if __name__ == "__main__":
    main()
