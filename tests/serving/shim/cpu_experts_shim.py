"""A vLLM general plugin for tests: expert and pipeline parallelism on the CPU, and a record of weight files opened.

vLLM's unquantized CPU experts ignore `expert_map`: under expert parallelism they index a rank's weights with global
expert ids. `_apply_locally` gives them local ids, and weight 0 to experts of other ranks (their slot then holds local
expert 0, whose output counts nothing). The order in which a token's experts are summed stays that of the router.

Where OPENED_SAFETENSORS_LOG names a file, each process appends to it a line of JSON for each safetensors file it opens.
RECORD_TENSORS notes the tensors that are read, too. Where NODES is a JSON list of directories, rank i reads its weights
from the i-th, as on a node of its own. VLLM_IS and HOOK_IS_GONE make vLLM look like one that reshard's plugin does not
fit. FORK_WORKERS saves workers the import of vLLM. ROUTER_FORGETS lets routers of a model that is served placed answer
as if experts were where they always were, and RETURNS_SLOTS lets those of an output return what they chose as it is.

EPLB_ON_CPU has vLLM's EPLB run, which it has for GPUs only. TRITON_INTERPRET must be set, too, for reshard's kernels.
COPIES_OF_OTHERS has routers choose among the copies of another placement than slots hold.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vllm

_done: list[bool] = []


def install() -> None:
    """The entry point, called once or more in every vLLM process."""
    if _done:
        return
    _done.append(True)
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    CPUUnquantizedExperts.apply = _apply_locally(CPUUnquantizedExperts.apply)
    _warm_up_stages()
    if os.environ.get("FORK_WORKERS"):
        _fork_workers()
    if path := os.environ.get("OPENED_SAFETENSORS_LOG"):
        _record_opened(path)
    if nodes := os.environ.get("NODES"):
        _read_from_nodes(json.loads(nodes))
    if "ROUTER_FORGETS" in os.environ:
        from reshard.vllm import placed

        placed.ExpertPlace.forward = lambda self, ids: ids
    if "RETURNS_SLOTS" in os.environ:
        from reshard.vllm import returned

        returned.Returning._capture = lambda self, capture, ids: capture(ids)
    if "EPLB_ON_CPU" in os.environ:
        _allow_eplb()
    if "COPIES_OF_OTHERS" in os.environ:
        from reshard.vllm import copies

        copies.schedule = _of_others(copies.schedule)
    if version := os.environ.get("VLLM_IS"):
        vllm.__version__ = version
    if "HOOK_IS_GONE" in os.environ:
        _change_hook()


def _apply_locally(apply: Callable[..., None]) -> Callable[..., None]:
    """`CPUUnquantizedExperts.apply` that honours `expert_map` [E]: local id of each expert, -1 if not of this rank."""

    @functools.wraps(apply)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        assert not args, "vLLM passes all arguments by name"
        expert_map = kwargs["expert_map"]
        if expert_map is not None:
            local_ids = expert_map[kwargs["topk_ids"].long()]
            kwargs["topk_weights"] = kwargs["topk_weights"].masked_fill(local_ids < 0, 0.0)
            kwargs["topk_ids"] = local_ids.clamp(min=0).to(kwargs["topk_ids"].dtype)
        apply(self, **kwargs)

    return wrapper


def _allow_eplb() -> None:
    """Answer for the GPU, and do what vLLM's runner for CPUs leaves out. Maps, moves and steps are vLLM's own."""
    from types import SimpleNamespace

    from vllm.config import parallel
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from reshard.vllm import request

    class Gpu:
        """The platform, but for the question that vLLM asks before EPLB."""

        def __getattr__(self, name: str) -> Any:
            return getattr(platform, name)

        def is_cuda_alike(self) -> bool:
            return True

    platform, load, model_of = parallel.current_platform, CPUModelRunner.load_model, request._model_of
    parallel.current_platform = Gpu()

    class Event:
        """An event of a device that has done all that it was given."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def record(self, *args: Any) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Any) -> float:
            return 0.0

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        self._moe_model = self.get_model()
        self.eplb_state = EplbState(self.parallel_config, torch.device("cpu"))
        self.eplb_state.add_model(self._moe_model, self.model_config)

    torch.Event = Event  # type: ignore[misc,assignment]
    torch.accelerator.current_stream = lambda: SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda device: (8, 0)  # type: ignore[assignment,misc]
    CPUModelRunner.load_model = load_model
    request._model_of = lambda config: dataclasses.replace(model_of(config), on_cuda=True)


def _of_others(make: Callable[..., Any]) -> Callable[..., Any]:
    def make_of_others(order: Any, experts: int, *more: Any, **options: Any) -> Any:
        return make([(expert + 1) % experts for expert in order], experts, *more, **options)

    return make_of_others


def _warm_up_stages() -> None:
    """On CPUs, uncompiled, vLLM lets pipeline stages meet their first batch without room for what they are sent."""
    from vllm.distributed import get_pp_group
    from vllm.v1.worker.cpu_worker import CPUWorker

    determine = CPUWorker.determine_available_memory

    @functools.wraps(determine)
    def wrapper(self: Any) -> int:
        if get_pp_group().world_size > 1:
            self.model_runner.profile_run()
        return determine(self)

    CPUWorker.determine_available_memory = wrapper


def _fork_workers() -> None:
    """Let the driver fork its workers, though vLLM sets on CPUs that it spawns them."""
    from vllm.v1.executor import multiproc_executor

    def forking() -> Any:
        return multiprocessing.get_context("fork")

    multiproc_executor.get_mp_context = forking


def _read_from_nodes(nodes: list[str]) -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    prepare = DefaultModelLoader._prepare_weights

    @functools.wraps(prepare)
    def wrapper(self: Any, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        return prepare(self, nodes[torch.distributed.get_rank()], *args, **kwargs)

    DefaultModelLoader._prepare_weights = wrapper


def _change_hook() -> None:
    """Make `create_fused_moe_router` another function with other arguments, whether or not it was replaced before."""
    from vllm.model_executor.layers.fused_moe import layer

    create = inspect.unwrap(layer.create_fused_moe_router)
    layer.create_fused_moe_router = lambda **arguments: create(**arguments)


def _record_opened(path: str) -> None:
    """Record opening by the safetensors library, whose Rust code Python's audit events do not see, and by Python."""
    import safetensors
    import safetensors.torch
    from vllm.model_executor.model_loader import weight_utils

    def note(who: str, what: str) -> None:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
        line = json.dumps(
            {"pid": os.getpid(), "rank": rank if not who or rank is None else f"{who}{rank}", "file": what}
        )
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, f"{line}\n".encode())
        os.close(descriptor)

    def record(name: object) -> None:
        if isinstance(name, (str, os.PathLike)) and os.fspath(name).endswith(".safetensors"):
            note("", Path(name).name)

    safe_open = safetensors.safe_open

    class Noting:
        """An open file that notes which tensors are read."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> Noting:
            return Noting(self._file.__enter__())

        def __exit__(self, *args: Any) -> Any:
            return self._file.__exit__(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Any:
            note("tensors of ", name)
            return self._file.get_tensor(name)

    @functools.wraps(safe_open, updated=())
    def recording_safe_open(filename: Any, *args: Any, **kwargs: Any) -> Any:
        record(filename)
        file = safe_open(filename, *args, **kwargs)
        return Noting(file) if "RECORD_TENSORS" in os.environ else file

    for module in (safetensors, safetensors.torch, weight_utils):
        setattr(module, "safe_open", recording_safe_open)  # noqa: B010

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            record(arguments[0])

    sys.addaudithook(audit)
