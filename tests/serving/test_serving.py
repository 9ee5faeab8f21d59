"""Real vLLM on the CPU: compares its answers from a resharded checkpoint with those from the original.

"Equal" means that every bit of all tokens and log-probabilities that vLLM returns is equal. That is possible if both
take the same sums in the same order: an output under linear placement, and its source under vLLM's own round-robin
placement. If the order of sums differs, answers can only be *close*: the same tokens, log-probabilities within `CLOSE`.

The first part needs no plugin, and shows that these comparisons work. The second part tests the plugin.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import HERE, PROMPTS, SHIM_ONLY, SPAWNED, Result, Serving

CLOSE = 1e-4  # we measured up to 4e-6; another choice of experts gives 1e-1 and more

Model = Callable[[Serving], Path]


def v3(serving: Serving) -> Path:
    """16 experts in 4 groups, sigmoid scores with a bias."""
    return serving.model("deepseek_v3")


def v2(serving: Serving) -> Path:
    """12 experts in 3 groups, softmax scores without a bias."""
    return serving.model("deepseek_v2", n_routed_experts=12, n_group=3, num_experts_per_tok=3)


def uneven_mtp(serving: Serving) -> Path:
    """15 experts in 5 groups, which cannot be divided evenly among two ranks, and a draft layer."""
    return serving.model("deepseek_v3", mtp=True, n_routed_experts=15, n_group=5)


def kimi(serving: Serving) -> Path:
    """16 experts in one group."""
    return serving.model("kimi_k2")


def qwen3(serving: Serving) -> Path:
    """16 experts without groups, softmax scores."""
    return serving.model("qwen3_moe")


# The draft chooses its own attention backend, so it needs the option too: see generate.py.
MTP = {"method": "mtp", "num_speculative_tokens": 1, "attention_backend": "CPU_MLA"}


def assert_answered(result: Result) -> None:
    assert result.status == 0, result.log[-6000:]


def assert_equal(result: Result, expected: Result) -> None:
    assert_answered(result)
    assert_answered(expected)
    assert result.tokens == expected.tokens
    assert result.bits == expected.bits, (
        f"same tokens, log-probabilities differ by {largest_difference(result, expected)}"
    )


def assert_close(result: Result, expected: Result) -> None:
    assert_answered(result)
    assert_answered(expected)
    assert result.tokens == expected.tokens
    assert largest_difference(result, expected) < CLOSE


def largest_difference(result: Result, expected: Result) -> float:
    """The largest difference of log-probabilities, over all positions and the token ids that both results have."""
    return max(
        abs(at[token] - expected_at[token])
        for prompts, expected_prompts in (
            (result.logprobs, expected.logprobs),
            (result.prompt_logprobs, expected.prompt_logprobs),
        )
        for prompt, expected_prompt in zip(prompts, expected_prompts, strict=True)
        for at, expected_at in zip(prompt, expected_prompt, strict=True)
        for token in at.keys() & expected_at.keys()
    )


def round_robin(serving: Serving, model: Path) -> Result:
    """The answer of stock vLLM from the original on two ranks, under its own zigzag placement, round-robin."""
    result = serving.generate(model, ranks=2, placement="round_robin", plugins=SHIM_ONLY)
    assert "Expert placement strategy: round_robin" in result.log
    return result


# Without the plugin


def test_a_repeated_start_gives_the_same_bits(serving: Serving) -> None:
    model = v3(serving)
    assert_equal(serving.generate(model, plugins=SHIM_ONLY, again=1), serving.generate(model, plugins=SHIM_ONLY))


def test_two_expert_parallel_ranks_answer_as_one_process_does(serving: Serving) -> None:
    model = v3(serving)
    alone = serving.generate(model, plugins=SHIM_ONLY)
    assert_close(serving.generate(model, ranks=2, plugins=SHIM_ONLY), alone)
    assert_close(round_robin(serving, model), alone)


@pytest.mark.parametrize("model", [v3, v2], ids=["V3", "V2"])
def test_vllm_on_two_ranks_answers_as_transformers_does(model: Model, serving: Serving) -> None:
    answer = round_robin(serving, model(serving))
    assert_answered(answer)
    reference = serving.reference(model(serving))
    assert [len(prompt) for prompt in reference] == [len(prompt) - 1 for prompt in PROMPTS]
    for prompt, expected_prompt in zip(answer.prompt_logprobs, reference, strict=True):
        for at, expected_at in zip(prompt, expected_prompt, strict=True):
            assert at == pytest.approx({token: expected_at[int(token)] for token in at}, rel=0, abs=CLOSE)


@pytest.mark.parametrize("model", [kimi, qwen3], ids=["Kimi-K2", "Qwen3-MoE"])
def test_without_expert_groups_the_output_needs_no_plugin(model: Model, serving: Serving) -> None:
    source = model(serving)
    answer = serving.generate(serving.resharded(source, 2), ranks=2, plugins=SHIM_ONLY)
    assert_close(answer, serving.generate(source, plugins=SHIM_ONLY))


def test_the_control_without_the_contract_gives_other_tokens(serving: Serving) -> None:
    source = v3(serving)
    config = json.loads((source / "config.json").read_text())
    spoilt = serving.edited(serving.earlier(source, 2, 1), "no-contract", lambda _: config)
    answer = serving.generate(spoilt, ranks=2, plugins=SHIM_ONLY)
    assert_answered(answer)
    original = round_robin(serving, source)
    tokens, other = ([token for prompt in result.tokens for token in prompt] for result in (answer, original))
    agreeing = sum(token == other_token for token, other_token in zip(tokens, other, strict=True))
    assert agreeing < len(tokens) / 2
    assert largest_difference(answer, original) > 1000 * CLOSE


def test_without_the_plugin_vllm_refuses_a_group_limited_output_at_once(serving: Serving) -> None:
    refusal = serving.generate(serving.resharded(v3(serving), 2), ranks=2, plugins=SHIM_ONLY)
    assert refusal.status != 0
    assert "reshard_deepseek_v3" in refusal.log
    assert not refusal.opened, "it started to load weights"
    assert refusal.seconds < 60


@pytest.mark.parametrize("loader", ["AutoConfig", "AutoModelForCausalLM"])
def test_transformers_refuses_a_group_limited_output(loader: str, serving: Serving) -> None:
    code = f"import sys, transformers; transformers.{loader}.from_pretrained(sys.argv[1])"
    refusal = serving.python(code, serving.resharded(v3(serving), 2))
    assert refusal.returncode != 0
    assert "reshard_deepseek_v3" in refusal.stderr


# With the plugin


@pytest.mark.parametrize("model", [v3, v2], ids=["V3", "V2"])
def test_on_two_ranks_the_output_equals_the_original_under_round_robin(model: Model, serving: Serving) -> None:
    source = model(serving)
    answer = serving.generate(serving.resharded(source, 2), ranks=2, environment=SPAWNED)
    assert_equal(answer, round_robin(serving, source))
    assert "Expert placement strategy: linear" in answer.log


def test_on_uneven_ranks_with_drafts_the_output_equals_the_original_under_round_robin(serving: Serving) -> None:
    source = uneven_mtp(serving)
    original = serving.generate(source, ranks=2, placement="round_robin", plugins=SHIM_ONLY, speculative_config=MTP)
    answer = serving.generate(serving.resharded(source, 2), ranks=2, speculative_config=MTP)
    assert_equal(answer, original)
    assert answer.accepted_drafts == original.accepted_drafts > 0


def test_on_one_rank_the_output_equals_the_original(serving: Serving) -> None:
    source = v3(serving)
    answer = serving.generate(serving.resharded(source, 2))
    assert_equal(answer, serving.generate(source, plugins=SHIM_ONLY))
    assert "expert parallelism is off" in answer.log


@pytest.mark.parametrize("model", [v3, v2])
def test_different_placements_per_layer_answer_as_the_original(model: Model, serving: Serving) -> None:
    source = model(serving)
    placed = serving.placed(source, 2)
    assert_equal(serving.generate(placed), serving.generate(source))
    assert_close(serving.generate(placed, ranks=2), serving.generate(source, ranks=2))


# Two stages, each with MoE layers. By default vLLM gives the first stage only the first of three layers, a dense one.
TWO_STAGES: dict[str, Any] = {"stages": 2, "environment": {"VLLM_PP_LAYER_PARTITION": "2,1"}}


@pytest.mark.parametrize("model", [v3, v2], ids=["V3", "V2"])
def test_pipeline_stages_with_different_placements_per_layer_equal_the_original(model: Model, serving: Serving) -> None:
    source = model(serving)
    answer = serving.generate(serving.placed(source, 2), **TWO_STAGES)
    assert_equal(answer, serving.generate(source, plugins=SHIM_ONLY, **TWO_STAGES))
    assert_equal(answer, serving.generate(source, plugins=SHIM_ONLY))


@pytest.mark.parametrize("model", [v3, kimi], ids=["V3", "Kimi-K2"])
def test_round_robin_on_top_of_an_output_is_refused_with_one_line_before_anything_is_loaded(
    model: Model, serving: Serving
) -> None:
    refusal = serving.generate(serving.resharded(model(serving), 2), ranks=2, placement="round_robin")
    assert refusal.status != 0
    assert re.search(r"UnsupportedError: .*round_robin would place them once more.*leave that option out", refusal.log)
    assert not refusal.opened, "it began to load"


def test_an_output_with_layout_source_equals_the_original_under_round_robin(serving: Serving) -> None:
    source = v3(serving)
    answer = serving.generate(serving.resharded(source, 2, "source"), ranks=2)
    assert_equal(answer, round_robin(serving, source))


@pytest.mark.parametrize("layout", ["ranks", "source"])
def test_on_fewer_ranks_than_planned_the_output_answers_right_and_the_log_says_to_reshard(
    layout: str, serving: Serving
) -> None:
    source = v3(serving)
    answer = serving.generate(serving.resharded(source, 4, layout), ranks=2)
    assert_close(answer, round_robin(serving, source))
    warnings = [line for line in answer.log.splitlines() if "WARNING" in line and "reshard" in line]
    assert any(re.search(r"\b4\b", line) and "--ep" in line for line in warnings), warnings


def test_a_rank_opens_only_the_shared_files_and_its_own(serving: Serving) -> None:
    output = serving.resharded(v3(serving), 2)
    opened = serving.generate(output, ranks=2).opened
    for rank in ("0", "1"):
        own = {path.name for pattern in ("model-shared-*", f"model-ep0{rank}-of-02-*") for path in output.glob(pattern)}
        assert opened[rank] == own
    assert opened.keys() == {"0", "1"}


def test_vllm_serve_gives_the_same_completion_over_http_as_from_the_original(serving: Serving) -> None:
    source = v3(serving)
    prompt = " ".join(f"w{token:03}" for token in PROMPTS[3])
    original = serving.complete(source, prompt, 16, ranks=2, placement="round_robin")
    assert original.split() == [f"w{token:03}" for token in round_robin(serving, source).tokens[3][:16]]
    assert serving.complete(serving.resharded(source, 2), prompt, 16, ranks=2) == original


def test_nodes_with_only_their_ranks_files_answer_as_a_node_with_all_files(serving: Serving) -> None:
    source = v3(serving)
    nodes = [serving.staged(serving.resharded(source, 2), rank) for rank in "01"]
    answer = serving.generate(nodes[0], ranks=2, environment={"NODES": json.dumps([str(node) for node in nodes])})
    assert_equal(answer, round_robin(serving, source))
    for rank in "01":
        assert answer.opened[rank] == {path.name for path in nodes[int(rank)].glob("*.safetensors")}


@pytest.mark.parametrize("model", [v3, kimi], ids=["V3", "Kimi-K2"])
def test_nodes_with_different_outputs_of_one_model_are_refused(model: Model, serving: Serving) -> None:
    """Each rank had other experts in its slots than its router thought, and the answers were another model's."""
    source = model(serving)
    nodes = [str(serving.resharded(source, 2)), str(serving.placed(source, 2))]
    refusal = serving.generate(Path(nodes[0]), ranks=2, environment={"NODES": json.dumps(nodes)})
    assert refusal.status != 0
    assert re.search(r"UnsupportedError: .*(another output of reshard|give all nodes files of the same)", refusal.log)


def test_the_error_on_a_node_without_a_ranks_files_says_how_to_get_them(serving: Serving) -> None:
    refusal = serving.generate(serving.staged(serving.resharded(v3(serving), 2), "0"), ranks=2)
    assert refusal.status != 0
    assert re.search(r"model-ep01-of-02\S*: absent, but EP rank 1 of 2 needs it.*reshard stage", refusal.log)


def test_without_the_plugin_vllm_refuses_a_staged_directory(serving: Serving) -> None:
    staged = serving.staged(serving.resharded(kimi(serving), 2), "0")
    refusal = serving.generate(staged, plugins=SHIM_ONLY)
    assert refusal.status != 0
    assert "model-ep01-of-02" in refusal.log


# Fail closed: the plugin is installed but cannot work


def refused(serving: Serving, environment: dict[str, str]) -> str:
    """The log of a start that must fail, with these variables set."""
    refusal = serving.generate(serving.resharded(v3(serving), 2), environment=environment)
    assert refusal.status != 0
    assert not refusal.tokens
    return refusal.log


def test_the_output_is_refused_if_the_plugin_fails_to_import(serving: Serving) -> None:
    log = refused(serving, {"PYTHONPATH": str(HERE / "broken")})
    assert "Failed to load plugin reshard" in log
    assert "reshard_deepseek_v3" in log


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0"])
def test_an_unsupported_vllm_version_is_refused_and_the_supported_ones_are_named(
    version: str, serving: Serving
) -> None:
    log = refused(serving, {"VLLM_IS": version})
    assert re.search(rf"needs vLLM 0\.26 to 0\.33: found {version}.*reshard restore", log)


def test_a_vllm_with_another_router_factory_is_refused_before_it_serves(serving: Serving) -> None:
    log = refused(serving, {"HOOK_IS_GONE": "1"})
    assert re.search(
        r"does not route by the contract: its create_fused_moe_router takes no top_k.*reshard restore", log
    )


def test_models_without_a_contract_still_work_on_an_unsupported_vllm(serving: Serving) -> None:
    source = v3(serving)
    answer = serving.generate(source, environment={"VLLM_IS": "0.34.0", "HOOK_IS_GONE": "1"})
    assert_equal(answer, serving.generate(source, plugins=SHIM_ONLY))


NEWER = {"VLLM_IS": "0.34.0"}
ALLOWED = {**NEWER, "RESHARD_UNTESTED_VLLM": "1"}


def test_a_newer_vllm_whose_functions_fit_is_allowed_by_a_variable_and_answers_right(serving: Serving) -> None:
    source = v3(serving)
    answer = serving.generate(serving.resharded(source, 2), environment=ALLOWED)
    assert_equal(answer, serving.generate(source, plugins=SHIM_ONLY))
    assert "vLLM 0.34.0 is newer than the versions that reshard was tried with (0.26 to 0.33)" in answer.log


def test_a_placement_on_a_newer_vllm_ends_the_start_with_a_line_that_names_the_variable(serving: Serving) -> None:
    refusal = serving.generate(v3(serving), ranks=2, environment={**NEWER, "RESHARD_PLACEMENT": "zigzag"})
    assert refusal.status != 0
    assert re.search(r"RESHARD_PLACEMENT=zigzag: .*found 0\.34\.0.*RESHARD_UNTESTED_VLLM=1 allows it", refusal.log)
    assert refusal.opened.keys() <= {"engine"}, "which reads one header, to see whether this is an output; no rank did"


def test_the_variable_does_not_allow_a_vllm_whose_routers_escape_the_plugin(serving: Serving) -> None:
    log = refused(serving, {**ALLOWED, "HOOK_IS_GONE": "1"})
    assert re.search(r"does not route by the contract: .*reshard restore", log)
