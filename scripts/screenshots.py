"""``python scripts/screenshots.py RESULT``: docs/figures/report-1280.png and report-390.png, the report of a result in
Chromium.

The first HEIGHT pixels of each, in 256 colours: a page of flat colours loses little, and the files stay small.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "src")]

from browser import browser, find  # noqa: E402

from leangrid.report.views import rewrite  # noqa: E402

HEIGHT = {1280: 2560, 390: 2560}


def main() -> None:
    program = find()
    if program is None:
        raise SystemExit("no Chromium here: name one in $CHROMIUM")
    page = rewrite(Path(sys.argv[1])).resolve()
    with tempfile.TemporaryDirectory() as folder, browser(program) as opened:
        for width, height in HEIGHT.items():
            opened.open(page.as_uri(), width)
            shot = Path(folder) / f"{width}.png"
            opened.screenshot(shot, height)
            image = Image.open(shot).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            image.save(ROOT / "docs" / "figures" / f"report-{width}.png", optimize=True)


if __name__ == "__main__":
    main()
