"""Originals served with RESHARD_PLACEMENT by real vLLM on the CPU, without rewriting a byte of the checkpoint.

"Equal" and "close" mean the same as in `test_serving`. Two ranks under zigzag sum in the same order as stock
round-robin and as a baked output with a contract; any other placement sums in another order. At EP 1 the order of sums
never changes, so the answers have the original's bits.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from harness import COMPILED, PROMPTS, SHIM_ONLY, SPAWNED, Serving
from oracle import read_safetensors
from test_served_traffic import recorded, trace
from test_serving import (
    MTP,
    Model,
    assert_answered,
    assert_close,
    assert_equal,
    kimi,
    largest_difference,
    qwen3,
    round_robin,
    uneven_mtp,
    v2,
    v3,
)

from reshard.model.families import BY_MODEL_TYPE

ZIGZAG = {"RESHARD_PLACEMENT": "zigzag"}
WORKER = {"worker_cls": "other.worker.Worker"}  # as a platform plugin of another package sets it


def moe_layers(model: Path) -> tuple[list[str], int]:
    """The names of the modules that hold experts, draft layers included, and the number of experts."""
    names = {name for path in model.glob("*.safetensors") for name in read_safetensors(path)[1]}
    experts = [name.split(".experts.") for name in names if ".experts." in name]
    numbers = {int(rest.split(".")[0]) for _, rest in experts}
    return sorted({layer for layer, _ in experts}), len(numbers)


def random_file(serving: Serving, model: Path, ep: int, name: str = "random", **changes: Any) -> Path:
    """A placement file for `model` with another random order in each layer."""
    layers, num_experts = moe_layers(model)
    rng = random.Random(0)
    content = {
        "reshard_placement": 1,
        "strategy": "random",
        "ep_size": ep,
        "model_type": None,
        "num_experts": num_experts,
        "layers": layers,
        "physical_to_logical": {layer: rng.sample(range(num_experts), num_experts) for layer in layers},
        **changes,
    }
    path = serving.directory / f"{model.name}-{name}{ep}.json"
    path.write_text(json.dumps(content))
    return path


def by(path: Path) -> dict[str, str]:
    return {"RESHARD_PLACEMENT": str(path)}


# Exact


@pytest.mark.parametrize("model", [v3, v2], ids=["V3", "V2"])
def test_zigzag_of_an_original_equals_stock_round_robin_and_the_log_reports_the_placement(
    model: Model, serving: Serving
) -> None:
    source = model(serving)
    answer = serving.generate(source, ranks=2, environment={**ZIGZAG, **SPAWNED})
    assert_equal(answer, round_robin(serving, source))
    assert "2 MoE layers are placed: zigzag, digest" in answer.log
    assert "every slot was seen to be filled" in answer.log


def test_zigzag_with_drafts_and_uneven_ranks_equals_stock_round_robin(serving: Serving) -> None:
    source = uneven_mtp(serving)
    original = serving.generate(source, ranks=2, placement="round_robin", plugins=SHIM_ONLY, speculative_config=MTP)
    answer = serving.generate(source, ranks=2, speculative_config=MTP, environment=ZIGZAG)
    assert_equal(answer, original)
    assert answer.accepted_drafts == original.accepted_drafts > 0
    assert "draft: 1 MoE layers are placed" in answer.log


@pytest.mark.parametrize("model", [kimi, qwen3], ids=["Kimi-K2", "Qwen3-MoE"])
def test_without_groups_zigzag_is_close_to_its_baked_output_and_the_original(model: Model, serving: Serving) -> None:
    source = model(serving)
    answer = serving.generate(source, ranks=2, environment=ZIGZAG)
    # not equal: without a contract, an engine sums a token's experts in the order of physical ids
    assert_close(answer, serving.generate(serving.resharded(source, 2), ranks=2, plugins=SHIM_ONLY))
    assert_close(answer, serving.generate(source, plugins=SHIM_ONLY))


def test_different_placements_per_layer_equal_their_baked_output_and_ranks_read_only_their_experts(
    serving: Serving,
) -> None:
    source, out = v3(serving), serving.placed(v3(serving), 2)
    manifest = out / "reshard_manifest.json"  # a manifest is read as a placement file
    answer = serving.generate(
        *(source,), ranks=2, enable_ep_weight_filter=True, environment={**by(manifest), "RECORD_TENSORS": "1"}
    )
    assert_equal(answer, serving.generate(out, ranks=2))
    assert_close(answer, serving.generate(source, ranks=2))
    placement = json.loads(manifest.read_text())["physical_to_logical"]
    assert len({tuple(order) for order in placement.values()}) > 1
    for rank in (0, 1):
        read = {match.groups() for match in map(EXPERT.match, answer.opened[f"tensors of {rank}"]) if match}
        assert read == {(layer, str(e)) for layer, order in placement.items() for e in order[8 * rank : 8 * rank + 8]}


EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.")


def test_on_one_rank_any_placement_equals_the_original_and_its_trace_has_logical_experts(serving: Serving) -> None:
    source = v3(serving)
    _, original = trace(serving, "v3", source)
    placement = by(random_file(serving, source, 1))
    answer, directory = trace(serving, "v3-served", source, environment=placement)
    assert_equal(answer, serving.generate(source, plugins=SHIM_ONLY))
    assert recorded(directory) == recorded(original) != []


def test_the_control_a_router_that_ignores_the_placement_gives_other_tokens(serving: Serving) -> None:
    source = v3(serving)
    environment = {**by(random_file(serving, source, 1)), "ROUTER_FORGETS": "1"}
    wrong = serving.generate(source, environment=environment)
    assert_answered(wrong)
    assert wrong.tokens != serving.generate(source, plugins=SHIM_ONLY).tokens
    assert largest_difference(wrong, serving.generate(source, plugins=SHIM_ONLY)) > 0.1


@pytest.mark.parametrize(("kind", "known", "layers"), [("exaone_moe", False, 2), ("olmoe", True, 3)])
def test_a_placement_needs_nothing_of_the_table_of_families(
    kind: str, known: bool, layers: int, serving: Serving
) -> None:
    source = serving.model(kind)
    assert (kind in BY_MODEL_TYPE) == known
    answer = serving.generate(source, ranks=2, environment=by(random_file(serving, source, 2)))
    assert_close(answer, serving.generate(source, ranks=2, plugins=SHIM_ONLY))
    assert f"{layers} MoE layers are placed" in answer.log


def test_compiled_code_answers_the_same_and_is_cached_per_placement(serving: Serving) -> None:
    source = v3(serving)
    cache = {"VLLM_CACHE_ROOT": str(serving.directory / "compiled-placed"), **COMPILED}
    placement = by(random_file(serving, source, 1))
    compiled = serving.generate(source, enforce_eager=False, environment={**cache, **placement})
    assert_close(compiled, serving.generate(source, plugins=SHIM_ONLY))
    assert "saved AOT compiled function" in compiled.log
    linear = serving.generate(source, enforce_eager=False, environment=cache)
    assert_equal(linear, compiled)
    assert "saved AOT compiled function" in linear.log, "the linear start reused the code compiled for the placement"


# New weights


def reloaded(serving: Serving, environment: dict[str, str], model: Path | None = None, **more: Any) -> dict[str, Any]:
    """The output of reload.py for `model`, or for `v3`; `more` are other keys of its request."""
    source = v3(serving)
    request = {
        "model": str(model or source),
        "other": str(serving.model("deepseek_v3", seed=1)),
        "output": str(serving.resharded(source, 2)),
        "prompts": PROMPTS,
        "max_tokens": 8,
        **more,
        "llm": {"enable_expert_parallel": True, **more.get("llm", {})},
    }
    return serving.reloaded(request, environment)


def test_new_weights_go_to_their_slots_and_operations_that_know_only_slots_are_refused(serving: Serving) -> None:
    # vLLM 0.32's CPU kernels do not survive a reload even without reshard; so we expect what stock vLLM answers then
    same = ["at first", "reload", "sleep", "update", "another model", "back", "sleep without the buffer"]
    stock = reloaded(serving, {}, steps=same)
    placed = reloaded(serving, by(random_file(serving, v3(serving), 1)), steps=[*same, "by slot", "an output", "save"])
    for step in same:
        assert placed[step] == stock[step], step
    assert stock["another model"] != stock["reload"], "the control: other weights, other tokens"
    assert placed["lost"] != stock["lost"], "the control: without its buffer the placement is lost"
    for step, fault in (("by slot", "kernel format"), ("an output", "is an output"), ("save", "order of their slots")):
        assert re.match(
            rf"UnsupportedError: .*refused while the model is served with a placement: .*{fault}", placed[step]
        )


def test_an_output_keeps_its_placement_when_memory_is_lost_and_weights_are_loaded_again(serving: Serving) -> None:
    """Outside modules it was zeros after sleep level 2, and every token went to expert 0."""
    steps = ["at first", "reload", "sleep", "sleep without the buffer"]
    stock = reloaded(serving, {"VLLM_PLUGINS": SHIM_ONLY}, steps=steps)
    output = reloaded(serving, {}, serving.placed(v3(serving), 2), steps=steps)
    for step in steps:
        assert output[step] == stock[step], step
    assert output["lost"] != stock["lost"], "the control: without its buffer the placement is lost"


# Refused


def configured(serving: Serving, model: Path, cases: dict[str, tuple[str | None, dict[str, Any]]]) -> dict[str, Any]:
    """Make a vLLM configuration for each case: the error, or its hash, its placement and its pickled form.

    A case is a value of RESHARD_PLACEMENT (None: not set) and options of EngineArgs.
    """
    code = (
        "import json, os, pickle, sys\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "found = {}\n"
        "for name, (asked, options) in json.loads(sys.argv[2]).items():\n"
        "    os.environ.pop('RESHARD_PLACEMENT', None)\n"
        "    if asked:\n"
        "        os.environ['RESHARD_PLACEMENT'] = asked\n"
        "    base = dict(model=sys.argv[1], dtype='float32', enforce_eager=True, max_model_len=128,\n"
        "        attention_backend='CPU_MLA', skip_tokenizer_init=True, tensor_parallel_size=2,\n"
        "        enable_expert_parallel=True)\n"
        "    try:\n"
        "        config = EngineArgs(**{**base, **options}).create_engine_config()\n"
        "        found[name] = [config.compute_hash(), config.additional_config.get('reshard'),\n"
        "            pickle.dumps(config.additional_config).hex()]\n"
        "    except Exception as error:\n"
        "        found[name] = f'{type(error).__name__}: {error}'\n"
        "print(json.dumps(found))\n"
    )
    ran = serving.python(code, model, json.dumps(cases))
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    found["log"] = ran.stdout + ran.stderr
    return found


def test_options_that_bypass_a_placement_are_refused_with_one_line_before_any_process_starts(serving: Serving) -> None:
    source = v3(serving)
    copies = random_file(serving, source, 2, "copies", physical_to_logical=[*range(16), 0, 1])
    other_e = random_file(serving, source, 2, "other-e", num_experts=8, layers=[], physical_to_logical=list(range(8)))
    inline = {"reshard": {"placement": "zigzag"}}
    output, plain = (str(serving.resharded(model, 2)) for model in (source, kimi(serving)))
    cases: dict[str, tuple[str | None, dict[str, Any], str]] = {
        "round robin": ("zigzag", {"expert_placement_strategy": "round_robin"}, "leave that option out"),
        "LoRA": ("zigzag", {"enable_lora": True}, "serve without LoRA"),
        "sharded": ("zigzag", {"load_format": "sharded_state"}, "load format sharded_state does not load experts"),
        "output": ("zigzag", {"model": output}, "an output of reshard"),
        "plain output": ("zigzag", {"model": plain}, "an output of reshard"),
        "no file": ("zigzagg", {}, "no such file; expected zigzag, node-zigzag:M"),
        "no nodes": ("node-zigzag", {}, "expected node-zigzag:M with M nodes"),
        "uneven nodes": ("node-zigzag:3", {}, "2 EP ranks cannot be divided evenly among 3 nodes"),
        "copies": (
            *(str(copies), {}),
            "vLLM holds copies with EPLB only; add --enable-eplb --eplb-config '.\"num_redundant_experts\": 2.'$",
        ),
        "rearranging": (
            *("zigzag", {"additional_config": {"reshard": {"rearrange": True}}}),
            "rearrange is for vLLM's EPLB, which is off",
        ),
        "other E": (str(other_e), {}, "made for 8 experts, .* has 16; .*reshard export .* --to vllm --ep 2"),
        "other EP": (str(random_file(serving, source, 4)), {}, "made for 4 EP ranks, served on 2; .*reshard export"),
        "EP off": (
            *(str(random_file(serving, source, 2)), {"enable_expert_parallel": False}),
            "served on 1 .expert parallelism is off",
        ),
        "EP off, one rank": (
            *(str(random_file(serving, source, 1)), {"enable_expert_parallel": False}),
            "this placement moves experts, but expert parallelism is off",
        ),
        "another package's worker": ("zigzag", WORKER, "nothing would check what worker class other.worker.Worker"),
        "an output's": (None, {"model": output, **WORKER}, "with expert groups, and nothing would check what worker"),
        "key": (None, {"additional_config": {"reshard": {"placement": "zigzag", "x": 1}}}, "unknown key 'x'"),
        "shape": (None, {"additional_config": {"reshard": "zigzag"}}, "additional_config.reshard is 'zigzag'"),
        "both": ("node-zigzag:2", {"additional_config": inline}, "give only one, or the same for both"),
    }
    served = {
        "zigzag": ("zigzag", {}),
        "inline": (None, {"additional_config": inline}),
        "file": (str(random_file(serving, source, 2)), {}),
        "idle": ("zigzag", {"enable_expert_parallel": False}),
        "linear": (None, {}),
    }
    identity = random_file(serving, source, 1, "identity", layers=[], physical_to_logical=list(range(16)))
    fine = {
        "vLLM's worker": ("zigzag", {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}),
        "plain output, another package's worker": (None, {"model": plain, **WORKER}),
        "linear, another package's worker": (None, WORKER),
        "EP on, one rank": (str(random_file(serving, source, 1)), {"tensor_parallel_size": 1}),
        "EP off, one rank, linear": (str(identity), {"enable_expert_parallel": False}),
    }
    asked = {name: case[:2] for name, case in cases.items()}
    found = configured(serving, source, {**asked, **served, **fine})
    for name in fine:
        assert isinstance(found[name], list), found[name]
    for name, (_, _, fault) in cases.items():
        assert isinstance(found[name], str), f"{name} was not refused"
        assert re.match(rf"(Unsupported|Checkpoint)Error: .*{fault}", found[name]), found[name]
        assert "\n" not in found[name]
    assert found["zigzag"][:2] == found["inline"][:2], "the same request in two ways"
    assert len({found[name][0] for name in served}) == 4, "each placement has its own compiled code"
    assert len({found[name][1]["digest"] for name in ("zigzag", "file", "idle")}) == 3
    assert "the placement has no effect" in found["log"]
    assert found["linear"][1] is None
    code = "import pickle, sys; sys.modules['reshard'] = None; print(pickle.loads(bytes.fromhex(sys.argv[1])))"
    arrived = serving.python(code, found["zigzag"][2])
    assert arrived.returncode != 0
    assert "ModuleNotFoundError" in arrived.stderr, "a worker without reshard would serve linear"


def test_a_model_that_slices_one_tensor_of_all_experts_itself_is_refused_after_loading(serving: Serving) -> None:
    refusal = serving.generate(serving.model("llama4"), ranks=2, environment=ZIGZAG)
    assert refusal.status != 0
    assert re.search(
        r"zigzag: layer \S+: .*so this model cannot be served with a placement; serve it without", refusal.log
    )


def test_a_rank_without_the_plugin_is_named(serving: Serving) -> None:
    soon = {**ZIGZAG, "RESHARD_AGREEMENT_SECONDS": "10"}
    one, _ = serving.each(v3(serving), [soon, {"VLLM_PLUGINS": SHIM_ONLY}])
    assert one.returncode != 0
    assert re.search(r"ranks 1 did not report their placement within 10 s", one.stderr), one.stderr[-4000:]


def test_ranks_with_different_placements_name_each_other(serving: Serving) -> None:
    source = v3(serving)
    one, other = serving.each(source, [ZIGZAG, by(random_file(serving, source, 2))])
    for rank, ended in enumerate((one, other)):
        assert ended.returncode != 0
        assert re.search(rf"ranks {1 - rank} serve a different placement", ended.stderr), ended.stderr[-4000:]


def test_a_weight_cache_builds_no_model_with_a_placement(serving: Serving) -> None:
    """`vllm preload` skips the checks: a linear engine could have mapped what it held."""
    code = (
        "import sys; from types import SimpleNamespace\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "from vllm.config import set_current_vllm_config\n"
        "from vllm.model_executor.model_loader.weight_cache.daemon import WeightCacheDaemon\n"
        "config = EngineArgs(model=sys.argv[1], dtype='float32', enforce_eager=True, max_model_len=128,\n"
        "    attention_backend='CPU_MLA', skip_tokenizer_init=True, enable_expert_parallel=True,\n"
        "    additional_config={'reshard': {'placement': 'zigzag'}}).create_engine_config()\n"
        "with set_current_vllm_config(config):\n"
        "    WeightCacheDaemon.get_model(SimpleNamespace(vllm_config=config, model_config=config.model_config))\n"
    )
    ran = serving.python(code, v3(serving))
    assert ran.returncode != 0
    assert re.search(r"UnsupportedError: .*vLLM builds this model outside of its usual loaders", ran.stderr)


def test_a_placement_is_refused_on_a_vllm_without_a_function_that_the_plugin_replaces(serving: Serving) -> None:
    refusal = serving.generate(v3(serving), environment={**ZIGZAG, "HOOK_IS_GONE": "1"})
    assert refusal.status != 0
    assert re.search(r"create_fused_moe_router.*placements need vLLM 0\.26 to 0\.33", refusal.log)
