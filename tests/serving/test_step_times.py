"""Real vLLM on two ranks runs `benchmarks/step_times.py`: swapping a placement in place serves that placement."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from copies_oracle import random_copies
from harness import BIN, HERE, ROOT, TIMEOUT, Serving
from safetensors.torch import load_file, save_file
from step_times import report, write_placement
from test_copies import ON_CPU

from reshard.placement.permutations import zigzag

EXPERTS, KINDS, LENGTH, RANKS = 16, ("a", "b", "c"), 64, 2
STEPS = ROOT / "benchmarks" / "step_times.py"


def made(serving: Serving, tmp_path: Path) -> Path:
    """A model of `lifted_model`, and placements beside it, as the command line makes them."""
    generator, gates = torch.Generator().manual_seed(0), {}
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.gate"
        gates[f"{name}.weight"] = torch.randn(EXPERTS, 8, generator=generator)
        gates[f"{name}.e_score_correction_bias"] = torch.randn(EXPERTS, generator=generator) / 10
        for kind in KINDS:
            gates[f"{name}.input.{kind}"] = torch.randn(LENGTH, 8, generator=generator).bfloat16()
    save_file(gates, tmp_path / "gates.safetensors")
    config = (serving.model("deepseek_v3") / "config.json").read_text()
    model = tmp_path / "original"
    command = [BIN / "python", STEPS, "make", model, "--gates", tmp_path / "gates.safetensors"]
    command += ["--config", config, "--copies", "2"]
    ran = subprocess.run(command, env=serving.environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert ran.returncode == 0, ran.stderr[-4000:]
    rng, linear = random.Random(0), list(range(EXPERTS))
    orders = {"linear": [linear], "zigzag": [zigzag(EXPERTS, RANKS)]}
    orders["random"] = [rng.sample(linear, EXPERTS) for _ in range(2)]
    for name, by_gate in orders.items():
        write_placement(tmp_path / "placements" / f"{name}.json", "deepseek_v3", RANKS, (1, 2), by_gate)
    return model


def answers(
    serving: Serving, model: Path, swaps: list[str], *options: object, more: Mapping[str, str] | None = None
) -> list[tuple[str, Any]]:
    """What two ranks answer under each placement, swapped in turns; `more`: of the environment."""
    file = model.parent / f"{'-'.join(swaps)}.json"
    command = [BIN / "python", HERE / "swap.py", ",".join(swaps), file, "measure", model]
    command += ["--placements", model.parent / "placements", "--ranks", RANKS, "--json", model.parent / "steps.json"]
    command += ["--decode", "8:2", "--prefill", "1024:1", *options]
    with serving.slot() as slot:
        environment = {
            **serving.environment(RANKS, first=slot.number),
            "PYTHONPATH": str(ROOT / "benchmarks"),
            **(more or {}),
        }
        ran = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, timeout=TIMEOUT, cwd=model.parent
        )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-6000:]
    return [(name, found) for name, found in json.loads(file.read_text())]


def test_a_placement_that_is_swapped_in_place_answers_as_one_that_vllm_starts_with(
    serving: Serving, tmp_path: Path
) -> None:
    model = made(serving, tmp_path)
    choices = tmp_path / "choices.safetensors"
    swapped = answers(serving, model, ["zigzag", "random", "zigzag"], "--rounds", 1, "--save-choices", choices)
    ((_, fresh),) = answers(serving, model, ["random"], "--start", "random", "--rounds", 0)
    assert swapped[1][1] == fresh  # tokens and log-probabilities, bit for bit
    assert swapped[0][1] == swapped[2][1]
    assert swapped[0][1] != fresh  # weights stay where they are: another placement uses other experts
    record = json.loads((tmp_path / "steps.json").read_text())
    assert all(share < 0.02 for share in record["choices_that_differ"].values())  # near ties: bits of the sums differ
    assert {(row["case"], row["placement"], len(row["ms"])) for row in record["rows"]} == {
        (case, placement, batches)
        for case, batches in (("decode 8", 2), ("prefill 1024", 1))
        for case in (f"{case}, mixed", f"{case}, one kind")
        for placement in ("linear", "random", "zigzag")
    }
    assert all(ms > 0 for row in record["rows"] for ms in row["ms"])
    assert {ids.shape for ids in load_file(choices).values()} == {(2, len(KINDS) * LENGTH, 4)}
    assert "| decode 8, mixed" in report(record)


def test_placements_with_copies_are_swapped_in_place_beside_others(serving: Serving, tmp_path: Path) -> None:
    model = made(serving, tmp_path)
    for spare in (1, 2):
        orders = [random_copies(random.Random(gate), EXPERTS, RANKS, spare, 2) for gate in range(2)]
        write_placement(tmp_path / "placements" / f"copies-{spare}.json", "deepseek_v3", RANKS, (1, 2), orders)
    on_cpu = {**ON_CPU, "PYTHONPATH": f"{ON_CPU['PYTHONPATH']}:{ROOT / 'benchmarks'}"}
    names = ["copies-2", "zigzag", "copies-1", "copies-2"]
    found = answers(serving, model, names, "--rounds", 1, "--by-position", more=on_cpu)
    assert found[0] == found[3]
    assert len({json.dumps(answer) for _, answer in found}) == 3  # weights stay where they are
    record = json.loads((tmp_path / "steps.json").read_text())
    assert all(share < 0.02 for share in record["choices_that_differ"].values())
    assert list(record["placements"]) == ["linear", "copies-1", "copies-2", "random", "zigzag"]
    assert {(row["case"], row["placement"]) for row in record["rows"]} == {
        (f"{case}, {label}", placement)
        for case in ("decode 8", "prefill 1024")
        for label in ("mixed", "one kind")
        for placement in record["placements"]
    }
