"""Runs real vLLM on the CPU, as a subprocess in its own environment, for tests that run without vLLM.

Each request is answered once. All of pytest's workers share one directory, under locks, which keeps answers and models.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from click.testing import CliRunner
from earlier_contracts import to_version_1, to_version_2

from reshard.cli.main import main

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BIN = ROOT / ".venv-vllm" / "bin"
SHIM_ONLY = "cpu_experts_shim"  # a value of VLLM_PLUGINS with which vLLM does not load reshard's plugin
SPAWNED = {"FORK_WORKERS": ""}  # workers start as vLLM starts them: anew, with a pickled configuration
COMPILED = {"TORCH_COMPILE_DISABLE": "0"}
TIMEOUT = 240  # seconds; a start takes about 30

PROMPTS = ((5,), (7, 11), (3, 201, 45, 90), tuple(range(20, 31)), tuple(range(250, 100, -7)))
MAX_TOKENS = 24

SLOTS = 2  # vLLMs that run at the same time: most of a start is one thread of Python

Logprobs = list[list[dict[str, float]]]
"""For each prompt and position, the log-probabilities of some token ids."""


@dataclass(frozen=True)
class Slot:
    """Room for one running vLLM: its first core, and a directory for its logs."""

    number: int
    directory: Path


@dataclass(frozen=True)
class Result:
    """What a vLLM process answered and printed. If `status` is not 0, there are no tokens."""

    status: int
    seconds: float
    log: str
    opened: dict[str, set[str]]  # names of the safetensors files that each process opened, by its rank or "engine"
    tokens: list[list[int]]
    raw_logprobs: list[list[dict[str, str]]]  # as `float.hex`, of generated tokens
    raw_prompt_logprobs: list[list[dict[str, str]]] | None
    accepted_drafts: int
    routed: list[Any]

    @property
    def logprobs(self) -> Logprobs:
        """Log-probabilities of the generated tokens."""
        return _from_hex(self.raw_logprobs)

    @property
    def prompt_logprobs(self) -> Logprobs:
        """Log-probabilities of the prompts' tokens, without each prompt's first."""
        assert self.raw_prompt_logprobs is not None
        return _from_hex(self.raw_prompt_logprobs)

    @property
    def bits(self) -> object:
        """All tokens and log-probabilities; equal if and only if every bit is equal."""
        return self.tokens, self.raw_logprobs, self.raw_prompt_logprobs


def _from_hex(raw: list[list[dict[str, str]]]) -> Logprobs:
    return [[{token: float.fromhex(value) for token, value in at.items()} for at in prompt] for prompt in raw]


class Warm:
    """A process of warm.py, which forks a vLLM for each answer."""

    def __init__(self, environment: Mapping[str, str], directory: Path) -> None:
        self._socket, other = socket.socketpair()
        self._log = (directory / f"warm-log-{os.getpid()}").open("w+")
        with other:
            self._process = subprocess.Popen(
                [BIN / "python", HERE / "warm.py"],
                env=environment,
                stdin=other,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
        self._socket.settimeout(TIMEOUT)

    def run(
        self, script: str, arguments: Sequence[object], environment: Mapping[str, str], request: str, errors: IO[str]
    ) -> tuple[int, str]:
        """The exit status and the output of a script that is given `request`. Raises TimeoutError, and ends it then."""
        with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as output:
            given.write(request)
            given.seek(0)
            descriptors = [given.fileno(), output.fileno(), errors.fileno()]
            words = [str(argument) for argument in arguments]
            message = json.dumps({"environment": dict(environment), "script": script, "arguments": words})
            socket.send_fds(self._socket, [message.encode()], descriptors)
            process = int(self._line())
            try:
                status = int(self._line())
            except TimeoutError:
                os.killpg(process, signal.SIGKILL)
                self._line()
                raise
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # workers that are left
            output.seek(0)
            return status, output.read()

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            if not (byte := self._socket.recv(1)):
                self._log.seek(0)
                raise AssertionError(f"the process that forks has ended:\n{self._log.read()[-4000:]}")
            line += byte
        return line

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self._process.wait(TIMEOUT)
        self._log.close()


class Serving:
    """Models, their resharded outputs, and answers, kept in `directory`."""

    def __init__(self, directory: Path) -> None:
        if not (BIN.parent / ".ready").exists():
            raise RuntimeError(f"no {BIN.parent.name}: run `make {BIN.parent.name}/.ready`, or `make test`")
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self._forks: Warm | None = None

    def close(self) -> None:
        """End the process that forks."""
        if self._forks:
            self._forks.close()

    def _warm(self) -> Warm:
        if self._forks is None:
            self._forks = Warm(self.environment(), self.directory)
        return self._forks

    def model(self, kind: str, *, mtp: bool = False, seed: int = 0, **config: Any) -> Path:
        """A tiny random model of `models.py`; `config` overrides keys of its config.json."""

        def make(directory: Path) -> None:
            options = ["--config", json.dumps(config), "--seed", seed, *(["--mtp"] if mtp else [])]
            self._forked("models", kind, directory, *options)

        return self._made(f"{kind}-{_digest([mtp, seed, config])}", make)

    def resharded(self, model: Path, ep: int, layout: str = "ranks") -> Path:
        """The output of `reshard zigzag` for a model."""

        def make(directory: Path) -> None:
            arguments = ["zigzag", "--src", str(model), "--ep", str(ep), "--out", str(directory), "--quiet"]
            arguments += ["--layout", layout]
            result = CliRunner().invoke(main, arguments, catch_exceptions=False)
            assert result.exit_code == 0, result.output

        return self._made(f"{model.name}-zz{ep}-{layout}", make)

    def earlier(self, model: Path, ep: int, version: int) -> Path:
        """The output of `reshard zigzag` for a model, with a contract of version 1 or 2."""
        output = self.resharded(model, ep)

        def make(directory: Path) -> None:
            shutil.copytree(output, directory)
            (to_version_1, to_version_2)[version - 1](model, directory)

        return self._made(f"{output.name}-version{version}", make)

    def placed(self, model: Path, ep: int, seed: int = 0) -> Path:
        """The output of `reshard place` for a model, with another random order in each MoE layer."""

        def make(directory: Path) -> None:
            runner, rng = CliRunner(), random.Random(seed)
            found = json.loads(runner.invoke(main, ["inspect", str(model), "--json"], catch_exceptions=False).output)
            experts = range(found["num_experts"])
            orders = {layer: rng.sample(experts, len(experts)) for layer in found["moe_layers"]}
            assert len({tuple(order) for order in orders.values()}) > 1
            orders_file = directory.with_suffix(".json")
            orders_file.write_text(json.dumps({"physical_to_logical": orders}))
            arguments = ["place", "--src", str(model), "--ep", str(ep), "--out", str(directory), "--quiet"]
            arguments += ["--strategy", "file", "--map", str(orders_file)]
            result = runner.invoke(main, arguments, catch_exceptions=False)
            assert result.exit_code == 0, result.output

        return self._made(f"{model.name}-placed{ep}-{seed}", make)

    def staged(self, output: Path, ranks: str) -> Path:
        """A staged directory: `reshard stage` of an output, for some ranks."""

        def make(directory: Path) -> None:
            arguments = ["stage", str(output), "--ranks", ranks, "--out", str(directory), "--quiet"]
            result = CliRunner().invoke(main, arguments, catch_exceptions=False)
            assert result.exit_code == 0, result.output

        return self._made(f"{output.name}-ranks{ranks}", make)

    def hub(self, output: Path) -> Path:
        """A copy of an output as vLLM downloads it from the Hub: without the manifest, which holds no weights."""

        def make(directory: Path) -> None:
            shutil.copytree(output, directory, ignore=shutil.ignore_patterns("reshard_manifest.json"))

        return self._made(f"{output.name}-hub", make)

    def edited(self, model: Path, name: str, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
        """A copy of a model, with its config.json changed by `edit`."""

        def make(directory: Path) -> None:
            shutil.copytree(model, directory)
            path = directory / "config.json"
            path.write_text(json.dumps(edit(json.loads(path.read_text())), indent=2))

        return self._made(f"{model.name}-{name}", make)

    def generate(
        self,
        model: Path,
        *,
        ranks: int = 1,
        stages: int = 1,
        expert_parallel: bool = True,
        placement: str = "linear",
        plugins: str | None = None,
        environment: Mapping[str, str] | None = None,
        prompts: Sequence[Sequence[int]] = PROMPTS,
        max_tokens: int = MAX_TOKENS,
        again: int = 0,
        **llm: Any,
    ) -> Result:
        """Greedy decoding of `model` on `ranks` ranks in each of `stages` stages.

        `plugins` is VLLM_PLUGINS, `environment` sets more variables, and `llm` are more arguments of `vllm.LLM`. The
        same call gets the kept answer without starting vLLM again, unless `again` differs.
        """
        llm["tensor_parallel_size"] = ranks
        if expert_parallel:  # on one rank, too: it changes nothing there, but a placement that moves experts needs it
            llm.update(enable_expert_parallel=True, expert_placement_strategy=placement)
        if stages > 1:
            llm["pipeline_parallel_size"] = stages
        request = {"model": str(model), "prompts": prompts, "max_tokens": max_tokens, "llm": llm}
        more = dict(environment or {})
        path = self.directory / f"{_digest([request, plugins, again, more])}.json"
        with self._locked(path.name):
            if not path.exists():
                with self.slot() as slot:
                    answer = self._run(slot, request, ranks * stages, plugins, more)
                path.write_text(json.dumps(asdict(answer), default=sorted))
        kept = json.loads(path.read_text())
        return Result(**{**kept, "opened": {who: set(names) for who, names in kept["opened"].items()}})

    def _run(
        self, slot: Slot, request: Mapping[str, Any], processes: int, plugins: str | None, more: Mapping[str, str]
    ) -> Result:
        opened, log = slot.directory / "opened", slot.directory / "log"
        opened.write_text("")
        environment = {
            **self.environment(processes, plugins, slot.number),
            "OPENED_SAFETENSORS_LOG": str(opened),
            **more,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine in the calling process starts faster
        }
        start = time.monotonic()
        # what an import of vLLM would see differently needs a process that imports it
        warm = "PYTHONPATH" not in more and request["llm"].get("enforce_eager", True)
        with log.open("w") as errors:
            try:
                if warm:
                    status, output = self._warm().run("generate", [], environment, json.dumps(request), errors)
                else:
                    command = [BIN / "python", HERE / "generate.py"]
                    with _process(command, environment, subprocess.PIPE, errors) as process:
                        output, _ = process.communicate(json.dumps(request), timeout=TIMEOUT)
                        status = process.returncode
            except (subprocess.TimeoutExpired, TimeoutError):
                raise AssertionError(f"vLLM took more than {TIMEOUT} s:\n{log.read_text()[-4000:]}") from None
        answer = json.loads(output) if status == 0 else {}
        return Result(
            status=status,
            seconds=time.monotonic() - start,
            log=log.read_text(),
            opened=_opened(opened),
            tokens=answer.get("tokens", []),
            raw_logprobs=answer.get("logprobs", []),
            raw_prompt_logprobs=answer.get("prompt_logprobs"),
            accepted_drafts=int(answer.get("accepted_drafts", 0)),
            routed=answer.get("routed", []),
        )

    def reloaded(self, request: Mapping[str, Any], more: Mapping[str, str]) -> dict[str, Any]:
        """What reload.py answers to a request, with more variables in its environment."""
        with self.slot() as slot:
            first = {**self.environment(first=slot.number), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            log = slot.directory / "log"
            with log.open("w") as errors:
                status, output = self._warm().run("reload", [], {**first, **more}, json.dumps(request), errors)
            assert status == 0, log.read_text()[-6000:]
        found: dict[str, Any] = json.loads(output)
        return found

    def each(
        self, model: Path | Sequence[Path], environments: Sequence[Mapping[str, str]], **llm: Any
    ) -> list[subprocess.CompletedProcess[str]]:
        """Start one EP rank per environment by hand, so that vLLM does not carry a placement from one to the others.

        `model` is that of all ranks, or one for each.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        size = len(environments)
        llm |= {"tensor_parallel_size": size, "enable_expert_parallel": True}
        llm |= {"distributed_executor_backend": "external_launcher"}
        models = [model] * size if isinstance(model, Path) else model
        with self.slot() as slot, contextlib.ExitStack() as stack:
            processes = []
            for rank, more in enumerate(environments):
                environment = {
                    **self.environment(size, first=slot.number),
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
                    **more,
                }
                log = stack.enter_context((slot.directory / f"rank{rank}-log").open("w+"))
                command = [BIN / "python", HERE / "generate.py"]
                process = stack.enter_context(_process(command, environment, subprocess.PIPE, log))
                assert process.stdin is not None
                request = {"model": str(models[rank]), "prompts": [[5]], "max_tokens": 1, "llm": llm}
                process.stdin.write(json.dumps(request))
                process.stdin.close()
                processes.append((process, log))
            ended = []
            for process, log in processes:
                status = process.wait(TIMEOUT) if not ended else _ended_soon(process)
                log.seek(0)
                ended.append(subprocess.CompletedProcess(process.args, status, stderr=log.read()))
            return ended

    def complete(self, model: Path, prompt: str, max_tokens: int, *, ranks: int, placement: str = "linear") -> str:
        """One completion from `vllm serve`, over HTTP, with the model's tokenizer."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --no-enable-prefix-caching"
        arguments += " --max-model-len 128 --max-num-seqs 1 --attention-backend CPU_MLA"
        arguments += ' --compilation-config {"custom_ops":["-rotary_embedding"]}'  # see generate.py
        arguments += f" --tensor-parallel-size {ranks} --enable-expert-parallel --expert-placement-strategy {placement}"
        body = {"model": str(model), "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body["skip_special_tokens"] = False
        command = [BIN / "vllm", "serve", model, *arguments.split()]
        log = self.directory / f"serve-log-{port}"
        with (
            self.slot() as slot,
            log.open("w") as errors,
            _process(command, {**self.environment(ranks, first=slot.number), **SPAWNED}, errors, errors) as server,
        ):
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + TIMEOUT
            while not _answers(f"{address}/health"):
                assert server.poll() is None, f"vllm serve ended with {server.returncode}:\n{log.read_text()[-4000:]}"
                assert time.monotonic() < deadline, f"vllm serve is not up:\n{log.read_text()[-4000:]}"
                time.sleep(0.5)
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                text: str = json.load(response)["choices"][0]["text"]
        return text

    def reference(self, model: Path, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[list[float]]]:
        """Log-probabilities computed by Transformers: [prompt][position, without the first][token id]."""
        printed = self._forked("reference", model, json.dumps(prompts))
        result: list[list[list[float]]] = json.loads(printed.splitlines()[-1])
        return result

    def _forked(self, script: str, *arguments: object) -> str:
        """What a script that needs no vLLM prints."""
        with tempfile.TemporaryFile("w+") as errors:
            status, output = self._warm().run(script, arguments, self.environment(), "", errors)
            errors.seek(0)
            assert status == 0, errors.read()
        return output

    def python(self, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run Python code in vLLM's environment."""
        command = [str(BIN / "python"), "-c", code, *map(str, arguments)]
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=TIMEOUT)

    def environment(self, processes: int = 1, plugins: str | None = None, first: int = 0) -> dict[str, str]:
        """The environment of a vLLM that uses no network and keeps to a core per process, from core `first` on."""
        cores = sorted(os.sched_getaffinity(0))
        first %= len(cores)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "HF_", "PYTEST"))}
        kept.pop("PYTHONPATH", None)
        return {
            **kept,
            "TMPDIR": str(self.directory),  # killed processes leave their sockets behind
            "PATH": f"{BIN}:{os.environ.get('PATH', '')}",
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(self.directory / "modules"),  # classes that come with a checkpoint
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "FORK_WORKERS": "1",  # they need not import vLLM again; SPAWNED undoes it
            "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # idle workers wait for as long as they are allowed to
            "TORCH_COMPILE_DISABLE": "1",  # even an eager vLLM compiles a function that ranks log-probabilities
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(
                map(str, itertools.islice(itertools.cycle(cores[first:] + cores[:first]), processes))
            ),  # a core per process, as long as there are enough cores
            **({} if plugins is None else {"VLLM_PLUGINS": plugins}),
        }

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        directory = self.directory / name
        with self._locked(name):
            if not directory.exists():
                unfinished = self.directory / f"{name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.rename(directory)
        return directory

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold what is made under `name`: the tests' other process waits for it."""
        with (self.directory / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def slot(self) -> Iterator[Slot]:
        """Wait until fewer than SLOTS vLLMs run, and take a slot for one more."""
        while True:
            for number in range(SLOTS):
                directory = self.directory / f"slot{number}"
                directory.mkdir(exist_ok=True)
                with (directory / "lock").open("w") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    yield Slot(number, directory)
                    return
            time.sleep(0.2)


@contextlib.contextmanager
def _process(
    command: Sequence[object], environment: Mapping[str, str], output: Any, errors: Any
) -> Iterator[subprocess.Popen[str]]:
    """A process in its own session; all its workers are killed with it."""
    process = subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=errors,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:  # let it stop its workers and wait for them
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _ended_soon(process: subprocess.Popen[str]) -> int | None:
    """The exit status of a rank after another rank has ended; None if it goes on waiting for that rank."""
    try:
        return process.wait(10)
    except subprocess.TimeoutExpired:
        return None


def _opened(path: Path) -> dict[str, set[str]]:
    opened: dict[str, set[str]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        who = "engine" if record["rank"] is None else str(record["rank"])
        opened.setdefault(who, set()).add(record["file"])
    return opened


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
