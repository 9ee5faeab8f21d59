"""`reshard analyze --spare`: predicted times with copies, what copies take of a GPU, and when they are recommended.

Times are compared with `step_oracle`. There a flow solver chooses the copies for small batches, so reshard's greedy
choice may take a little longer, and never less. No code is shared with the package.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from command_line import run, run_well
from copies_oracle import least
from oracle import zigzag
from step_oracle import R1, RANKS, Busiest, Ids, Slow, TimeOf, build, fixed, seconds
from traces import write_trace

EXPERTS, TOP_K, TOKENS, SPARE = 256, 8, 8192, 8
LAYER = "model.layers.0.mlp"


def liking(weights: list[float]) -> Ids:
    """Tokens that choose different experts, each with a chance that follows its weight."""
    noise = np.random.default_rng(0).gumbel(size=(TOKENS, len(weights)))
    return np.argsort(-(np.log(weights) + noise), axis=1)[:, :TOP_K].astype(np.int64)


def uneven() -> Ids:
    """A few experts are much liked, all over the ranks of every placement."""
    return liking([float(weight) for weight in 1 / np.random.default_rng(1).permutation(EXPERTS).clip(1)])


def copied(order: list[int], size: int) -> Busiest:
    """The busiest rank with copies: after the best choice; in large batches time is dealt out greedily.

    Batches in between do not choose, and ranks serve equally many experts.
    """
    slots = len(order) // RANKS
    ranks_of = [[slot // slots for slot, other in enumerate(order) if other == expert] for expert in range(EXPERTS)]

    def chosen(rows: Ids, time_of: TimeOf, slow: Slow) -> float:
        assert rows.max() <= 64, "one tile, so all active experts take as long"
        active = least([int(count > 0) for count in rows], order, RANKS)
        return active * float(time_of(np.array([1]))[0]) + slow(active)

    def by_time(rows: Ids, time_of: TimeOf, slow: Slow) -> float:
        seconds_of, active_of, time_E = np.zeros(RANKS), [0] * RANKS, time_of(rows)  # noqa: N806
        for expert in sorted(range(EXPERTS), key=lambda expert: (len(ranks_of[expert]) > 1, -rows[expert])):
            rank = min(ranks_of[expert], key=lambda rank: seconds_of[rank])
            seconds_of[rank] += time_E[expert]
            active_of[rank] += bool(rows[expert])
        return float(max(seconds + slow(active) for seconds, active in zip(seconds_of, active_of, strict=True)))

    return chosen if size <= 128 else by_time


def choosing(size: int) -> float:
    """Seconds of a layer in which copies are chosen: the table in docs/copies.md."""
    sizes, microseconds = [8, 32, 64, 128, 2048, 8192], [4.00, 4.03, 4.25, 4.64, 29.32, 30.67]
    return 1e-6 * float(np.interp(size, sizes, microseconds))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("advice") / "source", EXPERTS, TOP_K, R1)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("trace"), {LAYER: uneven().tolist()}, EXPERTS)


def analyzed(source: Path, *options: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_well("analyze", source, "--ep", RANKS, "--json", *options))
    return found


def test_predicted_times_are_those_of_the_best_choice_or_a_little_more(
    source: Path, trace: Path, tmp_path: Path
) -> None:
    ids = uneven()
    half = write_trace(tmp_path / "half", {LAYER: ids[: TOKENS // 2].tolist()}, EXPERTS)
    mix = ("--batch-mix", "decode:8,32;prefill:2048")
    run_well(
        *("export", source, "--to", "vllm", "--ep", RANKS, "--spare", SPARE, "--trace", half, *mix),
        *("--out", tmp_path / "copies.json"),
    )
    order = json.loads((tmp_path / "copies.json").read_text())["physical_to_logical"]
    asked = [word for name in ("zigzag", "copies") for word in ("--placement", name)]
    found = analyzed(source, "--trace", trace, "--spare", SPARE, "--batch", 64, *asked, *mix)
    steps = {(step["phase"], step["tokens"]): step for step in found["steps"]}
    for phase, size in (("decode", 8), ("decode", 32), ("prefill", 2048)):
        step = steps[phase, size]
        total = {name: step["rest"] + moe for name, moe in step["moe"].items()}
        unseen = ids[TOKENS // 2 :]
        assert total["zigzag"] == pytest.approx(
            seconds(unseen, fixed(np.array(zigzag(EXPERTS, RANKS))), phase, size, R1), rel=1e-4
        )
        best = seconds(unseen, copied(order, size), phase, size, R1) + choosing(size)
        assert best * (0.999 if size <= 128 else 0.97) <= total["copies"] <= best * (1.02 if size <= 128 else 1.03)
        assert total["copies"] < total["zigzag"], "copies help these tokens"


def test_copies_are_recommended_where_they_save_one_percent_more_than_all_else(source: Path, trace: Path) -> None:
    words = ("--trace", trace, "--spare", SPARE, "--batch-mix", "decode:8,32")
    found = analyzed(source, *words)
    advice = found["advice"]
    assert [candidate["strategy"] for candidate in found["candidates"]] == ["linear", "zigzag", "balanced", "copies"]
    assert advice["strategy"] == "copies"
    assert advice["saved"]["copies"] > max(advice["saved"]["zigzag"], advice["saved"]["balanced"]) + 0.01
    memory = found["copies"]
    expert = 3 * R1[0] * R1[1]
    assert (memory["copies_size"], memory["buffer_size"]) == (SPARE * expert, (EXPERTS // RANKS + SPARE) * expert)
    assert advice["why"].startswith("serve with copies, 8 spare slots on each rank: it saves ")
    assert f"Copies take 2.1 GB of each GPU and leave about {memory['kv_size'] / 1e9:.1f} GB" in advice["why"]
    export, serve = advice["commands"]
    assert export.startswith(f"reshard export {source} --to vllm --ep 8 --strategy copies --spare 8 --trace {trace}")
    assert serve.endswith("""--enable-expert-parallel --enable-eplb --eplb-config '{"num_redundant_experts": 64}'""")
    text = run_well("analyze", source, "--ep", RANKS, *words)
    assert "8 spare slots in each MoE layer" in text
    assert "(vLLM's rule)" in text
    assert text.rstrip().endswith(serve)


def test_the_command_that_it_prints_writes_the_file(source: Path, trace: Path, tmp_path: Path) -> None:
    found = analyzed(source, "--trace", trace, "--spare", 2, "--batch-mix", "decode:8", "--placement", "copies")
    export = found["serve"]["copies"][0].replace("copies.json", str(tmp_path / "copies.json"))
    run_well(*(word.strip("'") for word in export.split()[1:]))
    assert len(json.loads((tmp_path / "copies.json").read_text())["physical_to_logical"]) == EXPERTS + 2 * RANKS


def test_where_all_experts_are_active_copies_are_not_recommended(source: Path, tmp_path: Path) -> None:
    even = write_trace(tmp_path, {LAYER: liking([1.0] * EXPERTS).tolist()}, EXPERTS)
    advice = analyzed(source, "--trace", even, "--spare", SPARE, "--batch-mix", "decode:128")["advice"]
    assert advice["strategy"] == "linear"
    assert "Copies save " in advice["why"]
    assert ", and take 2.1 GB of each GPU." in advice["why"]


@pytest.mark.parametrize(
    ("memory", "strategy", "words"),
    [
        ('"memory": 1e9, ', "balanced", "Copies do not fit: they take 2.1 GB of each GPU."),
        ("", "copies", "Copies take 2.1 GB of each GPU."),
    ],
)
def test_copies_that_do_not_fit_are_not_recommended(
    memory: str, strategy: str, words: str, source: Path, trace: Path, tmp_path: Path
) -> None:
    gpu = tmp_path / "gpu.json"
    gpu.write_text(f'{{"source": "me", {memory}"bandwidth": 4.8e12, "flops": {{"bf16": 1e15}}, "link": 1e11}}')
    advice = analyzed(source, "--trace", trace, "--spare", 8, "--batch-mix", "decode:8", "--gpu", gpu)["advice"]
    assert advice["strategy"] == strategy
    assert advice["why"].partition(" All-to-all kernels")[0].endswith(words)


def test_spare_slots_that_do_not_fit_the_experts_are_left_out_or_refused(source: Path, trace: Path) -> None:
    found = analyzed(source, "--trace", trace, "--spare", 225, "--placement", "linear", "--batch", 8)
    assert [candidate["strategy"] for candidate in found["candidates"]] == ["linear"]
    found = analyzed(source, "--trace", trace, "--spare", 225, "--batch", 8)
    assert "225 spare slots" in found["unfit"]["copies"]
    assert "copies" not in found
    result = run("analyze", source, "--ep", RANKS, "--placement", "copies")
    assert result.exit_code == 2
    assert "--placement copies needs --spare" in result.stderr


def test_more_spare_slots_save_more(source: Path, trace: Path) -> None:
    saved = [
        analyzed(
            *(source, "--trace", trace, "--spare", spare, "--batch-mix", "decode:8", "--batch", 8),
            *("--placement", "linear", "--placement", "copies"),
        )["advice"]["saved"]["copies"]
        for spare in (1, 4, 16)
    ]
    assert all(few < many for few, many in pairwise(saved))


def test_without_a_trace_copies_are_judged_and_nothing_is_recommended(tmp_path: Path) -> None:
    checkpoints.build(checkpoints.Spec("deepseek_v3", experts=16), tmp_path / "source")
    found = json.loads(run_well("analyze", tmp_path / "source", "--ep", 4, "--spare", 2, "--tokens", 1024, "--json"))
    assert found["advice"]["strategy"] is None
    times = {step["tokens"]: step["moe"] for step in found["steps"] if step["phase"] == "decode"}
    assert all(times[size]["copies"] < times[size]["zigzag"] + 58 * choosing(size) for size in (8, 64))
    assert found["copies"]["redundant_experts"] == 8


def test_no_spare_slot_prints_what_there_is_without_the_option(source: Path, trace: Path, tmp_path: Path) -> None:
    words = ("analyze", source, "--ep", RANKS, "--trace", trace, "--batch", 64)
    for more in ((), ("--json",), ("--html", "-")):
        without, none = run_well(*words, *more), run_well(*words, "--spare", 0, *more)
        assert without == none.replace(" --spare 0", ""), "but for the command itself, which the page has"
    assert "copies" not in json.loads(run_well(*words, "--json"))
