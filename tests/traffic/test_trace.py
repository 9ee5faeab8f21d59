"""Traces on disk: what is written comes back, whatever ends its writer; others' records are read, the rest refused."""

from __future__ import annotations

import json
import random
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from checkpoints import Spec
from command_line import run, run_well
from scratch import checkpoint

from reshard import TraceError, read_checkpoint, read_model
from reshard.model.layers import MoeModel
from reshard.traffic.choices import STRETCH, Traffic, recorded_traffic, stretches
from reshard.traffic.trace_file import Header, TraceWriter, read_streams

EXPERTS, TOP_K = 8, 2
LAYERS = ("model.layers.1.mlp", "model.layers.2.mlp")
Ids = list[list[list[int]]]
"""[token][layer][choice]"""


def header(**other: Any) -> Header:
    fields = {"engine": "vLLM 0.32.0", "model": "m", "layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K}
    return Header(reshard_trace=1, **{**fields, **other})


def random_ids(tokens: int, layers: int = 2, experts: int = EXPERTS, top_k: int = TOP_K, seed: int = 0) -> Ids:
    chance = random.Random(seed)
    return [[chance.sample(range(experts), top_k) for _ in range(layers)] for _ in range(tokens)]


def to_rows(ids: Ids, size: int = 1) -> bytes:
    return b"".join(expert.to_bytes(size, "little") for token in ids for layer in token for expert in layer)


def write(directory: Path, ids: Ids, limit: int = 1 << 20, **other: Any) -> None:
    about = header(**other)
    with closing(TraceWriter(directory, about, limit)) as writer:
        writer.write(memoryview(to_rows(ids, about.id_size)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 experts in 4 groups, two MoE layers, an MTP layer."""
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=EXPERTS))


@pytest.fixture(scope="module")
def model(source: Path) -> MoeModel:
    return read_model(read_checkpoint(source))


def traffic(path: Path, model: MoeModel, **options: Any) -> Traffic:
    return recorded_traffic(path, model, Path("m"), **options)


def expected(ids: Ids) -> dict[str, Ids]:
    return {name: [token[layer] for token in ids] for layer, name in enumerate(LAYERS)}


def as_lists(found: Traffic) -> dict[str, Any]:
    return {layer: ids.tolist() for layer, ids in found.ids.items()}


# Written and read


def test_what_is_written_comes_back(tmp_path: Path, model: MoeModel) -> None:
    ids = random_ids(100)
    with closing(TraceWriter(tmp_path, header())) as writer:
        for part in (ids[:40], ids[40:]):
            writer.write(memoryview(to_rows(part)))
    assert as_lists(traffic(tmp_path, model)) == expected(ids)
    assert {layer.name for layer in model.layers} > set(LAYERS), "the MTP layer is not recorded"


def test_a_part_of_a_row_at_the_end_is_passed_over(tmp_path: Path, model: MoeModel) -> None:
    ids = random_ids(10)
    write(tmp_path, ids)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for cut in range(1, 2 * TOP_K + 1):
        path.write_bytes(whole[:-cut])
        assert as_lists(traffic(tmp_path, model)) == expected(ids[:9])
    path.write_bytes(b"")
    with pytest.raises(TraceError, match="has no recorded tokens"):
        traffic(tmp_path, model)


def test_a_stream_stays_within_its_limit_and_keeps_the_newest(tmp_path: Path, model: MoeModel) -> None:
    ids = random_ids(5000)
    with closing(TraceWriter(tmp_path, header(), limit := 8000)) as writer:
        for token in ids:
            writer.write(memoryview(to_rows([token])))
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    (stream,) = read_streams(tmp_path)
    assert stream.tokens * 4 > limit / 2
    assert as_lists(traffic(tmp_path, model)) == expected(ids[-stream.tokens :])


def test_the_limit_is_of_all_runs_of_a_stream_together(tmp_path: Path, model: MoeModel) -> None:
    for seed in range(30):
        write(tmp_path, random_ids(100, seed=seed), limit=8000)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 8000
    kept = read_streams(tmp_path)[0].tokens
    assert as_lists(traffic(tmp_path, model)) == expected(
        [token for seed in range(30) for token in random_ids(100, seed=seed)][-kept:]
    )


def test_two_writers_of_one_stream_do_not_touch_each_other_s_files(tmp_path: Path) -> None:
    with closing(TraceWriter(tmp_path, header())) as one, closing(TraceWriter(tmp_path, header())) as other:
        for _ in range(2):
            one.write(memoryview(to_rows(random_ids(3))))
            other.write(memoryview(to_rows(random_ids(5))))
    (stream,) = read_streams(tmp_path)
    assert [segment.rows for segment in stream.segments] == [6, 10]


def test_streams_of_other_ranks_are_read_together(tmp_path: Path, model: MoeModel) -> None:
    one, other = random_ids(7, seed=1), random_ids(9, seed=2)
    write(tmp_path, one, dp_rank=0)
    write(tmp_path, other, dp_rank=1)
    found = as_lists(traffic(tmp_path, model))
    assert all(sorted(found[layer]) == sorted(expected(one + other)[layer]) for layer in LAYERS)
    assert len(read_streams(tmp_path)) == 2


def test_stages_of_a_pipeline_have_a_layer_each_and_count_their_tokens_once(tmp_path: Path, model: MoeModel) -> None:
    ids = random_ids(20)
    for rank in (0, 1):
        for stage, layer in enumerate(LAYERS):
            write(tmp_path, [[token[stage]] for token in ids], layers=(layer,), pp_rank=stage, dp_rank=rank)
    assert as_lists(traffic(tmp_path, model)) == expected(ids + ids)
    assert json.loads(run_well("trace", "info", tmp_path, "--json"))["tokens"] == 40
    for most, found in ((100, 40), (40, 40), (20, 20)):
        part = traffic(tmp_path, model, most=most)
        assert (part.tokens, part.of) == (found, 40)


@pytest.mark.parametrize("by_layer", [False, True])
def test_physical_ids_come_out_logical(by_layer: bool, tmp_path: Path, model: MoeModel) -> None:
    ids, chance = random_ids(20), random.Random(3)
    orders = {layer: chance.sample(range(EXPERTS), EXPERTS) for layer in LAYERS}
    if not by_layer:
        orders = dict.fromkeys(LAYERS, orders[LAYERS[0]])
    physical = [
        [[orders[layer].index(expert) for expert in chosen] for layer, chosen in zip(LAYERS, token, strict=True)]
        for token in ids
    ]
    assert physical != ids
    write(tmp_path, physical, physical_to_logical=orders if by_layer else orders[LAYERS[0]])
    assert as_lists(traffic(tmp_path, model)) == expected(ids)


def test_ids_beyond_a_byte_take_two(tmp_path: Path) -> None:
    ids = [[[0, 255], [256, 39_999]], [[32_767, 32_768], [1, 2]]]
    write(tmp_path, ids, num_experts=40_000)
    info = json.loads(run_well("trace", "info", tmp_path, "--json"))
    assert info["tokens"] == 2
    from reshard.traffic.recordings import read_recordings

    assert read_recordings(tmp_path)[0].read(0, 2).tolist() == ids


# A part of a long trace


def test_a_long_trace_is_read_in_runs_spread_over_all_of_it(tmp_path: Path, model: MoeModel) -> None:
    tokens = 10 * STRETCH
    ids = [[[token % EXPERTS, (token + 1) % EXPERTS]] * 2 for token in range(tokens)]
    write(tmp_path, ids)
    found = traffic(tmp_path, model, most=3 * STRETCH)
    assert found.tokens == 3 * STRETCH
    assert traffic(tmp_path, model).tokens == tokens
    chosen = stretches(tokens, 3 * STRETCH)
    assert [len(run) for run in chosen] == [STRETCH] * 3
    assert chosen[0].start < tokens / 4
    assert chosen[-1].stop > 3 * tokens / 4
    assert all(one.stop <= other.start for one, other in pairwise(chosen))


@pytest.mark.parametrize(
    ("tokens", "most"), [(10, 10), (10, 0), (STRETCH, 5), (3 * STRETCH + 1, STRETCH), (9 * STRETCH + 7, 8 * STRETCH)]
)
def test_no_more_than_asked_for_and_within_the_trace(tokens: int, most: int) -> None:
    chosen = stretches(tokens, most)
    assert sum(map(len, chosen)) <= most
    assert all(0 <= run.start <= run.stop <= tokens for run in chosen)
    assert most < min(STRETCH, tokens) or sum(map(len, chosen)) > most - STRETCH


def test_a_part_of_every_recording_in_time_can_be_asked_for(tmp_path: Path, model: MoeModel) -> None:
    one, other = random_ids(11, seed=1), random_ids(6, seed=2)
    write(tmp_path, one, dp_rank=0)
    write(tmp_path, other, dp_rank=1)
    streams = {stream.header.dp_rank: stream for stream in read_streams(tmp_path)}
    in_order = [one, other] if next(iter(streams)) == 0 else [other, one]
    halves = [[ids[: -(-len(ids) // 2)] for ids in in_order], [ids[-(-len(ids) // 2) :] for ids in in_order]]
    for (start, end), half in zip([(0.0, 0.5), (0.5, 1.0)], halves, strict=True):
        found = recorded_traffic(tmp_path, model, Path("m"), start=start, end=end)
        assert as_lists(found) == expected([token for ids in half for token in ids])


# What others record


def to_vllm_array(ids: Ids, layers: int = 3) -> numpy.ndarray[Any, Any]:
    """As `CompletionOutput.routed_experts`: all hidden layers, zeros where there are no experts."""
    array = numpy.zeros((len(ids), layers, TOP_K), dtype=numpy.uint8)
    array[:, 1:3] = ids
    return array


def test_what_vllm_returns_with_an_answer_is_read(tmp_path: Path, model: MoeModel) -> None:
    ids = random_ids(50)
    numpy.save(tmp_path / "a.npy", to_vllm_array(ids[:30]))
    numpy.save(tmp_path / "b.npy", to_vllm_array(ids[30:]))
    assert as_lists(traffic(tmp_path, model)) == expected(ids)
    assert as_lists(traffic(tmp_path / "b.npy", model)) == expected(ids[30:])


def to_sglang_dump(passes: list[Ids], physical_to_logical: list[list[int]], layers: int = 4) -> dict[str, Any]:
    """As `_DetailAccumulator.dump` of sglang/srt/eplb/expert_distribution.py (0.5.23)."""
    records = []
    for number, ids in enumerate(passes):
        topk_ids = torch.full((layers, len(ids), 8), -1, dtype=torch.int32)
        topk_ids[1:3, :, :TOP_K] = torch.tensor(ids).transpose(0, 1).int()
        records.append(
            {"forward_pass_id": number, "rank": 0, "gatherer_key": "primary", "input_ids": [1] * len(ids),
             "positions": list(range(len(ids))), "extend_seq_lens": None, "forward_mode": 1,
             "topk_ids_of_layer": topk_ids, "misc_objects": [], "global_physical_count": torch.zeros(layers, EXPERTS)}
        )  # fmt: skip
    return {"records": records, "last_physical_to_logical_map": torch.tensor(physical_to_logical)}


def test_what_sglang_records_per_token_is_read_in_logical_ids(tmp_path: Path, model: MoeModel) -> None:
    ids, chance = random_ids(50), random.Random(1)
    orders = [chance.sample(range(EXPERTS), EXPERTS) for _ in range(4)]
    physical = [[[orders[1 + layer].index(e) for e in token[layer]] for layer in range(2)] for token in ids]
    torch.save(
        to_sglang_dump([physical[:20], physical[20:]], orders), tmp_path / "expert_distribution_recorder_1.0_0.pt"
    )
    assert as_lists(traffic(tmp_path, model)) == expected(ids)


def test_counts_of_sglang_are_refused_with_how_to_record(tmp_path: Path) -> None:
    torch.save(
        {"rank": 0, "logical_count": torch.zeros(1, 4, EXPERTS)}, tmp_path / "expert_distribution_recorder_1.0.pt"
    )
    refused = run("trace", "info", tmp_path)
    assert refused.exit_code == 1
    assert "--expert-distribution-recorder-mode per_token" in refused.output


def test_a_dump_whose_map_leads_to_no_expert_is_refused(tmp_path: Path) -> None:
    torch.save(to_sglang_dump([random_ids(5)], [[1 << 40] * EXPERTS] * 4), tmp_path / "dump.pt")
    refused = run("trace", "info", tmp_path)
    assert refused.exit_code == 1
    assert "no model has so many" in refused.output


class Malice:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "written")


def test_a_dump_that_holds_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"records": [Malice(tmp_path / "touched")]}, tmp_path / "dump.pt")
    refused = run("trace", "info", tmp_path)
    assert refused.exit_code == 1
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "dump.pt", weights_only=False)  # the control: run, it writes
    assert (tmp_path / "touched").exists()


# Refused


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"\x89PNG", "expected a line of JSON"),
        (b"[]\n", "not a trace of reshard"),
        (b"{}\n", "not a trace of reshard"),
        (b"[" * 100_000 + b"\n", "not a trace of reshard"),
        (json.dumps({"reshard_trace": 2}).encode() + b"\n", "not a trace of reshard"),
        ({"reshard_trace": 2}, "a trace of version 2"),
        ({"layers": []}, "distinct names of layers"),
        ({"layers": ["a", "a"]}, "distinct names of layers"),
        ({"top_k": 0}, "is impossible"),
        ({"num_experts": 1 << 20}, "is impossible"),
        ({"physical_to_logical": [0, 1]}, "does not have 8 experts"),
        ({"physical_to_logical": [0] * 8}, "expected a permutation"),
        ({"physical_to_logical": {"a": [0]}}, "an entry for each"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_in_one_line(line: Any, fault: str, tmp_path: Path) -> None:
    if isinstance(line, dict):
        whole = {"engine": "e", "model": "m", "layers": LAYERS, "num_experts": 8, "top_k": 2, "reshard_trace": 1}
        line = json.dumps({**whole, **line}).encode() + b"\n"
    (tmp_path / "x.trace").write_bytes(line)
    refused = run("trace", "info", tmp_path)
    assert refused.exit_code == 1
    assert fault in refused.output
    assert "x.trace" in refused.output
    assert len(refused.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ({"num_experts": 16}, "recorded with 16 experts per layer"),
        ({"top_k": 1}, "recorded with 1 experts per token"),
        ({"layers": ("model.layers.1.mlp", "model.layers.7.mlp")}, "has no such MoE layer"),
    ],
)
def test_the_trace_of_another_model_is_refused(
    other: dict[str, Any], fault: str, tmp_path: Path, model: MoeModel
) -> None:
    write(tmp_path, [[chosen[: other.get("top_k", TOP_K)] for chosen in token] for token in random_ids(5)], **other)
    with pytest.raises(TraceError, match=fault):
        traffic(tmp_path, model)


def test_an_expert_that_is_not_there_is_refused(tmp_path: Path, model: MoeModel) -> None:
    write(tmp_path, [[[0, 9], [1, 2]]])
    with pytest.raises(TraceError, match="has expert 9 of 8"):
        traffic(tmp_path, model)
    numpy.save(tmp_path / "a.npy", to_vllm_array([[[0, 9], [1, 2]]]))
    with pytest.raises(TraceError, match="has expert 9"):
        traffic(tmp_path / "a.npy", model)


@pytest.mark.parametrize(
    "array",
    [
        numpy.zeros((2, 3)),
        numpy.zeros((2, 3, 4)),
        numpy.array([{}, {}]),
        numpy.full((2, 3, 4), 1 << 40),
        numpy.zeros((1, 100_000, 1), dtype=numpy.uint8),
    ],
)
def test_an_array_that_is_no_routing_is_refused(array: Any, tmp_path: Path) -> None:
    numpy.save(tmp_path / "a.npy", array)
    refused = run("trace", "info", tmp_path)
    assert refused.exit_code == 1
    assert "a.npy" in refused.output


def test_nothing_recorded_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        refused = run("trace", "info", path)
        assert refused.exit_code == 1
        assert "RESHARD_TRACE" in refused.output or "has no recorded tokens" in refused.output
