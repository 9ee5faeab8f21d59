"""Fit the constants of the time model to measured MoE kernels, and say how far the model is off.

    python benchmarks/fit_time_model.py docs/gpu/what-zigzag-buys.json [--write]

The record has the time of each rank, by batch, placement and way (`what_zigzag_buys.py`). Constants are fitted on the
routings in FITTED, by least squares of relative errors, and judged on the others. `few` is taken as it is, and the
errors that other values would give are printed. `--write` writes the constants to `reshard/placement/gpus.json`. The
record has no rows per expert: a rank's tiles are taken as pairs / tile, and half a tile for each active expert, and at
least one.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reshard.placement import time_model
from reshard.placement.time_model import ExpertShape, GpuProfile, flops, read_gpu

PROFILES = Path(time_model.__file__).with_name("gpus.json")
GPU = "H200"
R1 = ExpertShape(hidden=7168, intermediate=2048, top_k=8, size=3 * 7168 * 2048 + 3 * 56 * 16 * 4, dtype="fp8")
FITTED = ("random", "decode")  # routings; `prefill` and `mixed` judge
TERMS = ("launch", "row", "active", "tile")


def points(record: dict[str, Any], tile: int, few: float) -> tuple[list[tuple[str, int, str]], Tensor, Tensor]:
    """Every measured rank that had an expert to compute; `few` are the experts of the slow start.

    Returns:
        what: (routing, tokens of the batch, way) of each of N points
        terms_NF: how often each of TERMS counts
        time_N: seconds
    """
    what, terms, times = [], [], []
    for batch in record["batches"]:
        for placement in ("linear", "zigzag"):
            of = batch[placement]
            for way in ("own", "all"):
                for pairs, active, own, us in zip(
                    of["pairs_R"], of["active_R"], of["tokens_R"], of[f"{way}_us"], strict=True
                ):
                    if not active:
                        continue
                    tiles = max(active, pairs / tile + active / 2)
                    what.append((batch["case"], batch["tokens"], way))
                    rows = own if way == "own" else batch["tokens"]
                    terms.append((1.0, rows, math.hypot(active, few), tiles - active))
                    times.append(us * 1e-6)
    return what, torch.tensor(terms, dtype=torch.double), torch.tensor(times, dtype=torch.double)


def fit(terms_NF: Tensor, time_N: Tensor) -> Tensor:
    """Seconds of each term, [F]: least squares of the relative error."""
    found: Tensor = torch.linalg.lstsq(terms_NF / time_N.unsqueeze(1), torch.ones(len(time_N), 1).double()).solution
    return found.squeeze(1)


def off(terms_NF: Tensor, time_N: Tensor, seconds_F: Tensor) -> Tensor:
    """Relative errors of the predicted times, [N]."""
    return (terms_NF @ seconds_F) / time_N - 1


def rms(off_N: Tensor) -> float:
    """Root mean square."""
    return float(off_N.square().mean().sqrt())


def kernels_of(seconds_F: Tensor, gpu: GpuProfile) -> dict[str, float]:
    """The model's constants: what share of the datasheet's figures those times are."""
    launch, row, active, tile = seconds_F.tolist()
    return {
        "launch": float(f"{launch:.3g}"),
        "read_share": round(R1.size / active / gpu.bandwidth, 3),
        "flops_share": round(gpu.kernels.tile * R1.flops / tile / flops(gpu, R1.dtype), 3),
        "rows_share": round(R1.row_bytes / row / gpu.bandwidth, 3),
    }


def errors(what: Sequence[tuple[str, int, str]], terms_NF: Tensor, time_N: Tensor, seconds_F: Tensor) -> list[str]:
    """A row of Markdown for each batch size: relative errors on fitted and on other routings, root mean square."""
    off_N = off(terms_NF, time_N, seconds_F)
    lines = [
        "| tokens | fitted routings | other routings | other, all | other, own |",
        "| --- | --- | --- | --- | --- |",
    ]

    def spread(chosen: Sequence[bool]) -> str:
        of_chosen = off_N[torch.tensor(chosen)]
        return f"{rms(of_chosen):.1%} ({float(of_chosen.mean()):+.1%})"

    for size in (*sorted({tokens for _, tokens, _ in what}), None):
        of_size = [size in (None, tokens) for _, tokens, _ in what]
        cells = [
            spread(
                [
                    here and (case in FITTED) == fitted and way in ways
                    for here, (case, _, way) in zip(of_size, what, strict=True)
                ]
            )
            for fitted, ways in ((True, ("own", "all")), (False, ("own", "all")), (False, ("all",)), (False, ("own",)))
        ]
        lines.append(f"| {size or 'all'} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, judge, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--write", action="store_true", help=f"write the constants to {PROFILES.name}")
    options = parser.parse_args(arguments)
    gpu = read_gpu(GPU)
    record = json.loads(options.record.read_text())
    if GPU not in record["machine"]["device"]:
        sys.exit(f"{options.record}: measured on {record['machine']['device']}, expected {GPU}")
    what, terms_NF, time_N = points(record, gpu.kernels.tile, gpu.kernels.few)
    mine = torch.tensor([case in FITTED for case, _, _ in what])
    seconds_F = fit(terms_NF[mine], time_N[mine])
    for few in range(9):
        _, others_NF, _ = points(record, gpu.kernels.tile, few)
        found_F = fit(others_NF[mine], time_N[mine])
        off_N = off(others_NF, time_N, found_F)
        launch = 1e6 * float(found_F[0])
        print(f"few {few}: launch {launch:.1f} µs; fitted {rms(off_N[mine]):.1%}, others {rms(off_N[~mine]):.1%}")
    kernels = kernels_of(seconds_F, gpu)
    of_each = ", ".join(f"{name} {1e6 * value:.3f} µs" for name, value in zip(TERMS, seconds_F.tolist(), strict=True))
    print(f"{int(mine.sum())} points of {', '.join(FITTED)} fitted, {int((~mine).sum())} others judge: {of_each}")
    print("\n".join([json.dumps(kernels), "", "Root mean square (mean) of relative errors of a rank's time:", ""]))
    print("\n".join(errors(what, terms_NF, time_N, seconds_F)))
    if options.write:
        text = PROFILES.read_text()
        for name, value in kernels.items():
            text = re.sub(rf'"{name}": [^,]+', f'"{name}": {value}', text, count=1)
        PROFILES.write_text(text)


if __name__ == "__main__":
    main()
