"""Draw a picture of the page that `reshard analyze --html` writes: python benchmarks/page_picture.py OUT.png

The traffic is real: the experts that two routers of a small model chose for Python source, after training on such text
(tests/data; `balanced.py` trains the model). The checkpoint has layers of R1's size, with 64 experts, and no data: only
sizes are read. Needs chromium, Playwright and half a minute. Writes the page itself beside the picture.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright
from safetensors.torch import load_file

from reshard import Balanced, Linear, NodeZigzag, Zigzag, analyze, write_page
from reshard.traffic.trace_file import Header, TraceWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import deepseek_v3

ROOT = Path(__file__).parents[1]
ROUTING = ROOT / "tests" / "data" / "routing.safetensors"
RANKS, NODES, WIDTH = 8, 2, 1120
SIZES = {"HIDDEN": 7168, "EXPERT_WIDTH": 2048, "DENSE_WIDTH": 18432, "VOCAB": 129280, "HEADS": 128}
SIZES |= {"Q_RANK": 1536, "KV_RANK": 512, "NOPE": 128, "ROPE": 64, "V_HEAD": 128}
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


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
        write_page(analysis, page, "reshard analyze Small-MoE --ep 8 --nodes 2 --trace python-source --html page.html")
        with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program) as browser:
            tab = browser.new_page(viewport={"width": WIDTH, "height": 900})
            tab.goto(page.as_uri())
            tab.screenshot(path=out, full_page=True)


def build(source: Path) -> int:
    """Write the headers and config of a checkpoint: the demo's, with the sizes of R1's layers; return its top k.

    The data is never read, so the file is one hole.
    """
    top_k: int = load_file(ROUTING)["python"].shape[2]
    for name, size in SIZES.items():
        setattr(deepseek_v3, name, size)
    with torch.device("meta"):
        tensors = deepseek_v3._tensors()
    source.mkdir()
    header, end = {}, 0
    for name, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        dtype = DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    sizes = {"hidden_size": 7168, "moe_intermediate_size": 2048, "intermediate_size": 18432, "kv_lora_rank": 512}
    config = {**deepseek_v3.CONFIG, **sizes, "num_attention_heads": 128, "num_experts_per_tok": top_k}
    (source / "config.json").write_text(json.dumps({**config, "qk_rope_head_dim": 64}))
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
