"""The router that `verify` runs, against a plain statement of group-limited routing in Python numbers; and the trap."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import torch
from checkpoints import Spec, build
from forgery import record
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import read_safetensors, tree

from reshard import CheckpointError, Routing, verify, zigzag
from reshard.model.router import Chosen, Router, route

TOKENS, HIDDEN = 32, 8


def choose(scores: list[float], bias: list[float] | None, routing: Routing) -> list[int]:
    """The experts of one token, as DeepSeek's own code chooses them, equal scores by the lower id."""
    compared = [score + extra for score, extra in zip(scores, bias or [0.0] * len(scores), strict=True)]
    size = routing.num_experts // routing.n_group
    allowed = range(routing.n_group)
    if routing.group_limited:
        best = 1 if bias is None else 2
        groups = [sum(sorted(compared[g * size : (g + 1) * size])[-best:]) for g in range(routing.n_group)]
        allowed = sorted(range(routing.n_group), key=lambda g: (-groups[g], g))[: routing.topk_group]
    candidates = [expert for expert in range(routing.num_experts) if expert // size in allowed]
    return sorted(candidates, key=lambda expert: (-compared[expert], expert))[: routing.top_k]


def scores_of(logits: list[float], scoring: str) -> list[float]:
    """What a router makes of its logits."""
    if scoring == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    if scoring == "sqrtsoftplus":
        return [math.sqrt(math.log1p(math.exp(logit))) for logit in logits]
    largest = max(logits)
    total = sum(math.exp(logit - largest) for logit in logits)
    return [math.exp(logit - largest) / total for logit in logits]


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """Any routing."""
    n_group, size = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    topk_group = draw(st.integers(1, n_group))
    return Routing(
        num_experts=n_group * size,
        top_k=draw(st.integers(1, topk_group * size)),
        scoring=draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        n_group=n_group,
        topk_group=topk_group,
    )


@settings(max_examples=150, deadline=None)
@given(routings(), st.booleans(), st.integers(0, 1000), st.data())
def test_experts_are_chosen_as_the_plain_statement_says_before_and_after_any_renumbering(
    routing: Routing, biased: bool, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((TOKENS, HIDDEN), (routing.num_experts, HIDDEN), (routing.num_experts,))
    )
    before = route(hidden, Router(weight, None, bias if biased else None), routing)
    for token in range(TOKENS):
        logits = [sum(a * b for a, b in zip(row, hidden[token].tolist(), strict=True)) for row in weight.tolist()]
        scores = scores_of(logits, routing.scoring)
        expected = choose(scores, bias.tolist() if biased else None, routing)
        assert before.experts_TK[token].tolist() == expected
        weights = [scores[expert] for expert in expected]
        total = sum(weights) if routing.norm_topk_prob else 1.0
        weights = [value / total * routing.routed_scaling_factor for value in weights]
        assert before.weights_TK[token].tolist() == pytest.approx(weights)

    order = data.draw(st.permutations(range(routing.num_experts)))
    renumbered = Router(weight[order], None, bias[order] if biased else None)
    after = route(hidden, renumbered, routing, order)
    assert_same_choice(before, after, order)


def assert_same_choice(before: Chosen, after: Chosen, order: list[int]) -> None:
    assert torch.equal(torch.tensor(order)[after.experts_TK], before.experts_TK)
    assert torch.equal(after.weights_TK, before.weights_TK)


def test_equal_scores_fall_as_in_the_original() -> None:
    routing = Routing(8, 3, "sigmoid", True, 1.0, 4, 2)
    hidden, weight = torch.ones(1, HIDDEN, dtype=torch.float64), torch.ones(8, HIDDEN, dtype=torch.float64)
    order = [7, 2, 5, 0, 1, 6, 3, 4]
    before = route(hidden, Router(weight, None, None), routing)
    assert before.experts_TK.tolist() == [[0, 1, 2]]
    assert before.tied_T.all()
    assert_same_choice(before, route(hidden, Router(weight, None, None), routing, order), order)


def test_without_the_contract_a_renumbered_group_limited_router_is_another_model() -> None:
    """The trap: rows permuted and nothing else, as an unaware engine would route."""
    routing = Routing(64, 8, "sigmoid", True, 2.5, 8, 4)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (256, 64))
    order = [rank + 8 * slot for rank in range(8) for slot in range(8)]
    before = route(hidden, Router(weight, None, None), routing)
    renumbered = Router(weight[order], None, None)
    unaware = torch.tensor(order)[route(hidden, renumbered, routing).experts_TK]
    same = (unaware.sort(dim=1).values == before.experts_TK.sort(dim=1).values).all(dim=1)
    assert int(same.sum()) < 256 // 4
    assert_same_choice(before, route(hidden, renumbered, routing, order), order)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ((b'"num_experts_per_tok": 2', b'"num_experts_per_tok": 1'), "chooses other experts"),
        ((b'"routed_scaling_factor": 2.5', b'"routed_scaling_factor": 1.5'), "chooses other weights"),
        ((b'"scoring_func": "sigmoid"', b'"scoring_func": "softmax"'), "chooses other"),
    ],
)
def test_verify_notices_a_config_that_routes_otherwise_though_every_digest_is_right(
    change: tuple[bytes, bytes], complaint: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    build(Spec("deepseek_v3", experts=8), source)
    zigzag(source, out, 3)
    assert not verify(out, source).problems
    config = (out / "config.json").read_bytes()
    assert config.count(change[0]) == 1
    (out / "config.json").write_bytes(config.replace(*change))
    record(out, "config.json")
    assert not verify(out).problems
    assert any(complaint in problem for problem in verify(out, source).problems)


def test_an_id_in_a_hash_layer_that_no_expert_has_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(Spec("deepseek_v4", experts=8, token_table_dtype="I32"), source)
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in read_safetensors(path)[1].items():
            if name.endswith("tid2eid"):
                with path.open("r+b") as file:
                    file.seek(tensor.start)
                    file.write(struct.pack("<i", 8))
    before = tree(source)
    with pytest.raises(CheckpointError, match=r"safetensors: tensor \S+tid2eid: .* from 0 to 7, found 8"):
        zigzag(source, tmp_path / "out", 3)
    assert tree(source) == before
