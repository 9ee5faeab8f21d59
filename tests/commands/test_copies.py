"""`reshard export --spare`: placement files with copies, read by the rule that serves them, judged on held-out tokens.

The judge is a flow solver that finds the best choice of copies. It shares no code with the package.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
from checkpoints import Spec
from command_line import run, run_well
from copies_oracle import batches, least
from safetensors.torch import load_file
from scratch import checkpoint
from traces import write_trace

from reshard import Copies, OutputError, export, plan_placement

LEARNED = load_file(Path(__file__).parents[1] / "data" / "routing.safetensors")
EXPERTS, TOP_K, RANKS, SPARE = 64, 6, 8, 4
SLOTS = EXPERTS // RANKS + SPARE
TOKENS = 8192


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=EXPERTS, top_k=TOP_K))


def layers_of(source: Path) -> list[str]:
    found: list[str] = json.loads(run_well("inspect", source, "--json"))["moe_layers"]
    return found


@pytest.fixture(scope="module")
def trace(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learned choices, the first half of them; the last layer, of drafts, was not recorded."""
    ids = {
        layer: LEARNED["python"][number % 2][: TOKENS // 2].tolist()
        for number, layer in enumerate(layers_of(source)[:-1])
    }
    return write_trace(tmp_path_factory.mktemp("trace"), ids, EXPERTS)


def by_layer(path: Path, source: Path) -> dict[str, list[list[int]]]:
    """What each rank holds of each layer. Slots of rank r begin at r * (E / R + S), as in vLLM's EPLB."""
    data = json.loads(path.read_text())
    jsonschema.validate(data, json.loads((files("reshard.placement") / "placement.schema.json").read_text()))
    assert (data["ep_size"], data["num_experts"], data["strategy"]) == (RANKS, EXPERTS, "copies")
    orders = data["physical_to_logical"]
    orders = orders if isinstance(orders, dict) else dict.fromkeys(data["layers"], orders)
    assert list(orders) == layers_of(source)
    assert {len(order) for order in orders.values()} == {RANKS * SLOTS}
    return {
        layer: [order[rank * SLOTS : (rank + 1) * SLOTS] for rank in range(RANKS)] for layer, order in orders.items()
    }


def written(source: Path, out: Path, *options: object) -> dict[str, list[list[int]]]:
    run_well("export", source, "--to", "vllm", "--ep", RANKS, "--spare", SPARE, *options, "--out", out)
    return by_layer(out, source)


def test_a_file_has_every_expert_and_none_twice_on_a_rank(source: Path, trace: Path, tmp_path: Path) -> None:
    for name, options in (("evenly.json", ()), ("traced.json", ("--trace", trace))):
        for ranks in written(source, tmp_path / name, *options).values():
            assert {expert for held in ranks for expert in held} == set(range(EXPERTS))
            assert all(len(set(held)) == SLOTS for held in ranks)


def test_without_a_trace_copies_are_spread_over_ranks_and_expert_groups(source: Path, tmp_path: Path) -> None:
    found = written(source, tmp_path / "copies.json")
    ranks = next(iter(found.values()))
    assert all(held == ranks for held in found.values())
    copied: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    for rank, held in enumerate(ranks):
        assert {expert for expert in held if expert % RANKS == rank} == set(range(rank, EXPERTS, RANKS)), "zigzag"
        others = [expert for expert in held if expert % RANKS != rank]
        copied.update(others)
        pairs.update((min(rank, expert % RANKS), max(rank, expert % RANKS)) for expert in others)
    assert set(copied.values()) == {1}
    assert set(Counter(expert % RANKS for expert in copied).values()) == {SPARE}, "as many of each rank's experts"
    assert set(Counter(expert // 16 for expert in copied).values()) == {8}, "and of each of the four groups"
    assert max(pairs.values()) <= 2, "each pair of ranks shares about as many"


def test_with_a_trace_the_busiest_rank_has_less_to_do_on_tokens_not_seen(
    source: Path, trace: Path, tmp_path: Path
) -> None:
    evenly, traced = (
        written(source, tmp_path / f"{len(options)}.json", *options)
        for options in ((), ("--trace", trace, "--batch-mix", "decode:4"))
    )

    def busiest(held: list[list[int]], number: int) -> float:
        unseen = LEARNED["python"][number % 2][TOKENS // 2 :].long()
        placement = [expert for of_rank in held for expert in of_rank]
        return sum(least(active, placement, RANKS) for active in batches(unseen, 4, 150, EXPERTS).tolist())

    *recorded, draft = layers_of(source)
    for number, layer in enumerate(recorded):
        zigzag = [list(range(rank, EXPERTS, RANKS)) for rank in range(RANKS)]
        by_trace = busiest(traced[layer], number)
        assert by_trace < 0.99 * busiest(evenly[layer], number) < 0.8 * busiest(zigzag, number)
    assert traced[draft] == evenly[draft]


def test_the_batch_sizes_decide_where_copies_go(source: Path, trace: Path, tmp_path: Path) -> None:
    small, large = (
        written(source, tmp_path / f"{mix[7:]}.json", "--trace", trace, "--batch-mix", mix)
        for mix in ("decode:4", "decode:128")
    )
    assert small != large


def test_the_line_has_the_options_that_serve_it_and_what_it_costs(source: Path, trace: Path, tmp_path: Path) -> None:
    words = ("export", source, "--to", "vllm", "--ep", RANKS, "--spare", SPARE, "--trace", trace)
    result = run(*words, "--out", tmp_path / "copies.json")
    assert result.exit_code == 0
    *_, last = result.stderr.splitlines()
    command = shlex.split(last.partition("with:  ")[2])
    assert command == [
        *(f"RESHARD_PLACEMENT={tmp_path / 'copies.json'}", "vllm", "serve", str(source)),
        *("--tensor-parallel-size", "8", "--enable-expert-parallel"),
        *("--enable-eplb", "--eplb-config", '{"num_redundant_experts": 32}'),
    ]
    draft = layers_of(source)[-1]
    assert f"has no traffic of {draft}: these layers got zigzag and evenly spread copies" in result.stderr
    report = json.loads(run_well(*words, "--json"))
    inspected = json.loads(run_well("inspect", source, "--json"))
    layers = len(layers_of(source))
    expert = inspected["expert_size"] // (EXPERTS * layers)
    found = report["copies"]
    assert (found["spare_slots"], found["redundant_experts"]) == (SPARE, RANKS * SPARE)
    assert found["copies_size"] == SPARE * (layers - 1) * expert, "drafts have none"
    assert found["buffer_size"] == SLOTS * expert
    assert found["kv_size"] == found["kv_size_without"] - found["copies_size"] - found["buffer_size"]
    assert found["kv_size_without"] == int(0.92 * 141 * 2**30) - found["weights_size"]
    experts = EXPERTS // RANKS * (layers - 1) * expert
    assert experts < found["weights_size"] <= experts + (inspected["tensors_size"] - inspected["expert_size"]) // RANKS


@pytest.mark.parametrize("to", ["vllm", "sglang", "vllm-ascend", "trtllm", "eplb"])
def test_no_spare_slot_is_what_there_is_without_the_option(to: str, source: Path) -> None:
    words = ("export", source, "--to", to, "--ep", RANKS)
    for more in ((), ("--json",), ("--strategy", "zigzag")):
        without, none = run(*words, *more), run(*words, *more, "--spare", 0)
        assert without.exit_code == none.exit_code == 0
        assert (without.stdout, without.stderr) == (none.stdout, none.stderr)
    assert "copies" not in without.output


@pytest.mark.parametrize("to", ["sglang", "vllm-ascend", "trtllm"])
def test_engines_that_choose_copies_by_another_rule_are_refused(to: str, source: Path, tmp_path: Path) -> None:
    words = ("export", source, "--to", to, "--ep", RANKS, "--out", tmp_path / "file.json")
    result = run(*words, "--spare", 1)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "chooses among the copies of an expert by its own rule" in result.stderr
    assert list(tmp_path.iterdir()) == []
    run_well(*words)


def test_the_map_of_eplb_has_a_row_of_replicas_for_each_layer(source: Path) -> None:
    result = run("export", source, "--to", "eplb", "--ep", RANKS, "--spare", SPARE)
    found = json.loads(result.stdout)
    assert [len(row) for row in found["physical_to_logical_map"]] == [RANKS * SLOTS] * len(layers_of(source))
    assert "for num_gpus=8, num_replicas=96" in result.stderr


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--spare", 57], 1, "57 spare slots on each of 8 EP ranks for 64 experts"),
        (["--spare", 4, "--ep", 6], 1, "expected a number of ranks that divides the experts"),
        (["--spare", -1], 2, "--spare"),
        (["--spare", 4, "--strategy", "zigzag"], 2, "--spare does not go with --strategy zigzag"),
        (["--strategy", "copies"], 2, "--strategy copies needs --spare"),
        (["--spare", 4, "--nodes", 2], 2, "--nodes does not go with --strategy copies"),
        (["--spare", 4, "--batch-mix", "prefill:8192"], 1, "--batch-mix has none; add one, such as decode:8,32,64"),
        (["--spare", 4, "--batch-mix", "decode:129"], 1, "decoding steps of at most 128 tokens"),
    ],
)
def test_what_cannot_be_is_refused(options: list[object], status: int, words: str, source: Path) -> None:
    result = run("export", source, "--to", "vllm", "--ep", RANKS, *options)
    assert (result.exit_code, result.stdout) == (status, "")
    assert words in result.stderr


def test_all_slots_that_a_rank_can_fill_hold_every_expert(source: Path) -> None:
    found = json.loads(export(source, "vllm", RANKS, lambda ep_size: Copies(ep_size, 56)).content)
    order = found["physical_to_logical"]
    assert order == list(range(EXPERTS)) * RANKS


def test_a_short_trace_is_refused(source: Path, tmp_path: Path) -> None:
    write_trace(tmp_path, {layer: [[0, 1, 2, 3, 4, 5]] * 100 for layer in layers_of(source)}, EXPERTS)
    result = run("export", source, "--to", "vllm", "--ep", RANKS, "--spare", 1, "--trace", tmp_path)
    assert result.exit_code == 1
    assert "100 tokens recorded; copies needs at least 4096" in result.stderr


def test_an_output_with_copies_is_refused(source: Path, tmp_path: Path) -> None:
    result = run("place", "--src", source, "--ep", RANKS, "--strategy", "copies", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "'copies' is not one of" in result.stderr
    with pytest.raises(OutputError, match=r"an output has each expert once.*reshard export --to vllm --ep 8 --spare 4"):
        plan_placement(source, tmp_path / "out", Copies(RANKS, SPARE))
