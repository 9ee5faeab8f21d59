"""What placements gain in a step on several GPUs: one vLLM, and placements that are swapped in place.

    python benchmarks/step_times.py make DIR --gates FILE --layers 30        the model (`lifted_model`), without weights
    python benchmarks/step_times.py place DIR --choices FILE --ep 8          placement files of every strategy
    python benchmarks/step_times.py measure DIR --mode tp --json FILE        one process for each GPU
    python benchmarks/step_times.py report FILE                              prints Markdown

vLLM serves an original with a placement (`additional_config`), so that its routers map ids. Weights are random, and
the time of a step does not depend on them. So another placement needs no other weights: `measure` overwrites the map of
each layer in place, and the CUDA graphs that vLLM has captured read the new one. Nothing else differs between
placements. If a placement has copies of experts, vLLM starts with the one that has the most, and with EPLB: then each
rank has its slots under every placement, and each way to map ids has its own CUDA graphs (`swaps`).

- *decode*: vLLM's own CUDA graph is replayed, once for each batch. A batch has one token of each sequence, from
  anywhere in the text; attention reads a context of CONTEXT tokens.
- *prefill*: prompts of WINDOW consecutive tokens, with attention and without a graph, as vLLM runs them. The CPU starts
  each kernel: if that takes as long as the step, the step's time says little (`host` in the results).

*mixed* batches have text of all kinds, the others of one kind. In a round each placement gets the same batches, and
each round has new ones. With `--mode dp`, each rank gets its share of a batch, and vLLM's default all-to-all exchanges
them; numbers of tokens are those of all ranks together. Cases whose ratios still spread by more than WIDTH get more
rounds.

Before it measures, `measure` has real routers choose for every token, and compares that with `expected_choices`. It
also maps all experts to the slots of one rank, to see that graphs read the map: that must take longer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from entry_points import announce, python_path
from lifted_model import FILE, PLUGIN, R1_EXPERT, VARIABLE, expected_choices, make, r1_config
from reporting import gpus, installed, say, write_json
from serve_ep import MULTICAST_OFF, ROOT, UNLESS_SET
from swaps import BY_POSITION, Copies, Fixed, Swaps
from torch import Tensor

from reshard import __version__
from reshard.placement.placement_file import PlacementFile, encode_placement_file, read_placement_file

BASE = "linear"  # ratios are of this placement's time over another's
KINDS = 3  # of text in the model's vocabulary
WINDOW = 1024  # consecutive tokens of a prompt
CONTEXT = 1100  # tokens that a decoding sequence attends to
ONE_KIND = 1  # the kind of text of batches that are not mixed
DECODE = {1: 32, 8: 32, 16: 16, 32: 16, 64: 8, 128: 4, 256: 4}  # tokens: batches in a round
PREFILL = {1024: 2, 4096: 2, 8192: 1, 16384: 1}
HELD_OUT = 4096  # recorded tokens from this one on are none of those that are measured
ROUNDS, WIDTH = 8, 0.01
UNSTEADY = 0.05  # if the quartiles of a case's ratios are further apart, the case says little
WAITING = ("prefill 1024",)  # the CPU takes as long to start the kernels as the GPUs take to run them
PLUGINS = {"reshard": "reshard.vllm:register", **PLUGIN}
ENVIRONMENT = {
    **MULTICAST_OFF,
    **UNLESS_SET,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_USE_DEEP_GEMM": "0",
}


@dataclass(frozen=True)
class Case:
    """A kind of step: `tokens` is of all ranks together, `batches` how many a round has."""

    what: str  # decode or prefill
    label: str  # mixed or one kind
    tokens: int
    batches: int

    @property
    def name(self) -> str:
        """As the report names it."""
        return f"{self.what} {self.tokens}, {self.label}"


# Cases and batches


def cases(decode: Mapping[int, int], prefill: Mapping[int, int], ranks: int = 1) -> list[Case]:
    """All cases whose tokens can be divided among `ranks` ranks, prompts of prefill included."""
    unit = {"decode": 1, "prefill": WINDOW}
    return [
        Case(what, label, tokens, batches)
        for what, sizes in (("decode", decode), ("prefill", prefill))
        for tokens, batches in sizes.items()
        if tokens % (ranks * unit[what]) == 0
        for label in ("mixed", "one kind")
    ]


def batches(case: Case, turn: int, vocabulary: int) -> list[list[int]]:
    """The token ids of each batch of a case in round `turn`; the same in every process.

    The vocabulary has two halves, and each half has as many consecutive tokens of each kind of text.
    """
    rng = random.Random(f"{case.name} {turn}")
    length = vocabulary // (2 * KINDS)
    found = []
    for _ in range(case.batches):
        ids: list[int] = []
        while len(ids) < case.tokens:
            kind = rng.randrange(KINDS) if case.label == "mixed" else ONE_KIND
            first, start = (rng.randrange(2) * KINDS + kind) * length, rng.randrange(length)
            count = 1 if case.what == "decode" else min(WINDOW, case.tokens - len(ids))
            ids += [first + (start + step) % length for step in range(count)]
        found.append(ids)
    return found


def wanted(rows: Sequence[Mapping[str, Any]], all_cases: Sequence[Case]) -> list[Case]:
    """The cases to measure next: those with too few rounds, then those that spread too much, then all of them."""
    done = {case: [row for row in rows if row["case"] == case.name] for case in all_cases}
    few = [case for case, mine in done.items() if len({row["round"] for row in mine}) < ROUNDS]
    wide = [case for case, mine in done.items() if max(map(width, ratios(mine).values()), default=0) > WIDTH]
    return few or wide or list(all_cases)


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """For each placement but BASE, BASE's time over its own in each round that has both."""
    took = {(row["placement"], row["round"]): sum(row["ms"]) for row in rows}
    names = dict.fromkeys(name for name, _ in took if name != BASE)
    rounds = sorted(turn for name, turn in took if name == BASE)
    return {name: [took[BASE, turn] / took[name, turn] for turn in rounds if (name, turn) in took] for name in names}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def width(values: Sequence[float]) -> float:
    """How far the quartiles are apart."""
    return quartiles(values)[2] - quartiles(values)[0] if values else 0.0


def is_unsteady(case: str, measured: Sequence[Sequence[float]]) -> bool:
    """Whether a case's ratios, those of each placement, spread too much to compare them, or it waits for the CPU."""
    return case.startswith(WAITING) or statistics.median(map(width, measured)) > UNSTEADY


# Placements


def place(options: argparse.Namespace) -> None:
    """Write a placement file for each strategy, made from recorded choices: {kind: [G, T, K]}, all kinds in turns."""
    from copies import eplb
    from safetensors.torch import load_file

    from reshard.placement.balance import balanced_layers, packed
    from reshard.placement.copies import with_copies
    from reshard.placement.permutations import zigzag
    from reshard.placement.steps import DEFAULT_MIX
    from reshard.placement.swaps import Aim
    from reshard.placement.time_model import read_gpu

    texts = [text_GTK[:, HELD_OUT : HELD_OUT + options.tokens] for text_GTK in load_file(options.choices).values()]
    pieces = zip(*(text_GTK.split(WINDOW, dim=1) for text_GTK in texts), strict=True)
    traffic_GTK = torch.cat([piece for together in pieces for piece in together], dim=1).long()
    experts, ranks, aim = options.experts, options.ep, Aim(DEFAULT_MIX, R1_EXPERT, read_gpu(options.gpu))
    counts = [ids_TK.flatten().bincount(minlength=experts).tolist() for ids_TK in traffic_GTK]
    makers: dict[str, Callable[[], list[tuple[int, ...]]]] = {
        BASE: lambda: [tuple(range(experts))] * len(counts),
        "zigzag": lambda: [zigzag(experts, ranks)] * len(counts),
        "packing": lambda: [packed(count_E, ranks) for count_E in counts],
        "balanced": lambda: list(balanced_layers(list(traffic_GTK), experts, ranks, aim)),
        "best-fixed": lambda: [with_copies(ids_TK, experts, ranks, 0) for ids_TK in traffic_GTK],
    }
    for spare in options.spare:
        makers |= {
            f"copies-{spare}": lambda spare=spare: [with_copies(ids, experts, ranks, spare) for ids in traffic_GTK],
            f"eplb-{spare}": lambda spare=spare: [eplb(count_E, ranks, ranks * spare) for count_E in counts],
        }
    config = json.loads((options.directory / "config.json").read_text())
    layers = range(config["first_k_dense_replace"], config["num_hidden_layers"])
    for name in options.strategies or makers:
        by_gate = makers[name]()
        write_placement(options.out / f"{options.prefix}{name}.json", config["model_type"], ranks, layers, by_gate)
        say(f"{options.prefix}{name}.json")


def write_placement(
    path: Path, model_type: str, ep_size: int, layers: Sequence[int], by_gate: Sequence[Sequence[int]]
) -> None:
    """Write a placement file: the layers take the orders of the routers in turns, as they take the routers."""
    names = [f"model.layers.{layer}.mlp" for layer in layers]
    orders = {name: list(by_gate[number % len(by_gate)]) for number, name in enumerate(names)}
    path.parent.mkdir(parents=True, exist_ok=True)
    file = PlacementFile(
        strategy="file",
        ep_size=ep_size,
        model_type=model_type,
        num_experts=1 + max(by_gate[0]),
        layers=names,
        physical_to_logical=orders,
    )
    path.write_bytes(encode_placement_file(file))


def orders_of(path: Path, layers: Sequence[int]) -> Tensor:
    """physical_to_logical of each layer, [L, P]; P is the number of experts, or more if some have copies."""
    found = read_placement_file(path).physical_to_logical
    every = [found[f"model.layers.{layer}.mlp"] if isinstance(found, dict) else found for layer in layers]
    return torch.tensor(every)


# One rank


class Rank:
    """A rank's vLLM: swaps placements, and times steps. All ranks call the same methods in the same order."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import LLM

        from reshard.vllm.runners import moe_runners

        self.rank, self.ranks, self.is_dp = int(os.environ["RANK"]), options.ranks, options.mode == "dp"
        self.parts = self.ranks if self.is_dp else 1  # into how many a batch is divided
        llm = LLM(str(options.directory), **arguments(options))
        engine: Any = llm.llm_engine
        self.runner = engine.model_executor.driver_worker.worker.model_runner
        self.model: torch.nn.Module = self.runner.get_model()
        self.on_gpu = torch.cuda.is_available()
        self.moe = dict(sorted((int(name.split(".")[2]), found) for name, found in moe_runners(self.model).items()))
        self.device = next(self.model.parameters()).device
        self.layers = list(self.moe)
        self.llm = llm
        self.swaps = self._swaps(options)
        self._spans: list[tuple[Any, Any, float]] = []  # of forward passes: begin, end, milliseconds of the CPU
        self._warm: set[Case] = set()  # compiled
        self.model.register_forward_pre_hook(self._begin)
        self.model.register_forward_hook(self._end)

    def _swaps(self, options: argparse.Namespace) -> Swaps:
        orders, moe = read_orders(options.placements, self.layers), list(self.moe.values())
        spare = spare_slots(orders, self.ranks)
        if not spare:
            return Fixed({name: order_LE.to(self.device) for name, order_LE in orders.items()}, moe)
        self._captured: dict[str, Any] = {}  # CUDA graphs, by the way to map ids
        num_experts = num_experts_of(orders[BASE])
        return Copies(orders, also_by_position(options, orders), moe, num_experts, self.ranks, self._recapture)

    def _recapture(self, way: str) -> None:
        """Use the CUDA graphs of a way to map ids; capture them if there are none yet."""
        if not self.on_gpu:
            return
        wrapper = self.runner.model
        if way in self._captured:
            wrapper.concrete_cudagraph_entries = self._captured[way]
            return
        wrapper.concrete_cudagraph_entries = self._captured[way] = {}
        kinds = self.runner.cudagraph_dispatcher.get_capture_descs()
        sizes = {key.num_tokens for _, keys in kinds for key in keys}
        for tokens in sorted(sizes):  # compiles kernels, which must not happen while a graph is captured
            self.forward(tokens, "decode")
        self.runner.capture_model()

    def mine(self, ids: Sequence[int]) -> list[int]:
        """This rank's share of a batch."""
        share = len(ids) // self.parts
        part = self.rank if self.is_dp else 0
        return list(ids[part * share : (part + 1) * share])

    def put(self, ids: Sequence[int]) -> None:
        """Write token ids where the model reads them."""
        buffer = self.runner.input_ids.gpu
        buffer[: len(ids)].copy_(torch.tensor(ids, dtype=buffer.dtype))

    def steps(self, case: Case, every: Sequence[Sequence[int]]) -> tuple[list[float], float]:
        """Milliseconds of a step with each batch; and those in which the CPU started the last one, if it did so."""
        if case.what == "decode" and self.on_gpu:
            return self._replays([self.mine(ids) for ids in every]), 0.0
        took, host = [], 0.0
        for ids in every if case in self._warm else [every[0], *every]:
            self.put(self.mine(ids))
            self.swaps.before_step(len(ids) // self.parts)
            self.forward(len(ids) // self.parts, case.what)
            begin, end, host = self._spans[-1]
            took.append(begin.elapsed_time(end) if self.on_gpu else 1000 * (end - begin))
        self._warm.add(case)
        return took[-len(every) :], host

    def forward(self, tokens: int, what: str) -> None:
        """Run the model on the ids that were put, without a CUDA graph; prefill with attention to its prompts."""
        from vllm.config import CUDAGraphMode

        length = self.runner.uniform_decode_query_len
        prompt = min(WINDOW, tokens) if what == "prefill" else length
        self.runner.uniform_decode_query_len = prompt  # vLLM's dummy batch has so many tokens of each sequence
        self._spans.clear()
        try:
            self.runner._dummy_run(
                tokens,
                cudagraph_runtime_mode=CUDAGraphMode.NONE,
                force_attention=self.on_gpu,
                uniform_decode=True,
                skip_eplb=True,
                profile_seq_lens=prompt if what == "prefill" else CONTEXT,
            )
            if self.on_gpu:
                torch.cuda.synchronize()
        finally:
            self.runner.uniform_decode_query_len = length

    def _begin(self, *_: Any) -> None:
        self._begun = time.perf_counter(), self._event()

    def _end(self, *_: Any) -> None:
        started, begin = self._begun
        self._spans.append((begin, self._event(), 1000 * (time.perf_counter() - started)))

    def _event(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _replays(self, every: Sequence[Sequence[int]]) -> list[float]:
        graph, buffer = self._graph(len(every[0])), self.runner.input_ids.gpu
        ids_BT = torch.tensor(every, dtype=buffer.dtype, device=self.device)
        self.swaps.before_step(len(every[0]))
        events = []
        for number, ids_T in enumerate([ids_BT[0], *ids_BT]):  # the first is a warm-up
            buffer[: len(ids_T)].copy_(ids_T)
            begin = self._event()
            graph.replay()
            if number:
                events.append((begin, self._event()))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    def _graph(self, tokens: int) -> Any:
        """vLLM's CUDA graph for so many decoding sequences; its attention is set to contexts of CONTEXT tokens."""
        self.runner._dummy_run(tokens, uniform_decode=True, profile_seq_lens=CONTEXT, skip_eplb=True)
        torch.cuda.synchronize()
        entries = self.runner.model.concrete_cudagraph_entries.items()
        found = [entry.cudagraph for key, entry in entries if key.num_tokens == tokens and entry.cudagraph]
        if len(found) != 1:
            raise RuntimeError(f"vLLM has {len(found)} CUDA graphs for {tokens} tokens, expected one")
        return found[0]

    def choices(self, placement: str, vocabulary: int, few: int) -> dict[str, Tensor]:
        """The experts that the real routers choose for each token under a placement, mapped back to logical ids.

        Returns:
            many: int16 [L, V, K], by batches of up to WINDOW tokens; few: the same by batches of `few` tokens
        """
        self.swaps.swap(placement)
        logical_LP = self.swaps.logical(placement).to(self.device)
        pieces: dict[str, list[list[Tensor]]] = {name: [[] for _ in self.moe] for name in ("many", "few")}

        def watch(number: int, router: Any) -> Callable[..., None]:
            logical_P = logical_LP[number]

            def chosen(gate: Any, given_TH: Tensor) -> Tensor:
                logits_TE = gate.forward(given_TH)[0]
                _, ids_TK = router.select_experts(hidden_states=given_TH, router_logits=logits_TE)
                return logical_P[ids_TK.long()].to(torch.int16).cpu()

            def hook(gate: Any, given: tuple[Tensor, ...], _: Any) -> None:
                pieces["many"][number].append(chosen(gate, given[0]))
                pieces["few"][number].append(torch.cat([chosen(gate, some_TH) for some_TH in given[0].split(few)]))

            return hook

        hooks = [
            self.model.get_submodule(f"model.layers.{layer}.mlp.gate").register_forward_hook(
                watch(number, found.router)
            )
            for number, (layer, found) in enumerate(self.moe.items())
        ]
        for first in range(0, vocabulary, WINDOW):
            ids = list(range(first, min(first + WINDOW, vocabulary)))
            self.put(ids)
            self.forward(len(ids), "prefill")
        for hook in hooks:
            hook.remove()
        return {name: torch.stack([torch.cat(layer) for layer in layers]) for name, layers in pieces.items()}

    def about(self) -> dict[str, Any]:
        """Which kernels route and compute, and whether the kernel that routes reads the map that `swap` writes."""
        runner = next(iter(self.moe.values()))
        method = runner.routed_experts.quant_method
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", method)
        exchange = getattr(getattr(method, "moe_kernel", None), "prepare_finalize", None)
        return {
            "router": type(runner.router).__name__,
            **self.swaps.about(),
            "experts": type(experts).__name__,
            "exchange": type(exchange).__name__,
            "gpu_memory_mib": torch.cuda.memory_allocated() >> 20 if self.on_gpu else 0,
        }


def starts_with(options: argparse.Namespace) -> tuple[str, int]:
    """The placement that vLLM starts with, and its spare slots on each rank: the one with the most, if any has some."""
    layers = json.loads((options.directory / "config.json").read_text())
    numbers = range(layers["first_k_dense_replace"], layers["num_hidden_layers"])
    orders = read_orders(options.placements, numbers)
    spare = spare_slots(orders, options.ranks)
    if not spare:
        return options.start, 0
    return max(orders, key=lambda name: orders[name].shape[1]), spare


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of vLLM's `LLM`."""
    share = options.ranks if options.mode == "dp" else 1
    sizes = [tokens // share for tokens in options.decode if tokens % share == 0]
    prompts = [tokens // share for tokens in options.prefill]
    parallel = {"data_parallel_size": options.ranks} if share > 1 else {"tensor_parallel_size": options.ranks}
    start, spare = starts_with(options)
    if spare:
        redundant = {"num_redundant_experts": options.ranks * spare, "communicator": "torch_gloo", "use_async": False}
        parallel |= {"enable_eplb": True, "eplb_config": redundant}
    if options.exchange:
        parallel |= {"all2all_backend": options.exchange}
    common = {
        **{"load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False, "seed": 0},
        **{"enable_expert_parallel": True, "distributed_executor_backend": "external_launcher", **parallel},
        "max_num_seqs": max([*sizes, *(tokens // WINDOW for tokens in prompts), 1]),
        "additional_config": {"reshard": {"placement": str((options.placements / f"{start}.json").resolve())}},
    }
    if not torch.cuda.is_available():  # a rehearsal
        cpu = {"attention_backend": "CPU_MLA", "compilation_config": {"custom_ops": ["-rotary_embedding"]}}
        short = {"max_model_len": 128, "max_num_batched_tokens": WINDOW, "kv_cache_memory_bytes": 1 << 26}
        return {**common, **cpu, **short, "dtype": "float32", "enforce_eager": True}
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sorted(sizes)}
    return {
        **common,
        **{"moe_backend": options.backend, "enable_flashinfer_autotune": False},
        "max_model_len": 2 * CONTEXT,
        "max_num_batched_tokens": max([WINDOW, *prompts]),
        "kv_cache_memory_bytes": 2 << 30,
        "gpu_memory_utilization": 0.85,
        **({"compilation_config": graphs} if sizes else {"enforce_eager": True}),
    }


def work(own: Rank, options: argparse.Namespace) -> None:
    """One rank of `measure`; rank 0 writes the results."""
    from vllm.distributed.parallel_state import get_world_group

    began, group = options.began, cast(Any, get_world_group())
    with torch.inference_mode():
        record = prepare(own, options)
        todo, turn = cases(options.decode, options.prefill, own.parts), 0
        all_cases, rows = todo, record["rows"]
        while True:
            for case in todo:
                names = own.swaps.names
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    own.swaps.swap(name)
                    took, host = own.steps(case, batches(case, turn, options.vocabulary))
                    row = {"case": case.name, "round": turn, "placement": name, "ms": [round(ms, 4) for ms in took]}
                    rows.append(row | ({"host": round(host, 3)} if host else {}))
            turn += 1
            over = time.time() - began > options.seconds or turn == options.rounds
            todo = group.broadcast_object(None if over else wanted(rows, all_cases) if own.rank == 0 else None, src=0)
            if own.rank == 0:
                record["seconds"] = time.time() - began
                write_json(options.json, record)
                say(f"{time.time() - began:.0f} s: round {turn}, next {len(todo or ())} cases")
            if todo is None:
                return


def prepare(own: Rank, options: argparse.Namespace) -> dict[str, Any]:
    """Check that everything is as it should be; return what the results begin with."""
    say_first = say if own.rank == 0 else (lambda _: None)
    say_first(f"{time.time() - options.began:.0f} s: vLLM is up")
    about = own.about()  # before anything else runs: graphs were captured with the kernels that had agreed until now
    about["kernel_maps"] = about["kernel_reads_the_map"] and all(about["kernel_agreed"].values())
    chosen = own.choices("zigzag", options.vocabulary, min(16, WINDOW))
    differ = differing(chosen, options.directory, own.device) if own.rank == 0 else {}
    control = slowest_placement(own, options)
    say_first(f"{time.time() - options.began:.0f} s: {json.dumps({**about, 'differ': differ, 'control': control})}")
    if any(share > 0.2 for share in differ.values()):
        raise RuntimeError(f"routers choose other experts than expected: {differ}")
    if own.on_gpu and own.ranks > 1 and control < 1.1:
        raise RuntimeError(f"with all experts on one rank a step takes {control:.3f} of its time, expected over 1.1")
    if own.rank == 0 and options.save_choices:
        from safetensors.torch import save_file

        save_file({name: ids.to(torch.uint8) for name, ids in chosen.items()}, options.save_choices)
    machine = {name: installed(name) for name in ("vllm", "torch", "triton")}
    return {
        "mode": options.mode,
        "ranks": own.ranks,
        "layers": len(own.layers),
        "machine": {"gpus": gpus("name,driver_version") or [], **machine, "reshard": __version__},
        "about": about,
        "choices_that_differ": differ,
        "control": control,
        "cases": [asdict(case) for case in cases(options.decode, options.prefill, own.parts)],
        "vocabulary": options.vocabulary,
        "placements": {
            name: read_placement_file(options.placements / f"{name.removesuffix(BY_POSITION)}.json").placement_digest
            for name in own.swaps.names
        },
        "rows": [],
    }


def differing(chosen: Mapping[str, Tensor], directory: Path, device: torch.device) -> dict[str, float]:
    """The share of a token's experts that real routers chose and `expected_choices` did not."""
    from safetensors.torch import load_file

    tensors = {name: tensor.to(device) for name, tensor in load_file(directory / FILE).items()}
    routing = routing_of(json.loads((directory / "config.json").read_text()))
    found = {}
    for name, ids_LVK in chosen.items():
        dtype = torch.bfloat16 if device.type == "cuda" and name == "many" else torch.float32
        expected_LVK = expected_choices(tensors, dtype, routing).cpu()
        same = (ids_LVK.unsqueeze(3) == expected_LVK.unsqueeze(2)).any(dim=3)
        found[name] = round(1 - same.double().mean().item(), 6)
    return found


def routing_of(config: Mapping[str, Any]) -> Any:
    """The routing that a config describes."""
    from reshard.model.routing import Routing

    return Routing(
        num_experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        scoring=config["scoring_func"],
        norm_topk_prob=config["norm_topk_prob"],
        routed_scaling_factor=config["routed_scaling_factor"],
        n_group=config["n_group"],
        topk_group=config["topk_group"],
    )


def slowest_placement(own: Rank, options: argparse.Namespace) -> float:
    """The time of a step with all experts on one rank, over that with the linear placement."""
    fit = [case for case in cases(options.decode, options.prefill, own.parts) if case.tokens >= 8]
    if not fit or own.ranks == 1:
        return 0.0
    case, took = replace(fit[0], batches=8), []
    own.swaps.swap(BASE)
    took.append(statistics.median(own.steps(case, batches(case, 0, options.vocabulary))[0]))
    num_experts = num_experts_of(own.swaps.logical(BASE))
    own.swaps.swap_map(torch.arange(num_experts).repeat(len(own.layers), 1) % (num_experts // own.ranks))
    took.append(statistics.median(own.steps(case, batches(case, 0, options.vocabulary))[0]))
    return round(took[1] / took[0], 4)


def read_orders(directory: Path, layers: Sequence[int]) -> dict[str, Tensor]:
    """physical_to_logical [L, P] of each placement file; BASE first."""
    paths = sorted(directory.glob("*.json"), key=lambda path: (path.stem != BASE, path.stem))
    return {path.stem: orders_of(path, layers) for path in paths}


def spare_slots(orders: Mapping[str, Tensor], ranks: int) -> int:
    """The most slots of a rank beside its share of the experts."""
    return max(order_LP.shape[1] - num_experts_of(order_LP) for order_LP in orders.values()) // ranks


def num_experts_of(order_LP: Tensor) -> int:
    """How many logical experts a placement has."""
    return 1 + int(order_LP.max())


def also_by_position(options: argparse.Namespace, orders: Mapping[str, Tensor]) -> list[str]:
    """The placements that vLLM's own choice of a copy serves too: those asked for, or those with the most copies."""
    if options.by_position is not None:
        return list(options.by_position)
    most = max(order_LP.shape[1] for order_LP in orders.values())
    return [name for name, order_LP in orders.items() if order_LP.shape[1] == most]


# All ranks


def run_ranks(command: Sequence[str], options: argparse.Namespace) -> None:
    """Run `command` once for each rank, with --rank added, and wait.

    If one fails, or after `options.limit` seconds, raises SystemExit with the end of its log and stops the others.
    """
    logs = options.logs or options.directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    site = options.directory / "site"
    announce(site, PLUGINS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        **ENVIRONMENT,
        VARIABLE: str((options.directory / FILE).resolve()),
        "PYTHONPATH": python_path(site, ROOT, ROOT / "benchmarks"),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.ranks)),
        **{"WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    started, processes = time.time(), []
    for rank in range(options.ranks):
        log = logs / f"{options.mode}-rank{rank}.log"
        line = [*command, "--rank", str(rank), "--began", str(started)]
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as output:
            process = subprocess.Popen(line, env=environment, stdout=output, stderr=output, start_new_session=True)
        processes.append((process, log))
    try:
        for shown in follow(processes, started + options.limit):
            sys.stdout.write(shown)
            sys.stdout.flush()
    finally:
        for process, _ in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def follow(processes: Sequence[tuple[Any, Path]], deadline: float) -> Iterator[str]:
    """Yield what the first rank says, until all have ended. Raises SystemExit if one fails, or at the deadline."""
    read = 0
    while True:
        ended = [process.poll() for process, _ in processes]
        said = processes[0][1].read_text(errors="replace")
        new = said[read:]
        yield "".join(f"{line}\n" for line in new.splitlines() if line.split(" s: ")[0].isdigit())
        read = len(said)
        failed = next((rank for rank, status in enumerate(ended) if status), None)
        if failed is not None or time.time() > deadline:
            rank = failed or 0
            tail = processes[rank][1].read_text(errors="replace")[-6000:]
            raise SystemExit(f"{tail}\nrank {rank} {'failed' if failed is not None else 'is late'}; its log ends above")
        if all(status == 0 for status in ended):
            return
        time.sleep(1)


# Report


def report(record: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in record["rows"]:
        rows.setdefault(row["case"], []).append(row)
    names = [name for name in record["placements"] if name != BASE]
    lines = [
        f"{record['ranks']} ranks, {record['mode']}: {', '.join(sorted(set(record['machine']['gpus'])))}; "
        f"vLLM {record['machine']['vllm']}. {record['layers']} MoE layers.",
        "",
        f"| step | rounds | {BASE}, ms | {' | '.join(f'{BASE} / {name}' for name in names)} |",
        f"| --- | ---: | ---: |{' --- |' * len(names)}",
    ]
    for case, mine in rows.items():
        base = [statistics.mean(row["ms"]) for row in mine if row["placement"] == BASE]
        found = ratios(mine)
        cells = [shown(found[name]) if found.get(name) else "" for name in names]
        bound = " (bound by the CPU)" if is_bound_by_cpu(mine) else ""
        lines.append(f"| {case}{bound} | {len(base)} | {statistics.median(base):.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def is_bound_by_cpu(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether starting the kernels of a step took nearly as long as the step."""
    shares = [row["host"] / row["ms"][-1] for row in rows if "host" in row]
    return bool(shares) and statistics.median(shares) > 0.9


def shown(values: Sequence[float]) -> str:
    """The median and the quartiles."""
    low, middle, high = quartiles(values)
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"


# Command line


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    making, placing = stages.add_parser("make", help="make the model"), stages.add_parser("place", help="place experts")
    measuring = stages.add_parser("measure", help="measure steps")
    stages.add_parser("report", help="print the results in Markdown").add_argument("json", type=Path, metavar="FILE")
    for stage in (making, placing, measuring):
        stage.add_argument("directory", type=Path, help="directory of the model")
    making.add_argument("--gates", type=Path, required=True, help="file that `what_zigzag_buys.py --save-gates` wrote")
    making.add_argument("--layers", type=int, default=30, help="MoE layers (default 30)")
    making.add_argument("--config", type=json.loads, help="a whole config in place of R1's; for rehearsals")
    making.add_argument("--copies", type=int, default=3, help="layers that share a router (default 3)")
    placing.add_argument("--choices", type=Path, required=True, help="recorded choices of the same routers")
    placing.add_argument("--out", type=Path, required=True, help="directory of placement files")
    placing.add_argument("--ep", type=int, default=8, help="EP ranks (default 8)")
    placing.add_argument("--experts", type=int, default=256)
    placing.add_argument("--tokens", type=int, default=16384, help="of each kind (default 16384)")
    placing.add_argument("--gpu", default="H200", help="for balanced: a GPU's name, or a JSON (default H200)")
    placing.add_argument("--prefix", default="", help="of the files' names")
    placing.add_argument("--strategies", nargs="+", help="only these")
    placing.add_argument("--spare", type=int, nargs="*", default=[2, 4, 8], help="slots for copies (default 2 4 8)")
    measuring.add_argument("--placements", type=Path, required=True, help="directory of placement files")
    measuring.add_argument("--mode", choices=("tp", "dp"), default="tp")
    measuring.add_argument("--ranks", type=int, default=8, help="GPUs (default 8)")
    measuring.add_argument("--json", type=Path, required=True, metavar="FILE", help="file of results")
    measuring.add_argument("--save-choices", type=Path, metavar="FILE", help="write what real routers choose")
    measuring.add_argument("--logs", type=Path, help="directory of logs (default DIR/logs)")
    measuring.add_argument("--seconds", type=float, default=420, help="begin no round after this (default 420)")
    measuring.add_argument("--limit", type=float, default=560, help="give up after this (default 560)")
    measuring.add_argument("--rounds", type=int, default=1000, help="at most so many")
    measuring.add_argument("--decode", type=sizes, default=DECODE, help="tokens:batches, … (default all sizes)")
    measuring.add_argument("--prefill", type=sizes, default=PREFILL, help="tokens:batches, …")
    measuring.add_argument(
        "--start", default="zigzag", help="placement that vLLM starts with, if none has copies (default zigzag)"
    )
    measuring.add_argument(
        "--by-position",
        nargs="*",
        metavar="NAME",
        help="also serve these as vLLM's EPLB picks copies (default: those with the most copies)",
    )
    measuring.add_argument("--backend", default="triton", help="vLLM's --moe-backend (default triton)")
    measuring.add_argument("--exchange", help="vLLM's --all2all-backend, for --mode dp (default: vLLM's own)")
    measuring.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    measuring.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.stage == "measure":
        options.vocabulary = json.loads((options.directory / "config.json").read_text())["vocab_size"]
    return options


def sizes(text: str) -> dict[int, int]:
    """Parse `8:32,64:8`: tokens, and batches in a round."""
    return {int(tokens): int(count) for tokens, _, count in (part.partition(":") for part in text.split(",") if part)}


def main() -> None:
    """Run one stage."""
    options = parse()
    if options.stage == "make":
        from safetensors.torch import load_file

        config = options.config or r1_config(options.layers)
        make(options.directory, load_file(options.gates), config, copies=options.copies)
    elif options.stage == "place":
        place(options)
    elif options.stage == "report":
        print(report(json.loads(options.json.read_text())))
    elif options.rank is None:
        run_ranks([sys.executable, __file__, *sys.argv[1:]], options)
    else:
        work(Rank(options), options)
        sys.stdout.flush()
        os._exit(0)  # an engine that shares the process with its driver may hang while it shuts down


if __name__ == "__main__":
    main()
