"""Draw a picture of the page that `reshard analyze --html` writes: python benchmarks/page_picture.py OUT.png

The traffic is real: the experts that two routers of a small model chose for Python source, after training on such text
(tests/data; `balanced.py` trains the model). The checkpoint is the demo's; its gates are not read. Needs chromium,
Playwright and half a minute. Writes the page itself beside the picture.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from playwright.sync_api import sync_playwright
from safetensors.torch import load_file

from reshard import Balanced, Linear, NodeZigzag, Zigzag, analyze, write_page
from reshard.traffic.trace_file import Header, TraceWriter

ROOT = Path(__file__).parents[1]
ROUTING = ROOT / "tests" / "data" / "routing.safetensors"
RANKS, NODES, WIDTH = 8, 2, 1120


def main() -> None:
    """Build the checkpoint, analyze it, draw the page."""
    out = Path(sys.argv[1]).absolute()
    program = shutil.which("chromium")
    if program is None:
        raise SystemExit("chromium not found: install it, to draw the page")
    with tempfile.TemporaryDirectory(prefix="reshard-page-") as name:
        os.chdir(name)
        source, trace = Path("Small-MoE"), Path("python-source")  # the page shows these names
        record(build(source), trace)
        strategies = [Linear(RANKS), Zigzag(RANKS), NodeZigzag(RANKS, NODES), Balanced(RANKS, trace, NODES, share=0.5)]
        analysis = analyze(source, strategies, nodes=NODES, trace=trace)
        page = out.with_suffix(".html")
        page.unlink(missing_ok=True)
        write_page(analysis, page)
        with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program) as browser:
            tab = browser.new_page(viewport={"width": WIDTH, "height": 900})
            tab.goto(page.as_uri())
            tab.screenshot(path=out, full_page=True)


def build(source: Path) -> int:
    """Write the demo's checkpoint with the top k of the recorded traffic; return that top k."""
    runpy.run_path(str(ROOT / "examples" / "deepseek_v3.py"))["build"](source)
    config = json.loads((source / "config.json").read_text())
    top_k: int = load_file(ROUTING)["python"].shape[2]
    (source / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": top_k}))
    return top_k


def record(top_k: int, trace: Path) -> None:
    """Write the traffic as the plugin would have recorded it."""
    layers = ("model.layers.1.mlp", "model.layers.2.mlp")
    about = {"engine": "small_moe", "model": "Small-MoE", "layers": layers, "num_experts": 64, "top_k": top_k}
    rows = load_file(ROUTING)["python"].transpose(0, 1).contiguous().flatten()
    with closing(TraceWriter(trace, Header(reshard_trace=1, **about))) as writer:
        writer.write(memoryview(bytes(rows.tolist())))


if __name__ == "__main__":
    main()
