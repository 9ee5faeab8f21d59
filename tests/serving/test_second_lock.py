"""The second and third lock on a group-limited output, where the first is forced open by hand, without the plugin.

By the second, every router raises. By the third, no loader takes the gates, even if it is given the original's config.
Outputs of earlier versions of the contract, which lack a lock, are the controls.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from harness import SHIM_ONLY, Serving
from test_serving import assert_answered, assert_equal, round_robin, v2, v3

# Names a class that reads the config, and one that builds the model, whatever config.json says.
BY_HAND = {"model_type": "deepseek_v32", "architectures": ["DeepseekV3ForCausalLM"]}
ATTEMPTS = """
import json, sys
import torch, transformers
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32TopkRouter
from vllm.model_executor.layers.fused_moe.layer import create_fused_moe_router
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopk, GroupedTopKRouter
from vllm.transformers_utils.config import get_config

assert "reshard" not in sys.modules
v2, v3, (n_group, topk_group) = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
groups = {"n_group": n_group, "topk_group": topk_group}
found = {}

def attempt(name, act):
    try:
        found[name] = str(type(act()).__name__)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"

def router(kind, config):
    config.__dict__.update(groups)  # past the types that newer Transformers check
    return kind(config)(torch.ones(3, config.hidden_size))

v2_config = transformers.DeepseekV2Config(topk_method="group_limited_greedy", num_experts_per_tok=4)
for name, kind, config, where in (
    ("V2", DeepseekV2TopkRouter, v2_config, v2),
    ("V3", DeepseekV3TopkRouter, transformers.DeepseekV3Config(), v3),
    ("V32", DeepseekV32TopkRouter, transformers.DeepseekV32Config(), v3),
):
    model = getattr(transformers, f"Deepseek{name}ForCausalLM")
    attempt(f"Transformers, {name}", lambda: model.from_pretrained(where))
    attempt(f"Transformers, router of {name}", lambda: router(kind, config))
    for model_type in ("deepseek_v32", "kimi_k2"):
        overrides = {"model_type": model_type, "architectures": [f"Deepseek{name}ForCausalLM"]}
        attempt(f"vLLM, {name} as {model_type}", lambda: get_config(where, False, hf_overrides_kw=overrides))

hidden, logits = torch.ones(3, 8), torch.rand(3, 16)
grouped = {"top_k": 4, "num_expert_group": n_group, "topk_group": topk_group}
for name, scoring in (
    ("V2", {"scoring_func": "softmax"}),
    ("V3, V3.2, Ling", {"scoring_func": "sigmoid", "e_score_correction_bias": torch.zeros(16)}),
):
    factory = {"global_num_experts": 16, "use_grouped_topk": True, **grouped, **scoring}
    attempt(f"vLLM, {name} on a CPU", lambda: create_fused_moe_router(**factory)._compute_routing(hidden, logits, None))
    del factory["use_grouped_topk"]
    attempt(f"vLLM, {name}", lambda: GroupedTopKRouter(**factory)._compute_routing(hidden, logits, None))
print(json.dumps(found))
"""


def attempted(serving: Serving, v2_output: object, v3_output: object, groups: list[Any]) -> dict[str, str]:
    """What each way of reading the outputs gave: the class of the result, or an error."""
    ran = serving.python(ATTEMPTS, v2_output, v3_output, json.dumps(groups))
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) == 16
    return found


def test_classes_named_by_hand_and_all_their_routers_raise(serving: Serving) -> None:
    sources = v2(serving), v3(serving)
    outputs = [serving.resharded(source, 2) for source in sources]
    lock = {json.loads((output / "config.json").read_text())[key] for output in outputs for key in ("n_group",)}
    assert len(lock) == 1
    found = attempted(serving, *outputs, [*lock, *lock])
    assert {name: error for name, error in found.items() if not re.match(r"\w+Error: ", error)} == {}
    assert {name for name, error in found.items() if error.startswith("TypeError")} >= {
        "vLLM, V2", "vLLM, V3, V3.2, Ling", "vLLM, V2 on a CPU", "vLLM, V3, V3.2, Ling on a CPU",
        *(f"Transformers, router of {name}" for name in ("V2", "V3", "V32")),
    }  # fmt: skip


def test_outputs_of_version_1_have_no_second_lock(serving: Serving) -> None:
    """The control of the test above."""
    found = attempted(serving, *(serving.earlier(model(serving), 2, 1) for model in (v2, v3)), [4, 2])
    assert {name: error for name, error in found.items() if re.match(r"\w+Error: ", error)} == {}


def test_vllm_told_the_models_class_refuses_an_output_and_answers_wrongly_from_one_of_version_1(
    serving: Serving,
) -> None:
    source = v3(serving)
    refusal = serving.generate(serving.resharded(source, 2), plugins=SHIM_ONLY, hf_overrides=BY_HAND)
    assert refusal.status != 0
    assert "resharded: needs the reshard plugin" in refusal.log
    assert not refusal.opened, "it started to load weights"
    wrong = serving.generate(serving.earlier(source, 2, 1), plugins=SHIM_ONLY, hf_overrides=BY_HAND)
    assert_answered(wrong)
    assert wrong.tokens != serving.generate(source, plugins=SHIM_ONLY).tokens


@pytest.mark.parametrize(("model", "version"), [(v3, 1), (v3, 2), (v2, 2)])
def test_with_the_plugin_an_output_of_an_earlier_version_equals_the_original_under_round_robin(
    model: Any, version: int, serving: Serving
) -> None:
    source = model(serving)
    assert_equal(serving.generate(serving.earlier(source, 2, version), ranks=2), round_robin(serving, source))


WITH_A_CONFIG = """
import json, sys
import torch, transformers
plugin, config, *models = sys.argv[1:]
if plugin:
    import reshard.vllm
    reshard.vllm.register()
config, found = transformers.DeepseekV3Config.from_pretrained(config), []
assert config.n_group == 4
for model in models:
    try:
        loaded = transformers.DeepseekV3ForCausalLM.from_pretrained(model, config=config, dtype=torch.float32)
        found.append(loaded(torch.arange(5, 45)[None]).logits.argmax(-1).flatten().tolist())
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
print(json.dumps(found))
"""


@pytest.mark.parametrize("plugin", ["", "with the plugin"])
def test_transformers_with_the_originals_config_takes_no_gates_of_an_output(plugin: str, serving: Serving) -> None:
    """It took them, and chose other experts."""
    source = v3(serving)
    ran = serving.python(
        WITH_A_CONFIG, plugin, source, source, serving.earlier(source, 2, 2), serving.resharded(source, 2)
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    original, wrong, refusal = json.loads(ran.stdout.splitlines()[-1])
    assert len(original) == len(wrong) == 40
    assert sum(a == b for a, b in zip(original, wrong, strict=True)) < 20, "the control"
    assert re.match(r"RuntimeError: .*(size|shape)", refusal, re.DOTALL), refusal


def test_vllm_with_the_originals_config_takes_no_gates_of_an_output(serving: Serving) -> None:
    """Without the plugin it took them, and chose other experts."""
    source = v3(serving)
    told: dict[str, Any] = {"plugins": SHIM_ONLY, "hf_config_path": str(source)}
    refusal = serving.generate(serving.resharded(source, 2), **told)
    assert refusal.status != 0
    assert "Tried to load weights of size torch.Size([1024])" in refusal.log, "16 experts, a hidden size of 64"
    wrong = serving.generate(serving.earlier(source, 2, 2), **told)
    assert_answered(wrong)
    assert wrong.tokens != serving.generate(source, plugins=SHIM_ONLY).tokens, "the control"
