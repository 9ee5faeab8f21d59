"""Serving with copies of experts, without vLLM: the request, the choice in routers, and following EPLB's maps.

Routers and EPLB are stand-ins (`support/served_copies.py`), kernels run in Triton's interpreter. What ranks compute is
counted: every pair of token and expert once.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Spec
from command_line import run_well
from copies_oracle import random_copies
from scratch import checkpoint
from triton_process import asking

from reshard.errors import UnsupportedError
from reshard.placement.placement_file import PlacementFile, encode_placement_file
from reshard.vllm.asked import asked_for, asked_to_rearrange
from reshard.vllm.request import Model, resolve

EXPERTS, RANKS, SPARE, TOP_K = 16, 4, 2, 3
ORDERS = [random_copies(random.Random(layer), EXPERTS, RANKS, SPARE, 3) for layer in range(2)]
OTHERS = [random_copies(random.Random(10 + layer), EXPERTS, RANKS, SPARE, 4) for layer in range(2)]


SMALL, LARGE = 128, 1024  # tokens: copies are chosen for batches of up to SMALL, and of more than LARGE


def rows(tokens: int, padding: int = 0) -> list[list[int]]:
    """What tokens choose; the last rows are padding, of which some have ids and some have none."""
    draw = random.Random(tokens)
    found = [draw.sample(range(EXPERTS), TOP_K) for _ in range(tokens + padding)]
    return [*found[: tokens + padding // 2], *[[-1] * TOP_K] * (padding - padding // 2)]


Serve = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """What ranks make of batches: see `served_copies`."""
    case = {"orders": ORDERS, "experts": EXPERTS, "ranks": RANKS, "data_parallel": 1, "rearrange": False}
    with asking("served_copies.py") as ask:
        yield lambda batches, **more: ask({**case, **more, "batches": batches})


def chosen(batch: dict[str, Any]) -> Counter[tuple[int, int]]:
    """The pairs of token and expert that a batch asks for."""
    return Counter((token, expert) for token, row in enumerate(batch["rows"]) for expert in row if expert >= 0)


def computed(found: dict[str, Any], layer: int) -> Counter[tuple[int, int]]:
    """The pairs that ranks computed."""
    return Counter((token, expert) for token, expert in found["pairs"][layer])


def slots_used(found: dict[str, Any], layer: int, tokens: int, ranks: int = 1) -> dict[int, set[int]]:
    """The slots that served each expert, for the first tokens of each of the first ranks."""
    used: dict[int, set[int]] = {}
    order = found["orders"][layer]
    for rank in range(ranks):
        for row in found["physical"][rank][layer][:tokens]:
            for slot in row:
                used.setdefault(order[slot], set()).add(slot)
    return used


BATCHES = [
    {"rows": rows(1)},
    {"rows": rows(8)},
    {"rows": rows(5, padding=3), "real": 5},
    {"rows": rows(SMALL)},
    {"rows": rows(LARGE + 1)},
    {"rows": rows(LARGE + 30, padding=40), "real": LARGE + 30},
    {"rows": rows(SMALL + 1)},
    {"rows": rows(200, padding=40), "real": 200},
    {"rows": rows(LARGE)},
]


def test_every_pair_is_computed_once_and_all_ranks_choose_alike(serve: Serve) -> None:
    counted = [Counter[int](), Counter[int]()]
    for batch, found in zip(BATCHES, serve(BATCHES), strict=True):
        for layer in range(2):
            assert computed(found, layer) == chosen(batch)
            assert all(of_rank == found["physical"][0] for of_rank in found["physical"])
            real = found["physical"][0][layer][: batch.get("real")]
            counted[layer].update(slot for row in real for slot in row)
            loads = found["loads"][layer]
            assert loads == [counted[layer][slot] for slot in range(len(loads))], "EPLB counts tokens, no padding"


def test_batches_in_between_have_one_fixed_copy_of_each_expert(serve: Serve) -> None:
    found = serve([BATCHES[6], BATCHES[8], {"rows": rows(300)}, BATCHES[4]])
    for layer in range(2):
        used = [slots_used(answer, layer, 10_000) for answer in found]
        assert all(len(slots) == 1 for slots in used[0].values())
        assert used[0] == used[1] == used[2] != used[3]
        ranks = Counter(slot // 6 for slots in used[0].values() for slot in slots)
        assert max(ranks.values()) <= EXPERTS // RANKS + 1, "ranks serve nearly as many experts as each other"


def test_the_control_maps_of_another_placement_are_seen(serve: Serve) -> None:
    spoilt = [[(expert + 1) % EXPERTS for expert in order] for order in ORDERS]
    for batch in (BATCHES[1], BATCHES[4]):
        (found,) = serve([{**batch, "spoilt": spoilt}])
        assert computed(found, 0) != chosen(batch)


def busiest(slots: Iterable[int]) -> float:
    """The busiest rank's pairs over the mean, if pairs are served in these slots; ranks have six."""
    pairs = Counter(slot // 6 for slot in slots)
    return max(pairs.values()) * RANKS / pairs.total()


def is_even(found: dict[str, Any], layer: int) -> bool:
    """Whether ranks get nearly as many pairs as each other, and more evenly than by the first copy of each expert."""
    order = found["orders"][layer]
    served = [slot for of_rank in found["physical"] for row in of_rank[layer] for slot in row]
    return busiest(served) < min(1.15, busiest(order.index(order[slot]) for slot in served))


def test_a_batch_uses_one_copy_of_each_expert_and_gives_ranks_as_many_active_experts_or_pairs(serve: Serve) -> None:
    small, large = serve([BATCHES[1], BATCHES[4]])
    for layer in range(2):
        for found, tokens in ((small, 8), (large, LARGE + 1)):
            used = slots_used(found, layer, tokens)
            assert all(len(slots) == 1 for slots in used.values())
        active = Counter(slot // 6 for slots in slots_used(small, layer, 8).values() for slot in slots)
        assert max(active.values()) - min(active.values()) <= 1
        assert is_even(large, layer)


def test_with_data_parallelism_all_ranks_use_the_same_copy_in_small_batches(serve: Serve) -> None:
    """Each routes tokens of its own, so none knows what the others choose."""
    batches = [{"rows": rows(8)}, {"rows": rows(64)}, {"rows": rows(RANKS * (LARGE + 8))}]
    found = serve(batches, data_parallel=RANKS)
    served = [Counter[int](), Counter[int]()]
    for layer in range(2):
        for batch, answer in zip(batches, found, strict=True):
            assert computed(answer, layer) == chosen(batch)
        always: dict[int, set[int]] = {}
        for answer in found[:2]:
            for expert, slots in slots_used(answer, layer, 16, RANKS).items():
                always.setdefault(expert, set()).update(slots)
        assert all(len(slots) == 1 for slots in always.values()), "the same in all small batches"
        served[layer].update(slot // 6 for slots in always.values() for slot in slots)
        assert max(served[layer].values()) <= EXPERTS // RANKS + 1, "ranks serve nearly as many experts as each other"
        assert is_even(found[2], layer)


def test_where_rows_are_gathered_before_they_are_routed_all_ranks_choose_alike(serve: Serve) -> None:
    """Some of vLLM's kernels have every rank route all ranks' rows; each rank knows only its own number of tokens."""
    for batch in (BATCHES[1], BATCHES[4]):
        (found,) = serve([{**batch, "unpadded": [3, 5, 8, 2]}], data_parallel=RANKS, gathered=True)
        for layer in range(2):
            assert computed(found, layer) == chosen(batch)
            assert all(of_rank == found["physical"][0] for of_rank in found["physical"])


@pytest.mark.parametrize("by_layer", [False, True], ids=["at once", "layer by layer"])
def test_eplb_moves_experts_only_if_it_is_asked_to_and_the_choice_follows_its_maps(
    by_layer: bool, serve: Serve
) -> None:
    batches = [
        {"rows": rows(8)},
        {"rows": rows(8), "rearranged": OTHERS, "by_layer": by_layer},
        {"rows": rows(LARGE + 1)},
        {"rows": rows(LARGE + 1), "rearranged": ORDERS, "by_layer": by_layer},
        {"rows": rows(8)},
    ]
    kept, moved = serve(batches), serve(batches, rearrange=True)
    for batch, one, other in zip(batches, kept, moved, strict=True):
        for layer in range(2):
            assert computed(one, layer) == computed(other, layer) == chosen(batch)
    assert [found["orders"] for found in kept] == [ORDERS] * 5
    assert [found["orders"] for found in moved] == [ORDERS, OTHERS, OTHERS, ORDERS, ORDERS]
    assert moved[4]["physical"] == moved[0]["physical"] != moved[1]["physical"]


@pytest.mark.parametrize("own_way", ["router", "kernel"])
def test_a_layer_that_routes_in_its_own_way_is_refused(own_way: str, serve: Serve) -> None:
    (answer,) = serve([], own_way=own_way)
    assert "layer model.layers.0.mlp.experts routes in its own way (" in answer["refused"]
    assert "would not choose among copies of experts" in answer["refused"]


# The request


def changed(**values: Any) -> Model:
    """A model with 8 experts on 2 EP ranks."""
    fields: dict[str, Any] = {
        **{"name": "org/model", "num_experts": 8, "num_layers": 3, "n_group": 4, "ep_size": 2},
        **{"expert_parallel": True, "is_output": False, "strategy": "linear", "load_format": "auto", "lora": False},
        **{"elastic": False, "transfer": None, **values},
    }
    return Model(**fields)


def file_of(tmp_path: Path, **more: Any) -> str:
    """A placement file with copies for 8 experts on 2 ranks, two more slots on each."""
    layers = ["model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp"]
    orders = [random_copies(random.Random(layer), 8, 2, 2, 2) for layer in range(3)]
    fields: dict[str, Any] = {
        **{"strategy": "copies", "ep_size": 2, "model_type": None, "num_experts": 8, "layers": layers},
        "physical_to_logical": dict(zip(layers, orders, strict=True)),
        **more,
    }
    path = tmp_path / "copies.json"
    path.write_bytes(encode_placement_file(PlacementFile(**fields)))
    return str(path)


def test_a_placement_with_copies_wants_eplb_with_as_many_redundant_experts(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    served = resolve(path, changed(eplb=True, redundant=4))
    assert served.redundant == 4
    assert not served.rearranges, "the default"
    assert len(served.order("model.layers.1.mlp.experts", 8) or ()) == 12
    assert served.order("model.layers.0.mlp.experts", 8, draft=True) is None
    with pytest.raises(UnsupportedError, match="has 16 experts and 4 copies, but the placement 12"):
        served.order("model.layers.1.mlp.experts", 16)
    option = r"--eplb-config '\{\"num_redundant_experts\": 4\}'$"
    for model, fault in (
        (changed(), rf"vLLM holds copies with EPLB only; add --enable-eplb {option}"),
        (changed(eplb=True), rf"it has 4 copies, and vLLM has room for 0; give {option}"),
        (changed(eplb=True, redundant=6), rf"it has 4 copies, and vLLM has room for 6; give {option}"),
        (changed(eplb=True, redundant=4, on_cuda=False), "a kernel for NVIDIA GPUs chooses among them"),
        (changed(ep_size=4, eplb=True, redundant=4), "made for 2 EP ranks, served on 4"),
        (changed(eplb=True, redundant=4, is_output=True), "this is an output of reshard and already has a placement"),
        (changed(eplb=True, redundant=4, elastic=True), "elastic expert parallelism moves experts by itself"),
    ):
        with pytest.raises(UnsupportedError, match=rf"copies\.json: .*{fault}") as refused:
            resolve(path, model)
        assert "\n" not in str(refused.value)


def test_what_export_writes_is_served_with_the_options_that_it_prints(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=8, top_k=2))
    path = tmp_path / "copies.json"
    said = run_well("export", source, "--to", "vllm", "--ep", "2", "--spare", "2", "--out", path)
    options = "--enable-eplb --eplb-config '{\"num_redundant_experts\": 4}'"
    assert options in " ".join(said.split())
    served = resolve(str(path), changed(eplb=True, redundant=4))
    assert served.redundant == 4
    layers = list(json.loads(path.read_text())["layers"])
    assert all(len(served.order(f"{layer}.experts", 8) or ()) == 12 for layer in layers)
    with pytest.raises(UnsupportedError) as refused:
        resolve(str(path), changed())
    assert str(refused.value).endswith(f"add {options}")


def test_a_placement_whose_slots_do_not_fit_vllms_is_refused(tmp_path: Path) -> None:
    layers = ["model.layers.1.mlp", "model.layers.2.mlp"]
    orders = {layers[0]: [*range(8), 0, 1], layers[1]: list(range(8))}
    path = file_of(tmp_path, layers=layers, physical_to_logical=orders)
    with pytest.raises(UnsupportedError, match="a layer has 8 slots and another one 10"):
        resolve(path, changed(eplb=True, redundant=2))
    path = file_of(tmp_path, ep_size=None, layers=[], physical_to_logical=[*range(8), 0])
    with pytest.raises(UnsupportedError, match="its 9 slots cannot be divided evenly among 2 EP ranks"):
        resolve(path, changed(eplb=True, redundant=1))


def test_rearranging_is_a_choice_of_the_user_with_eplb(tmp_path: Path) -> None:
    path, with_eplb = file_of(tmp_path), changed(eplb=True, redundant=4)
    assert resolve(path, with_eplb, rearrange=True).rearranges
    assert resolve("zigzag", with_eplb).rearranges
    assert not resolve("zigzag", with_eplb, rearrange=False).rearranges
    with pytest.raises(UnsupportedError, match=r"rearrange is for vLLM's EPLB, which is off; add --enable-eplb"):
        resolve("zigzag", changed(), rearrange=True)
    assert asked_to_rearrange({"reshard": {"rearrange": True}}) is True
    assert asked_to_rearrange({"reshard": {"placement": "zigzag"}}) is asked_to_rearrange(None) is None
    assert asked_for({"RESHARD_PLACEMENT": path}, {"reshard": {"rearrange": True}}) == path
    with pytest.raises(UnsupportedError, match=r"expected \{\"placement\": \"zigzag\"\}"):
        asked_for({}, {"reshard": {"rearrange": True}})
    with pytest.raises(UnsupportedError, match=r"rearrange is 'yes'; expected true or false"):
        asked_to_rearrange({"reshard": {"rearrange": "yes"}})
