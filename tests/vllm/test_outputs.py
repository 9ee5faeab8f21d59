"""What the plugin refuses for outputs, without vLLM: options, new weights, adapters, returned ids."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from stand_ins import another_packages, vllms_own

from reshard.errors import UnsupportedError
from reshard.placement.contract import MARK, Contract, contract_to_json
from reshard.placement.permutations import zigzag
from reshard.placement.placement_file import PlacementFile
from reshard.vllm import agreement, lora, placed, worker
from reshard.vllm.fused import set_names, understood
from reshard.vllm.loading import install_check
from reshard.vllm.lora import touches_experts
from reshard.vllm.outputs import (
    contract_digest,
    is_output,
    note_output,
    read_placement,
    refuse_options,
    refuse_other_contract,
    refuse_worker,
)
from reshard.vllm.placed import Placed, placed_router
from reshard.vllm.placed_weights import Filling
from reshard.vllm.proof import check_filled, check_kernels
from reshard.vllm.request import resolve_in
from reshard.vllm.returned import check_returning, returning
from reshard.vllm.routing import in_logical_order
from reshard.vllm.served import current_build, served_file, served_strategy
from reshard.vllm.updates import close, own_files
from reshard.vllm.worker import Loaded

LAYER = "model.layers.1.mlp"
GROUPED = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
ORDER = zigzag(8, 2)
CONTRACT = Contract("zigzag", 2, 4, 2, {LAYER: ORDER}, {"model_type": "deepseek_v3"})
# All load formats of vLLM 0.26 to 0.33, and one that nobody knows yet.
LOAD_FORMATS = """
    auto hf safetensors fastsafetensors instanttensor dummy
    mistral pt npcache runai_streamer runai_streamer_sharded sharded_state tensorizer bitsandbytes gguf ipc_cache
    modelexpress mooncake novel
"""
ASK_FOR_FILES = {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "dummy"}


def directory(folder: Path, order: tuple[int, ...] | None = ORDER, limited: bool = False) -> Path:
    """A directory as far as the plugin reads it: an output, or an original if `order` is None."""
    folder.mkdir()
    placement = {} if order is None else {"expert_placement": contract_to_json(CONTRACT)} if limited else {}
    (folder / "config.json").write_text(json.dumps(placement))
    if order is not None:
        manifest = {"moe_layers": [{"name": LAYER}], "physical_to_logical": list(order)}
        (folder / "reshard_manifest.json").write_text(json.dumps(manifest))
    return folder


def model_config(model: object, **hf: Any) -> Any:
    config = SimpleNamespace(**hf)
    return SimpleNamespace(model=str(model), hf_config=config, hf_text_config=config)


def vllm_config(model: Any, **changes: Any) -> Any:
    return SimpleNamespace(
        **{
            "model_config": model,
            "parallel_config": SimpleNamespace(expert_placement_strategy="linear"),
            "load_config": SimpleNamespace(load_format="auto"),
            "speculative_config": None,
            "weight_transfer_config": None,
            "lora_config": None,
            "additional_config": {},
            **changes,
        }
    )


def test_an_output_is_known_by_its_contract_its_manifest_or_the_files_that_were_read(tmp_path: Path) -> None:
    original = model_config(directory(tmp_path / "original", None))
    assert not is_output(original)
    assert is_output(model_config(directory(tmp_path / "plain")))
    assert is_output(model_config("org/limited", expert_placement={}))
    from_hub = model_config("org/plain")
    assert not is_output(from_hub)
    note_output(from_hub)
    assert is_output(from_hub)


@pytest.mark.parametrize("other", ["adapter_model.safetensors", "._model.safetensors", "consolidated.safetensors"])
def test_an_output_is_known_by_its_files_whatever_lies_beside_them(other: str, tmp_path: Path) -> None:
    """Only the first file was looked at, and an adapter comes before the model."""
    folder = directory(tmp_path / "output", None)
    save_file({}, folder / "model-ep00-of-02-00001-of-00001.safetensors", metadata=MARK)
    (folder / other).write_bytes(b"no safetensors" if other.startswith(".") else save({}))
    assert is_output(model_config(folder))
    original = directory(tmp_path / "original", None)
    for name in (other, "model-00001-of-00001.safetensors"):
        save_file({}, original / name)
    assert not is_output(model_config(original)), "the control"


@pytest.mark.parametrize("load_format", LOAD_FORMATS.split())
@pytest.mark.parametrize("whose", ["load_config", "draft_load_config"])
def test_only_load_formats_that_ask_which_files_a_rank_needs_load_an_output(load_format: str, whose: str) -> None:
    """runai_streamer lists the directory: in a staged one, experts of other ranks stayed uninitialised."""
    load = SimpleNamespace(load_format=load_format)
    draft, original = model_config("out", expert_placement={}), model_config("original")
    config = vllm_config(model_config("out"), speculative_config=SimpleNamespace(draft_model_config=draft))
    setattr(config if whose == "load_config" else config.speculative_config, whose, load)
    if load_format in ASK_FOR_FILES:
        refuse_options(config, "out")
        return
    if whose == "draft_load_config":
        other = SimpleNamespace(draft_model_config=original, draft_load_config=load)
        refuse_options(vllm_config(model_config("out"), speculative_config=other), "out")
    with pytest.raises(UnsupportedError, match=rf"^out: .*{load_format} does not ask which files.*use one of auto"):
        refuse_options(config, "out")


@pytest.mark.parametrize("backend", ["nccl", "ipc", "sparse_nccl", "sharded_rdt", "novel"])
def test_weight_transfer_to_an_output_is_refused(backend: str) -> None:
    config = vllm_config(model_config("out"), weight_transfer_config=SimpleNamespace(backend=backend))
    with pytest.raises(UnsupportedError, match=rf"^out: .*{backend}.*original's numbering; serve the original"):
        refuse_options(config, "out")


def test_a_worker_of_another_package_is_refused_for_a_model_or_draft_with_a_contract() -> None:
    """Nothing would have checked its routers."""
    limited, plain = model_config("out", expert_placement={}), model_config("plain")

    def config(model: Any, draft: Any, name: str) -> Any:
        speculative = None if draft is None else SimpleNamespace(draft_model_config=draft)
        return vllm_config(model, parallel_config=SimpleNamespace(worker_cls=name), speculative_config=speculative)

    for model, draft in ((limited, None), (plain, limited), (limited, plain)):
        for own in ("auto", "vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.xpu_worker.XPUWorker"):
            refuse_worker(config(model, draft, own))
        with pytest.raises(UnsupportedError, match=r"^out: .*nothing would check what worker class other\.Worker"):
            refuse_worker(config(model, draft, "other.Worker"))
    refuse_worker(config(plain, plain, "other.Worker"))


@pytest.mark.parametrize("limited", [True, False])
def test_an_output_with_another_config_than_its_own_is_refused(limited: bool, tmp_path: Path) -> None:
    """An original's server that was given an output's files would choose other experts."""
    output = str(directory(tmp_path / "output", limited=limited))
    groups = {"n_group": 4, "topk_group": 2}
    with pytest.raises(UnsupportedError, match=r"no routing contract.*its own config"):
        refuse_other_contract(model_config("other", **groups), output)
    told = contract_to_json(CONTRACT)
    if limited:
        refuse_other_contract(model_config("other", expert_placement=told, **groups), output)
    else:
        with pytest.raises(UnsupportedError, match="no output of reshard with expert groups, but"):
            refuse_other_contract(model_config("other", expert_placement=told, **groups), output)
        refuse_other_contract(model_config("other", n_group=1, topk_group=1), output)
        refuse_other_contract(model_config("other"), output)


@pytest.mark.parametrize(
    ("served", "weights", "own", "fits"),
    [
        ("original", "original", True, True),
        ("original", "other original", True, True),
        ("original", "original", False, True),
        ("original", "plain", True, False),
        ("original", "limited", True, False),
        ("plain", "plain", True, True),
        ("plain", "alike", True, True),
        ("plain", "otherwise", True, False),
        ("plain", "original", True, False),
        ("plain", "plain", False, False),
        ("limited", "limited", True, True),
        ("limited", "original", True, False),
        ("limited", "limited", False, False),
        ("org/plain", "org/plain", True, True),
        ("org/plain", "original", True, False),
    ],
)
def test_a_reload_takes_only_weights_that_are_numbered_alike(
    served: str, weights: str, own: bool, fits: bool, tmp_path: Path
) -> None:
    for name in ("original", "other original"):
        directory(tmp_path / name, None)
    directory(tmp_path / "plain")
    directory(tmp_path / "alike")
    directory(tmp_path / "otherwise", zigzag(8, 4))
    directory(tmp_path / "limited", limited=True)
    where = {name: name if name.startswith("org/") else str(tmp_path / name) for name in (served, weights)}
    config = model_config(where[served])
    if served.startswith("org/"):
        note_output(config)
    fault = Loaded.of(config).reload_fault(where[weights], own)
    assert (fault is None) == fits, fault
    if fault:
        assert "reload_weights is refused" in fault
        assert "\n" not in fault


def test_a_worker_reloads_an_output_from_its_own_files_and_from_nothing_else(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def load_weights(self, weights: Any) -> None:
            given.append(list(weights))

    class Worker:
        def __init__(self, config: Any) -> None:
            self.vllm_config, self.model = config, Model()

        def load_model(self) -> None:
            self.model.load_weights(["at first"])
            close(self.model, "closed")  # as `loading` does

        def reload_weights(self, iterator: Any = None, path: str | None = None, checkpoint_format: bool = True) -> None:
            assert current_build().vllm_config is self.vllm_config, "vLLM 0.26 sets no current configuration here"
            self.model.load_weights([path or self.vllm_config.model_config.model] if iterator is None else iterator)

    given: list[Any] = []
    worker.install(SimpleNamespace(Worker=Worker))  # type: ignore[arg-type]
    output, original = directory(tmp_path / "output"), directory(tmp_path / "original", None)
    own = Worker(vllm_config(model_config(output)))
    own.load_model()
    own.reload_weights()
    assert given == [["at first"], [str(output)]]
    for ways, fault in (
        (lambda: own.reload_weights(["tensor"]), "refused while this output"),
        (lambda: own.reload_weights(None, str(original)), "an original"),
        (lambda: own.reload_weights(None, None, False), "refused while this output"),
        (lambda: own.model.load_weights(["tensor"]), "closed"),
    ):
        with pytest.raises(UnsupportedError, match=fault):
            ways()
    own.vllm_config.model_config.model = str(original)  # as `update_config` through collective_rpc does
    with pytest.raises(UnsupportedError, match="an original"):
        own.reload_weights()
    own.vllm_config.model_config.model = str(output)
    own.vllm_config.load_config.load_format = "runai_streamer"
    with pytest.raises(UnsupportedError, match="load format"):
        own.reload_weights()
    assert len(given) == 2
    other = Worker(vllm_config(model_config(original)))
    other.load_model()
    with pytest.raises(UnsupportedError, match="an output of reshard"):
        other.reload_weights(None, str(output))


def test_a_closed_model_is_closed_in_every_module_and_opens_for_its_own_files() -> None:
    class Part(torch.nn.Module):
        def load_weights(self, weights: list[str]) -> list[str]:
            return weights

    class Whole(Part):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.rest = Part(), torch.nn.Linear(1, 1)

    model = Whole()
    assert model.part.load_weights(["a"]) == ["a"], "the control"
    close(model, "closed")
    for module in (model, model.part):
        with pytest.raises(UnsupportedError, match="closed"):
            module.load_weights(["a"])
        with own_files():
            assert module.load_weights(["a"]) == ["a"]


def test_a_placement_that_nobody_resolved_is_refused_by_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without the plugin made the configuration, and the model was served linear with no word."""

    class Worker:
        vllm_config: Any = None

        def load_model(self) -> None:
            loaded.append(self.vllm_config)

    loaded: list[Any] = []
    worker.install(SimpleNamespace(Worker=Worker))  # type: ignore[arg-type]
    one = Worker()
    one.vllm_config = vllm_config(model_config("m"), additional_config={"reshard": {"placement": "zigzag"}})
    with pytest.raises(UnsupportedError, match=r"=zigzag: .*did not resolve it; check that reshard's plugin"):
        one.load_model()
    one.vllm_config = vllm_config(model_config("m"))
    one.load_model()
    assert len(loaded) == 1, "the control"
    monkeypatch.setenv("RESHARD_PLACEMENT", "zigzag")
    with pytest.raises(UnsupportedError, match="did not resolve it"):
        one.load_model()


@pytest.mark.parametrize("ways", ["start", "update", "update of a rank"])
def test_an_update_in_kernel_format_is_refused_with_a_placement(ways: str) -> None:
    """Some versions of vLLM copy such weights to slots as they are: no lookup would see that."""

    class Worker:
        def __init__(self, config: Any) -> None:
            self.vllm_config = config

        def start_weight_update(self, is_checkpoint_format: bool = True) -> str:
            return "taken"

        def update_weights(self, update_info: Any) -> str:
            return "taken"

    worker.install(SimpleNamespace(Worker=Worker))  # type: ignore[arg-type]
    placed = {"reshard": served_strategy("zigzag", 1, 8, 2, 3)}

    def update(additional: Any, checkpoint_format: bool) -> str:
        one, info = Worker(vllm_config(model_config("m"), additional_config=additional)), {"names": []}
        if ways == "start":
            return one.start_weight_update(checkpoint_format)
        told = {**info, "is_checkpoint_format": checkpoint_format}
        return one.update_weights(told if ways == "update" else [info, told])

    assert update(placed, True) == update({}, False) == "taken", "the controls"
    with pytest.raises(UnsupportedError, match="kernel format are ordered by slot"):
        update(placed, False)


def test_a_workers_environment_asks_for_what_its_configuration_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker:
        def load_model(self) -> None:
            raise AssertionError("loaded")

    worker.install(SimpleNamespace(Worker=Worker))  # type: ignore[arg-type]
    one: Any = Worker()
    one.vllm_config = vllm_config(
        model_config("m"), additional_config={"reshard": served_strategy("zigzag", 1, 8, 2, 3)}
    )
    monkeypatch.setenv("RESHARD_PLACEMENT", "other.json")
    with pytest.raises(UnsupportedError, match=r"is other\.json, but the configuration carries zigzag"):
        one.load_model()


def test_options_are_refused_for_a_configuration_that_got_its_placement_from_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's configurations are copied with what they carry; nobody looked at the options of the copy."""
    platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(platforms=platforms))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)

    served = served_strategy("zigzag", 1, 8, 2, 3)

    def copy(**changes: Any) -> Any:
        model = model_config("m")
        vars(model).update(get_num_experts=lambda: changes.get("experts", 8), runner_type=changes.get("runner"))
        model.get_total_num_hidden_layers = lambda: 3
        parallel = {"enable_expert_parallel": True, "enable_eplb": False, "expert_placement_strategy": "linear"}
        parallel |= {"data_parallel_size": 1, "tensor_parallel_size": 2, "worker_cls": "auto"}
        return vllm_config(
            model,
            parallel_config=SimpleNamespace(**{**parallel, **changes.get("parallel", {})}),
            lora_config=changes.get("lora"),
            load_config=SimpleNamespace(load_format=changes.get("load", "auto")),
            speculative_config=SimpleNamespace(draft_load_config=changes.get("draft_load")),
            additional_config={"reshard": type(served)({**served, "redundant": changes.get("redundant", 0)})},
        )

    resolve_in(copy(), {})
    resolve_in(copy(experts=0, runner="draft"), {})
    resolve_in(copy(parallel={"worker_cls": "vllm.v1.worker.gpu_worker.Worker"}), {})
    resolve_in(copy(runner="draft", parallel={"enable_expert_parallel": False}), {})
    for changes, fault in (
        ({"lora": object()}, "serve without LoRA"),
        ({"load": "sharded_state"}, "sharded_state does not load"),
        ({"draft_load": SimpleNamespace(load_format="tensorizer")}, "tensorizer does not load"),
        ({"parallel": {"expert_placement_strategy": "round_robin"}}, "leave that option out"),
        ({"experts": 0}, "no experts to place"),
        ({"parallel": {"enable_expert_parallel": False}}, "moves experts, but expert parallelism is off"),
        ({"parallel": {"worker_cls": "other.worker.Worker"}}, "what worker class other.worker.Worker serves"),
        ({"parallel": {"tensor_parallel_size": 4}}, "resolved for 2 EP ranks, and m is served on 4"),
        ({"redundant": 2}, "it has copies of some experts, and vLLM holds copies with EPLB only"),
    ):
        with pytest.raises(UnsupportedError, match=fault):
            resolve_in(copy(**changes), {})
    resolve_in(copy(), {"RESHARD_PLACEMENT": "zigzag"})
    with pytest.raises(UnsupportedError, match=r"is other\.json, but the configuration carries zigzag"):
        resolve_in(copy(), {"RESHARD_PLACEMENT": "other.json"})


def test_a_layer_that_its_model_builds_from_parts_of_its_own_is_refused_with_a_line() -> None:
    """It was an AttributeError."""
    runner = torch.nn.Module()
    runner.router, runner.routed_experts = object(), object()
    model = torch.nn.Module()
    model.experts = runner
    served = served_strategy("zigzag", 1, 8, 2, 3)
    for is_draft in (False, True):
        with pytest.raises(UnsupportedError, match=r"layer experts: reshard does not know how it is built.*moe_config"):
            check_filled(model, served, is_draft=is_draft, pipelined=False, dummy=False)


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_placement_that_has_a_layer_under_two_names_is_refused(pipelined: bool) -> None:
    """One of the two orders counted, and the log said that all was placed."""

    class Router(Placed):
        def __init__(self) -> None:
            pass

    def model_of(*layers: int) -> Any:
        model: Any = torch.nn.Module()
        for layer in layers:
            runner = torch.nn.Module()
            experts = SimpleNamespace(reshard_filling=Filling((0, 1), (0, 1)), global_num_experts=2)
            runner.router, runner.routed_experts = Router(), experts
            runner.moe_config = SimpleNamespace(moe_parallel_config=SimpleNamespace(ep_size=1))
            names = {"model": {"layers": {str(layer): {"mlp": {"experts": runner}}}}}
            add(model, names)
        return model

    def add(module: Any, names: Any) -> None:
        for name, inner in names.items():
            if isinstance(inner, torch.nn.Module):
                module.add_module(name, inner)
                continue
            if not hasattr(module, name):
                module.add_module(name, torch.nn.Module())
            add(getattr(module, name), inner)

    def check(layers: list[str], model: Any) -> int:
        orders = {layer: [1, 0] if number else [0, 1] for number, layer in enumerate(layers)}
        file = PlacementFile(
            strategy="file", ep_size=1, model_type=None, num_experts=2, layers=layers, physical_to_logical=orders
        )
        served = served_file("a.json", file, 1, 9, "make it again")
        return check_filled(model, served, is_draft=False, pipelined=pipelined, dummy=True)

    layer, other, draft = "model.layers.1.mlp", "language_model.layers.1.mlp", "model.layers.9.mlp"
    assert check([layer, "model.layers.2.mlp", draft], model_of(1, 2)) == 2, "the control"
    with pytest.raises(UnsupportedError, match=rf"layer {other} is {layer}, which has another name there as well"):
        check([layer, other], model_of(1))
    if not pipelined:
        with pytest.raises(UnsupportedError, match=r"layer model\.layers\.3\.mlp is no MoE layer of this model"):
            check([layer, "model.layers.3.mlp"], model_of(1))


def test_a_layer_with_a_part_of_another_packages_is_refused_with_a_placement() -> None:
    """A platform plugin's class may route in its own way."""

    class Router(Placed, vllms_own):
        __module__ = "abc"  # as Python says of a class made from vLLM's, which is abstract

    served = served_strategy("zigzag", 1, 8, 2, 3)
    for make, refused in ((vllms_own, False), (another_packages, True)):
        experts = vllms_own(quant_method=make(is_monolithic=False), global_num_experts=8)
        runner = vllms_own(router=Router(), routed_experts=experts)
        model: Any = SimpleNamespace(named_modules=lambda runner=runner: [("experts", runner)])
        if not refused:
            assert check_kernels(model, served, 2) == {"vllms_own"}
            continue
        with pytest.raises(UnsupportedError, match=r"layer experts: a part of it is not vLLM's own \(other\."):
            check_kernels(model, served, 2)


def test_a_model_that_is_built_outside_of_vllms_usual_loaders_is_refused() -> None:
    """`vllm preload` does that: a linear engine could have mapped placed weights."""

    class BaseModelLoader:
        load_config = SimpleNamespace(load_format="auto")

        def create_model(self, vllm_config: Any, model_config: Any) -> str:
            return str(module.initialize_model(vllm_config=vllm_config, model_config=model_config))

        def load_model(self, vllm_config: Any, model_config: Any) -> str:
            return self.create_model(vllm_config, model_config)

    module: Any = SimpleNamespace(
        BaseModelLoader=BaseModelLoader, initialize_model=lambda vllm_config, model_config: "built"
    )
    install_check(module)
    loader, placed = BaseModelLoader(), {"reshard": served_strategy("zigzag", 1, 8, 2, 3)}
    original, limited = model_config("m"), model_config("m", expert_placement=contract_to_json(CONTRACT))
    for config in (vllm_config(original, additional_config=placed), vllm_config(limited)):
        assert loader.load_model(config, config.model_config) == "built"
        with pytest.raises(UnsupportedError, match=r"^m: its experts are placed, .*outside of its usual loaders"):
            loader.create_model(config, config.model_config)
    assert loader.create_model(vllm_config(original), original) == "built", "the control"
    with pytest.raises(UnsupportedError, match="outside of its usual loaders"):
        loader.create_model(vllm_config(original), limited)


def test_ranks_with_an_output_with_expert_groups_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with the original beside them was not noticed, whether it had the plugin or not: answers were wrong."""

    class BaseModelLoader:
        load_config = SimpleNamespace(load_format="auto")

        def load_model(self, vllm_config: Any, model_config: Any) -> None:
            module.initialize_model(vllm_config=vllm_config, model_config=model_config)

    module: Any = SimpleNamespace(
        BaseModelLoader=BaseModelLoader, initialize_model=lambda vllm_config, model_config: None
    )
    install_check(module)
    monkeypatch.setenv("RESHARD_AGREEMENT_SECONDS", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def load(store: Any, rank: int, contract: Contract | None) -> None:
        monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(agreement, "_loads", {"model": iter([0])})
        config = model_config("m", **({} if contract is None else {"expert_placement": contract_to_json(contract)}))
        BaseModelLoader().load_model(vllm_config(config), config)

    otherwise = replace(CONTRACT, physical_to_logical={LAYER: zigzag(8, 4)})
    for first, fault in (
        (None, r"ranks 0 serve a different placement \(linear"),
        (otherwise, "ranks 0 serve a different"),
    ):
        store = torch.distributed.HashStore()
        if first is not None:
            with pytest.raises(UnsupportedError, match="ranks 1 did not report"):
                load(store, 0, first)
        else:
            load(store, 0, None)
        with pytest.raises(UnsupportedError, match=rf"{fault}.*and the same model"):
            load(store, 1, CONTRACT)
    store = torch.distributed.HashStore()
    agreement.publish(store, "model/0", 0, contract_digest(CONTRACT))
    load(store, 1, CONTRACT)  # the control


# Adapters


@pytest.mark.parametrize(
    ("tensor", "touches"),
    [
        ("base_model.model.model.layers.1.self_attn.q_a_proj.lora_A.weight", False),
        ("base_model.model.model.layers.1.attention.query_key_value.lora_A.weight", False),
        ("base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight", False),
        ("base_model.model.model.layers.1.mlp.shared_experts.down_proj.lora_B.weight", False),
        ("base_model.model.model.layers.1.feed_forward.shared_expert.down_proj.lora_B.weight", False),
        ("base_model.model.model.embed_tokens.lora_embedding_A", False),
        ("base_model.model.lm_head.lora_A.weight", False),
        ("base_model.model.model.layers.1.mlp.experts.3.gate_proj.lora_A.weight", True),
        ("base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight", True),
        ("base_model.model.model.layers.1.mlp.experts.lora_A.weight", True),
        ("base_model.model.model.layers.1.mlp.gate.lora_B.weight", True),
        ("base_model.model.model.layers.1.mlp.gate.weight", True),
        ("base_model.model.model.layers.1.mlp.router.lora_B.weight", True),
        ("base_model.model.model.layers.1.block_sparse_moe.gate.lora_B.weight", True),
        ("base_model.model.model.layers.1.something.new.lora_B.weight", True),
    ],
)
def test_an_adapters_tensors_of_experts_and_routers_are_told_from_others(tensor: str, touches: bool) -> None:
    assert touches_experts(tensor) == touches


def test_an_adapter_of_experts_is_refused_for_outputs_only(tmp_path: Path) -> None:
    class Adapter:
        def __init__(self, tensors: list[str]) -> None:
            self.tensors = tensors

        @classmethod
        def from_lora_tensors(cls, number: int, tensors: dict[str, Any], helper: Any = None) -> Adapter:
            return cls(list(tensors))

    class Manager:
        def __init__(self, config: Any, device: str, kind: type[Adapter] = Adapter) -> None:
            self._lora_model_cls = kind

    lora.install(SimpleNamespace(WorkerLoRAManager=Manager))  # type: ignore[arg-type]
    output = directory(tmp_path / "output")
    attention, expert = "model.layers.1.self_attn.o_proj.lora_A.weight", "model.layers.1.mlp.experts.0.w1.lora_A.weight"
    served = Manager(vllm_config(model_config(output)), "cpu")
    found = served._lora_model_cls.from_lora_tensors(1, {attention: 0})
    assert isinstance(found, Adapter)
    assert found.tensors == [attention]
    with pytest.raises(UnsupportedError, match=rf"^{output}: .*{expert} may belong to an expert"):
        served._lora_model_cls.from_lora_tensors(1, tensors={attention: 0, expert: 0})
    original = Manager(vllm_config(model_config(directory(tmp_path / "original", None))), "cpu")
    assert original._lora_model_cls.from_lora_tensors(1, {expert: 0}).tensors == [expert]


# Routers


class Router:
    """A stand-in for a vLLM router that captures what it chose."""

    def __init__(self) -> None:
        self.capture_fn: Any = None

    def _compute_routing(self, hidden: Any, logits: torch.Tensor, dtype: Any = None, **more: Any) -> Any:
        return logits.topk(2, dim=1)

    def _select_experts(self, hidden: Any, logits: torch.Tensor) -> Any:
        weights, ids = self._compute_routing(hidden, logits)
        if self.capture_fn is not None:
            self.capture_fn(ids)
        return weights, ids


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(device_config=SimpleNamespace(device="cpu"))
    module = SimpleNamespace(get_current_vllm_config=lambda: config)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(config=module))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.config", module)  # type: ignore[arg-type]


def test_an_outputs_router_captures_the_originals_ids_and_returns_slots(current: None) -> None:
    """vLLM returned slots, as if they were experts."""
    router, captured = returning(Router(), ORDER, LAYER), []
    logits = torch.tensor([[0.0, 0.1, 0.9, 0.2, 0.3, 0.8, 0.4, 0.5]])
    router._select_experts(None, logits)
    router.capture_fn = captured.append
    _, slots = router._select_experts(None, logits)
    assert slots.tolist() == [[2, 5]]
    assert [ids.tolist() for ids in captured] == [[[ORDER[2], ORDER[5]]]]
    router.capture_fn = None
    router._select_experts(None, logits)
    assert len(captured) == 1


def test_the_map_to_the_originals_ids_survives_sleep(current: None) -> None:
    class Runner(torch.nn.Module):
        def __init__(self, router: object, routed_experts: object) -> None:
            super().__init__()
            self.router, self.routed_experts = router, routed_experts

    placed.install_runner(SimpleNamespace(MoERunner=Runner))  # type: ignore[arg-type]
    runner = Runner(returning(Router(), ORDER, LAYER), object())
    assert len(dict(runner.named_buffers())) == 1


def test_a_model_that_would_return_slots_is_refused(current: None) -> None:
    def model(router: object, monolithic: bool = False, **more: torch.nn.Module) -> torch.nn.Module:
        whole, runner = torch.nn.Module(), torch.nn.Module()
        runner.router = router
        runner.routed_experts = SimpleNamespace(quant_method=SimpleNamespace(is_monolithic=monolithic))
        whole.experts = runner
        for name, module in more.items():
            setattr(whole, name, module)
        return whole

    by_itself = torch.nn.Module()
    by_itself.capture_fn = None  # type: ignore[assignment]
    router = returning(Router(), ORDER, LAYER)
    check_returning(model(router))
    for bad in (model(Router()), model(router, monolithic=True), model(router, mega=by_itself)):
        with pytest.raises(UnsupportedError, match="would return slots"):
            check_returning(bad)


@pytest.mark.parametrize(
    ("argument", "value", "refused"),
    [
        ("skip_padding", True, False),
        ("renormalize", True, False),
        ("novel", None, False),
        ("novel", 0, False),
        ("novel", torch.zeros(8), True),
        ("bias_vl", torch.zeros(8), True),
        ("novel", "a", True),
    ],
)
def test_an_output_is_refused_where_routers_get_an_argument_that_nobody_knows(
    argument: str, value: Any, refused: bool, current: None
) -> None:
    arguments = {**GROUPED, argument: value}
    if not refused:
        in_logical_order(Router(), CONTRACT, arguments, LAYER)
        return
    with pytest.raises(UnsupportedError, match=rf"^{LAYER}: .*given {argument}, which reshard does not know"):
        in_logical_order(Router(), CONTRACT, arguments, LAYER)


@pytest.mark.parametrize("placed_original", [False, True], ids=["output", "placed original"])
def test_vllms_router_routes_where_it_is_given_something_that_the_kernel_does_not_know(
    placed_original: bool, current: None
) -> None:
    """The kernel routed as if it had not been given."""

    class VllmsRouter(Router):
        def _compute_routing(self, hidden: Any, logits: torch.Tensor, dtype: Any = None, **more: Any) -> Any:
            asked.append(more)
            return super()._compute_routing(hidden, logits, dtype)

        def _select_experts(self, hidden: Any, logits: torch.Tensor, dtype: Any = None, **more: Any) -> Any:
            weights, ids = self._compute_routing(hidden, logits, dtype, **more)
            return weights, self._apply_eplb_mapping(ids)

        def _apply_eplb_mapping(self, ids: torch.Tensor) -> torch.Tensor:
            return ids

        def _convert_indices_dtype(self, ids: torch.Tensor, dtype: Any) -> torch.Tensor:
            return ids

    class Kernel:
        def route(self, logits: torch.Tensor, bias: None, router: Any) -> tuple[torch.Tensor, torch.Tensor]:
            ran.append(len(logits))
            return torch.ones(len(logits), 2), torch.zeros(len(logits), 2)

    asked: list[dict[str, Any]] = []
    ran: list[int] = []
    own: Any = VllmsRouter()
    vars(own).update(e_score_correction_bias=None)
    if placed_original:
        router = placed_router(own, served_strategy("zigzag", 1, 8, 2, 3), {"global_num_experts": 8}, LAYER)
        router.reshard_kernel, route = Kernel(), router._select_experts
    else:
        router = in_logical_order(own, CONTRACT, GROUPED, LAYER)
        router._fused, route = Kernel(), router._compute_routing
    hidden, logits, mask = torch.ones(2, 3), torch.rand(2, 8), torch.ones(2)
    route(hidden, logits, None)
    assert (ran, asked) == ([2], []), "the control"
    route(hidden, logits, None, novel=mask)
    assert (ran, asked) == ([2], [{"novel": mask}])


def test_the_kernel_steps_aside_where_it_is_given_something_that_it_does_not_know() -> None:
    assert understood((), {"input_ids": torch.ones(1)})
    assert understood((None,), {"novel": None})
    assert not understood((torch.ones(1),), {})
    assert not understood((), {"novel": torch.ones(1)})
    assert set_names({"top_k": 8, "skip_padding": True, "bias_vl": None, "lo": 0}, ("top_k",)) == ["skip_padding"]


def test_read_placement_reads_a_manifest_again_when_it_changed(tmp_path: Path) -> None:
    output = directory(tmp_path / "output")
    assert read_placement(str(output)) == {LAYER: ORDER}
    manifest, other = output / "reshard_manifest.json", tmp_path / "other.json"
    other.write_text(manifest.read_text().replace(str(list(ORDER)), str(list(range(8)))))
    other.rename(manifest)
    assert read_placement(str(output)) == {LAYER: tuple(range(8))}
