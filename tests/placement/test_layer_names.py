"""Names of the same layer: in checkpoints, in vLLM, of drafts."""

from __future__ import annotations

import pytest

from reshard.placement.layer_names import LayerKey, find_layer, layer_key, module_name


@pytest.mark.parametrize(
    ("name", "num_layers", "expected"),
    [
        ("model.layers.3.mlp", None, LayerKey("layer", (3,))),
        ("model.layers.3.mlp.experts", 61, LayerKey("layer", (3,))),
        ("model.layers.3.mlp.experts.17.gate_proj.weight", 61, LayerKey("layer", (3,))),
        ("language_model.model.layers.3.block_sparse_moe.experts", 61, LayerKey("layer", (3,))),
        ("model.layers.61.mlp", None, LayerKey("layer", (61,))),
        ("model.layers.61.mtp_block.mlp.experts", 61, LayerKey("draft", (0,))),
        ("mtp.0.ffn", None, LayerKey("draft", (0,))),
        ("mtp.1.ffn.experts.4.w1.weight", 61, LayerKey("draft", (1,))),
        ("mtp.layers.0.mlp.experts", 48, LayerKey("draft", (0,))),
        ("model.layers.4.mlps.1.experts", 61, LayerKey("layer", (4, 1))),
        ("mlp", 61, LayerKey("layer", ())),
    ],
)
def test_kind_and_number_are_read_from_any_name(name: str, num_layers: int | None, expected: LayerKey) -> None:
    assert layer_key(name, num_layers) == expected


def test_a_draft_is_told_from_the_layer_of_the_same_number() -> None:
    layers = ["model.layers.0.ffn", "model.layers.1.ffn", "mtp.0.ffn"]
    assert find_layer("model.layers.0.ffn.experts", layers, 2) == "model.layers.0.ffn"
    assert find_layer("mtp.0.ffn.experts.3.w1.weight", layers, 2) == "mtp.0.ffn"
    assert find_layer("model.layers.2.mtp_block.ffn.experts", layers, 2) == "mtp.0.ffn"
    assert find_layer("model.layers.3.ffn.experts", layers, 2) is None


def test_a_layer_that_may_be_two_is_none_unless_its_name_is_known() -> None:
    layers = ["model.layers.3.mlp.text_moe", "model.layers.3.mlp.vision_moe"]
    assert find_layer("language_model.model.layers.3.mlp", layers) is None
    assert find_layer("model.layers.3.mlp.vision_moe.experts", layers) == layers[1]


def test_a_module_is_what_stands_before_its_experts() -> None:
    assert module_name("model.layers.3.mlp.experts.17.down_proj.weight") == "model.layers.3.mlp"
    assert module_name("model.layers.3.mlp") == "model.layers.3.mlp"
