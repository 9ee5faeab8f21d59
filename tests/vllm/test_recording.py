"""The plugin's recorder, without vLLM: whatever goes wrong with a trace, routers answer and steps continue."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reshard.traffic.recordings import read_recordings
from reshard.vllm.imbalance_log import ImbalanceLog, busiest_over_mean
from reshard.vllm.recording import MAX_WAITING_STEPS, Recorder, Scribe, attach, install_notice

TOP_K, EXPERTS, MAX_TOKENS = 2, 8, 16


class Capturer:
    """A stand-in for vLLM's `RoutedExpertsCapturer` on one rank; it raises an error for `fault_at` rows."""

    fault_at: int | None = None

    def __init__(self, tokens: int, config: Any) -> None:
        self.device_buffer = torch.zeros(tokens, 3, TOP_K, dtype=torch.int32)

    def capture(self, column: int, ids: Tensor) -> None:
        if self.fault_at == len(ids):
            raise AssertionError("unexpected topk_ids batch dim")
        self.device_buffer[: len(ids), column] = ids


class Log(list[str]):
    """A stand-in for vLLM's logger that keeps its lines."""

    def _add(self, text: str, *values: object) -> None:
        self.append(text % values)

    info = warning = exception = _add


class Vllm:
    """Stand-ins for what the recorder imports from vLLM."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = Log()
        self.tp_rank = 0
        self.capturer = type("Capturer", (Capturer,), {})
        group = lambda: SimpleNamespace(rank_in_group=self.tp_rank)  # noqa: E731
        for name, contents in {
            "vllm": {"__version__": "0.0"},
            "vllm.logger": {"init_logger": lambda name: self.log},
            "vllm.distributed.parallel_state": {
                "get_tp_group": group,
                "get_pp_group": lambda: SimpleNamespace(rank_in_group=0),
            },
            "vllm.model_executor.layers.fused_moe.routed_experts_capturer": {"RoutedExpertsCapturer": self.capturer},
        }.items():
            module = ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    return Vllm(monkeypatch)


class Router:
    """A router that returns the first columns of the logits as ids."""

    top_k = TOP_K

    def _compute_routing(self, hidden: Tensor, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return logits[:, :TOP_K].float(), logits[:, :TOP_K]


def worker(*, monolithic: bool = False, **parallel: Any) -> Any:
    """A worker with two MoE layers."""
    runners = [
        SimpleNamespace(
            router=Router(), routed_experts=SimpleNamespace(quant_method=SimpleNamespace(is_monolithic=one))
        )
        for one in (False, monolithic)
    ]
    named = [(f"model.layers.{number}.mlp.experts", runner) for number, runner in enumerate(runners, 1)]
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**{"data_parallel_rank": 0, **parallel}),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=MAX_TOKENS),
        model_config=SimpleNamespace(model="m", hf_config=SimpleNamespace(), get_num_experts=lambda: EXPERTS),
        additional_config={},
    )
    model = SimpleNamespace(named_modules=lambda: named)
    return SimpleNamespace(vllm_config=config, get_model=lambda: model, routers=[runner.router for runner in runners])


def step(worker: Any, recorder: Recorder | None, ids: list[list[int]]) -> None:
    """A forward pass in which every layer chooses `ids` for these tokens."""
    logits = torch.tensor(ids)
    for router in worker.routers:
        weights, chosen = router._compute_routing(None, logits)
        assert torch.equal(chosen, logits)
        assert torch.equal(weights, logits.float())
    if recorder is not None:
        recorder.step(len(ids))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def recorded(directory: Path, tokens: int) -> Any:
    until(lambda: bool(list(directory.glob("*.trace"))) and _tokens(directory) == tokens)
    (recording,) = read_recordings(directory)
    return recording.read(0, tokens).tolist()


def _tokens(directory: Path) -> int:
    (path,) = directory.glob("*.trace")
    line, _, rows = path.read_bytes().partition(b"\n")
    return len(rows) // (line.count(b"model.layers") * TOP_K)


def start(worker: Any, directory: Path) -> Recorder:
    recorder = attach(worker, {"RESHARD_TRACE": str(directory)})
    assert recorder is not None
    return recorder


def test_each_step_records_the_rows_of_its_tokens_without_padding(vllm: Vllm, tmp_path: Path) -> None:
    of = worker()
    recorder = start(of, tmp_path)
    step(of, recorder, [[1, 2], [3, 4], [5, 6]])
    for router in of.routers:
        router._compute_routing(None, torch.tensor([[7, 0], [0, 0], [0, 0]]))  # two rows are a CUDA graph's padding
    recorder.step(1)
    assert recorded(tmp_path, 4) == [[ids, ids] for ids in ([1, 2], [3, 4], [5, 6], [7, 0])]
    assert of.vllm_config.additional_config == {"reshard_trace": True}


def test_every_tensor_parallel_rank_captures_and_only_the_first_writes(vllm: Vllm, tmp_path: Path) -> None:
    vllm.tp_rank, of = 1, worker()
    recorder = start(of, tmp_path)
    step(of, recorder, [[1, 2]])
    assert not list(tmp_path.iterdir())
    assert recorder._capturer.device_buffer[0, :2].tolist() == [[1, 2], [1, 2]]


def test_a_layer_whose_kernel_routes_is_skipped_and_named(vllm: Vllm, tmp_path: Path) -> None:
    of = worker(monolithic=True)
    recorder = start(of, tmp_path)
    step(of, recorder, [[1, 2]])
    assert recorded(tmp_path, 1) == [[[1, 2]]]
    assert any("1 layers are not recorded" in line and "model.layers.2.mlp.experts" in line for line in vllm.log)


@pytest.mark.parametrize("parallel", [{"use_ubatching": True}, {"prefill_context_parallel_size": 2}])
def test_nothing_is_recorded_if_rows_are_not_tokens(parallel: dict[str, Any], vllm: Vllm, tmp_path: Path) -> None:
    of = worker(**parallel)
    assert attach(of, {"RESHARD_TRACE": str(tmp_path)}) is None
    step(of, None, [[1, 2]])
    assert not list(tmp_path.iterdir())
    assert "nothing is recorded" in vllm.log[-1]


def test_an_error_while_capturing_stops_the_recording_but_not_the_routing(vllm: Vllm, tmp_path: Path) -> None:
    of = worker()
    recorder = start(of, tmp_path)
    step(of, recorder, [[1, 2]])
    vllm.capturer.fault_at = 3
    for _ in range(3):
        step(of, recorder, [[1, 2], [3, 4], [5, 6]])
    step(of, recorder, [[1, 2]])
    assert recorded(tmp_path, 1) == [[[1, 2]] * 2]
    assert len([line for line in vllm.log if "recording stopped: unexpected topk_ids" in line]) == 1


def test_a_directory_that_cannot_be_written_is_logged_and_this_rank_still_captures(vllm: Vllm, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    of = worker()
    recorder = start(of, tmp_path / "file")
    step(of, recorder, [[3, 4]])
    assert recorder._capturer.device_buffer[0, :2].tolist() == [[3, 4], [3, 4]]
    assert len([line for line in vllm.log if "recording cannot begin" in line]) == 1


def test_a_full_disk_stops_the_writing_and_this_rank_still_captures(vllm: Vllm, tmp_path: Path) -> None:
    of = worker()
    recorder = start(of, tmp_path)
    assert recorder._scribe is not None

    def full(rows: memoryview) -> None:
        raise OSError(28, "No space left on device")

    recorder._scribe._writer.write = full  # type: ignore[method-assign]
    thread = recorder._scribe._thread
    step(of, recorder, [[1, 2]])
    until(lambda: not thread.is_alive())
    for _ in range(2):
        step(of, recorder, [[3, 4]])
    assert recorder._scribe is None
    assert recorder._capturer.device_buffer[0, :2].tolist() == [[3, 4], [3, 4]]
    assert len([line for line in vllm.log if "No space left on device" in line]) == 1


def test_a_slow_disk_loses_steps_and_delays_none(vllm: Vllm) -> None:
    class Stuck:
        def __init__(self) -> None:
            self.rows = 0
            self.goes_on = threading.Event()

        def write(self, rows: memoryview) -> None:
            assert self.goes_on.wait(60)
            self.rows += 1

        def close(self) -> None:
            pass

    disk: Any = Stuck()
    scribe = Scribe(disk, id_size=1)
    for _ in range(3 * MAX_WAITING_STEPS):
        assert scribe.take(torch.ones(1, 1, TOP_K, dtype=torch.int32))
    assert disk.rows == 0, "no step waited for the disk"
    assert vllm.log.count("RESHARD_TRACE: the disk is too slow: some steps are not recorded") == 1
    disk.goes_on.set()
    until(lambda: not scribe._waiting.qsize())
    scribe._finish()
    assert disk.rows in (MAX_WAITING_STEPS, MAX_WAITING_STEPS + 1), "one may have been on its way"


@pytest.mark.parametrize(
    ("parallel", "copies_all", "copied", "warned"),
    [
        ({"data_parallel_backend": "ray", "distributed_executor_backend": "ray"}, True, "", True),
        ({"data_parallel_backend": "mp", "distributed_executor_backend": "ray"}, False, "OTHER", True),
        ({"data_parallel_backend": "mp", "distributed_executor_backend": "ray"}, True, "", False),
        ({"data_parallel_backend": "ray", "distributed_executor_backend": "mp"}, False, "OTHER,RESHARD_TRACE", False),
        ({"data_parallel_backend": "mp", "distributed_executor_backend": "mp"}, False, "", False),
        ({"distributed_executor_backend": None}, False, "", False),
    ],
)
def test_the_log_says_where_ray_keeps_workers_from_recording(
    parallel: dict[str, Any],
    copies_all: bool,
    copied: str,
    warned: bool,
    vllm: Vllm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM hands Ray's processes its own variables only, and nothing was recorded, with no word."""

    class VllmConfig:
        def __init__(self) -> None:
            self.__post_init__()

        def __post_init__(self) -> None:
            self.parallel_config = SimpleNamespace(**parallel)

    envs = SimpleNamespace(VLLM_USE_RAY_V2_EXECUTOR_BACKEND=copies_all)
    monkeypatch.setattr(sys.modules["vllm"], "envs", envs, raising=False)
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", copied)
    install_notice(SimpleNamespace(VllmConfig=VllmConfig))  # type: ignore[arg-type]
    VllmConfig()
    assert [line for line in vllm.log if "Ray does not pass this variable on" in line] == vllm.log
    assert bool(vllm.log) == warned


@pytest.mark.parametrize("backend", ["ray", "mp"])
def test_the_notice_is_there_once_the_plugin_is_registered(backend: str, tmp_path: Path) -> None:
    """In a process of its own, with packages of vLLM's names."""
    for name, text in {
        "vllm": "envs = None",
        "vllm.logger": LOGGER,
        "vllm.config": "",
        "vllm.config.vllm": CONFIG.format(backend=backend),
    }.items():
        (folder := tmp_path.joinpath(*name.split("."))).mkdir()
        (folder / "__init__.py").write_text(text)
    code = "import reshard.vllm; reshard.vllm.register(); import vllm.config.vllm as module; module.VllmConfig()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    path = f"{tmp_path}:{environment.get('PYTHONPATH', '')}"
    environment |= {"PYTHONPATH": path, "RESHARD_TRACE": str(tmp_path / "trace")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("RESHARD_TRACE: Ray does not pass this variable on") == (backend == "ray"), ran.stdout


LOGGER = """
from types import SimpleNamespace
say = lambda text, *values: print(text % values)
init_logger = lambda name: SimpleNamespace(info=say, warning=say, info_once=say, warning_once=say)
"""
CONFIG = """
from types import SimpleNamespace

class VllmConfig:
    def __init__(self):
        self.__post_init__()

    def __post_init__(self):
        self.model_config, self.additional_config = None, {{}}
        self.parallel_config = SimpleNamespace(data_parallel_backend="{backend}", distributed_executor_backend="mp")
"""


def test_the_busiest_rank_is_counted_by_layer() -> None:
    ranks = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    ids = torch.tensor([[[0, 1], [0, 2]], [[0, 2], [0, 1]], [[0, 1], [2, 0]]])  # three tokens, two layers
    # layer 0: pairs 5 and 1, active experts 2 and 1; layer 1: pairs 5 and 1, active experts 2 and 1
    assert busiest_over_mean(ids, ranks, 2) == (pytest.approx(2 / 1.5), pytest.approx(5 / 3))
    even = torch.tensor([[[0, 2], [0, 1]]])
    assert busiest_over_mean(even, ranks, 2) == (1, 1)


def test_a_step_is_counted_once_a_minute_from_rows_of_either_size(monkeypatch: pytest.MonkeyPatch) -> None:
    now, log = [100.0], Log()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for id_size, dtype in ((1, torch.uint8), (2, torch.uint16)):
        counted = ImbalanceLog(torch.tensor([[0, 0, 1, 1]]), 2, log._add)
        rows = memoryview(torch.tensor([[0, 1], [0, 2]], dtype=dtype).view(torch.uint8).numpy().tobytes())
        for _ in range(3):
            counted.note(rows, id_size, top_k=2)
        assert len(log) == 1
        assert log.pop().startswith("a step of 2 tokens: the busiest of 2 EP ranks has 1.33 times")
        now[0] += 61
        counted.note(memoryview(b""), id_size, top_k=2)
        assert not log
        counted.note(rows, id_size, top_k=2)
        assert len(log) == 1
        log.clear()
