"""Serving an original with a placement, part by part and without vLLM: request, loading, proof, agreement, EPLB."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from stand_ins import another_packages, vllms_own

from reshard.errors import UnsupportedError
from reshard.placement.contract import MARK, Contract, contract_to_json
from reshard.placement.permutations import invert, node_zigzag, rank_slots, zigzag
from reshard.placement.placement_file import PlacementFile, encode_placement_file
from reshard.vllm import agreement, loading, worker
from reshard.vllm.agreement import ORIGINAL, compare, publish
from reshard.vllm.asked import asked_for
from reshard.vllm.eplb import place, with_copies
from reshard.vllm.outputs import INDEX
from reshard.vllm.placed import ExpertPlace
from reshard.vllm.placed_weights import Filling, install
from reshard.vllm.request import Model, resolve
from reshard.vllm.served import ServedPlacement, served_file, served_strategy
from reshard.vllm.weight_filter import PlacedExperts, install_skip
from reshard.vllm.worker import reload_fault

LAYERS = ["model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp"]
ORDERS = {layer: list(order) for layer, order in zip(LAYERS, (zigzag(8, 2), zigzag(8, 4), range(8)), strict=True)}
FILE = PlacementFile(
    strategy="balanced", ep_size=2, model_type=None, num_experts=8, layers=LAYERS, physical_to_logical=ORDERS
)
MODEL = Model(
    name="org/model",
    num_experts=8,
    num_layers=3,
    n_group=4,
    ep_size=2,
    expert_parallel=True,
    is_output=False,
    strategy="linear",
    load_format="auto",
    lora=False,
    elastic=False,
    transfer=None,
)


def changed(**values: Any) -> Model:
    return Model(**{**{name: getattr(MODEL, name) for name in Model.__dataclass_fields__}, **values})


# The request


@pytest.mark.parametrize(
    ("environment", "more", "expected"),
    [
        ({}, {}, None),
        ({"RESHARD_PLACEMENT": ""}, {"other": 1}, None),
        ({"RESHARD_PLACEMENT": "zigzag"}, None, "zigzag"),
        ({}, {"reshard": {"placement": "zigzag"}}, "zigzag"),
        ({"RESHARD_PLACEMENT": "zigzag"}, {"reshard": {"placement": "zigzag"}}, "zigzag"),
    ],
)
def test_a_placement_is_requested_in_two_ways(environment: dict[str, str], more: Any, expected: str | None) -> None:
    assert asked_for(environment, more) == expected


@pytest.mark.parametrize(
    ("environment", "more", "fault"),
    [
        (
            {"RESHARD_PLACMENT": "zigzag"},
            {},
            "RESHARD_PLACMENT is set, .* was RESHARD_PLACEMENT meant",
        ),
        ({"reshard_placement": "zigzag"}, None, "was RESHARD_PLACEMENT meant"),
        (
            {},
            {"Reshard": {"placement": "zigzag"}},
            "additional_config has 'Reshard', which nothing reads; was 'reshard'",
        ),
        ({}, {"reshad": {"placement": "zigzag"}}, "additional_config has 'reshad'"),
        ({"RESHARD_PLACEMENT": "zigzag"}, {"re-shard": {"rearrange": True}}, "additional_config has 're-shard'"),
        ({}, {"RESHARD_PLACEMENT": "zigzag"}, "additional_config has 'RESHARD_PLACEMENT'"),
        ({}, {"reshard": {"placment": "zigzag"}}, "additional_config.reshard is"),
        ({}, {"reshard": {"placement": ""}}, "additional_config.reshard is"),
        ({}, {"reshard": None}, "additional_config.reshard is None"),
    ],
    ids=str,
)
def test_a_request_that_is_misspelt_or_empty_is_refused(environment: dict[str, str], more: Any, fault: str) -> None:
    """The model was served linear, with no word."""
    with pytest.raises(UnsupportedError, match=fault):
        asked_for(environment, more)


def test_names_of_others_are_no_misspelt_requests() -> None:
    variables = {"RESHARD_TRACE": "t", "RESHARD_TRACE_LIMIT": "1", "RESHARD_AGREEMENT_SECONDS": "1", "VLLM_PLUGINS": ""}
    assert asked_for(variables, {"reshard_trace": True, "sharded": 1, "reshape": 1, "gdn_prefill_backend": "x"}) is None
    assert asked_for({"RESHARD_PLACEMENT": "zigzag", "RESHARD_PLACEMENTS": "all"}, {}) == "zigzag"


def test_a_file_serves_only_the_model_that_it_was_made_for(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_bytes(encode_placement_file(FILE))
    served = resolve(str(path), MODEL)
    assert served.order("model.layers.1.mlp.experts", 8) == zigzag(8, 2)
    assert served.order("model.layers.2.mlp.experts.5.w1.weight", 8) == zigzag(8, 4)
    assert served.order("model.layers.3.mtp_block.mlp.experts", 8) == tuple(range(8)), "the draft layer"
    assert served.order("model.layers.4.mtp_block.mlp.experts", 8) is None, "a draft layer that is not in the file"
    assert served.order("model.layers.0.mlp.experts", 8, draft=True) is None, "a draft from another directory"
    with pytest.raises(UnsupportedError, match=r"layer model\.layers\.0.* is not in the placement; .*reshard export"):
        served.order("model.layers.0.mlp.experts", 8)
    with pytest.raises(UnsupportedError, match="has 16 experts, but the placement 8"):
        served.order("model.layers.1.mlp.experts", 16)
    command = "reshard export org/model --to vllm --ep {} --strategy balanced --trace DIR --out FILE"
    for model, fault in (
        (changed(ep_size=4), f"made for 2 EP ranks, served on 4; .*{command.format(4)}"),
        (changed(num_experts=6), f"made for 8 experts, org/model has 6; .*{command.format(2)}"),
        (changed(ep_size=1, expert_parallel=False), "served on 1 .expert parallelism is off: --enable-expert-parallel"),
    ):
        with pytest.raises(UnsupportedError, match=fault):
            resolve(str(path), model)


@pytest.mark.parametrize(
    ("strategy", "needs"),
    [("zigzag", ""), ("node-zigzag", " --nodes M"), ("file", " --map FILE"), ("copies", " --spare S")],
)
def test_the_command_that_makes_another_file_has_the_options_that_its_strategy_needs(
    strategy: str, needs: str, tmp_path: Path
) -> None:
    path = tmp_path / "placement.json"
    path.write_bytes(encode_placement_file(msgspec.structs.replace(FILE, strategy=strategy)))
    with pytest.raises(UnsupportedError, match=f"--strategy {strategy}{needs} --out FILE"):
        resolve(str(path), changed(ep_size=4))


def test_strategies_fit_any_layer_and_any_number_of_ranks() -> None:
    served = resolve("zigzag", changed(ep_size=4))
    assert served.order("whatever", 8) == zigzag(8, 4)
    assert served.order("a draft's", 6) == zigzag(6, 4)
    nodes = resolve("node-zigzag:2", changed(ep_size=4))
    assert nodes.order("whatever", 8) == node_zigzag(8, 4, 2)
    assert nodes.digest != served.digest
    assert resolve("node-zigzag:1", changed(ep_size=4)).digest == served.digest


def test_a_pickled_placement_arrives_unchanged_and_registers_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[bool] = []
    monkeypatch.setattr("reshard.vllm.register", lambda: registered.append(True))
    served = served_strategy("zigzag", 1, 8, 2, 3)
    arrived = pickle.loads(pickle.dumps(served))
    assert type(arrived) is ServedPlacement
    assert arrived == served
    assert registered, "unpickling registers the plugin"
    assert b"reshard.vllm.served" in pickle.dumps(served), "unpickling needs reshard"


# Loading and its proof


class Experts(torch.nn.Module):
    """A stand-in for vLLM's RoutedExperts with 8 experts, on EP rank 1 of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.expert_map_manager = SimpleNamespace(expert_map=torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3]))
        self.w13_weight = torch.nn.Parameter(torch.zeros(4, 2, 3))
        self.w2_weight = torch.nn.Parameter(torch.zeros(4, 3))
        self.w2_bias = torch.nn.Parameter(torch.zeros(4, 3))
        self.e_score_correction_bias = torch.nn.Parameter(torch.zeros(4))
        self.reshard_filling = Filling.of(self, invert(zigzag(8, 2)))

    def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
        return int(self.expert_map_manager.expert_map[expert_id])

    def weight_loader(
        self, param: Any, loaded_weight: Any, weight_name: str, shard_id: str, expert_id: int, return_success: bool
    ) -> bool | None:
        slot = self._map_global_expert_id_to_local_expert_id(expert_id)
        if slot < 0:
            return False if return_success else None
        target = param.data[slot] if shard_id == "w2" else param.data[slot, ["w1", "w3"].index(shard_id)]
        target.fill_(float(loaded_weight))
        return True if return_success else None


install(SimpleNamespace(RoutedExperts=Experts))  # type: ignore[arg-type]
PARTS = (("w13_weight", "w1"), ("w13_weight", "w3"), ("w2_weight", "w2"))


def loaded(skip: tuple[int, str] | None = None) -> Experts:
    """Experts loaded from a checkpoint in which every weight of expert `e` is the number `e`."""
    experts = Experts()
    for expert in range(8):
        for name, part in PARTS:
            if (expert, part) != skip:
                weight = torch.tensor(float(expert))
                experts.weight_loader(getattr(experts, name), weight, f"layer.{name}", part, expert, False)
    return experts


def test_experts_are_loaded_into_their_slots_and_that_is_proved() -> None:
    experts = loaded()
    assert experts.w2_weight[:, 0].tolist() == [1, 3, 5, 7], "what rank 1 of 2 owns under zigzag"
    assert experts.reshard_filling.expected == (1, 3, 5, 7)
    assert experts.reshard_filling.fault(experts) is None
    experts.e_score_correction_bias.data.fill_(1.0)
    assert experts.reshard_filling.fault(experts) is None, "a router tensor keeps the original's order"


def test_a_slot_that_was_not_filled_is_reported() -> None:
    experts = loaded(skip=(5, "w3"))
    assert experts.reshard_filling.fault(experts) == "w13_weight: slot 2, of expert 5, was not filled (w3)"


def test_a_slot_that_got_another_expert_is_reported() -> None:
    experts = loaded()
    experts.reshard_filling.filled["w2_weight"][1]["w2"] = 6
    assert "slot 1 was filled with expert 6, expected 3" in str(experts.reshard_filling.fault(experts))


@pytest.mark.parametrize("first", ["real weights", "dummy weights"])
def test_new_weights_that_bypass_the_lookup_are_refused(first: str) -> None:
    """Llama 4 slices its fused tensors itself: new weights of that form went to other experts' slots, silently."""
    experts = loaded() if first == "real weights" else Experts()
    experts.reshard_filling.forget()
    experts.weight_loader(experts.w2_weight, torch.tensor(5.0), "layer.w2_weight", "w2", 5, False)
    assert experts.w2_weight[:, 0].tolist()[2] == 5.0, "the control: expert by expert they are taken"
    for whole, lookup in ((torch.ones(1, 1, 1), True), (torch.tensor(1.0), False)):
        if not lookup:
            experts._map_global_expert_id_to_local_expert_id = lambda expert: 0  # type: ignore[method-assign]
        with pytest.raises(UnsupportedError, match="bypass the placement"):
            experts.weight_loader(experts.w2_weight, whole, "layer.w2_weight", "w2", 5, False)


def test_a_parameter_that_was_filled_without_the_lookup_is_reported() -> None:
    experts = loaded()
    experts.w2_bias.data[2].fill_(1.0)
    assert experts.reshard_filling.fault(experts) == "w2_bias was filled, but not expert by expert"
    untouched = Experts()
    assert untouched.reshard_filling.fault(untouched) == "no tensor of w13 was loaded by expert"
    whole = loaded()
    whole.reshard_filling.note("w13_weight", "w1", 4, whole=True)
    assert "as one tensor of all experts" in str(whole.reshard_filling.fault(whole))
    without_lookup = loaded()
    without_lookup.reshard_filling.last_lookup = None
    without_lookup.reshard_filling.note("w13_weight", "w1", 4, whole=False)
    assert "as one tensor of all experts" in str(without_lookup.reshard_filling.fault(without_lookup))


def test_ids_are_mapped_and_padding_is_unchanged() -> None:
    place = ExpertPlace(zigzag(8, 2), "cpu")
    ids = torch.tensor([[0, 3, -1], [7, 1, 2]], dtype=torch.int32)
    assert place(ids).tolist() == [[0, 5, -1], [7, 4, 1]]
    assert place(ids).dtype == torch.int32
    assert place.place_E.tolist() == list(invert(zigzag(8, 2)))
    assert not place.state_dict(), "a reload has nothing to overwrite"
    assert [name for name, _ in place.named_buffers()] == ["_expert_map"], "sleep saves this buffer"


def test_a_rank_reads_its_own_experts_of_each_layer() -> None:
    weight_utils = SimpleNamespace(should_skip_weight=lambda name, ids: int(name.split(".")[-3]) not in ids)
    install_skip(weight_utils)  # type: ignore[arg-type]
    served = served_file("file", FILE, 2, 3, "make it")
    own = PlacedExperts({4, 5, 6, 7}, served, 8, rank=1)
    for layer, order in ORDERS.items():
        names = [f"{layer}.experts.{expert}.w1.weight" for expert in range(8)]
        read = {expert for expert, name in enumerate(names) if not weight_utils.should_skip_weight(name, own)}
        assert read == set(order[4:])
    name = "model.layers.9.mlp.experts.3.w1.weight"
    assert weight_utils.should_skip_weight(name, own), "a linear draft layer: vLLM's own set decides"
    assert not weight_utils.should_skip_weight(name, {3})


# Agreement of the ranks


def test_ranks_that_agree_continue_and_ranks_that_differ_or_are_silent_are_named() -> None:
    store: Any = torch.distributed.HashStore()
    publish(store, "model/0", 0, "a" * 64)
    publish(store, "model/0", 1, "a" * 64)
    compare(store, "model/0", range(2), "a" * 64, seconds=1)
    publish(store, "model/1", 0, "a" * 64)
    publish(store, "model/1", 1, None)
    publish(store, "model/1", 2, "b" * 64)
    with pytest.raises(UnsupportedError, match=r"ranks 1-2 serve a different placement \(linear on rank 1"):
        compare(store, "model/1", range(3), "a" * 64, seconds=1)
    with pytest.raises(UnsupportedError, match=r"ranks 3-4 did not report their placement within 1 s"):
        compare(store, "model/1", range(5), "a" * 64, seconds=1)


def test_ranks_compare_all_that_decides_where_experts_are_but_paths() -> None:
    """With equal orders, a file that lacks the draft's layer placed it on no rank, and another file on its own."""
    order = list(zigzag(8, 2))
    of_all = served_file("a.json", PlacementFile(**FORM, layers=[], physical_to_logical=order), 2, 3, "make")
    again = served_file("b.json", PlacementFile(**FORM, layers=[], physical_to_logical=order), 2, 3, "make again")
    orders = dict.fromkeys(LAYERS[:2], order)
    of_two = served_file("a.json", PlacementFile(**FORM, layers=LAYERS[:2], physical_to_logical=orders), 2, 3, "make")
    assert of_all.digest == of_two.digest
    assert of_all.order(f"{LAYERS[2]}.experts", 8, draft=True) != of_two.order(f"{LAYERS[2]}.experts", 8, draft=True)
    assert of_all.agreed == again.agreed != of_two.agreed
    assert served_strategy("zigzag", 1, 8, 2, 3).agreed != served_strategy("zigzag", 1, 8, 2, 3, rearrange=False).agreed


FORM: dict[str, Any] = {"strategy": "file", "ep_size": 2, "model_type": None, "num_experts": 8}


def test_a_draft_is_compared_within_its_pipeline_stage_whatever_other_stages_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stages without the draft never report it, and the start ended after five minutes."""
    store: Any = torch.distributed.HashStore()
    monkeypatch.setenv("RESHARD_AGREEMENT_SECONDS", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    stage = SimpleNamespace(get_ep_group=lambda: SimpleNamespace(ranks=[2, 3]))
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", stage)  # type: ignore[arg-type]

    def load(rank: int, kind: str, number: int, digest: str) -> None:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(agreement, "_loads", {"model": iter([number]), "draft": iter([number])})
        agreement.agree(digest, draft=kind == "draft")

    for rank in range(3):
        publish(store, "model/0", rank, "a" * 64)
    load(3, "model", 0, "a" * 64)
    publish(store, "draft/0", 2, "a" * 64)
    load(3, "draft", 0, "a" * 64)
    for rank in range(3):
        publish(store, "model/1", rank, "a" * 64)
    load(3, "model", 1, "a" * 64)
    with pytest.raises(UnsupportedError, match="ranks 2 did not report"):
        load(3, "draft", 1, "a" * 64)
    publish(store, "draft/1", 2, "b" * 64)
    with pytest.raises(UnsupportedError, match="ranks 2 serve a different placement"):
        load(3, "draft", 1, "a" * 64)


def test_ranks_that_read_files_with_other_numbers_are_refused_and_nobody_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nodes with outputs of their own, without expert groups, answered wrongly: each had other experts in its slots."""
    store: Any = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)

    def load(numbering: str | None, number: int = 0, *, draft: bool = False) -> None:
        monkeypatch.setattr(agreement, "_checks", {"model": iter([number]), "draft": iter([number])})
        agreement.agree_numbering(numbering, draft=draft)

    for numbering in ("a" * 64, "", None, "a" * 64):
        load(numbering)
    load("b" * 64, draft=True)
    for other, fault in (("b" * 64, "b{12} and a{12}"), (ORIGINAL, "an original and a{12}")):
        with pytest.raises(UnsupportedError, match=rf"rank 3 read files .* \({fault}\), .* give all nodes files"):
            load(other)
    load(ORIGINAL, 1)
    with pytest.raises(UnsupportedError, match=r"\(b{12} and an original\)"):
        load("b" * 64, 1)
    load("b" * 64, 2)  # another model of the same ranks
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    load(ORIGINAL, 1)


# EPLB


@pytest.mark.parametrize(
    ("experts", "ranks", "redundant"), [(8, 2, 2), (16, 4, 8), (256, 8, 32), (15, 4, 1), (6, 4, 6)]
)
def test_copies_follow_a_ranks_own_experts_and_no_rank_holds_an_expert_twice(
    experts: int, ranks: int, redundant: int
) -> None:
    order = zigzag(experts, ranks)
    found = with_copies(order, ranks, redundant)
    size = (experts + redundant) // ranks
    assert len(found) == experts + redundant
    assert sorted(found) == sorted([*range(experts), *(copy % experts for copy in range(redundant))])
    for rank, own in enumerate(rank_slots(experts, ranks)):
        held = found[rank * size : (rank + 1) * size]
        assert len(set(held)) == size, "a rank holds two copies of one expert"
        if redundant <= ranks:
            assert held[: len(own)] == order[own.start : own.stop]


class Moe(torch.nn.Module):
    """A model with one MoE layer, as EPLB sees it."""

    num_redundant_experts, num_logical_experts, expert_weights = 0, 8, ()
    moe_layers = (SimpleNamespace(layer_name="model.layers.1.mlp.experts"),)

    def load_weights(self, weights: list[str]) -> list[str]:
        """Take them."""
        return weights


@pytest.fixture
def balanced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The state of vLLM's EPLB, and what the plugin uses of vLLM for it."""

    def commit(state: Any, new_physical_to_logical_map: torch.Tensor) -> None:
        state.physical_to_logical_map = new_physical_to_logical_map

    eplb_state = SimpleNamespace(rearrange_expert_weights_inplace=lambda *all: None, _commit_eplb_maps=commit)
    modules: dict[str, Any] = {
        "vllm": SimpleNamespace(),
        "vllm.distributed": SimpleNamespace(),
        "vllm.distributed.eplb": SimpleNamespace(eplb_state=eplb_state),
        "vllm.distributed.parallel_state": SimpleNamespace(get_ep_group=lambda: SimpleNamespace(device_group=None)),
        "vllm.logger": SimpleNamespace(init_logger=lambda name: SimpleNamespace(info=lambda *values: None)),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(worker, "_proved", [])
    linear = torch.arange(8)[None]
    return SimpleNamespace(model=Moe(), physical_to_logical_map=linear, expert_buffer=None, communicator=None)


def test_a_model_whose_experts_eplb_moved_takes_no_new_weights(balanced: Any) -> None:
    """vLLM loads experts where they were at first: a trainer's weights went to other experts' slots."""
    assert balanced.model.load_weights(["a"]) == ["a"], "the control"
    place(balanced, served_strategy("zigzag", 1, 8, 2, 3), is_draft=False)
    assert balanced.physical_to_logical_map.tolist() == [list(zigzag(8, 2))]
    with pytest.raises(UnsupportedError, match=r"new weights are refused .*with EPLB"):
        balanced.model.load_weights(["a"])


@pytest.mark.parametrize("part", ["router", "routed_experts"])
def test_with_eplb_a_layer_with_a_part_of_another_packages_is_refused_too(part: str, balanced: Any) -> None:
    """Nothing shows that it follows EPLB's maps."""
    parts = {"router": vllms_own(), "routed_experts": vllms_own(quant_method=vllms_own()), part: another_packages()}
    balanced.model.layer = own_layer(**parts)
    with pytest.raises(UnsupportedError, match=r"layer layer: a part of it is not vLLM's own \(other\.stand_in\."):
        place(balanced, served_strategy("zigzag", 1, 8, 2, 3), is_draft=False)
    assert balanced.physical_to_logical_map.tolist() == [list(range(8))], "nothing was moved"
    balanced.model.layer = own_layer(router=vllms_own(), routed_experts=vllms_own(quant_method=vllms_own()))
    place(balanced, served_strategy("zigzag", 1, 8, 2, 3), is_draft=False)


def own_layer(**parts: Any) -> torch.nn.Module:
    """A MoE layer of vLLM's own class, with these parts."""
    layer = type("Layer", (torch.nn.Module,), {"__module__": "vllm.stand_in"})()
    vars(layer).update(parts)
    return layer


def test_copies_that_do_not_fit_on_different_ranks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="cannot be divided evenly among 4 EP ranks"):
        with_copies(zigzag(8, 4), 4, 2)
    with pytest.raises(UnsupportedError, match=r"one rank would hold expert \d+ twice"):
        with_copies(zigzag(2, 2), 2, 4)


@pytest.mark.parametrize(
    ("path", "checkpoint_format", "eplb", "fault"),
    [
        (None, True, False, None),
        (None, False, False, "kernel format"),
        (None, True, True, "with EPLB"),
        ("original", True, False, None),
        ("output", True, False, "is an output of reshard"),
        ("contract", True, False, "is an output of reshard"),
        ("marked", True, False, "is an output of reshard"),
    ],
)
def test_a_reload_that_would_misplace_experts_is_refused(
    path: str | None, checkpoint_format: bool, eplb: bool, fault: str | None, tmp_path: Path
) -> None:
    for name in ("original", "output", "contract", "marked"):
        (tmp_path / name).mkdir()
        save_file({}, tmp_path / name / "model.safetensors", metadata=MARK if name == "marked" else None)
    (tmp_path / "output" / "reshard_manifest.json").write_text("{}")
    contract = contract_to_json(Contract("zigzag", 2, 4, 2, {"m": (1, 0)}, {}))
    (tmp_path / "contract" / "config.json").write_text(json.dumps({"expert_placement": contract}))
    found = reload_fault(str(tmp_path / path) if path else None, checkpoint_format, eplb)
    assert (fault in found) if fault and found else found == fault


def test_a_placed_router_returns_physical_ids_and_captures_logical_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Router:
        capture_fn: Any = None

        def _select_experts(self, hidden: Any, logits: torch.Tensor, dtype: Any = None, **more: Any) -> Any:
            weights, ids = logits.topk(2, dim=1)
            if self.capture_fn is not None:
                self.capture_fn(ids)
            return weights, self._apply_eplb_mapping(ids)

        def _apply_eplb_mapping(self, ids: torch.Tensor) -> torch.Tensor:
            return ids

    module = SimpleNamespace(
        get_current_vllm_config=lambda: SimpleNamespace(device_config=SimpleNamespace(device="cpu"))
    )
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(config=module))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.config", module)  # type: ignore[arg-type]
    from reshard.vllm.placed import placed_router

    served = served_strategy("zigzag", 1, 8, 2, 3)
    placed = placed_router(Router(), served, {"global_num_experts": 8}, "model.layers.1.mlp.experts")
    assert isinstance(placed, Router)
    logits, captured = torch.tensor([[0.0, 0.1, 0.9, 0.2, 0.3, 0.8, 0.4, 0.5]]), []
    placed.capture_fn = captured.append
    weights, ids = placed._select_experts(None, logits)
    assert [zigzag(8, 2)[physical] for physical in ids[0].tolist()] == [2, 5]
    assert weights.tolist() == logits[:, [2, 5]].tolist()
    assert captured[0].tolist() == [[2, 5]], "captured ids are logical"
    assert not placed.supports_monolithic_kernels
    for arguments, fault in (
        ({"zero_expert_type": "copy"}, "zero experts"),
        ({"num_fused_shared_experts": 1}, "fused"),
    ):
        with pytest.raises(UnsupportedError, match=f"its router cannot be placed: .*{fault}"):
            placed_router(Router(), served, {"global_num_experts": 8, **arguments}, "layer")
    with pytest.raises(UnsupportedError, match="does not map its ids"):
        placed_router(object(), served, {"global_num_experts": 8}, "layer")


def test_a_model_with_a_placement_reads_no_output_whatever_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by its id in the Hub's cache, an output's weights were once loaded in the original's order."""
    module = SimpleNamespace(filter_duplicate_safetensors_files=lambda files, folder, index: files)
    loading.install_file_choice(module)  # type: ignore[arg-type]
    (tmp_path / "reshard_manifest.json").write_text('{"moe_layers": [{"name": "m"}], "physical_to_logical": [1, 0]}')
    files = [str(tmp_path / "a.safetensors")]
    save_file({}, files[0])
    serves_output = SimpleNamespace(
        model_config=SimpleNamespace(model=str(tmp_path), hf_config=SimpleNamespace()),
        parallel_config=SimpleNamespace(expert_placement_strategy="linear"),
        load_config=SimpleNamespace(load_format="auto"),
    )
    config = SimpleNamespace(get_current_vllm_config=lambda: serves_output)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(config=config))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.config", config)  # type: ignore[arg-type]
    logger = SimpleNamespace(init_logger=lambda name: None)
    monkeypatch.setitem(sys.modules, "vllm.logger", logger)  # type: ignore[arg-type]
    monkeypatch.setattr(worker, "_proved", [])
    assert module.filter_duplicate_safetensors_files(files, str(tmp_path), INDEX) == files, "the control"
    worker.mark_proved(served_strategy("zigzag", 1, 8, 2, 3))
    with pytest.raises(UnsupportedError, match="an output of reshard"):
        module.filter_duplicate_safetensors_files(files, str(tmp_path), INDEX)
