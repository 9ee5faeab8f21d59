"""What `benchmarks/step_times.py` decides without vLLM: cases, batches, rounds, placements, the report."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from step_times import (
    HELD_OUT,
    KINDS,
    ROUNDS,
    WINDOW,
    Case,
    batches,
    cases,
    follow,
    is_bound_by_cpu,
    orders_of,
    parse,
    place,
    quartiles,
    ratios,
    report,
    sizes,
    wanted,
    write_placement,
)

VOCABULARY = 2 * KINDS * 1024
DECODE, PREFILL = Case("decode", "mixed", 64, 3), Case("prefill", "mixed", 4096, 2)
ONE_KIND = Case("decode", "one kind", 64, 3)


def kind_of(token: int) -> int:
    return token // 1024 % KINDS


# Cases and batches


def test_ranks_share_a_batch_evenly_and_whole_prompts() -> None:
    every = cases({1: 1, 8: 1, 12: 1}, {1024: 1, 8192: 1, 16384: 1}, ranks=8)
    assert [(case.what, case.tokens, case.label) for case in every] == [
        *(("decode", 8, label) for label in ("mixed", "one kind")),
        *(("prefill", tokens, label) for tokens in (8192, 16384) for label in ("mixed", "one kind")),
    ]
    assert len(cases({1: 1, 8: 1, 12: 1}, {1024: 1})) == 8


def test_batches_are_the_same_in_every_process_and_new_in_every_round() -> None:
    assert batches(DECODE, 0, VOCABULARY) == batches(DECODE, 0, VOCABULARY)
    first, second = batches(DECODE, 0, VOCABULARY), batches(DECODE, 1, VOCABULARY)
    assert first != second
    assert len({tuple(ids) for ids in [*first, *second]}) == 6


def test_batches_have_the_kinds_of_text_and_the_size_of_their_case() -> None:
    mixed = [token for turn in range(9) for ids in batches(DECODE, turn, VOCABULARY) for token in ids]
    assert len(mixed) == 9 * 3 * 64
    assert {kind_of(token) for token in mixed} == set(range(KINDS))
    assert {token // 3072 for token in mixed} == {0, 1}  # from both halves of the vocabulary
    alike = [token for ids in batches(ONE_KIND, 0, VOCABULARY) for token in ids]
    assert {kind_of(token) for token in alike} == {1}


def test_prompts_are_consecutive_text_of_one_kind() -> None:
    for ids in batches(PREFILL, 0, VOCABULARY):
        assert len(ids) == 4096
        for first in range(0, 4096, WINDOW):
            prompt = ids[first : first + WINDOW]
            block = prompt[0] // 1024 * 1024
            assert prompt == [block + (prompt[0] - block + step) % 1024 for step in range(WINDOW)]
    decode = batches(DECODE, 0, VOCABULARY)[0]
    assert sum(after == before + 1 for before, after in itertools.pairwise(decode)) < 3


# Rounds


def rows(case: Case, rounds: int, spread: float = 0.0) -> list[dict[str, Any]]:
    made = []
    for turn in range(rounds):
        off = 1 + spread * (turn % 2)
        made += [
            {"case": case.name, "round": turn, "placement": "linear", "ms": [2.0, 2.0]},
            {"case": case.name, "round": turn, "placement": "zigzag", "ms": [2.0 / off, 1.0]},
        ]
    return made


def test_cases_with_few_rounds_come_first_then_those_that_spread() -> None:
    both = [DECODE, PREFILL]
    assert wanted([], both) == both
    assert wanted([*rows(DECODE, ROUNDS), *rows(PREFILL, ROUNDS - 1)], both) == [PREFILL]
    assert wanted([*rows(DECODE, ROUNDS, 0.5), *rows(PREFILL, ROUNDS)], both) == [DECODE]
    assert wanted([*rows(DECODE, ROUNDS), *rows(PREFILL, ROUNDS)], both) == both  # nothing is missing: go on with all


def test_ratios_are_of_all_batches_of_a_round() -> None:
    assert ratios(rows(DECODE, 2)) == {"zigzag": [4 / 3, 4 / 3]}
    assert ratios(rows(DECODE, 2)[:-1]) == {"zigzag": [4 / 3]}  # the last round is unfinished


def test_quartiles_of_few_values() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_the_report_names_each_step_and_those_that_wait_for_the_cpu() -> None:
    slow = [{**row, "host": 1.9} for row in rows(PREFILL, 4)]
    record = {
        "ranks": 8,
        "mode": "tp",
        "layers": 30,
        "machine": {"gpus": ["GPU"] * 8, "vllm": "0.26"},
        "placements": {"linear": "a", "zigzag": "b"},
        "rows": [*rows(DECODE, 5), *slow],
    }
    said = report(record).splitlines()
    assert "| decode 64, mixed | 5 | 2.000 | 1.3333 (1.3333 to 1.3333) |" in said
    assert "| prefill 4096, mixed (bound by the CPU) | 4 | 2.000 | 1.3333 (1.3333 to 1.3333) |" in said
    assert is_bound_by_cpu(slow)
    assert not is_bound_by_cpu([{**row, "host": 0.5} for row in slow])
    assert not is_bound_by_cpu(rows(DECODE, 5))


# Placements


def test_layers_take_the_orders_of_their_routers(tmp_path: Path) -> None:
    orders = [[0, 1, 2, 3], [3, 2, 1, 0]]
    write_placement(tmp_path / "made.json", "deepseek_v3", 2, range(1, 6), orders)
    assert orders_of(tmp_path / "made.json", [1, 2, 5]).tolist() == [orders[0], orders[1], orders[0]]


def test_placements_are_made_from_text_that_is_not_measured(tmp_path: Path) -> None:
    # in the text that is measured, experts 0 to 3 are busy; after it, expert 15 is
    measured, rest = torch.randint(0, 4, (2, HELD_OUT, 2)), torch.randint(4, 15, (2, 2048, 2))
    rest[:, :, 0] = 15
    texts = {kind: torch.cat([measured, rest], dim=1).to(torch.uint8) for kind in ("a", "b")}
    save_file(texts, tmp_path / "choices.safetensors")
    config = {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = argparse.Namespace(
        directory=tmp_path,
        choices=tmp_path / "choices.safetensors",
        out=tmp_path / "placements",
        tokens=2048,
        experts=16,
        ep=4,
        prefix="",
        gpu="H200",
        strategies=None,
        spare=[2],
    )
    place(options)
    made = {path.stem: orders_of(path, range(1, 5)) for path in options.out.iterdir()}
    assert sorted(made) == ["balanced", "best-fixed", "copies-2", "eplb-2", "linear", "packing", "zigzag"]
    for name in ("copies-2", "eplb-2"):
        assert made[name].shape == (4, 16 + 4 * 2)
        assert all(set(order) == set(range(16)) for order in made[name].tolist())
    assert made["linear"].tolist() == [list(range(16))] * 4
    assert made["zigzag"][0].tolist() == [*range(0, 16, 4), *range(1, 16, 4), *range(2, 16, 4), *range(3, 16, 4)]
    for name in ("packing", "balanced", "best-fixed"):
        assert made[name].sort(dim=1).values.tolist() == [list(range(16))] * 4
    (busy,) = [rank.tolist() for rank in made["packing"][0].view(4, 4) if 15 in rank]
    assert sorted(busy) == [0, 1, 2, 15] or len(set(busy) & {0, 1, 2, 3}) == 3  # with those that this text never uses


def test_sizes_are_read_from_the_command_line(tmp_path: Path) -> None:
    assert sizes("8:32,64:8") == {8: 32, 64: 8}
    assert sizes("") == {}
    (tmp_path / "config.json").write_text('{"vocab_size": 6144}')
    common = ["measure", str(tmp_path), "--placements", "p", "--json", "j"]
    assert parse([*common, "--decode", "8:1", "--prefill", ""]).decode == {8: 1}
    assert parse(common).vocabulary == 6144


# Ranks


def start(tmp_path: Path, name: str, code: str) -> tuple[subprocess.Popen[bytes], Path]:
    log = tmp_path / name
    with log.open("w") as output:
        return subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output), log


def test_the_first_rank_is_heard_and_a_failure_of_another_ends_it_all(tmp_path: Path) -> None:
    good = start(tmp_path, "good", "print('INFO noise'); print('3 s: vLLM is up')")
    assert "".join(follow([good, good], time.time() + 30)) == "3 s: vLLM is up\n"
    slow, bad = (
        start(tmp_path, "slow", "import time; time.sleep(60)"),
        start(tmp_path, "bad", "raise ValueError('why')"),
    )
    with pytest.raises(SystemExit, match=r"(?s)ValueError: why.*rank 1 failed"):
        list(follow([slow, bad], time.time() + 30))
    with pytest.raises(SystemExit, match="rank 0 is late"):
        list(follow([slow], time.time() - 1))
    slow[0].kill()
    slow[0].wait()
