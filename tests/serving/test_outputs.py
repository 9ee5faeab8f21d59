"""Real vLLM on the CPU with outputs of reshard: what is in the original's expert ids is refused or mapped.

Kimi-K2 has no expert groups, so its output has no contract, and only its manifest tells it from an original.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import PROMPTS, SHIM_ONLY, Serving
from safetensors.torch import save_file
from test_placed import ZIGZAG, by, configured, random_file, reloaded
from test_serving import MTP, TWO_STAGES, Model, assert_answered, kimi, qwen3, v3

REFUSED = {
    "update": "but for the output's own files",
    "other tensors": "but for the output's own files",
    "by slot": "but for the output's own files",
    "load_weights": "new weights are refused while this output",
    "load_weights of a module": "new weights are refused while this output",
    "another model": "this is an original",
    "elsewhere": "this is an original",
    "save": "order of their slots",
}


def other(kind: str, serving: Serving) -> Path:
    return serving.model({"V3": "deepseek_v3", "Kimi-K2": "kimi_k2"}[kind], seed=1)


@pytest.mark.parametrize(("kind", "model"), [("V3", v3), ("Kimi-K2", kimi)])
def test_a_running_output_takes_weights_that_are_numbered_as_its_own_and_no_others(
    kind: str, model: Model, serving: Serving
) -> None:
    """A trainer's weights, or those of an original, went to other experts' slots, with no error."""
    source = model(serving)
    request = {"other": str(other(kind, serving)), "alike": str(serving.placed(other(kind, serving), 2))}
    stock = reloaded(
        *(serving, {"VLLM_PLUGINS": SHIM_ONLY}, source),
        **request,
        steps=["at first", "reload", "another model", "back"],
    )
    steps = ["at first", "reload", *(step for step in REFUSED if step != "update"), "reload", "alike", "back", "update"]
    found = reloaded(serving, {}, serving.placed(source, 2), **request, steps=steps)
    assert found["at first"] == stock["at first"]
    assert found["reload"] == stock["reload"], "after all that was refused, too"
    assert found["alike"] == stock["another model"] != stock["back"], "resharded alike: numbered alike"
    assert found["back"] == stock["back"]
    for step, fault in REFUSED.items():
        assert re.match(rf"UnsupportedError: .*{fault}", str(found[step])), (step, found[step])
        assert "\n" not in found[step]


def test_an_output_without_its_manifest_is_known_by_its_files(serving: Serving) -> None:
    """With --layout source it was served as an original, whose experts have other ids."""
    hub = serving.hub(serving.resharded(kimi(serving), 2, "source"))
    steps = ["at first", "reload", "other tensors", "load_weights", "another model"]
    request = {"other": str(other("Kimi-K2", serving)), "output": str(hub)}
    found = reloaded(serving, {}, hub, **request, steps=steps)
    assert isinstance(found["reload"], list), "its own files are taken; vLLM's CPU kernels do not survive any reload"
    for step in steps[2:]:
        assert re.match(rf"UnsupportedError: .*{REFUSED[step]}", str(found[step])), (step, found[step])
    placement = by(random_file(serving, kimi(serving), 1))
    for environment, fault in (
        ({}, f"{hub}: an output of reshard, .*the running model is an original"),
        (placement, f".*reload_weights is refused.*{hub} is an output of reshard, with other expert ids"),
    ):
        original = reloaded(serving, environment, kimi(serving), **request, steps=["at first", "an output"])
        assert re.match(rf"UnsupportedError: {fault}", original["an output"])


def test_nothing_is_recorded_for_an_output_without_its_manifest(serving: Serving) -> None:
    """Nobody can tell which experts its slots hold."""
    hub = serving.hub(serving.resharded(qwen3(serving), 2, "source"))
    answer = serving.generate(hub, environment={"RESHARD_TRACE": str(serving.directory / "trace-of-hub")})
    assert_answered(answer)
    assert "nothing is recorded" in answer.log
    assert not list(serving.directory.glob("trace-of-hub/*"))


def is_tried(step: Any) -> bool:
    """Whether reshard lets weights pass; vLLM's kernels for the CPU cannot take any once they packed the first."""
    return isinstance(step, list) or "Attempted to load weight" in step


def test_an_original_takes_no_weights_of_an_output(serving: Serving) -> None:
    """They were taken, and other experts chosen."""
    steps = ["at first", "an output", "load_weights", "an output, by the runner"]
    found = reloaded(serving, {}, steps=steps)
    assert re.match("UnsupportedError: .*this is an output of reshard", found["an output"])
    assert re.match("UnsupportedError: .*no routing contract", found["an output, by the runner"])
    assert is_tried(found["load_weights"]), "the control: an original is not closed"


def test_after_dummy_weights_an_original_with_a_placement_takes_no_others(serving: Serving) -> None:
    """Nothing had shown where this model's loader puts experts."""
    placement = by(random_file(serving, v3(serving), 1))
    steps = ["at first", "other tensors", "load_weights"]
    found = reloaded(serving, placement, llm={"load_format": "dummy"}, steps=steps)
    assert isinstance(found["at first"], list)
    for step in steps[1:]:
        assert re.match("UnsupportedError: .*started with --load-format dummy: nothing has shown", found[step])
    assert is_tried(reloaded(serving, placement, steps=steps)["load_weights"]), "the control"


@pytest.mark.parametrize("model", [v3, kimi], ids=["V3", "Kimi-K2"])
def test_options_that_go_by_the_originals_ids_or_files_are_refused_before_any_process_starts(
    model: Model, serving: Serving
) -> None:
    output = serving.resharded(model(serving), 2)
    code = (
        "import json; from vllm.model_executor import model_loader as m\n"
        "print(json.dumps([*m._LOAD_FORMAT_TO_MODEL_LOADER]))"
    )
    formats = json.loads(serving.python(code).stdout.splitlines()[-1])
    good = {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "dummy"}
    assert good < set(formats)
    cases: dict[str, tuple[str | None, dict[str, Any]]] = {name: (None, {"load_format": name}) for name in formats}
    cases["transfer"] = (None, {"weight_transfer_config": {"backend": "nccl"}})
    found = configured(serving, output, cases)
    for name in (*formats, "transfer"):
        fault = "weight transfer" if name == "transfer" else f"load format {name} does not ask which files"
        refused = isinstance(found[name], str) and re.match(rf"UnsupportedError: .*{fault}", found[name])
        assert bool(refused) == (name not in good), (name, found[name])


@pytest.mark.parametrize(("model", "first"), [(v3, 1), (kimi, 1), (qwen3, 0)], ids=["V3", "Kimi-K2", "Qwen3-MoE"])
def test_an_output_returns_the_experts_that_the_original_does(model: Model, first: int, serving: Serving) -> None:
    """It returned slots."""
    source = model(serving)
    output = serving.placed(source, 2)
    more: dict[str, Any] = {"steps": ["experts"], "first_moe_layer": first}
    original = reloaded(serving, {"VLLM_PLUGINS": SHIM_ONLY}, source, **more)
    answer = reloaded(serving, {}, output, **more)
    assert answer["experts"] == original["experts"]
    assert sorted_choices(answer) == sorted_choices(original)
    assert len(answer["routed"]) == sum(len(prompt) + 8 - 1 for prompt in PROMPTS)
    slots = reloaded(serving, {"RETURNS_SLOTS": "1"}, output, **more)
    assert sorted_choices(slots) != sorted_choices(original), "the control: slots are other numbers"


def sorted_choices(answer: dict[str, Any]) -> list[list[list[int]]]:
    """The experts of each token and layer; routers give them in no particular order."""
    return [[sorted(chosen) for chosen in layers] for layers in answer["routed"]]


def adapter(serving: Serving, name: str, modules: dict[str, tuple[int, int]]) -> Path:
    """A LoRA adapter of rank 4 for the modules, whose numbers of outputs and inputs are given."""
    folder = serving.directory / f"adapter-{name}"
    if not folder.exists():
        folder.mkdir()
        generator = torch.Generator().manual_seed(0)
        tensors = {
            f"base_model.model.{module}.lora_{side}.weight": torch.randn(shape, generator=generator)
            for module, (outputs, inputs) in modules.items()
            for side, shape in (("A", (4, inputs)), ("B", (outputs, 4)))
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": sorted({*modules})}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


ADAPTERS = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

model, *adapters = sys.argv[1:]
config = EngineArgs(model=model, dtype="float32", max_model_len=128, skip_tokenizer_init=True).create_engine_config()
from vllm.config.lora import LoRAConfig
config.lora_config = LoRAConfig(max_lora_rank=8)
manager = LRUCacheWorkerLoRAManager(config, "cpu", {})
for adapter in adapters:
    try:
        helper = PEFTHelper.from_local_dir(adapter, 128)
        modules = {"o_proj", "gate", "experts", *(f"experts.{n}.gate_proj" for n in range(16))}
        found = manager._lora_model_cls.from_local_checkpoint(adapter, modules, helper, lora_model_id=1, device="cpu")
        print(json.dumps(sorted(found.loras)))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


@pytest.mark.parametrize("model", [v3, qwen3], ids=["V3", "Qwen3-MoE"])
def test_an_adapter_of_attention_works_and_one_of_experts_or_routers_is_refused(model: Model, serving: Serving) -> None:
    """It changed the experts in the slots that it named. Real adapters, in vLLM's own manager; CPUs cannot run them."""
    source = model(serving)
    attention = {f"model.layers.{layer}.self_attn.o_proj": (64, 64) for layer in range(3)}
    more = {"attention": {}, "expert": {"experts.0.gate_proj": (32, 64)}, "router": {"gate": (16, 64)}}
    adapters = [
        adapter(
            serving, name, {**attention, **{f"model.layers.1.mlp.{module}": shape for module, shape in own.items()}}
        )
        for name, own in more.items()
    ]
    taken, *refused = manager_of(serving, serving.resharded(source, 2), adapters)
    assert taken == sorted(attention)
    for answer, module in zip(refused, (r"experts\.0\.gate_proj", "gate"), strict=True):
        assert re.match(rf"UnsupportedError: .*\.{module}\.lora_\S* may belong to an expert or a router", str(answer))
    originals = manager_of(serving, source, adapters)
    assert [len(found) for found in originals] == [3, 4, 4], "the control: an original takes them"


def manager_of(serving: Serving, model: Path, adapters: list[Path]) -> list[Any]:
    """What vLLM's manager makes of each adapter for a model: names of its modules, or an error."""
    ran = serving.python(ADAPTERS, model, *adapters)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [json.loads(line) for line in ran.stdout.splitlines()[-len(adapters) :]]


@pytest.mark.parametrize(("model", "fault"), [(v3, "serve a different placement"), (kimi, "numbered in another way")])
def test_an_output_and_its_original_on_two_ranks_are_refused(model: Model, fault: str, serving: Serving) -> None:
    """As two nodes may have them under the same path. Each answered with the other's experts in its slots."""
    source = model(serving)
    output = serving.resharded(source, 2)
    for models in ((output, source), (source, output)):
        ranks = serving.each(models, [{}, {}])
        assert any(fault in rank.stderr for rank in ranks), [rank.stderr[-2000:] for rank in ranks]
        assert all(rank.returncode != 0 for rank in ranks)


def test_drafts_on_one_of_two_stages_are_placed(serving: Serving) -> None:
    """Stages without the draft never report its placement, and the start ended after five minutes.

    vLLM 0.32 on the CPU ends later, with stages, drafts and no placement, too: it looks for the draft on each stage.
    """
    source = serving.model("deepseek_v3", mtp=True)
    environment = {**TWO_STAGES["environment"], **ZIGZAG, "RESHARD_AGREEMENT_SECONDS": "20"}
    answer = serving.generate(source, stages=2, environment=environment, speculative_config=MTP)
    assert "draft: 1 MoE layers are placed: zigzag" in answer.log
    assert "did not report their placement" not in answer.log


def test_options_are_refused_for_a_second_engine_that_gets_the_configuration_of_the_first(serving: Serving) -> None:
    code = (
        "import json, sys\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "base = dict(model=sys.argv[1], dtype='float32', enforce_eager=True, max_model_len=128,\n"
        "    attention_backend='CPU_MLA', skip_tokenizer_init=True)\n"
        "first = EngineArgs(**base).create_engine_config()\n"
        "import os; del os.environ['RESHARD_PLACEMENT']\n"
        "for more in ({}, {'enable_lora': True}, {'load_format': 'sharded_state'}):\n"
        "    try:\n"
        "        EngineArgs(**base, **more, additional_config=first.additional_config).create_engine_config()\n"
        "        print('made')\n"
        "    except Exception as error:\n"
        "        print(f'{type(error).__name__}: {error}')\n"
    )
    code = f"import os; os.environ['RESHARD_PLACEMENT'] = 'zigzag'\n{code}"
    ran = serving.python(code, v3(serving))
    assert ran.returncode == 0, ran.stderr[-4000:]
    same, adapters, slots = [line for line in ran.stdout.splitlines() if line == "made" or "Error" in line][-3:]
    assert same == "made", "the control"
    assert re.match("UnsupportedError: .*serve without LoRA", adapters)
    assert re.match("UnsupportedError: .*sharded_state does not load experts", slots)
