"""A picture of the page that `reshard analyze --html` writes: python benchmarks/page_picture.py OUT.png

The layout is DeepSeek-R1's, its gates are random ones that favour some groups, so that there is something to see: the
numbers are no model's. Takes chromium, Playwright and half a minute. The page itself is written beside the picture.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import deepseek_r1
from playwright.sync_api import sync_playwright

from reshard import Linear, NodeZigzag, Zigzag, analyze, write_page

RANKS, NODES, WIDTH = 8, 2, 1120
LIKENESS, FAVOUR = 0.25, 0.08


def main() -> None:
    """Build, analyze, draw."""
    out = Path(sys.argv[1]).absolute()
    program = shutil.which("chromium")
    if program is None:
        raise SystemExit("a picture of a page takes a browser: install chromium")
    with tempfile.TemporaryDirectory(prefix="reshard-page-") as name:
        os.chdir(name)
        source = Path("Random-R1")  # as the page will call it
        deepseek_r1.build_sparse(source)
        deepseek_r1.fill_routers(source, LIKENESS, FAVOUR)
        analysis = analyze(source, [Linear(RANKS), Zigzag(RANKS), NodeZigzag(RANKS, NODES)], nodes=NODES)
        page = out.with_suffix(".html")
        page.unlink(missing_ok=True)
        write_page(analysis, page)
        with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program) as browser:
            tab = browser.new_page(viewport={"width": WIDTH, "height": 900})
            tab.goto(page.as_uri())
            tab.screenshot(path=out, full_page=True)


if __name__ == "__main__":
    main()
