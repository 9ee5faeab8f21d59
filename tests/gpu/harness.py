"""Runs real vLLM on GPUs, one subprocess per EP rank. Models, outputs and answers are kept for the session.

Each rank has its own GPU if there are enough; otherwise all ranks share one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from entry_points import announce

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TIMEOUT = 400  # seconds; a start with torch.compile takes up to 150
PROMPTS = tuple(
    tuple((7 * number + 13 * position) % 250 + 2 for position in range(3 + 9 * number)) for number in range(12)
)
MAX_TOKENS = 32
PLUGINS = {"reshard": "reshard.vllm:register", "one_gpu": "one_gpu:install"}

# The fraction of GPU memory that must be free for vLLM to start. It decides nothing else: we set the KV cache's size.
MIN_FREE = 0.02

# Options for ranks that may share a GPU.
EXPERT_PARALLEL: dict[str, Any] = {
    "enable_expert_parallel": True,
    "distributed_executor_backend": "external_launcher",
    "disable_custom_all_reduce": True,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 29,
    "gpu_memory_utilization": MIN_FREE,
}
# PyTorch's compiler decides by timing whether to combine kernels, and how a combined kernel sums. So two compilations
# may give different bits. With `combo_kernels` off and TORCHINDUCTOR_DETERMINISTIC set, it decides without timing.
# A placement that moves experts wants expert parallelism on one rank, too.
GRAPHS: dict[str, Any] = {
    "enable_expert_parallel": True,
    "gpu_memory_utilization": MIN_FREE,
    "kv_cache_memory_bytes": 1 << 30,
    "compilation_config": {
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
        "inductor_compile_config": {"combo_kernels": False},
    },
}
EAGER: dict[str, Any] = {
    "enable_expert_parallel": True,
    "gpu_memory_utilization": MIN_FREE,
    "kv_cache_memory_bytes": 1 << 30,
    "enforce_eager": True,
}


@dataclass(frozen=True)
class Answer:
    """What vLLM answered, and what it printed (`log`). If `status` is not 0, there are no tokens."""

    status: int
    log: str
    tokens: list[list[int]]
    logprobs: Any
    prompt_logprobs: Any
    drafts: list[float | None]
    digests: list[str]
    routed: list[Any]

    @property
    def bits(self) -> object:
        """All tokens and log-probabilities; equal if and only if every bit is equal."""
        return self.tokens, self.logprobs, self.prompt_logprobs

    @property
    def flat(self) -> list[int]:
        """All generated tokens."""
        return [token for prompt in self.tokens for token in prompt]


def together(*calls: Callable[[], Answer]) -> list[Answer]:
    """Make the calls at the same time, and return their answers."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


class Gpu:
    """The GPUs, and a directory for models, outputs and answers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._answers: dict[str, Answer] = {}
        site = directory / "site"
        announce(site, PLUGINS)
        paths = [str(site), str(HERE), *os.environ.get("PYTHONPATH", "").split(":"), str(ROOT)]
        self.environment = {
            **os.environ,
            "PYTHONPATH": ":".join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_DEEP_GEMM": "0",
            "TORCHINDUCTOR_DETERMINISTIC": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # takes minutes to compile, and greedy decoding does not need it
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """The directory `name`; `make` makes it if it does not exist yet."""
        directory = self.directory / name
        with (self.directory / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several pytest processes may share the directory
            if directory.exists():
                return directory
            unfinished = self.directory / f"{name}.unfinished"
            make(unfinished)
            unfinished.rename(directory)
        return directory

    def resharded(self, model: Path, ep: int) -> Path:
        """The output of `reshard zigzag` for a model."""

        def make(out: Path) -> None:
            arguments = ["zigzag", "--src", model, "--ep", str(ep), "--out", out, "--quiet"]
            command = [sys.executable, "-m", "reshard", *arguments]
            subprocess.run(command, env=self.environment, check=True, timeout=TIMEOUT)

        return self.made(f"{model.name}-zz{ep}", make)

    def answer(
        self,
        model: Path,
        llm: dict[str, Any],
        *,
        ranks: int = 1,
        prompts: Sequence[Sequence[int]] = PROMPTS,
        max_tokens: int = MAX_TOKENS,
        repeats: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> Answer:
        """Greedy decoding of `model`; the answer to a repeated call comes from memory."""
        request = {"model": str(model), "prompts": prompts, "max_tokens": max_tokens, "llm": llm, "repeats": repeats}
        more = dict(environment or {})
        key = hashlib.sha256(json.dumps([request, ranks, more], sort_keys=True).encode()).hexdigest()
        if key not in self._answers:
            # an empty cache, so that no code that was compiled for another answer is used for this one
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
                self._answers[key] = self._run(request, ranks, {**self.environment, "VLLM_CACHE_ROOT": cache, **more})
        return self._answers[key]

    def _run(self, request: dict[str, Any], ranks: int, environment: dict[str, str]) -> Answer:
        processes = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = torch.cuda.device_count() < ranks
        for rank in range(ranks):
            more = {}
            if ranks > 1:
                more = {
                    "RANK": str(rank),
                    "LOCAL_RANK": "0" if shared else str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",  # with one thread per core in each rank, the ranks would stall each other
                    **({"SHARED_GPU": "1", "VLLM_DISABLE_PYNCCL": "1"} if shared else {}),
                }
                request = {**request, "llm": {"tensor_parallel_size": ranks, **request["llm"]}}
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed below, after it is read
            process = subprocess.Popen(
                [sys.executable, HERE / "generate.py"],
                env={**environment, **more},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            assert process.stdin is not None
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            process.stdin = None
            processes.append((process, log))
        try:
            outputs = [process.communicate(timeout=TIMEOUT)[0] for process, _ in processes]
        finally:
            for process, _ in processes:
                process.kill()
        logs = []
        for _, log in processes:
            log.seek(0)
            logs.append(log.read())
            log.close()
        statuses = [process.returncode for process, _ in processes]
        failed = next((rank for rank, status in enumerate(statuses) if status), None)
        if failed is not None:
            return Answer(statuses[failed], logs[failed], [], [], [], [], [], [])
        assert len(set(outputs)) == 1, "the ranks do not agree"
        return Answer(0, "".join(logs), **json.loads(outputs[0]))
