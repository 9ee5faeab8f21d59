"""What `benchmarks/serve_ep.py` decides without a server: what runs when, what the log says, ratios, and its model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import serve_ep
import torch
from serve_ep import (
    LOUD,
    Start,
    Workload,
    command,
    complaint,
    fell_back,
    left,
    lifted,
    load_seconds,
    plan,
    ratios,
    report,
)

VARIANTS = ("linear", "round_robin", "zigzag", "balanced")
WORKLOAD = Workload(8, 1024, 128, [8, 64], 4, 64, {"step_interval": 400}, [])
RUN = {
    "total_token_throughput": 9.0,
    "output_throughput": 1.0,
    "mean_ttft_ms": 100.0,
    "mean_tpot_ms": 10.0,
    "failed": 0,
    "concurrency": 8,
    "mode": "tp",
}
LOG = """\
(Worker_TP0_EP0 pid=30843) INFO 11-24 16:29:55 [default_loader.py:501] Loading weights took 0.01 seconds
serve_ep: rank 1 loaded its weights in 0.012 s
serve_ep: rank 0 loaded its weights in 0.014 s
"""
ROUND_ROBIN_UNDER_DP = """\
(Worker_DP1_EP1 pid=3583) WARNING 11-24 16:48:40 [expert_map_manager.py:141] Round-robin expert placement currently \
only supports the DeepEP low-latency or NIXL EP backend, but 'allgather_reducescatter' was configured. Falling back to \
linear expert placement.
(Worker_DP0_EP0 pid=3580) WARNING 11-24 16:48:40 [expert_map_manager.py:141] Round-robin expert placement currently \
only supports the DeepEP low-latency or NIXL EP backend, but 'allgather_reducescatter' was configured. Falling back to \
linear expert placement.
"""
REFUSED = """\
(APIServer pid=30142) WARNING 11-24 16:26:32 [system_utils.py:255] This can cause fd limit errors like `OSError: \
[Errno 24] Too many open files`. Consider increasing with ulimit -n
  File "/usr/lib/python3/site-packages/pydantic/_internal/_dataclasses.py", line 121, in __init__
pydantic_core._pydantic_core.ValidationError: 1 validation error for ParallelConfig
  Value error, Expert parallelism load balancing is only supported on CUDA devices or ROCm devices or XPU devices now. \
[type=value_error, input_value=ArgsKwargs((), {'pipeline...'numa_bind_cpus': None}), input_type=ArgsKwargs]
"""


def a_run(variant: str, repeat: int, throughput: float, **more: Any) -> dict[str, Any]:
    return {**RUN, "variant": variant, "repeat": repeat, "request_throughput": throughput, **more}


# What runs when


def test_a_repeat_goes_through_all_and_the_next_one_begins_elsewhere() -> None:
    starts = plan(3, ["tp", "dp"], VARIANTS)
    assert [start.repeat for start in starts] == sorted(start.repeat for start in starts)
    assert [start.variant for start in starts[:4]] == list(VARIANTS)
    assert [start.variant for start in starts[8:12]] == ["round_robin", "zigzag", "balanced", "linear"]
    assert [start.mode for start in starts[:8]] == ["tp"] * 4 + ["dp"] * 4
    assert len(set(starts)) == len(starts) == 24


def test_what_was_cut_off_goes_on_where_it_stopped() -> None:
    starts = plan(1, ["tp"], ["linear", "zigzag", "balanced"])
    runs = [a_run("linear", 0, 1.0), a_run("linear", 0, 1.0, concurrency=64), a_run("zigzag", 0, 1.0)]
    record: dict[str, Any] = {"workload": asdict(WORKLOAD), "runs": runs, "starts": []}
    assert left(starts, record) == [(starts[1], [64]), (starts[2], [8, 64])]
    runs[2]["repeat"] = 1  # another repeat's is no excuse
    assert left(starts, record) == [(starts[1], [8, 64]), (starts[2], [8, 64])]


def test_what_failed_is_not_tried_for_ever() -> None:
    starts = plan(2, ["dp"], ["linear"])
    failed = {"repeat": 0, "mode": "dp", "variant": "linear", "failed": "ValueError: no"}
    record = {"workload": {"concurrency": [8]}, "runs": [], "starts": [failed]}
    assert left(starts, record) == [(starts[1], [8])]
    del failed["failed"]
    assert left(starts, record) == [(starts[0], [8]), (starts[1], [8])]


def test_what_was_not_made_is_said_before_anything_is_started(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    options = serve_ep.parse(["serve", str(tmp_path), "--json", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit, match="has no balanced and no zigzag: make it first"):
        serve_ep.serve(options)
    assert not options.json.exists()


@pytest.mark.parametrize(
    ("mode", "variant", "model", "told"),
    [
        ("tp", "linear", "original", "--tensor-parallel-size 8"),
        ("dp", "zigzag", "zigzag", "--data-parallel-size 8"),
        ("tp", "round_robin", "original", "--expert-placement-strategy round_robin"),
        ("eplb", "balanced", "balanced", '--enable-eplb --eplb-config {"step_interval": 400}'),
    ],
)
def test_vllm_is_told_the_mode_and_the_variant_and_no_other(mode: str, variant: str, model: str, told: str) -> None:
    line = " ".join(command(Path("models"), Start(0, mode, variant), WORKLOAD, 8000))
    assert f" models/{model} " in line
    assert told in line
    assert ("round_robin" in line) == (variant == "round_robin")
    assert ("--enable-eplb" in line) == (mode == "eplb")
    assert ("--data-parallel-size" in line) == (mode == "dp")


def test_more_options_come_last_so_that_they_win() -> None:
    line = command(Path("models"), Start(0, "tp", "linear"), replace(WORKLOAD, arguments=["--max-num-seqs", "7"]), 1)
    assert line[-2:] == ["--max-num-seqs", "7"]


# The server


def test_a_server_that_does_not_heed_its_end_is_killed_with_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_ep, "END_SECONDS", 0.5)
    worker = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {worker!r}]); {worker}"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout is not None
        assert [server.stdout.readline() for _ in range(2)] == [b"up\n", b"up\n"]
        serve_ep.end(server)
        assert server.returncode == -9
        assert server.stdout.read() == b""  # no process holds it any more


# What the log says


def test_each_rank_says_how_long_its_weights_took() -> None:
    assert load_seconds(LOG) == {"0": 0.014, "1": 0.012}
    assert load_seconds(LOG.replace("serve_ep:", "")) == {}


def test_vllm_says_where_it_does_not_place_round_robin() -> None:
    (said,) = fell_back(ROUND_ROBIN_UNDER_DP)
    assert said.startswith("Round-robin expert placement currently only supports the DeepEP low-latency or NIXL")
    assert said.endswith("Falling back to linear expert placement.")
    assert fell_back(LOG) == fell_back(ROUND_ROBIN_UNDER_DP.replace("Falling back to linear", "")) == []


def test_of_errors_the_first_is_told_and_no_directory() -> None:
    assert complaint(REFUSED) == (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ParallelConfig Value error, Expert "
        "parallelism load balancing is only supported on CUDA devices or ROCm devices or XPU devices now."
    )
    assert complaint("(Worker pid=3) ERROR 11-24 16:47:58 [a.py:1] OSError: /models/x/model is no file") == (
        "OSError: model is no file"
    )
    assert complaint(LOG + REFUSED.splitlines()[0]) == "no error is in its log"


# What the report says


def test_a_ratio_is_to_linear_in_the_same_repeat() -> None:
    runs = [a_run("linear", 0, 10.0), a_run("zigzag", 0, 11.0), a_run("zigzag", 1, 24.0), a_run("linear", 1, 20.0)]
    runs += [a_run("zigzag", 2, 99.0), a_run("linear", 2, 1.0, concurrency=64)]  # without linear beside it
    assert ratios(runs, "zigzag", 8, "request_throughput") == [pytest.approx(1.1), pytest.approx(1.2)]
    assert ratios(runs, "linear", 8, "request_throughput") == [1, 1]
    assert ratios(runs, "balanced", 8, "request_throughput") == []


def test_the_report_has_medians_spread_and_ratios_and_says_what_is_wrong() -> None:
    machine = {"gpus": ["H200"] * 8, "vllm": "0.26.0", "torch": "2.11", "reshard": "0", "set": {}}
    start = {"repeat": 0, "mode": "tp", "machine": machine, "ready_seconds": 60.0, "fell_back": []}
    loaded = {**start, "variant": "linear", "cold": True, "load_seconds": {"0": 4.0, "1": 6.0}}
    record = {
        "workload": {},
        "model": {},
        "starts": [loaded, {**start, "variant": "zigzag", "cold": False, "failed": "ValueError: too large"}],
        "runs": [
            a_run("linear", 0, 10.0),
            a_run("linear", 1, 20.0),
            a_run("zigzag", 0, 11.0),
            a_run("zigzag", 1, 24.0),
        ],
    }
    lines = report(record).splitlines()
    (linear,) = [line for line in lines if line.startswith("| 8 | linear |")]
    (zigzag,) = [line for line in lines if line.startswith("| 8 | zigzag |")]
    assert "| 2 | 900 (600 to 1,200) |" in linear
    assert "| 1.15 (1.1 to 1.2) | 1 (1 to 1) | 1 (1 to 1) |" in zigzag
    assert "| linear | empty | 1 | 5 (4 to 6) | 6 (6 to 6) | 60 (60 to 60) |" in lines
    assert "zigzag: failed: ValueError: too large" in lines
    assert "8 GPUs (H200), vLLM 0.26.0" in lines[0]


# The model


def a_trained_model(tokens: int = 12, experts: int = 16, hidden: int = 6) -> dict[str, torch.Tensor]:
    """What `save_gates` writes, of two routers and two kinds of text; all inputs equally long."""
    generator, gates = torch.Generator().manual_seed(0), {}
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.gate"
        gates[f"{name}.weight"] = torch.randn(experts, hidden, generator=generator)
        gates[f"{name}.e_score_correction_bias"] = torch.randn(experts, generator=generator)
        for kind in ("code", "prose"):
            gates[f"{name}.input.{kind}"] = torch.nn.functional.normalize(
                torch.randn(tokens, hidden, generator=generator)
            )
    return gates


def normalized(stream_TD: torch.Tensor) -> torch.Tensor:
    """RMSNorm."""
    return stream_TD / stream_TD.square().mean(dim=1, keepdim=True).sqrt()


def test_a_lifted_router_gives_the_logits_that_it_gave_for_what_it_was_given() -> None:
    gates = a_trained_model()
    found = lifted(gates, layers=3, hidden=32)
    stream_TD = normalized(found["model.embed_tokens.weight"])
    for layer, trained in ((1, 1), (2, 2), (3, 1)):
        name = f"model.layers.{trained}.mlp.gate"
        inputs = [gates[f"{name}.input.{kind}"] for kind in ("code", "prose")]
        given_TH = torch.cat([text for half in zip(*(text.chunk(2) for text in inputs), strict=True) for text in half])
        expected_TE = given_TH @ gates[f"{name}.weight"].T
        logits_TE = stream_TD @ found[f"model.layers.{layer}.mlp.gate.weight"].T
        torch.testing.assert_close(logits_TE, expected_TE)
        other_TE = stream_TD @ found[f"model.layers.{3 - trained}.mlp.gate.weight"].T
        assert (other_TE - expected_TE).abs().max() > 0.1
        bias = gates[f"{name}.e_score_correction_bias"]
        assert torch.equal(found[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"], bias)


def test_the_model_recites_each_half_of_its_text() -> None:
    found = lifted(a_trained_model(), layers=1, hidden=32)
    embedding_TD, tokens = found["model.embed_tokens.weight"], 24
    assert embedding_TD.square().mean().sqrt() == pytest.approx(LOUD, rel=1e-4)
    noise_TD = torch.randn(embedding_TD.shape, generator=torch.Generator().manual_seed(1)) * LOUD / 16
    spoken_T = (normalized(embedding_TD + noise_TD) @ found["lm_head.weight"].T).argmax(dim=1)
    assert spoken_T.tolist() == [*range(1, 12), 0, *range(13, tokens), 12]


def test_what_does_not_fit_into_the_hidden_size_is_refused() -> None:
    with pytest.raises(ValueError, match="12 dimensions do not fit into 11"):
        lifted(a_trained_model(), layers=1, hidden=11)
