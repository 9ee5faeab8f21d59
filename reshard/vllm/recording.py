"""RESHARD_TRACE=DIR records which logical experts each token chose in each layer, as a trace in DIR.

It works for any MoE model. Unless RESHARD_TRACE is set, nothing of this is installed. If it is set, each layer copies
its router's answer into a buffer on the device: some KiB, captured by CUDA graphs like any other copy. vLLM's own
`RoutedExpertsCapturer` knows which rows belong to this rank. After each step, the rows of its tokens are copied to the
CPU asynchronously, and a thread writes them; `imbalance_log` counts some of them there. Recording never blocks serving:
if it fails, it logs that once and stops.

Each DP rank records its tokens, and each PP stage its layers; the first TP rank records for all TP ranks. MTP drafts
are not recorded. RESHARD_TRACE_LIMIT is the maximum size of a rank's trace in bytes; the oldest part is deleted first.
"""

from __future__ import annotations

import atexit
import functools
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..placement.contract import placement_to_json
from ..traffic.trace_file import DEFAULT_LIMIT, TRACE_VERSION, Header, TraceWriter
from .imbalance_log import ImbalanceLog, imbalance_log
from .outputs import is_output, read_placement
from .patching import replace_once
from .routing import placement_of
from .runners import lets_kernel_route, moe_runners

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE, LIMIT_VARIABLE = "RESHARD_TRACE", "RESHARD_TRACE_LIMIT"
COPIED_BY_RAY = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
MAX_WAITING_STEPS = 64  # steps that wait for the disk; further steps are not recorded
EXIT_TIMEOUT_SECONDS = 5  # how long the process waits for the writer when it ends


def install(gpu_worker: ModuleType) -> None:
    """Make vLLM's worker record, on any device; `gpu_worker` defines Worker."""
    replace_once(gpu_worker.Worker, "load_model", _then_attach)
    replace_once(gpu_worker.Worker, "execute_model", _then_record)


def install_notice(vllm_config: ModuleType) -> None:
    """Say in the log where Ray keeps workers from recording; `vllm_config` defines VllmConfig."""
    replace_once(vllm_config.VllmConfig, "__post_init__", _then_notice)


def _then_notice(post_init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(post_init)
    def __post_init__(config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - vLLM's own name
        post_init(config, *args, **kwargs)
        from vllm import envs

        copies_all = getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", False)
        if ray_hides_variable(config.parallel_config, bool(copies_all), os.environ):
            _log().warning(
                "%s: Ray does not pass this variable on: only workers that have it in their own environment record; "
                "%s=%s,%s passes it on",
                *(VARIABLE, COPIED_BY_RAY, VARIABLE, LIMIT_VARIABLE),
            )

    return __post_init__


def ray_hides_variable(parallel: Any, copies_all: bool, environment: Mapping[str, str]) -> bool:
    """Whether workers run in processes of Ray that do not get VARIABLE.

    vLLM hands DP ranks its own variables only. Its newer executor for Ray hands workers all that it has (`copies_all`).
    """
    by_executor = str(parallel.distributed_executor_backend) == "ray" and not copies_all
    by_ray = getattr(parallel, "data_parallel_backend", None) == "ray" or by_executor
    return by_ray and VARIABLE not in environment.get(COPIED_BY_RAY, "").split(",")


def _then_attach(load_model: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_model)
    def with_recorder(worker: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_model(worker, *args, **kwargs)
        worker.reshard_recorder = _attempt("cannot begin", lambda: attach(worker, os.environ))
        return result

    return with_recorder


def _then_record(execute_model: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(execute_model)
    def with_record(worker: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = execute_model(worker, scheduler_output, *args, **kwargs)
        if recorder := getattr(worker, "reshard_recorder", None):
            recorder.step(scheduler_output.total_num_scheduled_tokens)
        return result

    return with_record


def attach(worker: Any, environment: Mapping[str, str]) -> Recorder | None:
    """Attach a recorder to the routers of the worker's model; if that is impossible, log why and return None."""
    config = worker.vllm_config
    if fault := _unsupported(config):
        _log().warning("%s: nothing is recorded: %s", VARIABLE, fault)
        return None
    runners = moe_runners(worker.get_model())
    blind = [name for name, runner in runners.items() if lets_kernel_route(runner)]
    routers = {name: runner.router for name, runner in runners.items() if name not in blind}
    if blind:
        _log().warning(
            "%s: %d layers are not recorded, because their kernels route by themselves: %s …",
            VARIABLE,
            len(blind),
            blind[0],
        )
    if not routers:
        _log().warning("%s: nothing is recorded: the model has no MoE layer whose router vLLM calls", VARIABLE)
        return None
    # vLLM's compile cache is keyed by the config. On CPUs routers are compiled with the model, so a run that records
    # and one that does not must not share compiled code
    config.additional_config["reshard_trace"] = True
    return Recorder(routers, config, Path(environment[VARIABLE]), int(environment.get(LIMIT_VARIABLE, DEFAULT_LIMIT)))


def _unsupported(config: Any) -> str | None:
    """Name an option with which buffer rows are not the step's tokens, or compiled code would be shared; else None."""
    parallel = config.parallel_config
    if getattr(parallel, "use_ubatching", False):
        return "microbatches (--enable-dbo) are not supported"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "prefill context parallelism is not supported"
    if not isinstance(config.additional_config, dict):
        return f"additional_config is a {type(config.additional_config).__name__}, not a dictionary"
    model = config.model_config
    if is_output(model) and read_placement(str(model.model), model.hf_config) is None:
        return f"{model.model} is an output of reshard, and no manifest there says which experts its slots hold"
    return None


class Recorder:
    """Keeps the routers' answers, and after each step hands the rows of its tokens to a `Scribe`.

    Every TP rank keeps its answers, as vLLM's capturer may have to gather rows among the ranks. Only the first TP rank
    has a scribe; it goes on taking part when the scribe cannot write.
    """

    def __init__(self, routers: Mapping[str, Any], config: Any, directory: Path, limit: int) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCapturer

        self._capturer = RoutedExpertsCapturer(config.scheduler_config.max_num_batched_tokens, config)
        self._keeps = True
        self._layers = len(routers)
        first = next(iter(routers.values()))
        header = Header(
            reshard_trace=TRACE_VERSION,
            engine=f"vLLM {_version()}",
            model=str(config.model_config.model),
            layers=tuple(name.removesuffix(".experts") for name in routers),
            num_experts=config.model_config.get_num_experts(),
            top_k=first.top_k,
            physical_to_logical=_order_of(config.model_config, routers),
            dp_rank=config.parallel_config.data_parallel_rank,
            pp_rank=get_pp_group().rank_in_group,
        )
        self._scribe: Scribe | None = None
        if get_tp_group().rank_in_group == 0:
            log = _attempt("has no load to log", lambda: imbalance_log(config, header.layers, _log().info))
            self._scribe = _attempt("cannot begin", lambda: _scribe_in(directory, header, limit, log))
        for column, router in enumerate(routers.values()):
            if hasattr(router, "reshard_answers_logical_ids"):
                router.reshard_answers_logical_ids()
            router._compute_routing = self._then_keep(router._compute_routing, column)

    def _then_keep(self, compute_routing: Callable[..., Any], column: int) -> Callable[..., Any]:
        @functools.wraps(compute_routing)
        def compute_and_keep(*args: Any, **kwargs: Any) -> Any:
            weights, ids = compute_routing(*args, **kwargs)
            if self._keeps:
                self._keeps = bool(_attempt("stopped", lambda: self._keep(column, ids)))
            return weights, ids

        return compute_and_keep

    def _keep(self, column: int, ids: Tensor) -> bool:
        self._capturer.capture(column, ids)
        return True

    def step(self, tokens: int) -> None:
        """Record a step of `tokens` tokens of this rank; call this once its forward pass was launched."""
        scribe, rows_TLK = self._scribe, self._capturer.device_buffer[:tokens, : self._layers]
        if tokens and scribe is not None and self._keeps and not _attempt("stopped", lambda: scribe.take(rows_TLK)):
            self._scribe = None


class Scribe:
    """Writes rows from the device to a trace, in its own thread, and logs now and then how they load the ranks."""

    def __init__(self, writer: TraceWriter, id_size: int, note: Callable[[memoryview], object] | None = None) -> None:
        self._writer = writer
        self._id_size = id_size
        self._note = note
        self._waiting: queue.Queue[Callable[[], memoryview] | None] = queue.Queue(MAX_WAITING_STEPS)
        self._dropped = False
        self._thread = threading.Thread(
            target=_attempt, args=("stopped", self._write), name="reshard-trace", daemon=True
        )
        self._thread.start()
        atexit.register(self._finish)

    def take(self, rows_TLK: Tensor) -> bool:
        """Start copying the rows, without waiting for the device; False if they can no longer be written."""
        import torch

        narrow_TLK = rows_TLK.to(torch.uint8 if self._id_size == 1 else torch.int16)
        if narrow_TLK.is_cuda:
            on_cpu = torch.empty(narrow_TLK.shape, dtype=narrow_TLK.dtype, pin_memory=True)
            on_cpu.copy_(narrow_TLK, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        else:
            on_cpu, copied = narrow_TLK.contiguous(), None

        def arrived() -> memoryview:
            if copied is not None:
                copied.synchronize()
            return on_cpu.view(torch.uint8).numpy().data.cast("B")

        try:
            self._waiting.put_nowait(arrived)
        except queue.Full:
            if not self._dropped:
                _log().warning("%s: the disk is too slow: some steps are not recorded", VARIABLE)
            self._dropped = True
        return self._thread.is_alive()

    def _write(self) -> None:
        while arrived := self._waiting.get():
            rows = arrived()
            self._writer.write(rows)
            if self._note is not None and not _attempt(
                "goes on, its load is not logged", functools.partial(self._noted, rows)
            ):
                self._note = None
        self._writer.close()

    def _noted(self, rows: memoryview) -> bool:
        if self._note is not None:
            self._note(rows)
        return True

    def _finish(self) -> None:
        if self._thread.is_alive():
            self._waiting.put(None, timeout=EXIT_TIMEOUT_SECONDS)
            self._thread.join(EXIT_TIMEOUT_SECONDS)


def _scribe_in(directory: Path, header: Header, limit: int, log: ImbalanceLog | None) -> Scribe:
    note = None if log is None else functools.partial(log.note, id_size=header.id_size, top_k=header.top_k)
    scribe = Scribe(TraceWriter(directory, header, limit), header.id_size, note)
    _log().info("%s: recording the experts that tokens choose in %s", VARIABLE, directory)
    return scribe


def _order_of(model_config: Any, routers: Mapping[str, Any]) -> list[int] | dict[str, list[int]] | None:
    """The model's placement in the form of a trace's header, to make its expert ids logical; None for an original."""
    placement = read_placement(str(model_config.model), model_config.hf_config)
    if placement is None:
        return None
    return placement_to_json({name.removesuffix(".experts"): placement_of(placement, name) for name in routers})


def _attempt(outcome: str, act: Callable[[], Any]) -> Any:
    """Return what `act` returns; if it raises, log that and return None, so that serving goes on without the trace."""
    try:
        return act()
    except Exception as error:
        _log().exception("%s: recording %s: %s", VARIABLE, outcome, error)
        return None


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def _log() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.reshard")
