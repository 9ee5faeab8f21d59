"""The model of `benchmarks/lifted_model.py`: which text each layer reads, what its routers choose, what is filled."""

from __future__ import annotations

import numpy
import pytest
import torch
from lifted_model import LARGEST_BYTE, TINY_SCALE, expected_choices, fill, spread_out
from serve_ep import lifted

from reshard.model.routing import Routing

ROUTING = Routing(
    num_experts=16,
    top_k=4,
    scoring="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    n_group=4,
    topk_group=2,
)
KINDS, LENGTH, HIDDEN = ("one", "other"), 6, 8


def gates(number: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in range(1, 1 + number):
        name = f"model.layers.{layer}.mlp.gate"
        found[f"{name}.weight"] = torch.randn(16, HIDDEN, generator=generator)
        found[f"{name}.e_score_correction_bias"] = torch.randn(16, generator=generator) / 100
        for kind in KINDS:
            found[f"{name}.input.{kind}"] = torch.randn(LENGTH, HIDDEN, generator=generator).bfloat16()
    return found


def test_copies_of_a_router_read_its_text_further_on() -> None:
    small = gates()
    found = spread_out(small, copies=3)
    assert len(found) == 3 * len(small)
    for copy in range(3):
        for gate in (1, 2):
            old, new = f"model.layers.{gate}.mlp.gate", f"model.layers.{2 * copy + gate}.mlp.gate"
            assert torch.equal(found[f"{new}.weight"], small[f"{old}.weight"])
            for kind in KINDS:
                further = [(position + 2 * copy) % LENGTH for position in range(LENGTH)]
                assert torch.equal(found[f"{new}.input.{kind}"], small[f"{old}.input.{kind}"][further])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expected_choices_are_those_of_a_group_limited_router(dtype: torch.dtype) -> None:
    tensors = lifted(spread_out(gates(), copies=2), 5, 64)
    found_LVK = expected_choices(tensors, dtype, ROUTING)
    assert found_LVK.shape == (5, len(KINDS) * LENGTH, 4)
    for layer in range(5):
        for token, embedding_H in enumerate(tensors["model.embed_tokens.weight"].double().numpy()):
            given_H = embedding_H / numpy.sqrt((embedding_H**2).mean())
            given_H = torch.tensor(given_H).bfloat16().double().numpy()
            name = f"model.layers.{1 + layer}.mlp.gate"
            logits_E = torch.tensor(tensors[f"{name}.weight"].double().numpy() @ given_H).to(dtype).double().numpy()
            score_E = 1 / (1 + numpy.exp(-logits_E)) + tensors[f"{name}.e_score_correction_bias"].double().numpy()
            group_G = [sum(sorted(score_E[first : first + 4])[-2:]) for first in range(0, 16, 4)]
            open_ = [expert for group in numpy.argsort(group_G)[-2:] for expert in range(4 * group, 4 * group + 4)]
            best = sorted(open_, key=lambda expert: -score_E[expert])[:4]
            if dtype == torch.float32 or len(set(score_E[open_].round(12))) == len(open_):  # ties may fall either way
                assert set(found_LVK[layer, token].tolist()) == set(best)


def test_layers_that_share_a_router_choose_by_themselves() -> None:
    found_LVK = expected_choices(lifted(spread_out(gates(), copies=3), 6, 64), torch.float32, ROUTING)
    assert not torch.equal(found_LVK[0], found_LVK[2])  # copies of one router
    assert not torch.equal(found_LVK[2], found_LVK[4])


class Toy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.zeros(4))
        self.gate = torch.nn.Parameter(torch.zeros(4))
        self.plain = torch.nn.Parameter(torch.zeros(64))
        self.weight_scale_inv = torch.nn.Parameter(torch.zeros(4))
        self.w13_weight = torch.nn.Parameter(torch.zeros(4096, dtype=torch.float8_e4m3fn), requires_grad=False)


def test_every_parameter_is_filled() -> None:
    toy = Toy()
    fill(toy, {"gate": torch.arange(4.0)})
    assert toy.norm.tolist() == [1] * 4
    assert toy.gate.tolist() == [0, 1, 2, 3]
    assert toy.weight_scale_inv.tolist() == pytest.approx([TINY_SCALE] * 4)
    assert toy.plain.std() > 0
    values, bytes_ = toy.w13_weight.float(), toy.w13_weight.view(torch.uint8)
    assert not values.isnan().any()
    assert len(bytes_.unique()) == 2 * LARGEST_BYTE
    assert 0.4 < (values < 0).double().mean() < 0.6
    other = Toy()
    fill(other, {})
    assert torch.equal(other.w13_weight.view(torch.uint8), bytes_)  # the same in every start
    assert other.gate.tolist() != toy.gate.tolist()


def test_a_tensor_that_the_model_does_not_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="gaet: the model has no such parameter"):
        fill(Toy(), {"gaet": torch.zeros(4)})
