"""What placements gain in serving: `vllm serve` on several GPUs, measured by `vllm bench serve`.

    python benchmarks/serve_ep.py make DIR --gates FILE --layers 6          builds the models; rerun it to resume
    python benchmarks/serve_ep.py serve DIR --json FILE --modes tp          rerun it until it says "nothing left"
    python benchmarks/serve_ep.py report FILE                               prints Markdown

The model has DeepSeek-R1's layers at their size, in FP8 and random except for three things. These make it route like a
small model that was trained on real text (`what_zigzag_buys.py --save-gates`):

- Its routers are the small model's, used in turns. A random orthonormal projection lifts them to R1's hidden size.
- Its vocabulary is held-out text. The embedding of token v is the input that the small model's routers had at position
  v, lifted in the same way, with a subspace for each router. It is much larger than what attention and experts add.
- Its head answers with the next position: the model recites the text.

`vllm bench serve --dataset-name random` makes prompts of consecutive ids, so a prompt is a piece of text, and its
answer is the text that follows. The balanced placement is made from the first half of the text, and the second half is
measured; answers stay in their half. With `--small`, for rehearsals on a CPU, everything is random.

Modes are ways to serve, all with expert parallelism. Variants are the original under linear placement, the original
under vLLM's `round_robin`, and outputs of `reshard zigzag` and `reshard place --strategy balanced`. Each start begins
with an empty page cache, if the user may empty it, and serves all concurrencies. A repeat goes through all modes and
variants, and each repeat begins with another variant. Ratios are to the original under linear placement in the same
repeat, which has the same prompts. vLLM logs the load time of weights for the first rank of a host only, so a plugin
makes every rank log it.

On Hopper, vLLM 0.26 uses FlashInfer's CUTLASS kernels for FP8 experts under expert parallelism. Without their binaries,
a start was stopped after five minutes of silence, in which it seems to have compiled them. Install the binaries, or use
vLLM's Triton kernels (`--serve-arguments="--moe-backend triton"`), which was not tried.
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
from entry_points import announce, python_path
from measure import cool, spread
from reporting import gpus, installed, say, write_json
from torch import Tensor

from reshard import __version__
from reshard.vllm.patching import replace_once

ROOT = Path(__file__).parents[1]
GPU_MODELS, TINY_MODELS = ROOT / "tests" / "gpu" / "models.py", ROOT / "tests" / "serving" / "models.py"
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
PLUGINS = {"reshard": "reshard.vllm:register", "load_times": "serve_ep:install"}
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
UNLESS_SET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
MODES = ("tp", "dp", "eplb")
# By default vLLM first moves experts after 3000 steps, when the benchmark has ended: these values are sooner.
EPLB = {"window_size": 200, "step_interval": 400, "num_redundant_experts": 0}
VARIANTS: dict[str, tuple[str, list[str]]] = {  # the model's directory, and more options of vLLM
    "linear": ("original", []),
    "round_robin": ("original", ["--expert-placement-strategy", "round_robin"]),
    "zigzag": ("zigzag", []),
    "balanced": ("balanced", []),
}
METRICS = {  # from a name in `vllm bench serve` to its name in the report
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
LOUD = 64.0  # standard deviation of embeddings; that of a layer's output is a few
TRACE_SEED = 0  # of the recorded prompts; repeats use the seeds after it
START_SECONDS = 540  # a start that takes longer has failed
END_SECONDS = 10  # a server that takes longer is killed


@dataclass(frozen=True)
class Workload:
    """The server's options and its requests. All results in one file have the same workload."""

    gpus: int
    input: int  # tokens of a prompt
    output: int  # tokens of an answer
    concurrency: list[int]
    rounds: int  # requests per concurrent request
    least: int  # minimum number of requests
    eplb: dict[str, Any]
    arguments: list[str]  # more options of `vllm serve`


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
    """Lift a small model's routers to `hidden`: embeddings, head and routers, by their names in a checkpoint.

    Each half of the vocabulary has half of each kind of text.

    Parameters:
        gates: what `small_moe.save_gates` wrote: G routers [E, H], biases [E], and inputs [T, H] for each kind of text
        layers: MoE layers of the new model, which has one dense layer before them
        hidden: hidden size of the new model
    """
    weights = [name for name in gates if name.endswith(".mlp.gate.weight")]
    names = [name.removesuffix(".weight") for name in sorted(weights, key=lambda name: int(name.split(".")[2]))]
    kinds = sorted({name.rpartition(".")[2] for name in gates if ".input." in name})
    texts_TGH = [torch.stack([gates[f"{name}.input.{kind}"] for name in names], dim=1).float() for kind in kinds]
    halves = zip(*(text[: len(text) // 2 * 2].chunk(2) for text in texts_TGH), strict=True)
    inputs_TGH = torch.cat([text for half in halves for text in half])
    basis_GHD = orthonormal(inputs_TGH[0].numel(), hidden).view(*inputs_TGH[0].shape, hidden)
    stream_TD = inputs_TGH.flatten(1) @ basis_GHD.flatten(0, 1)
    size_T1 = stream_TD.norm(dim=1, keepdim=True) / hidden**0.5  # RMSNorm divides by this
    previous_TD = torch.cat([half_TD.roll(1, 0) for half_TD in (stream_TD / size_T1).chunk(2)])
    found = {
        "model.embed_tokens.weight": LOUD * stream_TD / size_T1.mean(),
        "lm_head.weight": previous_TD / hidden**0.5,
    }
    for layer in range(layers):
        name, basis_HD = names[layer % len(names)], basis_GHD[layer % len(names)]
        lifted_ED = size_T1.mean() * gates[f"{name}.weight"].float() @ basis_HD
        found[f"model.layers.{1 + layer}.mlp.gate.weight"] = lifted_ED
        bias_E = gates[f"{name}.e_score_correction_bias"]
        found[f"model.layers.{1 + layer}.mlp.gate.e_score_correction_bias"] = bias_E.clone()
    return found


def orthonormal(rows: int, columns: int) -> Tensor:
    """Random orthonormal rows, the same in every call."""
    if rows > columns:
        raise ValueError(f"{rows} dimensions do not fit into {columns}")
    basis: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=torch.Generator().manual_seed(0)))[0]
    return basis.T.contiguous()


def make(options: argparse.Namespace) -> None:
    """Make everything that is served; keep what is already there."""
    models, workload = options.directory, workload_of(options)
    build_once(models / "original", lambda path: make_original(path, options))
    vocabulary = model_facts(models)["vocab_size"]
    # `vllm bench serve` makes prompts from all words that its tokenizer knows
    build_once(models / "traced", lambda path: save_words(path, models, range(vocabulary // 2)))
    build_once(models / "measured", lambda path: save_words(path, models, range(vocabulary // 2, vocabulary)))
    common = ["--src", models / "original", "--ep", options.ep or options.gpus, "--quiet"]
    build_once(models / "zigzag", lambda path: reshard("zigzag", *common, "--out", path), resumes=True)

    def record(path: Path) -> None:
        # starts sooner than with CUDA graphs; nothing is timed here
        eager = replace(workload, arguments=[*workload.arguments, "--enforce-eager"])
        with served(
            models, Start(0, "tp", "linear"), eager, models / "logs" / "trace.log", {"RESHARD_TRACE": str(path)}
        ) as address:
            bench(address, models / "traced", workload, max(workload.concurrency), TRACE_SEED)

    build_once(models / "trace", record)
    common += ["--strategy", "balanced", "--trace", models / "trace"]
    build_once(models / "balanced", lambda path: reshard("place", *common, "--out", path), resumes=True)


def build_once(path: Path, build: Callable[[Path], None], *, resumes: bool = False) -> None:
    """Build `path` unless it exists; until it is complete it has another name."""
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
    """Write the original model with its tokenizer."""
    if options.small:
        subprocess.run([sys.executable, TINY_MODELS, "deepseek_v3", directory], check=True)
        return
    from safetensors.torch import load_file

    tensors = lifted(load_file(options.gates), options.layers, R1_HIDDEN)
    runpy.run_path(str(GPU_MODELS))["make_r1"](directory, options.layers, tensors)
    runpy.run_path(str(TINY_MODELS))["save_tokenizer"](directory, range(len(tensors["lm_head.weight"])))


def save_words(directory: Path, models: Path, ids: range) -> None:
    """Write a tokenizer that knows only the tokens `ids`."""
    runpy.run_path(str(TINY_MODELS))["save_tokenizer"](directory, ids)
    shutil.copy(models / "original" / "config.json", directory)  # vLLM looks for a config


def reshard(*arguments: object) -> None:
    """Run reshard's command line."""
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    subprocess.run([sys.executable, "-m", "reshard", *map(str, arguments)], env=environment, check=True)


def model_facts(models: Path) -> dict[str, Any]:
    """A few numbers from the model's config."""
    config = json.loads((models / "original" / "config.json").read_text())
    names = ("num_hidden_layers", "first_k_dense_replace", "n_routed_experts", "n_group", "hidden_size", "vocab_size")
    return {name: config[name] for name in names}


# The server


def command(models: Path, start: Start, workload: Workload, port: int) -> list[str]:
    """The command that starts vLLM."""
    directory, placement = VARIANTS[start.variant]
    ranks = {
        "tp": ["--tensor-parallel-size", workload.gpus],
        "dp": ["--data-parallel-size", workload.gpus],
        "eplb": ["--tensor-parallel-size", workload.gpus, "--enable-eplb", "--eplb-config", json.dumps(workload.eplb)],
    }
    arguments = ["serve", models / directory, "--host", "127.0.0.1", "--port", port, "--served-model-name", "model"]
    # vLLM also refuses prompts with too many letters, and does not count spaces: so allow twice the length
    arguments += ["--max-model-len", 2 * (workload.input + workload.output)]
    # concurrencies share prompts, which a later one would find in the prefix cache
    arguments += ["--no-enable-prefix-caching", "--max-num-seqs", max(workload.concurrency)]
    arguments += ["--enable-expert-parallel", *ranks[start.mode], *placement, *workload.arguments]
    return [*VLLM, *map(str, arguments)]


@contextlib.contextmanager
def served(
    models: Path,
    start: Start,
    workload: Workload,
    log: Path,
    more: Mapping[str, str],
    plugins: Mapping[str, str] = PLUGINS,
) -> Iterator[str]:
    """Start a server, yield its address once it is up, end it. A RuntimeError tells the log's first error too."""
    announce(models / "site", plugins)
    path = python_path(models / "site", ROOT, ROOT / "benchmarks")
    environment = {**UNLESS_SET, **os.environ, **MULTICAST_OFF, **more, "PYTHONPATH": path}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        line = command(models, start, workload, port)
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
    """Whether a server is up there."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def end(server: subprocess.Popen[bytes]) -> None:
    """End a server and its child processes, and wait until they are gone: the next server needs the memory."""
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
    """Run `vllm bench serve`; return the numbers that it measured."""
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


# The server's log


def install() -> None:
    """The plugin for vLLM that makes every rank log how long it loaded its weights."""
    from wrapt import register_post_import_hook

    register_post_import_hook(_log_load_time, "vllm.model_executor.model_loader.default_loader")


def _log_load_time(default_loader: ModuleType) -> None:
    def wrap(load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def timed(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            result = load(*arguments, **more)
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            line = f"serve_ep: rank {rank} loaded its weights in {time.perf_counter() - began:.3f} s\n"
            os.write(2, line.encode())  # in one write: all ranks write to the same file
            return result

        return timed

    replace_once(default_loader.DefaultModelLoader, "load_weights", wrap)


def load_seconds(log: str) -> dict[str, float]:
    """The seconds in which each rank loaded its weights."""
    return {
        rank: float(took) for rank, took in re.findall(r"serve_ep: rank (\d+) loaded its weights in ([\d.]+) s", log)
    }


def fell_back(log: str) -> list[str]:
    """vLLM's messages that it did not place experts round-robin."""
    return sorted(set(re.findall(r"Round-robin [^\n]*Falling back to linear[^\n]*", log)))


def complaint(log: str) -> str:
    """The first error in a log, without directory names; errors quoted in warnings do not count."""
    logged, and_why = r"(?:\(\w+ pid=\d+\) )?(?:ERROR [^\]]*\] )?", r"(?:\n  Value error, [^\[\n]*)?"
    found = re.search(rf"^{logged}([\w.]*(?:Error|Exception)\b.*{and_why})", log, re.MULTILINE)
    return re.sub(r"(?:/[\w.+-]+)+/", "", " ".join(found[1].split())) if found else "no error is in its log"


# Starts of the server


def plan(repeats: int, modes: Sequence[str], variants: Sequence[str]) -> list[Start]:
    """All starts: each repeat has all modes, each mode all variants, and each repeat begins with another variant."""
    return [
        Start(repeat, mode, variants[(turn + repeat) % len(variants)])
        for repeat in range(repeats)
        for mode in modes
        for turn in range(len(variants))
    ]


def left(starts: Sequence[Start], record: Mapping[str, Any]) -> list[tuple[Start, list[int]]]:
    """The unfinished starts, and the concurrencies that each still has to serve. A failed start is not repeated."""
    done = {(run["repeat"], run["mode"], run["variant"], run["concurrency"]) for run in record["runs"]}
    failed = {(start["repeat"], start["mode"], start["variant"]) for start in record["starts"] if "failed" in start}
    sizes = record["workload"]["concurrency"]
    missing = [(start, [size for size in sizes if (*astuple(start), size) not in done]) for start in starts]
    return [(start, sizes) for start, sizes in missing if sizes and astuple(start) not in failed]


def serve(options: argparse.Namespace) -> None:
    """Serve what is left, as far as time allows; write each result to the file at once."""
    began, workload = time.monotonic(), workload_of(options)
    names = {VARIANTS[variant][0] for variant in options.variants}
    if missing := sorted(name for name in names if not (options.directory / name).exists()):
        raise SystemExit(f"{options.directory} has no {' and no '.join(missing)}: make it first")
    record: dict[str, Any] = {
        "workload": asdict(workload),
        "model": model_facts(options.directory),
        "starts": [],
        "runs": [],
    }
    if options.json.exists():
        before = json.loads(options.json.read_text())
        if (before["workload"], before["model"]) != (record["workload"], record["model"]):
            raise SystemExit(f"{options.json.name} has results of another workload or model: {before['workload']}")
        record = before
    starts = plan(options.repeats, options.modes, options.variants)
    for start, sizes in left(starts, record):
        longest = max([0.0, *(found["seconds"] for found in record["starts"] if found["mode"] == start.mode)])
        if time.monotonic() - began + longest > options.seconds:
            say(f"no time for another start: earlier ones took up to {longest:.0f} s")
            break
        serve_once(
            options.directory, start, sizes, workload, record, functools.partial(write_json, options.json, record)
        )
    say(f"{len(rest)} starts left" if (rest := left(starts, record)) else "nothing left")


def serve_once(
    models: Path, start: Start, sizes: list[int], workload: Workload, record: dict[str, Any], save: Callable[[], None]
) -> None:
    """Start a server once, for the concurrencies `sizes`."""
    began, log = time.monotonic(), models / "logs" / f"{start.mode}-{start.variant}-{start.repeat}.log"
    say(f"{start}: starting")
    found: dict[str, Any] = {**asdict(start), "machine": machine(), "cold": emptied(), "seconds": 0.0}
    record["starts"].append(found)
    try:
        with served(models, start, workload, log, {}) as address:
            found["ready_seconds"] = time.monotonic() - began
            found |= {"load_seconds": load_seconds(log.read_text()), "fell_back": fell_back(log.read_text())}
            for size in sizes:
                result = bench(address, models / "measured", workload, size, TRACE_SEED + 1 + start.repeat)
                record["runs"].append({**asdict(start), "concurrency": size, **result})
                save()
                say(f"{start}, {size} at once: {result['request_throughput']:.3f} requests/s")
    except RuntimeError as error:
        found["failed"] = str(error)
        say(f"{start}: {error}")
    found["seconds"] = time.monotonic() - began
    save()


def emptied() -> bool:
    """Empty the page cache; False if the user may not."""
    try:
        cool()
    except OSError:
        return False
    return True


def machine() -> dict[str, Any]:
    """The GPUs, versions and environment variables that a server runs with."""
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "NCCL_")) and "/" not in value
    }
    versions = {name: installed(name) for name in ("vllm", "torch")}
    return {"gpus": gpus("name") or [], **versions, "reshard": __version__, "environment": kept | MULTICAST_OFF}


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
        "Medians over repeats (minimum to maximum); ratios to the original under linear placement in the same repeat.",
    ]
    for mode in MODES:
        runs, starts = ([found for found in record[name] if found["mode"] == mode] for name in ("runs", "starts"))
        if starts:
            lines += ["", f"### {mode}", "", *results(runs), "", *loads(starts), *remarks(starts)]
    return "\n".join([*lines, "", PUBLISHED])


def results(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table of one mode."""
    names = [*METRICS.values(), *(f"{name}, ratio" for name in RATIOS.values())]
    yield f"| at once | variant | repeats | QPM | {' | '.join(names)} |"
    yield f"| ---: | --- | ---: | --- {'| --- ' * len(names)}|"
    for size in sorted({run["concurrency"] for run in runs}):
        for variant in VARIANTS:
            if mine := [run for run in runs if (run["variant"], run["concurrency"]) == (variant, size)]:
                cells = [str(size), variant, str(len(mine)), shown([60 * run["request_throughput"] for run in mine])]
                cells += [shown([run[name] for run in mine]) for name in METRICS]
                found = [ratios(runs, variant, size, name) for name in RATIOS]
                yield f"| {' | '.join([*cells, *(shown(of) if of else '' for of in found)])} |"


def ratios(runs: Sequence[Mapping[str, Any]], variant: str, size: int, name: str) -> list[float]:
    """A variant's metric over the original's under linear placement, for each repeat that has both."""
    of = {(run["variant"], run["repeat"]): run[name] for run in runs if run["concurrency"] == size}
    repeats = sorted(repeat for other, repeat in of if other == variant and ("linear", repeat) in of)
    return [of[variant, repeat] / of["linear", repeat] for repeat in repeats]


def loads(starts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table of how long weights took to load."""
    yield "| variant | page cache | starts | weights on each rank, s | on the slowest, s | until ready, s |"
    yield "| --- | --- | ---: | --- | --- | --- |"
    for variant in VARIANTS:
        for cold, cache in ((True, "empty"), (False, "could not be emptied")):
            mine = [start for start in starts if (start["variant"], start["cold"]) == (variant, cold)]
            if mine := [start for start in mine if start.get("load_seconds")]:
                ranks = [seconds for start in mine for seconds in start["load_seconds"].values()]
                slowest = shown([max(start["load_seconds"].values()) for start in mine])
                ready = shown([start["ready_seconds"] for start in mine])
                yield f"| {variant} | {cache} | {len(mine)} | {shown(ranks)} | {slowest} | {ready} |"


def remarks(starts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Messages and failures of the starts."""
    said = {(start["variant"], line) for start in starts for line in start.get("fell_back", ())}
    said |= {(start["variant"], f"failed: {start['failed']}") for start in starts if "failed" in start}
    for variant, line in sorted(said):
        yield f"\n{variant}: {line}"


def shown(values: Sequence[float]) -> str:
    """The median (minimum to maximum), with enough digits for differences of a percent."""
    return spread(values, lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}")


# Command line


def workload_of(options: argparse.Namespace) -> Workload:
    """The workload that the command line asks for."""
    names = ("gpus", "input", "output", "concurrency", "rounds", "least", "eplb")
    given = {name: getattr(options, name) for name in names}
    return Workload(**given, arguments=shlex.split(options.serve_arguments))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    making, serving = (
        stages.add_parser("make", help="make the models"),
        stages.add_parser("serve", help="serve what is left"),
    )
    for stage in (making, serving):
        stage.add_argument("directory", type=Path, help="directory of the models")
        stage.add_argument("--gpus", type=int, default=8, help="GPUs, each with one EP rank (default 8)")
        stage.add_argument("--input", type=int, default=1024, help="tokens of a prompt (default 1024)")
        stage.add_argument("--output", type=int, default=128, help="tokens of an answer (default 128)")
        stage.add_argument(
            "--concurrency", type=int, nargs="+", default=[8, 64, 512], help="concurrent requests (default 8 64 512)"
        )
        stage.add_argument("--rounds", type=int, default=4, help="requests per concurrent request (default 4)")
        stage.add_argument("--least", type=int, default=64, help="minimum number of requests (default 64)")
        stage.add_argument("--eplb", type=json.loads, default=EPLB, help=f"EPLB's config (default {json.dumps(EPLB)})")
        stage.add_argument("--serve-arguments", default="", help="more options of `vllm serve`, in one string")
    making.add_argument("--gates", type=Path, help="the file that `what_zigzag_buys.py --save-gates` wrote")
    making.add_argument(
        "--layers", type=int, default=6, help="MoE layers; each takes 11.3 GB in each of three models (default 6)"
    )
    making.add_argument("--ep", type=int, help="EP ranks that outputs are made for (default: --gpus)")
    making.add_argument("--small", action="store_true", help="rehearse with a tiny random model")
    serving.add_argument("--json", type=Path, required=True, metavar="FILE", help="file of results, which is extended")
    serving.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    serving.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    serving.add_argument("--repeats", type=int, default=3)
    serving.add_argument(
        "--seconds", type=float, default=540, help="begin no start that would end later than this (default 540)"
    )
    stages.add_parser("report", help="print the results in Markdown").add_argument("json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.stage == "make" and not (options.small or options.gates):
        parser.error("make needs --gates, or --small")
    return options


def main() -> None:
    """Run one stage."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit by an exception, so that servers end too
    options = parse()
    if options.stage == "report":
        print(report(json.loads(options.json.read_text())))
    else:
        {"make": make, "serve": serve}[options.stage](options)


if __name__ == "__main__":
    main()
