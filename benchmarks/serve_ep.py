"""What placements gain in serving: `vllm serve` under expert parallelism on several GPUs, and `vllm bench serve`.

    python benchmarks/serve_ep.py make DIR --gates FILE --layers 6          the models; again where it was cut off
    python benchmarks/serve_ep.py serve DIR --json FILE --modes tp          again until it says "nothing left"
    python benchmarks/serve_ep.py report FILE                               Markdown

The model has DeepSeek-R1's layers at their size, FP8, random but for three things, which make it route as a small model
does that was trained on real text (`what_zigzag_buys.py --save-gates`). Its routers are that model's, lifted to R1's
hidden size by a random orthonormal projection, in turns. Its vocabulary is held-out text: token v's embedding is what
the small model's routers were given at place v, each router's in a subspace of its own, lifted in the same way and loud
beside what attention and experts add. And its head answers with the next place: it recites. As `vllm bench serve
--dataset-name random` makes prompts of consecutive ids, a prompt is a piece of text, and its answer how that goes on.
The first half is what the balanced placement is made from, the second is what is measured; answers stay in their half.
With `--small`, to rehearse on a CPU, everything is random.

Modes are ways to serve; variants are the original under linear placement, the original under vLLM's `round_robin`, and
outputs of `reshard zigzag` and `reshard place --strategy balanced`. Each start begins with an empty page cache, where
that may be had, and serves all concurrencies. A repeat goes through all modes and variants, each time beginning with
another variant. Ratios are to the original under linear placement in the same repeat, which has the same prompts. vLLM
logs how long weights took on the first rank of a host only, so it gets a plugin with which every rank says it.

On Hopper vLLM 0.26 takes FlashInfer's CUTLASS kernels for FP8 experts under expert parallelism. A start without their
binaries was given up after five minutes without a word, in which it seems to have compiled them: install them, or take
vLLM's Triton kernels by `--serve-arguments="--moe-backend triton"`, which was not tried.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from entry_points import announce
from measure import cool, median
from torch import Tensor
from what_zigzag_buys import installed, write_json

from reshard import __version__
from reshard.vllm.patching import replace_once, when_imported

ROOT = Path(__file__).parents[1]
GPU_MODELS, TINY_MODELS = ROOT / "tests" / "gpu" / "models.py", ROOT / "tests" / "serving" / "models.py"
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
PLUGINS = {"reshard": "reshard.vllm:register", "load_times": "serve_ep:install"}
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
UNLESS_SET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
MODES = ("tp", "dp", "eplb")
# As vLLM has it unasked, but sooner: a run ends before the 3000 steps after which experts would first be moved.
EPLB = {"window_size": 200, "step_interval": 400, "num_redundant_experts": 0}
VARIANTS: dict[str, tuple[str, list[str]]] = {  # the model's directory, and what vLLM is told
    "linear": ("original", []),
    "round_robin": ("original", ["--expert-placement-strategy", "round_robin"]),
    "zigzag": ("zigzag", []),
    "balanced": ("balanced", []),
}
METRICS = {  # of `vllm bench serve`, as the report names them
    "total_token_throughput": "tokens/s, both ways",
    "output_throughput": "tokens/s, out",
    "mean_ttft_ms": "TTFT, ms",
    "mean_tpot_ms": "TPOT, ms",
}
RATIOS = {"request_throughput": "QPM", "mean_ttft_ms": "TTFT", "mean_tpot_ms": "TPOT"}
PUBLISHED = (
    "Published for `round_robin` over linear: about 3 % more (DeepSeek-V2) and 8 % more QPM (R1) on 8 H20 (vLLM pull "
    "request 23745); 14.6 % more throughput on two nodes over DeepEP (28449)."
)
R1_HIDDEN = 7168
LOUD = 64.0  # deviation of embeddings; what a layer adds is of a few
TRACED = 0  # seed of the prompts that are recorded; repeats have those that follow
START_SECONDS = 540  # a start that takes longer has failed
END_SECONDS = 10  # a server that takes longer is killed


@dataclass(frozen=True)
class Workload:
    """What a server is, and what is asked of it: all that runs in one file have in common."""

    gpus: int
    input: int  # tokens
    output: int
    concurrency: list[int]
    rounds: int  # requests for each one at the same time
    least: int  # requests, at least
    eplb: dict[str, Any]
    arguments: list[str]  # more of them, for `vllm serve`


@dataclass(frozen=True)
class Start:
    """One start of a server."""

    repeat: int
    mode: str
    variant: str

    def __str__(self) -> str:
        return f"repeat {self.repeat}, {self.mode}, {self.variant}"


# The models


def lifted(gates: Mapping[str, Tensor], layers: int, hidden: int) -> dict[str, Tensor]:
    """Embeddings, head and the routers of `layers` MoE layers by the names that a checkpoint with one dense layer has.

    Parameters:
        gates: what `small_moe.save_gates` wrote: G routers [E, H], biases [E], and inputs [T, H] for each kind of text
        layers, hidden: of the model to be made

    Tokens are ordered so that each half of the vocabulary has half of each kind of text.
    """
    weights = [name for name in gates if name.endswith(".mlp.gate.weight")]
    names = [name.removesuffix(".weight") for name in sorted(weights, key=lambda name: int(name.split(".")[2]))]
    kinds = sorted({name.rpartition(".")[2] for name in gates if ".input." in name})
    texts_TGH = [torch.stack([gates[f"{name}.input.{kind}"] for name in names], dim=1).float() for kind in kinds]
    halves = zip(*(text[: len(text) // 2 * 2].chunk(2) for text in texts_TGH), strict=True)
    given_TGH = torch.cat([text for half in halves for text in half])
    basis_GHD = orthonormal(given_TGH[0].numel(), hidden).view(*given_TGH[0].shape, hidden)
    stream_TD = given_TGH.flatten(1) @ basis_GHD.flatten(0, 1)
    size_T1 = stream_TD.norm(dim=1, keepdim=True) / hidden**0.5  # by which RMSNorm will divide
    before_TD = torch.cat([half_TD.roll(1, 0) for half_TD in (stream_TD / size_T1).chunk(2)])
    found = {"model.embed_tokens.weight": LOUD * stream_TD / size_T1.mean(), "lm_head.weight": before_TD / hidden**0.5}
    for layer in range(layers):
        name, basis_HD = names[layer % len(names)], basis_GHD[layer % len(names)]
        lifted_ED = size_T1.mean() * gates[f"{name}.weight"].float() @ basis_HD
        found[f"model.layers.{1 + layer}.mlp.gate.weight"] = lifted_ED
        bias_E = gates[f"{name}.e_score_correction_bias"]
        found[f"model.layers.{1 + layer}.mlp.gate.e_score_correction_bias"] = bias_E.clone()
    return found


def orthonormal(rows: int, columns: int) -> Tensor:
    """Orthonormal rows at random, the same each time."""
    if rows > columns:
        raise ValueError(f"{rows} dimensions do not fit into {columns}")
    basis: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=torch.Generator().manual_seed(0)))[0]
    return basis.T.contiguous()


def make(options: argparse.Namespace) -> None:
    """All that is served; what is there is left as it is."""
    at, workload = options.directory, workload_of(options)
    made(at / "original", lambda path: make_original(path, options))
    vocabulary = about(at)["vocab_size"]
    # `vllm bench serve` makes prompts of all words that its tokenizer knows
    made(at / "traced", lambda path: save_words(path, at, range(vocabulary // 2)))
    made(at / "measured", lambda path: save_words(path, at, range(vocabulary // 2, vocabulary)))
    common = ["--src", at / "original", "--ep", options.ep or options.gpus, "--quiet"]
    made(at / "zigzag", lambda path: reshard("zigzag", *common, "--out", path), resumes=True)

    def record(path: Path) -> None:
        soon = replace(workload, arguments=[*workload.arguments, "--enforce-eager"])  # times do not matter here
        with served(
            at, Start(0, "tp", "linear"), soon, at / "logs" / "trace.log", {"RESHARD_TRACE": str(path)}
        ) as address:
            bench(address, at / "traced", workload, max(workload.concurrency), TRACED)

    made(at / "trace", record)
    common += ["--strategy", "balanced", "--trace", at / "trace"]
    made(at / "balanced", lambda path: reshard("place", *common, "--out", path), resumes=True)


def made(path: Path, build: Callable[[Path], None], *, resumes: bool = False) -> None:
    """Build `path` where it is not there yet, under another name until it is whole."""
    if path.exists():
        return
    began, unfinished = time.monotonic(), path.with_name(f"{path.name}.unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not resumes:
        shutil.rmtree(unfinished, ignore_errors=True)
    build(unfinished)
    unfinished.rename(path)
    say(f"{path.name}: made in {time.monotonic() - began:.0f} s")


def make_original(directory: Path, options: argparse.Namespace) -> None:
    """The model, with a tokenizer."""
    if options.small:
        subprocess.run([sys.executable, TINY_MODELS, "deepseek_v3", directory], check=True)
        return
    from safetensors.torch import load_file

    given = lifted(load_file(options.gates), options.layers, R1_HIDDEN)
    runpy.run_path(str(GPU_MODELS))["make_r1"](directory, options.layers, given)
    runpy.run_path(str(TINY_MODELS))["save_tokenizer"](directory, range(len(given["lm_head.weight"])))


def save_words(directory: Path, at: Path, ids: range) -> None:
    """A tokenizer that knows a part of the vocabulary."""
    runpy.run_path(str(TINY_MODELS))["save_tokenizer"](directory, ids)
    shutil.copy(at / "original" / "config.json", directory)  # vLLM looks for one


def reshard(*arguments: object) -> None:
    """Run it."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-m", "reshard", *map(str, arguments)], env=environment, check=True)


def about(at: Path) -> dict[str, Any]:
    """The model, in a few numbers of its config."""
    config = json.loads((at / "original" / "config.json").read_text())
    names = ("num_hidden_layers", "first_k_dense_replace", "n_routed_experts", "n_group", "hidden_size", "vocab_size")
    return {name: config[name] for name in names}


# The server


def command(at: Path, start: Start, workload: Workload, port: int) -> list[str]:
    """How vLLM is started."""
    directory, told = VARIANTS[start.variant]
    ranks = {
        "tp": ["--tensor-parallel-size", workload.gpus],
        "dp": ["--data-parallel-size", workload.gpus],
        "eplb": ["--tensor-parallel-size", workload.gpus, "--enable-eplb", "--eplb-config", json.dumps(workload.eplb)],
    }
    arguments = ["serve", at / directory, "--host", "127.0.0.1", "--port", port, "--served-model-name", "model"]
    # vLLM refuses prompts by their letters too, and counts none for spaces: hence twice the length
    arguments += ["--max-model-len", 2 * (workload.input + workload.output)]
    # what one concurrency is asked is in part what the next one is, which would find it in the cache
    arguments += ["--no-enable-prefix-caching", "--max-num-seqs", max(workload.concurrency)]
    arguments += ["--enable-expert-parallel", *ranks[start.mode], *told, *workload.arguments]
    return [*VLLM, *map(str, arguments)]


@contextlib.contextmanager
def served(at: Path, start: Start, workload: Workload, log: Path, more: Mapping[str, str]) -> Iterator[str]:
    """The address of a server that is up; it has ended after that. A RuntimeError gets what the server's log says."""
    announce(at / "site", PLUGINS)
    paths = [at / "site", ROOT, ROOT / "benchmarks", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**UNLESS_SET, **os.environ, **MULTICAST_OFF, **more, "PYTHONPATH": ":".join(map(str, paths))}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        line = command(at, start, workload, port)
        server = subprocess.Popen(line, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not healthy(address := f"http://127.0.0.1:{port}"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("vLLM did not start")
            time.sleep(0.5)
        yield address
    except RuntimeError as error:
        raise RuntimeError(f"{error}; {complaint(log.read_text())}") from error
    finally:
        end(server)


def healthy(address: str) -> bool:
    """Whether it serves."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def end(server: subprocess.Popen[bytes]) -> None:
    """End a server and what it started, and see it gone: the next one needs the memory."""
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for _ in range(100):
            os.killpg(server.pid, 0)  # raises once none of them is left
            time.sleep(0.1)


def bench(address: str, tokenizer: Path, workload: Workload, concurrency: int, seed: int) -> dict[str, float]:
    """The numbers that `vllm bench serve` found."""
    requests = max(workload.least, workload.rounds * concurrency)
    arguments = ["--backend", "vllm", "--base-url", address, "--model", "model", "--tokenizer", tokenizer]
    arguments += ["--dataset-name", "random", "--random-input-len", workload.input]
    arguments += ["--random-output-len", workload.output, "--ignore-eos", "--temperature", 0, "--seed", seed]
    arguments += ["--num-prompts", requests, "--max-concurrency", concurrency, "--num-warmups", concurrency]
    arguments += ["--percentile-metrics", "ttft,tpot,itl", "--disable-tqdm", "--save-result"]
    with tempfile.TemporaryDirectory() as results:
        arguments += ["--result-dir", results, "--result-filename", "found.json"]
        line, environment = [*VLLM, "bench", "serve", *map(str, arguments)], {**UNLESS_SET, **os.environ}
        ran = subprocess.run(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ran.returncode:
            raise RuntimeError(f"vllm bench serve failed, {complaint(ran.stdout)}")
        found = json.loads((Path(results) / "found.json").read_text())
    if found["completed"] != requests:
        raise RuntimeError(f"{found['completed']} of {requests} requests were answered")
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


# What the log says


def install() -> None:
    """A plugin of vLLM's: every rank says how long its weights took."""
    when_imported("vllm.model_executor.model_loader.default_loader", _say_load_time)


def _say_load_time(default_loader: ModuleType) -> None:
    def wrap(load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def timed(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            result = load(*arguments, **more)
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            line = f"serve_ep: rank {rank} loaded its weights in {time.perf_counter() - began:.3f} s\n"
            os.write(2, line.encode())  # at once: all ranks write into the same file
            return result

        return timed

    replace_once(default_loader.DefaultModelLoader, "load_weights", wrap)


def load_seconds(log: str) -> dict[str, float]:
    """How long each rank's weights took."""
    return {
        rank: float(took) for rank, took in re.findall(r"serve_ep: rank (\d+) loaded its weights in ([\d.]+) s", log)
    }


def fell_back(log: str) -> list[str]:
    """What vLLM said where it did not place experts round-robin."""
    return sorted(set(re.findall(r"Round-robin [^\n]*Falling back to linear[^\n]*", log)))


def complaint(log: str) -> str:
    """The first error in it, without the names of directories; not what a warning says of errors."""
    logged, and_why = r"(?:\(\w+ pid=\d+\) )?(?:ERROR [^\]]*\] )?", r"(?:\n  Value error, [^\[\n]*)?"
    found = re.search(rf"^{logged}([\w.]*(?:Error|Exception)\b.*{and_why})", log, re.MULTILINE)
    return re.sub(r"(?:/[\w.+-]+)+/", "", " ".join(found[1].split())) if found else "no error is in its log"


# Runs


def plan(repeats: int, modes: Sequence[str], variants: Sequence[str]) -> list[Start]:
    """All starts: in each repeat all modes, and in each mode all variants, in each repeat from another one on."""
    return [
        Start(repeat, mode, variants[(turn + repeat) % len(variants)])
        for repeat in range(repeats)
        for mode in modes
        for turn in range(len(variants))
    ]


def left(starts: Sequence[Start], record: Mapping[str, Any]) -> list[tuple[Start, list[int]]]:
    """Starts of which concurrencies are left, and which. One that failed is not made again."""
    done = {(run["repeat"], run["mode"], run["variant"], run["concurrency"]) for run in record["runs"]}
    failed = {(start["repeat"], start["mode"], start["variant"]) for start in record["starts"] if "failed" in start}
    sizes = record["workload"]["concurrency"]
    missing = [(start, [size for size in sizes if (*astuple(start), size) not in done]) for start in starts]
    return [(start, sizes) for start, sizes in missing if sizes and astuple(start) not in failed]


def serve(options: argparse.Namespace) -> None:
    """Run what is left, as far as time allows; every result is in the file at once."""
    began, workload = time.monotonic(), workload_of(options)
    models = {VARIANTS[variant][0] for variant in options.variants}
    if missing := sorted(model for model in models if not (options.directory / model).exists()):
        raise SystemExit(f"{options.directory} has no {' and no '.join(missing)}: make it first")
    record: dict[str, Any] = {"workload": asdict(workload), "model": about(options.directory), "starts": [], "runs": []}
    if options.json.exists():
        before = json.loads(options.json.read_text())
        if (before["workload"], before["model"]) != (record["workload"], record["model"]):
            raise SystemExit(f"{options.json.name} has runs of another workload or model: {before['workload']}")
        record = before
    starts = plan(options.repeats, options.modes, options.variants)
    for start, sizes in left(starts, record):
        longest = max([0.0, *(found["seconds"] for found in record["starts"] if found["mode"] == start.mode)])
        if time.monotonic() - began + longest > options.seconds:
            say(f"no time for another start, which took up to {longest:.0f} s")
            break
        run(options.directory, start, sizes, workload, record, functools.partial(write_json, options.json, record))
    say(f"{len(rest)} starts left" if (rest := left(starts, record)) else "nothing left")


def run(
    at: Path, start: Start, sizes: list[int], workload: Workload, record: dict[str, Any], save: Callable[[], None]
) -> None:
    """One start, for the concurrencies that are left of it."""
    began, log = time.monotonic(), at / "logs" / f"{start.mode}-{start.variant}-{start.repeat}.log"
    say(f"{start}: starting")
    found: dict[str, Any] = {**asdict(start), "machine": machine(), "cold": emptied(), "seconds": 0.0}
    record["starts"].append(found)
    try:
        with served(at, start, workload, log, {}) as address:
            found["ready_seconds"] = time.monotonic() - began
            found |= {"load_seconds": load_seconds(log.read_text()), "fell_back": fell_back(log.read_text())}
            for size in sizes:
                result = bench(address, at / "measured", workload, size, TRACED + 1 + start.repeat)
                record["runs"].append({**asdict(start), "concurrency": size, **result})
                save()
                say(f"{start}, {size} at once: {result['request_throughput']:.3f} requests/s")
    except RuntimeError as error:
        found["failed"] = str(error)
        say(f"{start}: {error}")
    found["seconds"] = time.monotonic() - began
    save()


def emptied() -> bool:
    """Empty the page cache; whether that may be done here."""
    try:
        cool()
    except OSError:
        return False
    return True


def machine() -> dict[str, Any]:
    """What it runs on, and what else decides how."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        gpus = []
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "NCCL_")) and "/" not in value
    }
    versions = {name: installed(name) for name in ("vllm", "torch")}
    return {"gpus": gpus, **versions, "reshard": __version__, "environment": kept | MULTICAST_OFF}


# Report


def report(record: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    machines = {json.dumps(start["machine"]): start["machine"] for start in record["starts"]}
    facts = [
        f"{len(found['gpus'])} GPUs ({', '.join(set(found['gpus']))}), vLLM {found['vllm']}, torch {found['torch']}"
        for found in machines.values()
    ]
    lines = [
        f"{'; '.join(facts)}. Workload: {json.dumps(record['workload'])}. Model: {json.dumps(record['model'])}.",
        "",
        "Medians over repeats (least to greatest); ratios to the original under linear placement in the same repeat.",
    ]
    for mode in MODES:
        runs, starts = ([found for found in record[name] if found["mode"] == mode] for name in ("runs", "starts"))
        if starts:
            lines += ["", f"### {mode}", "", *results(runs), "", *loads(starts), *remarks(starts)]
    return "\n".join([*lines, "", PUBLISHED])


def results(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table of a mode."""
    names = [*METRICS.values(), *(f"{name}, ratio" for name in RATIOS.values())]
    yield f"| at once | variant | repeats | QPM | {' | '.join(names)} |"
    yield f"| ---: | --- | ---: | --- {'| --- ' * len(names)}|"
    for size in sorted({run["concurrency"] for run in runs}):
        for variant in VARIANTS:
            if mine := [run for run in runs if (run["variant"], run["concurrency"]) == (variant, size)]:
                cells = [str(size), variant, str(len(mine)), spread([60 * run["request_throughput"] for run in mine])]
                cells += [spread([run[name] for run in mine]) for name in METRICS]
                found = [ratios(runs, variant, size, name) for name in RATIOS]
                yield f"| {' | '.join([*cells, *(spread(of) if of else '' for of in found)])} |"


def ratios(runs: Sequence[Mapping[str, Any]], variant: str, size: int, name: str) -> list[float]:
    """A variant's over that of the original under linear placement, for each repeat that has both."""
    of = {(run["variant"], run["repeat"]): run[name] for run in runs if run["concurrency"] == size}
    repeats = sorted(repeat for other, repeat in of if other == variant and ("linear", repeat) in of)
    return [of[variant, repeat] / of["linear", repeat] for repeat in repeats]


def loads(starts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How long weights took."""
    yield "| variant | page cache | starts | weights on each rank, s | on the slowest, s | until ready, s |"
    yield "| --- | --- | ---: | --- | --- | --- |"
    for variant in VARIANTS:
        for cold, cache in ((True, "empty"), (False, "could not be emptied")):
            mine = [start for start in starts if (start["variant"], start["cold"]) == (variant, cold)]
            if mine := [start for start in mine if start.get("load_seconds")]:
                ranks = [seconds for start in mine for seconds in start["load_seconds"].values()]
                slowest = spread([max(start["load_seconds"].values()) for start in mine])
                ready = spread([start["ready_seconds"] for start in mine])
                yield f"| {variant} | {cache} | {len(mine)} | {spread(ranks)} | {slowest} | {ready} |"


def remarks(starts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What else starts said."""
    said = {(start["variant"], line) for start in starts for line in start.get("fell_back", ())}
    said |= {(start["variant"], f"failed: {start['failed']}") for start in starts if "failed" in start}
    for variant, line in sorted(said):
        yield f"\n{variant}: {line}"


def spread(values: Sequence[float]) -> str:
    """The median (least to greatest), with enough digits for differences of a percent."""
    middle, least, most = (
        f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in (median(values), min(values), max(values))
    )
    return f"{middle} ({least} to {most})"


# Command line


def workload_of(options: argparse.Namespace) -> Workload:
    """Its options."""
    names = ("gpus", "input", "output", "concurrency", "rounds", "least", "eplb")
    given = {name: getattr(options, name) for name in names}
    return Workload(**given, arguments=shlex.split(options.serve_arguments))


def say(text: str) -> None:
    """To whoever waits."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    making, serving = stages.add_parser("make", help="the models"), stages.add_parser("serve", help="run what is left")
    for stage in (making, serving):
        stage.add_argument("directory", type=Path, help="of the models")
        stage.add_argument("--gpus", type=int, default=8, help="ranks (default 8)")
        stage.add_argument("--input", type=int, default=1024, help="tokens of a prompt (default 1024)")
        stage.add_argument("--output", type=int, default=128, help="tokens of an answer (default 128)")
        stage.add_argument("--concurrency", type=int, nargs="+", default=[8, 64, 512], help="requests at the same time")
        stage.add_argument("--rounds", type=int, default=4, help="requests for each one at the same time (default 4)")
        stage.add_argument("--least", type=int, default=64, help="requests, at least (default 64)")
        stage.add_argument("--eplb", type=json.loads, default=EPLB, help=f"its config (default {json.dumps(EPLB)})")
        stage.add_argument("--serve-arguments", default="", help="more options of `vllm serve`, as one word")
    making.add_argument("--gates", type=Path, help="what `what_zigzag_buys.py --save-gates` wrote")
    making.add_argument("--layers", type=int, default=6, help="MoE layers, 11.3 GB each, three times (default 6)")
    making.add_argument("--ep", type=int, help="ranks that outputs are made for (default: as many as GPUs)")
    making.add_argument("--small", action="store_true", help="a tiny random model instead, to rehearse")
    serving.add_argument("--json", type=Path, required=True, metavar="FILE", help="results, kept and added to")
    serving.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    serving.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    serving.add_argument("--repeats", type=int, default=3)
    serving.add_argument("--seconds", type=float, default=540, help="begin no start that would end later (default 540)")
    stages.add_parser("report", help="Markdown").add_argument("json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.stage == "make" and not (options.small or options.gates):
        parser.error("make needs --gates, or --small")
    return options


def main() -> None:
    """Do a stage."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end too
    options = parse()
    if options.stage == "report":
        print(report(json.loads(options.json.read_text())))
    else:
        {"make": make, "serve": serve}[options.stage](options)


if __name__ == "__main__":
    main()
