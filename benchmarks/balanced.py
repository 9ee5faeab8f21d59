"""What balanced placement gains on learned routing, for the kind of text it was made for and others, and its run time.

    python benchmarks/balanced.py --json balanced.json > balanced.md     trains for four minutes on a CPU
    python benchmarks/balanced.py --traces traces.safetensors            keeps the traces; the next call need not train

Trains a small model of 64 experts in 8 groups (`small_moe`) on three kinds of text, then records its routing of text
that it has not seen. Each placement is made from the first half of one kind's tokens. It is judged on the second half
of that kind, in the order of the text and in random order (as if many users were answered at once), and on the second
halves of the other kinds. Then placements are made for as many layers as R1 has, at R1's size, from random traffic;
this measures run time only.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from corpus import read_documents
from reporting import say
from safetensors.torch import load_file, save_file
from small_moe import Shape, train
from torch import Tensor

from reshard.model.routing import Routing
from reshard.placement.balance import balanced, balanced_layers, packed
from reshard.placement.permutations import node_zigzag, zigzag
from reshard.placement.steps import DEFAULT_MIX
from reshard.placement.swaps import Aim
from reshard.placement.time_model import DEFAULT_GPU, ExpertShape, read_gpu
from reshard.traffic.effect import Effect, effect, mean_effect

ROUTING = Routing(64, 6, "sigmoid", True, 2.5, 8, 4)
SHAPE = Shape(
    vocabulary=2048,
    hidden=128,
    heads=4,
    layers=4,
    intermediate=32,
    window=256,
    windows=8,
    traced_windows=2000,  # more than there are: all held-out text
    text_bytes=6 << 20,
    learning_rate=2e-3,
    bias_speed=2e-3,
    routing=ROUTING,
)
SHUFFLED = "the same, in random order"
R1_EXPERTS, R1_TOP_K, R1_LAYERS = 256, 8, 59
R1_RANKS_NODES = ((8, 1), (16, 1), (16, 2), (64, 1), (64, 8))
R1_TOKENS = 1 << 16  # of traffic for each R1-sized layer
BATCH_SIZES = (64, 512, 4096)  # that placements are judged on, by pairs
AIM = Aim(DEFAULT_MIX, ExpertShape(7168, 2048, R1_TOP_K, 44_050_944, "fp8"), read_gpu(DEFAULT_GPU))


def traces_of_training(seconds: float) -> dict[str, Tensor]:
    """Train the model, then record its routing of held-out text: uint8 [L, T, K] for each kind, L layers."""
    torch.manual_seed(0)
    trained = train(read_documents(SHAPE.text_bytes), SHAPE, seconds, torch.device("cpu"), say)
    say(json.dumps(trained.report["held_out"]))
    return {kind: trace.experts_LTK.to(torch.uint8) for kind, trace in trained.traces.items()}


def placements(ids_TK: Tensor, ep_size: int, nodes: int) -> dict[str, tuple[int, ...]]:
    """The placements to compare, made for these tokens: physical_to_logical [E] by name."""
    experts = ROUTING.num_experts
    by_node = {"node-zigzag": node_zigzag(experts, ep_size, nodes)} if nodes > 1 else {}
    return {
        "linear": tuple(range(experts)),
        "zigzag": zigzag(experts, ep_size),
        **by_node,
        "EPLB packing": packed(ids_TK.flatten().bincount(minlength=experts).tolist(), ep_size),
        "balanced": balanced(ids_TK, experts, ep_size, AIM, nodes),
    }


def judge(traces: dict[str, Tensor], ep_size: int, nodes: int) -> list[dict[str, Any]]:
    """A row for each kind that placements were made for, each kind they are judged on, each layer, each placement."""
    rows = []
    for kind, ids_LTK in traces.items():
        for layer, ids_TK in enumerate(ids_LTK.long()):
            made = placements(_half(ids_TK, 0), ep_size, nodes)
            unseen = {other: _half(other_LTK[layer].long(), 1) for other, other_LTK in traces.items()}
            unseen[SHUFFLED] = unseen[kind][
                torch.randperm(len(unseen[kind]), generator=torch.Generator().manual_seed(0))
            ]
            for other, unseen_TK in unseen.items():
                for name, physical_to_logical in made.items():
                    found = effect(unseen_TK, physical_to_logical, ep_size, nodes, BATCH_SIZES)
                    rows.append(
                        {"made_for": kind, "judged_on": other, "layer": layer, "placement": name} | asdict(found)
                    )
    return rows


def _half(ids_TK: Tensor, which: int) -> Tensor:
    return ids_TK.tensor_split(2)[which]


def random_traffic(layer: int) -> Tensor:
    """Random R1-sized traffic [T, K]: some experts are popular with all tokens, some with a stretch of 64 tokens."""
    generator = torch.Generator().manual_seed(layer)
    topics = torch.randn(64, R1_EXPERTS, generator=generator)
    topic_T = torch.randint(len(topics), (R1_TOKENS // 64,), generator=generator).repeat_interleave(64)
    popularity_TE = 0.7 * (topics[topic_T] + torch.randn(R1_EXPERTS, generator=generator))
    noisy_TE = popularity_TE - torch.rand(R1_TOKENS, R1_EXPERTS, generator=generator).log().neg().log()
    return noisy_TE.topk(R1_TOP_K, dim=1).indices


def time_of_r1(layers: int) -> list[dict[str, Any]]:
    """Seconds that it takes to place `layers` R1-sized layers, for each number of ranks and nodes."""
    traffic = [random_traffic(layer) for layer in range(layers)]
    spent = []
    for ranks, nodes in R1_RANKS_NODES:
        started, used = time.perf_counter(), time.process_time()
        list(balanced_layers(traffic, R1_EXPERTS, ranks, AIM, nodes))
        seconds, processor = time.perf_counter() - started, time.process_time() - used
        spent.append({"ep_size": ranks, "nodes": nodes, "layers": layers, "seconds": seconds, "cpu_seconds": processor})
        say(f"{layers} R1-sized layers, {ranks} ranks, {nodes} nodes: {seconds:.1f} s")
    return spent


# Tables


def tables(rows: Sequence[dict[str, Any]], nodes: int) -> str:
    """The tables in Markdown: means over kinds and layers, then a row for each kind and layer."""
    judged: dict[str, list[dict[str, Any]]] = {
        "the other half of the same kind's tokens": [row for row in rows if row["made_for"] == row["judged_on"]],
        "the same tokens in random order": [row for row in rows if row["judged_on"] == SHUFFLED],
        "tokens of another kind": [row for row in rows if row["judged_on"] not in (row["made_for"], SHUFFLED)],
    }
    parts = []
    for title, chosen in judged.items():
        parts += [f"### Judged on {title}", "", _table(chosen, lambda row: (row["placement"],), ("placement",), nodes)]
        for rival in ("zigzag", "EPLB packing"):
            worse, pairs = worse_than(chosen, rival)
            parts += ["", f"balanced is worse than {rival} (mean of the three columns) in {worse} of {pairs} cases"]
        parts.append("")
    same = next(iter(judged.values()))
    names = ("kind", "layer", "placement")
    by_layer = _table(same, lambda row: (row["made_for"], row["layer"], row["placement"]), names, nodes)
    return "\n".join([*parts, "### By layer, the other half of the same kind's tokens", "", by_layer])


def worse_than(rows: Sequence[dict[str, Any]], rival: str) -> tuple[int, int]:
    """Count the cases in which balanced is less even than `rival`, on average over batch sizes; and all cases."""
    mean: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        case = mean.setdefault((row["made_for"], row["judged_on"], row["layer"]), {})
        case[row["placement"]] = sum(row["imbalance"]) / len(row["imbalance"])
    return sum(case["balanced"] > case[rival] for case in mean.values()), len(mean)


def _table(
    rows: Sequence[dict[str, Any]],
    key: Callable[[dict[str, Any]], tuple[Any, ...]],
    names: Sequence[str],
    nodes: int,
) -> str:
    groups: dict[tuple[Any, ...], list[Effect]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(Effect(row["imbalance"], row["ranks"], row["nodes"], row["loads"]))
    columns = [*names, *(f"{size} tokens" for size in BATCH_SIZES), "ranks a token", *["nodes a token"] * (nodes > 1)]
    lines = [columns, ["---"] * len(columns)]
    for group, effects in groups.items():
        found = mean_effect(effects)
        far = [found.ranks, found.nodes][: 1 + (nodes > 1)]
        lines.append([*map(str, group), *(f"{value:.3f}" for value in found.imbalance), *(f"{n:.2f}" for n in far)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def save_sample(traces: dict[str, Tensor], path: Path) -> None:
    """Write the tests' sample: the first and last layer, 24576 tokens of one kind and 4096 of another, in windows.

    The windows are spread evenly over each kind's text.
    """
    sample = {}
    for kind, windows in (("python", 96), ("prose", 16)):
        total = traces[kind].shape[1] // SHAPE.window
        windows_LNSK = traces[kind][[0, -1], : total * SHAPE.window].unflatten(1, (total, SHAPE.window))
        chosen = [number * total // windows for number in range(windows)]
        sample[kind] = windows_LNSK[:, chosen].flatten(1, 2).contiguous()
    made = "benchmarks/balanced.py --sample: experts of 64 that held-out text of a kind chose, [layers, tokens, top k]"
    save_file(sample, path, {"made": made})


def main() -> None:
    """Train or read traces, judge placements, time them, print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="seconds of training (default 240)")
    parser.add_argument("--traces", type=Path, help="read traces from this file; if it is absent, train and write it")
    parser.add_argument("--ep", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--layers", type=int, default=R1_LAYERS, help="R1-sized layers to place and time")
    parser.add_argument("--sample", type=Path, help="write the sample that the tests read")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.traces and options.traces.exists():
        traces = load_file(options.traces)
    else:
        traces = traces_of_training(options.seconds)
        if options.traces:
            save_file(traces, options.traces)
    if options.sample:
        save_sample(traces, options.sample)
    rows = judge(traces, options.ep, options.nodes)
    tokens = {kind: ids_LTK.shape[1] for kind, ids_LTK in traces.items()}
    print(
        f"{ROUTING.num_experts} experts, top {ROUTING.top_k}, {ROUTING.n_group} groups; {options.ep} EP ranks, ", end=""
    )
    print(f"{options.nodes} nodes; the busiest rank over the mean in batches; tokens traced: {tokens}\n")
    print(tables(rows, options.nodes), "\n")
    timed = time_of_r1(options.layers) if options.layers else []
    for row in timed:
        where = f"{row['ep_size']} EP ranks, {row['nodes']} nodes: {row['seconds']:.1f} s"
        print(
            f"- {row['layers']} layers of {R1_EXPERTS} experts, {where}, {row['cpu_seconds']:.1f} s of processor time"
        )
    if timed:
        print(f"\n{os.cpu_count()} processors")
    if options.json:
        options.json.write_text(json.dumps({"tokens": tokens, "rows": rows, "time": timed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
