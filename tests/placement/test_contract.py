"""The lock on a group-limited output: what it changes in a config, and that unlocking gives all of it back."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import with_locked_groups

from reshard import CheckpointError
from reshard.placement.contract import (
    Contract,
    contract_from_json,
    lock_config,
    locked_values,
    unlock_config,
)

PLACEMENT = {"model.layers.1.mlp": (0, 2, 1, 3)}
NAMES = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}


def locked(config: dict[str, Any]) -> dict[str, Any]:
    """`config`, locked with a contract for 4 experts and written as JSON."""
    contract = Contract("zigzag", 2, 2, 1, PLACEMENT, locked_values(config))
    result: dict[str, Any] = json.loads(json.dumps(lock_config(config, contract)))
    return result


counts = st.none() | st.integers(1, 8)
keys = st.sampled_from(["n_group", "topk_group", "text_config", "auto_map", "hidden_size", "n_groups"])
values = st.recursive(counts | st.lists(counts), lambda inner: st.dictionaries(keys, inner, max_size=4), max_leaves=12)


@given(st.dictionaries(keys, values), st.booleans())
def test_a_locked_config_has_no_group_count_anywhere_and_unlocking_gives_the_original(
    config: dict[str, Any], with_code: bool
) -> None:
    config = {**config, **NAMES, **({"auto_map": {"n_group": 3}} if with_code else {})}
    before = copy.deepcopy(config)
    changed = locked(config)
    assert config == before
    contract = changed.pop("expert_placement")
    renamed = {"model_type": "reshard_deepseek_v3", "architectures": ["ReshardDeepseekV3ForCausalLM"]}
    assert changed == with_locked_groups({key: value for key, value in config.items() if key != "auto_map"} | renamed)
    assert unlock_config({**changed, "expert_placement": contract}) == config


def test_a_null_is_locked_too() -> None:
    """A model that reads a null routes without groups, and without an error."""
    config = {**NAMES, "n_group": None, "text_config": {"n_group": 4, "topk_group": 2}}
    lock = "resharded: needs the reshard plugin"
    changed = locked(config)
    assert (changed["n_group"], changed["text_config"]) == (lock, {"n_group": lock, "topk_group": lock})


def test_a_contract_of_version_1_unlocks_what_it_locked() -> None:
    config = {**NAMES, "n_group": 4, "topk_group": 2}
    changed = {**config, "model_type": "reshard_deepseek_v3"}
    assert unlock_config({**changed, "expert_placement": {"version": 1, "original": NAMES}}) == config


@pytest.mark.parametrize("version", [0, 4, True, "3", 3.0, None])
def test_a_contract_of_an_unknown_version_is_refused(version: object) -> None:
    contract = locked(NAMES)["expert_placement"]
    assert contract_from_json(contract, "here")
    with pytest.raises(CheckpointError, match=r"here: .*version .*reads versions 1 to 3; upgrade"):
        contract_from_json({**contract, "version": version}, "here")
