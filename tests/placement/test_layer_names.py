"""One function tells layers apart, whoever named them."""

from __future__ import annotations

from reshard.placement.layer_names import LayerKey, find_layer, layer_key


def test_layers_are_known_by_kind_and_number() -> None:
    names = ("model.layers.3.mlp", "language_model.model.layers.3.mlp.experts", "layers.3")
    assert {layer_key(name) for name in names} == {LayerKey("layer", (3,))}
    assert layer_key("mtp.0.ffn") == LayerKey("draft", (0,))
    assert layer_key("lm_head").numbers == ()


def test_a_draft_layer_is_not_the_model_s_layer_of_the_same_number() -> None:
    """`vllm.routing.placement_of` took one for the other, which routed a draft by layer 0's placement."""
    layers = ["model.layers.0.ffn", "mtp.0.ffn"]
    assert find_layer("mtp.0.ffn.experts", layers) == "mtp.0.ffn"
    assert find_layer("model.layers.0.ffn.experts", layers) == "model.layers.0.ffn"
    assert find_layer("model.layers.4.mtp_block.ffn.experts", layers, num_layers=4) == "mtp.0.ffn"
    assert find_layer("model.layers.4.mtp_block.ffn.experts", layers) is None


def test_a_layer_that_two_could_be_is_none_of_them() -> None:
    assert find_layer("layers.3", ["first.layers.3.mlp", "second.layers.3.mlp"]) is None
    assert find_layer("second.layers.3.mlp", ["first.layers.3.mlp", "second.layers.3.mlp"]) == "second.layers.3.mlp"
