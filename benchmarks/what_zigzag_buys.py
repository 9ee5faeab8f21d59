"""What zigzag gains: run each EP rank's experts in turn on one GPU, under linear and under zigzag placement.

    python benchmarks/what_zigzag_buys.py --json buys.json > buys.md          on a GPU, with vLLM 0.26 (see docs/gpu.md)
    python benchmarks/what_zigzag_buys.py --device cpu --small                a rehearsal; its times mean nothing

Each batch of tokens is routed once. Each placement then gives each rank its part, and vLLM's Triton kernel computes it
at DeepSeek-R1's size (FP8 in blocks). The slowest rank is the critical path: the others wait for it. Routings come from
(a) random hidden states and a random router, and (b) a small model that is trained here (`small_moe`), on text that it
has not seen. Communication, the shared expert, the router and attention are left out. A rank gets its tokens in one of
two ways:

    own    only the tokens that chose one of its experts, as all-to-all dispatch sends them
    all    every token; the rank computes its own experts' part, as in vLLM under EP without all-to-all

All ranks use the same random weights: time depends on the number of experts and rows, hardly on values. Tensors carry
their shape in their name: T tokens, K experts chosen, E experts, R ranks, L layers, H hidden size.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from corpus import read_documents
from measure import median
from reporting import gpus, installed, say, write_json
from small_moe import R1_ROUTING, SMALL, Shape, Trace, Trained, choose, save_gates, train
from torch import Tensor

from reshard import __version__
from reshard.placement.permutations import invert, rank_slots, zigzag

PLACEMENTS = ("linear", "zigzag")
WAYS = ("own", "all")
BATCH_SIZES = (8, 32, 64, 128, 512, 1024, 2048, 8192)
CASES = {
    "random": "(a) random hidden states, a random router",
    "prefill": "(b) trained router, prefill: consecutive text of one kind",
    "decode": "(b) trained router, decode: single tokens from all over, one kind",
    "mixed": "(b) trained router, decode: single tokens from all over, all kinds",
}
MIN_ROUNDS = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of the timed experts, by default R1's."""

    hidden: int = 7168
    intermediate: int = 2048


@dataclass(frozen=True)
class Batch:
    """The logical experts that a batch of tokens chose, and their weights."""

    case: str
    kind: str  # of text
    layer: int  # of the trained model, among its MoE layers
    experts_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class Loads:
    """Each rank's work: its (token, expert) pairs, its experts with at least one token, its tokens."""

    pairs_R: list[int]
    active_R: list[int]
    tokens_R: list[int]


@dataclass(frozen=True)
class Work:
    """A rank's part of a batch: the physical experts and weights of the rows that it gets."""

    rank: int
    experts_TK: Tensor
    weights_TK: Tensor


class Experts(Protocol):
    """Computes a rank's experts and times them."""

    about: str

    def prepare(self, tokens: int) -> None:
        """Get ready for batches of that many tokens."""

    def measure(self, works: Sequence[Work], rounds: int, seconds: float) -> list[list[float]]:
        """Microseconds of each work in each round."""


# Placements, and each rank's work under them


def placements(num_experts: int, ep_size: int) -> dict[str, Tensor]:
    """The logical_to_physical [E] of each placement; linear is the identity."""
    orders = {"linear": tuple(range(num_experts)), "zigzag": zigzag(num_experts, ep_size)}
    return {name: torch.tensor(invert(physical_to_logical)) for name, physical_to_logical in orders.items()}


def owners(num_experts: int, ep_size: int) -> Tensor:
    """The rank of each physical expert, [E]."""
    slots = rank_slots(num_experts, ep_size)
    return torch.tensor([rank for rank, owned in enumerate(slots) for _ in owned])


def loads(physical_TK: Tensor, owner_E: Tensor) -> Loads:
    """Each rank's work in a batch."""
    ranks = int(owner_E.max()) + 1
    owner_TK = owner_E[physical_TK]
    touched_TR = torch.zeros(len(owner_TK), ranks, dtype=torch.bool).scatter(1, owner_TK, True)
    return Loads(
        pairs_R=torch.bincount(owner_TK.flatten(), minlength=ranks).tolist(),
        active_R=torch.bincount(owner_E[physical_TK.unique()], minlength=ranks).tolist(),
        tokens_R=touched_TR.sum(dim=0).tolist(),
    )


def part(batch: Batch, physical_TK: Tensor, owner_E: Tensor, rank: int, way: str) -> Work:
    """The part of a batch that `rank` gets in one of WAYS."""
    if way == "all":
        return Work(rank, physical_TK, batch.weights_TK)
    mine_T = (owner_E[physical_TK] == rank).any(dim=1)
    return Work(rank, physical_TK[mine_T], batch.weights_TK[mine_T])


# Batches


def random_batch(tokens: int, hidden: int, generator: torch.Generator, device: torch.device) -> Batch:
    """Route random hidden states with a random router: logits of variance 1, no bias, nothing learned."""
    given_TH = torch.randn(tokens, hidden, generator=generator, device=device)
    weight_EH = torch.randn(R1_ROUTING.num_experts, hidden, generator=generator, device=device) / hidden**0.5
    correction_E = torch.zeros(R1_ROUTING.num_experts, device=device)
    experts_TK, weights_TK = choose((given_TH @ weight_EH.T).sigmoid(), correction_E, R1_ROUTING)
    return Batch("random", "none", 0, experts_TK.cpu(), weights_TK.cpu())


def prefill_batch(trace: Trace, kind: str, layer: int, tokens: int, generator: torch.Generator) -> Batch:
    """Consecutive tokens, from a random place in the trace."""
    total = trace.experts_LTK.shape[1]
    first = int(torch.randint(total - tokens + 1, (), generator=generator))
    here = slice(first, first + tokens)
    return Batch("prefill", kind, layer, trace.experts_LTK[layer, here], trace.weights_LTK[layer, here])


def decode_batch(
    case: str, traces: dict[str, Trace], layer: int, tokens: int, window: int, generator: torch.Generator
) -> Batch:
    """Single tokens from many windows: a second one from a window only after each window has given one."""
    kind = next(iter(traces)) if len(traces) == 1 else "all"
    experts_TK = torch.cat([trace.experts_LTK[layer] for trace in traces.values()])
    weights_TK = torch.cat([trace.weights_LTK[layer] for trace in traces.values()])
    windows = len(experts_TK) // window
    # shuffle each window, make the windows columns, and read by rows: that takes a token from every window in turn
    place_WS = torch.rand(windows, window, generator=generator).argsort(dim=1)
    turn_W = torch.randperm(windows, generator=generator)
    chosen_T = (place_WS + torch.arange(windows).unsqueeze(1) * window)[turn_W].T.flatten()[:tokens]
    return Batch(case, kind, layer, experts_TK[chosen_T], weights_TK[chosen_T])


def batches(
    case: str, tokens: int, number: int, trained: Trained, shape: Shape, hidden: int, device: torch.device, seed: int
) -> Iterator[Batch]:
    """Batches of one case and size; layers and kinds of text take turns. No batch if there is too little text."""
    generator = torch.Generator().manual_seed(seed)
    on_device = torch.Generator(device).manual_seed(seed)
    layers = len(trained.gates) // 2
    kinds = {kind: trace for kind, trace in trained.traces.items() if trace.experts_LTK.shape[1] >= tokens}
    for turn in range(number if kinds or case == "random" else 0):
        layer, kind = turn % layers, (*kinds, "none")[turn // layers % max(1, len(kinds))]
        match case:
            case "random":
                yield random_batch(tokens, hidden, on_device, device)
            case "prefill":
                yield prefill_batch(kinds[kind], kind, layer, tokens, generator)
            case "decode":
                yield decode_batch(case, {kind: kinds[kind]}, layer, tokens, shape.window, generator)
            case _:
                yield decode_batch(case, trained.traces, layer, tokens, shape.window, generator)


# Timing


class VllmExperts:
    """Computes a rank's experts in FP8 with vLLM's `fused_experts`, in CUDA graphs.

    A graph is captured for one number of rows. To need few graphs, rows are padded to a multiple of a 64th of the
    batch, and to an even number, so that Triton compiles only once. The experts of padding rows all belong to another
    rank.
    """

    def __init__(self, sizes: Sizes, owner_E: Tensor, max_tokens: int, device: torch.device) -> None:
        from vllm.model_executor.layers.fused_moe import fused_experts
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

        experts, ranks, top_k = len(owner_E), int(owner_E.max()) + 1, R1_ROUTING.top_k
        local = int((owner_E == 0).sum())  # no rank has more than the first
        self.about = f"vLLM {installed('vllm')} `fused_experts`, FP8 in blocks of 128 x 128, {local} experts a rank"
        self._run = fused_experts
        self._up, up_scale = _quantized(local, 2 * sizes.intermediate, sizes.hidden, device)
        self._down, down_scale = _quantized(local, sizes.hidden, sizes.intermediate, device)
        self._config = fp8_w8a8_moe_quant_config(w1_scale=up_scale, w2_scale=down_scale, block_shape=[128, 128])
        self._hidden_TH = torch.randn(max_tokens, sizes.hidden, dtype=torch.bfloat16, device=device)
        self._experts_TK = torch.zeros(max_tokens, top_k, dtype=torch.int32, device=device)
        self._weights_TK = torch.zeros(max_tokens, top_k, device=device)
        self._map_E = torch.zeros(experts, dtype=torch.int32, device=device)
        self._map_RE = torch.full((ranks, experts), -1, dtype=torch.int32)
        for rank, slots in enumerate(rank_slots(experts, ranks)):
            self._map_RE[rank, slots.start : slots.stop] = torch.arange(len(slots))
        self._map_RE = self._map_RE.to(device)
        self._other_R = [int((owner_E != rank).nonzero()[0]) for rank in range(ranks)]
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.prepare(max_tokens)

    def prepare(self, tokens: int) -> None:
        """Get ready for batches of that many tokens."""
        self._tokens, self._step = tokens, max(2, tokens // 128 * 2)
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()  # a pool whose graphs are all gone cannot be used again
        torch.cuda.empty_cache()
        self._graph(tokens)  # the largest first: the smaller ones then fit in its memory

    def measure(self, works: Sequence[Work], rounds: int, seconds: float) -> list[list[float]]:
        """Microseconds of each work in each round; after `seconds` and MIN_ROUNDS there are no more rounds.

        Rounds go through the works forwards and backwards in turn, with cold caches, so that drift affects all alike.
        """
        ready = [self._ready(work) for work in works]
        graphs = [self._graph(len(experts_TK)) if len(experts_TK) else None for experts_TK, _ in ready]
        took: list[list[float]] = [[] for _ in works]
        started = time.monotonic()
        for turn in range(rounds):
            events = []
            order = range(len(works)) if turn % 2 == 0 else reversed(range(len(works)))
            for number in order:
                if (graph := graphs[number]) is None:
                    took[number].append(0.0)
                else:
                    events.append((number, *self._replay(graph, works[number].rank, *ready[number])))
            torch.cuda.synchronize()
            for number, begin, end in events:
                took[number].append(begin.elapsed_time(end) * 1000)
            if turn + 1 >= MIN_ROUNDS and time.monotonic() - started > seconds:
                break
        return took

    def _ready(self, work: Work) -> tuple[Tensor, Tensor]:
        """The experts and weights of a work on the GPU, padded."""
        rows = len(work.experts_TK)
        padding = min(-rows % self._step, self._tokens - rows)
        pad = torch.full((padding, R1_ROUTING.top_k), self._other_R[work.rank])
        experts_TK = torch.cat([work.experts_TK, pad]).to(self._experts_TK.device, torch.int32)
        weights_TK = torch.cat([work.weights_TK, pad * 0.0]).to(self._weights_TK.device, torch.float32)
        return experts_TK, weights_TK

    def _replay(
        self, graph: torch.cuda.CUDAGraph, rank: int, experts_TK: Tensor, weights_TK: Tensor
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        self._experts_TK[: len(experts_TK)].copy_(experts_TK)
        self._weights_TK[: len(weights_TK)].copy_(weights_TK)
        self._map_E.copy_(self._map_RE[rank])
        self._flush.zero_()  # empties the L2 cache, which could hold the weights of a few active experts
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        return begin, end

    def _graph(self, rows: int) -> torch.cuda.CUDAGraph:
        """The graph for so many rows, captured if there is none yet."""
        if rows not in self._graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._call(rows)  # compiles
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._call(rows)
            self._graphs[rows] = graph
        return self._graphs[rows]

    def _call(self, rows: int) -> None:
        self._run(
            self._hidden_TH[:rows],
            self._up,
            self._down,
            self._weights_TK[:rows],
            self._experts_TK[:rows],
            global_num_experts=len(self._map_E),
            expert_map=self._map_E,
            quant_config=self._config,
        )


def _quantized(experts: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random FP8 weights [experts, rows, columns] and their blocks' scales."""
    weights = torch.empty(experts, rows, columns, dtype=torch.float8_e4m3fn, device=device)
    for expert in weights:
        expert.copy_(torch.randn(rows, columns, device=device))
    return weights, torch.full((experts, rows // 128, columns // 128), columns**-0.5, device=device)


class PlainExperts:
    """A stand-in without a GPU: it exercises everything else; its times mean nothing."""

    def __init__(self, sizes: Sizes, owner_E: Tensor) -> None:
        self.about = "a STAND-IN in plain torch: the times mean nothing"
        self._owner_E = owner_E
        self._up = torch.randn(2 * sizes.intermediate, sizes.hidden)
        self._down = torch.randn(sizes.hidden, sizes.intermediate)

    def prepare(self, tokens: int) -> None:
        """Nothing to do."""

    def measure(self, works: Sequence[Work], rounds: int, seconds: float) -> list[list[float]]:
        """Microseconds of each work in each round."""
        return [[self._run(work) for _ in range(min(rounds, MIN_ROUNDS))] for work in works]

    def _run(self, work: Work) -> float:
        started = time.perf_counter()
        mine = work.experts_TK[self._owner_E[work.experts_TK] == work.rank]
        for rows in torch.bincount(mine).tolist():
            if rows:
                gate, up = (torch.ones(rows, self._up.shape[1]) @ self._up.T).chunk(2, dim=1)
                _ = (torch.nn.functional.silu(gate) * up) @ self._down.T
        return (time.perf_counter() - started) * 1e6 if len(work.experts_TK) else 0.0


def run_batch(batch: Batch, experts: Experts, owner_E: Tensor, rounds: int, seconds: float) -> dict[str, Any]:
    """Time a batch under both placements, in both ways: each rank's median times, and the loads."""
    moved = placements(len(owner_E), int(owner_E.max()) + 1)
    physical = {name: logical_to_physical[batch.experts_TK] for name, logical_to_physical in moved.items()}
    ranks = range(int(owner_E.max()) + 1)
    keys = [(way, name, rank) for way in WAYS for rank in ranks for name in PLACEMENTS]
    works = [part(batch, physical[name], owner_E, rank, way) for way, name, rank in keys]
    took = dict(zip(keys, experts.measure(works, rounds, seconds), strict=True))
    result: dict[str, Any] = {
        "case": batch.case,
        "kind": batch.kind,
        "layer": batch.layer,
        "tokens": len(batch.experts_TK),
        "rounds": len(next(iter(took.values()))),
    }
    for name in PLACEMENTS:
        result[name] = asdict(loads(physical[name], owner_E)) | {
            f"{way}_us": [median(took[way, name, rank]) for rank in ranks] for way in WAYS
        }
    # linear compared with itself: how far chance alone moves a ratio
    result["linear_beside_itself"] = {
        way: max(median(took[way, "linear", rank][::2]) for rank in ranks)
        / max(median(took[way, "linear", rank][1::2]) for rank in ranks)
        for way in WAYS
    }
    return result


# Report


def speedup(result: dict[str, Any], way: str) -> float:
    """Linear's critical path over zigzag's."""
    return max(result["linear"][f"{way}_us"]) / max(result["zigzag"][f"{way}_us"])


def over_mean(of_ranks: Sequence[float]) -> float:
    """The busiest rank's value over the mean. For linear's times this is the speedup if its work were spread evenly."""
    return max(of_ranks) * len(of_ranks) / sum(of_ranks)


def quartiles(values: Sequence[float]) -> str:
    """Median (first to third quartile; minimum to maximum)."""
    low, middle, high = torch.tensor(values).double().quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return f"{middle:.2f} ({low:.2f} to {high:.2f}; {min(values):.2f} to {max(values):.2f})"


def tables(results: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown, with a table for each case."""
    lines = [
        "Speedup: critical path under linear over critical path under zigzag, above 1 if zigzag is faster; the median",
        "over batches (first to third quartile; minimum to maximum). *Own*: a rank gets only the tokens that chose",
        "its experts; *all*: it gets all tokens and computes its experts' part. *Lost*: batches in which zigzag was",
        "slower. *Beside itself*: linear's even rounds over its odd ones, the range that chance explains. *If even*:",
        "the speedup if linear's work, as measured, were spread evenly. The columns after it are medians, linear then",
        "zigzag.",
    ]
    for case, title in CASES.items():
        mine = sorted((result for result in results if result["case"] == case), key=lambda result: result["tokens"])
        if not mine:
            continue
        lines += [
            "",
            f"### {title}",
            "",
            "| tokens | speedup, own | speedup, all | lost, own; all | beside itself, own | if even, own; all "
            "| critical path in µs, own | busiest rank's pairs over mean | most experts active on a rank "
            "| ranks a token |",
            "| ---: | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(_line(tokens, list(of_size)) for tokens, of_size in groupby(mine, key=lambda result: result["tokens"])),
        ]
    return "\n".join(lines)


def _line(tokens: int, results: Sequence[dict[str, Any]]) -> str:
    own, every = ([speedup(result, way) for result in results] for way in WAYS)
    chance = [result["linear_beside_itself"]["own"] for result in results]
    even = "; ".join(f"{median([over_mean(result['linear'][f'{way}_us']) for result in results]):.2f}" for way in WAYS)
    lost = "; ".join(f"{sum(value < 1 for value in values)} of {len(values)}" for values in (own, every))

    def both(value: Any, digits: int) -> str:
        found = (median([value(result[name]) for result in results]) for name in PLACEMENTS)
        return ", ".join(f"{number:.{digits}f}" for number in found)

    cells = (
        f"{tokens:,}",
        quartiles(own),
        quartiles(every),
        lost,
        f"{min(chance):.2f} to {max(chance):.2f}",
        even,
        both(lambda found: max(found["own_us"]), 0),
        both(lambda found: over_mean(found["pairs_R"]), 2),
        both(lambda found: max(found["active_R"]), 0),
        both(lambda found: sum(found["tokens_R"]) / tokens, 2),
    )
    return f"| {' | '.join(cells)} |"


def learned(report: dict[str, Any]) -> str:
    """How well the small model learned, in a sentence or two."""
    curve = report["loss_by_step"]
    if not curve:
        return "The small model was not trained: its routers are random."
    held_out = "; ".join(
        f"{kind} {found['loss']:.2f} ({found['unigram_loss']:.2f})" for kind, found in report["held_out"].items()
    )
    return (
        f"The small model ({report['parameters'] / 1e6:.0f} M parameters) was trained for {curve[-1][0]:,} steps, "
        f"{report['tokens_trained_on'] / 1e6:.1f} M tokens. Loss in nats a token: {curve[0][1]:.2f} over the first ten "
        f"steps, {curve[-1][1]:.2f} over the last; on held-out text (in parentheses, from token frequencies alone): "
        f"{held_out}."
    )


def machine(device: torch.device) -> dict[str, str]:
    """The machine and the versions that the benchmark ran with."""
    found = {"python": platform.python_version(), "reshard": __version__, "device": str(device)}
    found |= {name: installed(name) for name in ("torch", "triton", "vllm")}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        of_gpus = gpus("driver_version,clocks.max.sm,power.limit")
        found["driver, clock, power"] = "unknown" if of_gpus is None else "\n".join(of_gpus)
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="rehearse with a smaller model and smaller experts")
    parser.add_argument("--train-seconds", type=float, default=120, help="seconds of training (default 120)")
    parser.add_argument("--tokens", type=int, nargs="+", default=BATCH_SIZES, metavar="T", help="tokens in a batch")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--batches", type=int, default=16, help="batches of each case and size (default 16)")
    parser.add_argument("--rounds", type=int, default=12, help="how often each batch is timed (default 12)")
    parser.add_argument(
        "--batch-seconds", type=float, default=0.25, help="time no more rounds of a batch after this (default 0.25)"
    )
    parser.add_argument("--ep", type=int, default=8, help="EP ranks (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to this file, after each case")
    parser.add_argument("--save-gates", metavar="FILE", help="write the trained routers to this file (safetensors)")
    return parser.parse_args(arguments)


def main() -> None:
    """Train, measure, print the report."""
    options = parse()
    started = time.monotonic()

    def log(text: str) -> None:
        say(f"{time.monotonic() - started:7.1f} s  {text}")

    device = torch.device(options.device)
    shape = SMALL if options.small else Shape()
    sizes = Sizes(64, 32) if options.small and device.type == "cpu" else Sizes()
    torch.manual_seed(options.seed)
    owner_E = owners(R1_ROUTING.num_experts, options.ep)
    experts = (
        VllmExperts(sizes, owner_E, max(options.tokens), device)
        if device.type == "cuda"
        else PlainExperts(sizes, owner_E)
    )
    log(experts.about)
    documents = read_documents(shape.text_bytes)
    log(f"{len(documents):,} documents")
    trained = train(documents, shape, options.train_seconds, device, log)
    log(learned(trained.report))
    if options.save_gates:
        save_gates(trained, options.save_gates)
    results: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "machine": machine(device),
        "experts": experts.about,
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "save_gates")},
        "training": trained.report,
        "batches": results,
    }

    def save() -> None:
        if options.json:
            write_json(options.json, record)

    save()
    for tokens in sorted(options.tokens):
        experts.prepare(tokens)
        log(f"{tokens} tokens: ready")
        for case in options.cases:
            seed = options.seed + 1000 * tokens
            of_case = batches(case, tokens, options.batches, trained, shape, sizes.hidden, device, seed)
            mine = [run_batch(batch, experts, owner_E, options.rounds, options.batch_seconds) for batch in of_case]
            results += mine
            save()
            found = f"speedup {quartiles([speedup(result, 'own') for result in mine])}" if mine else "too little text"
            log(f"{tokens} tokens, {case}: {found}")
    facts = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    print(f"{facts}. Timed: {experts.about}; EP {options.ep}.\n\n{learned(trained.report)}\n\n{tables(results)}")


if __name__ == "__main__":
    main()
