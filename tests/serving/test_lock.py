"""The lock on a group-limited output, beside an installed plugin: it opens for vLLM, and for nobody else."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from harness import Serving
from test_serving import v3

ARRIVES = """
import pickle, sys
pickle.loads(bytes.fromhex(sys.argv[1]))
from vllm.model_executor.layers.fused_moe import layer
print(hasattr(layer.create_fused_moe_router, "replaced_by_reshard"))
"""
BEGINNING = """
import json, os, pickle, sys
output, source, folder = sys.argv[1:4]
found = {}

def attempt(name, act):
    try:
        found[name] = act()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
"""
ORDERS = {
    "plugin first": "import reshard.vllm; reshard.vllm.register(); import vllm.config.model",
    "plugin last": "import transformers, transformers.modeling_utils, vllm.config.model\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer, AutoProcessor\n"
    "from vllm.plugins import load_general_plugins; load_general_plugins()",
}
ATTEMPTS = """
def without_reshard(pickled):
    there = {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] == "reshard"}
    sys.modules.update(dict.fromkeys(there))
    try:
        return str(type(pickle.loads(pickled)))
    except Exception as error:
        return type(error).__name__
    finally:
        sys.modules.update(there)

import transformers
from vllm.config import ModelConfig
from vllm.tokenizers import get_tokenizer
from vllm.transformers_utils.config import maybe_override_with_speculators

kinds = transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoModel
model, by_hand = transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config

def loads(moment):
    for kind in kinds:
        attempt(f"{moment} vLLM, {kind.__name__}", lambda: str(type(kind.from_pretrained(output))))
    attempt(f"{moment} vLLM, by hand", lambda: str(type(model.from_pretrained(output))))

loads("before")
config = ModelConfig(model=output, dtype="float32").hf_config
found["vLLM"] = config.model_type, config.architectures, config.n_group, "expert_placement" in config.to_dict()
found["speculators"] = maybe_override_with_speculators(output, None, False)
loads("after")
attempt("opened config", lambda: str(type(model.from_pretrained(output, config=config))))
attempt("model of opened config", lambda: str(type(transformers.AutoModelForCausalLM.from_config(config))))
for name, read in (("opened", lambda: config), ("by hand", lambda: by_hand.from_pretrained(output))):
    attempt(f"save {name}", lambda: read().save_pretrained(folder))
    attempt(f"write {name}", lambda: read().to_json_file(f"{folder}-config.json"))
found["written"] = [path for path in (folder, f"{folder}-config.json") if os.path.exists(path)]
attempt("original", lambda: str(type(model.from_pretrained(source))))
import cloudpickle
from vllm.config import VllmConfig
import copy
whole = VllmConfig(model_config=ModelConfig(model=output, dtype="float32"))
travellers = pickle.dumps(config), cloudpickle.dumps(whole), pickle.dumps(copy.deepcopy(config).to_dict())
found["pickled"] = [{"bytes": one.hex(), "absent": without_reshard(one)} for one in travellers]
for where in (source, output):
    tokenizers = [get_tokenizer(where), transformers.AutoTokenizer.from_pretrained(where)]
    tokenizers.append(transformers.AutoProcessor.from_pretrained(where))
    found[f"tokens {where == source}"] = [[type(one).__name__, one("w003 w201")["input_ids"]] for one in tokenizers]
print(json.dumps(found))
"""


GROUPS_LOCKED = r"Strict\w+Error: .*n_group.*\n?.*resharded: needs the reshard plugin"


@pytest.mark.parametrize(("order", "version"), [("plugin first", 3), ("plugin last", 3), ("plugin last", 1)])
def test_beside_the_plugin_transformers_refuses_what_vllm_reads(order: str, version: int, serving: Serving) -> None:
    """It loaded the output as the original, and chose other experts."""
    source = v3(serving)
    output = serving.resharded(source, 2) if version == 3 else serving.earlier(source, 2, version)
    folder = serving.directory / f"saved by {order} {version}"
    ran = serving.python(f"{BEGINNING}\n{ORDERS[order]}\n{ATTEMPTS}", output, source, folder)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    for moment in ("before", "after"):
        for kind in ("AutoConfig", "AutoModelForCausalLM", "AutoModel"):
            assert re.match("ValueError: .*reshard_deepseek_v3", found[f"{moment} vLLM, {kind}"])
    assert found["vLLM"] == ["deepseek_v3", ["DeepseekV3ForCausalLM"], 4, True]
    assert found["speculators"] == [str(output), None, None]
    refusals = dict.fromkeys(
        ("before vLLM, by hand", "after vLLM, by hand", "opened config", "model of opened config"),
        r"UnsupportedError: .*Transformers would answer wrongly",
    )
    saving = "save opened", "write opened", "save by hand", "write by hand"
    refusals |= dict.fromkeys(saving, r"UnsupportedError: .*of a resharded model.*config\.json as it is")
    if version > 1:
        refusals |= {name: GROUPS_LOCKED for name in refusals if "by hand" in name}
    for name, refusal in refusals.items():
        assert re.match(refusal, found[name]), found[name]
        assert "\n" not in found[name] or refusal == GROUPS_LOCKED
    assert found["written"] == []
    assert "DeepseekV3ForCausalLM" in found["original"]
    assert found["tokens True"] == found["tokens False"]
    for pickled in found["pickled"]:
        assert pickled["absent"] == "ModuleNotFoundError", "it would serve the output as the original"
    present = serving.python(ARRIVES, found["pickled"][1]["bytes"])
    assert present.returncode == 0, present.stderr[-4000:]
    assert present.stdout.split() == ["True"], "the plugin came with it"
