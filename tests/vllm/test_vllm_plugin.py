"""The plugin's own decisions, without vLLM: which files to read, when to warn, which routers and versions to accept."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stand_ins import another_packages, vllms_own

from reshard import CheckpointError, OutputError, UnsupportedError
from reshard.placement.contract import Contract, contract_from_json, contract_to_json, lock_config, locked_values
from reshard.placement.permutations import zigzag
from reshard.vllm import configs, hooks, placed, support, worker
from reshard.vllm.configs import read_config
from reshard.vllm.loading import _parallel, check_model, install_file_choice
from reshard.vllm.outputs import INDEX
from reshard.vllm.patching import replace_once
from reshard.vllm.rank_files import Parallel, choose_files, needed_ranks, placement_warnings
from reshard.vllm.routing import current_contract, in_logical_order, placement_of

SHARED = ["/m/model-shared-00001-of-00002.safetensors", "/m/model-shared-00002-of-00002.safetensors"]
RANKED = [f"/m/model-ep{rank:02}-of-04-{n:05}-of-00002.safetensors" for rank in range(4) for n in (1, 2)]
NAMED = SHARED + RANKED


CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "x.Y"},
    **{"n_group": 4, "topk_group": 2, "hidden_size": 16},
}


def contract(placement: dict[str, tuple[int, ...]] | None = None) -> Contract:
    """A contract of 8 experts in 4 groups."""
    placement = placement or {"model.layers.1.mlp": zigzag(8, 2)}
    return Contract("zigzag", 2, 4, 2, placement, locked_values(CONFIG))


def test_importing_and_registering_the_plugin_imports_no_command_and_nothing_of_vllm_or_torch(tmp_path: Path) -> None:
    """Empty packages with these names show whether one is imported. The controls import one."""
    for name in ("vllm", "torch", "transformers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    seen = "print(sorted({'vllm', 'torch', 'transformers', 'reshard.commands'} & sys.modules.keys()))"
    for then, found in (
        ("reshard.vllm.register()", "[]"),
        ("import torch", "['torch']"),
        ("from reshard import zigzag", "['reshard.commands']"),
    ):
        script = f"import sys, reshard.vllm; {then}; {seen}"
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert ran.stdout.strip() == found, ran.stderr


def test_a_rank_reads_the_shared_files_and_its_own() -> None:
    for rank in range(4):
        chosen = choose_files(NAMED, NAMED, 8, Parallel(rank, 4, consecutive=True))
        assert chosen == SHARED + RANKED[2 * rank : 2 * rank + 2]


@pytest.mark.parametrize("parallel", [Parallel(0, 1, True), Parallel(1, 4, False)])
def test_without_expert_parallelism_or_with_eplb_a_rank_reads_every_file(parallel: Parallel) -> None:
    assert choose_files(NAMED, NAMED, 8, parallel) == NAMED


@pytest.mark.parametrize("experts", [8, 9, 10, 15])
@pytest.mark.parametrize("served_on", [2, 3, 4, 5, 8])
def test_with_another_ep_size_a_rank_reads_exactly_the_ranks_that_hold_its_experts(
    experts: int, served_on: int
) -> None:
    def slots(size: int) -> list[set[int]]:
        ends = [rank * (experts // size) + min(rank, experts % size) for rank in range(size + 1)]
        return [set(range(ends[rank], ends[rank + 1])) for rank in range(size)]

    for rank, owned in enumerate(slots(served_on)):
        needed = needed_ranks(4, experts, Parallel(rank, served_on, consecutive=True))
        assert needed == {holder for holder, held in enumerate(slots(4)) if held & owned}


def test_the_error_for_an_absent_file_names_it_and_says_how_to_get_it() -> None:
    present = [file for file in NAMED if file != RANKED[5]]
    assert choose_files(NAMED, present, 8, Parallel(1, 4, consecutive=True))
    with pytest.raises(OutputError, match=r"model-ep02-of-04-00002-of-00002.*EP rank 2 of 4.*reshard stage"):
        choose_files(NAMED, present, 8, Parallel(2, 4, consecutive=True))
    staged = [file for file in NAMED if "ep02" not in file]
    with pytest.raises(OutputError, match="reshard stage"):
        choose_files(staged, staged, 8, Parallel(2, 4, consecutive=True))


@pytest.mark.parametrize(
    ("parallel", "redundant", "expected"),
    [
        (Parallel(0, 4, True), 0, []),
        (Parallel(0, 1, True), 0, ["expert parallelism is off"]),
        (Parallel(0, 2, True), 0, ["with --ep 2"]),
        (Parallel(0, 4, False), 8, ["8 redundant experts"]),
    ],
)
def test_options_that_make_the_placement_useless_give_a_warning(
    parallel: Parallel, redundant: int, expected: list[str]
) -> None:
    warnings = placement_warnings(4, parallel, redundant)
    assert len(warnings) == len(expected)
    assert all(part in warning for part, warning in zip(expected, warnings, strict=True))


def test_a_layers_placement_is_found_by_its_number_if_layers_differ() -> None:
    one, other = zigzag(8, 2), zigzag(8, 4)
    both = {"model.layers.1.mlp": one, "model.layers.2.mlp": other}
    assert placement_of(both, "model.layers.2.mlp.experts") == other
    assert placement_of(both, "language_model.model.layers.1.mlp.experts") == one
    with pytest.raises(UnsupportedError, match=r"layers\.3"):
        placement_of(both, "model.layers.3.mlp.experts")
    assert placement_of({"model.layers.1.mlp": one}, "anything") == one


def test_a_locked_config_reads_as_the_original_and_keeps_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.vllm.configs.require_support", lambda where: None)
    locked = lock_config(CONFIG, contract())
    assert "auto_map" not in locked
    read = read_config(locked, "here")
    assert read.pop("expert_placement") == contract_to_json(contract())
    assert read == CONFIG
    assert read_config(CONFIG, "here") is CONFIG
    locked["expert_placement"] = {**locked["expert_placement"], "version": 4}
    with pytest.raises(CheckpointError, match=r"version 4.* reads versions 1 to 3; upgrade reshard"):
        read_config(locked, "here")


@pytest.mark.parametrize("copied", [False, True])
def test_an_opened_config_arrives_only_where_reshard_is(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker without reshard it was the original's config, and the worker served it as that."""
    registered: list[bool] = []
    monkeypatch.setattr("reshard.vllm.register", lambda: registered.append(True))
    monkeypatch.setattr("reshard.vllm.configs.require_support", lambda where: None)
    locked = lock_config(CONFIG, contract())
    opened = read_config(locked, "here")
    if copied:
        opened = copy.deepcopy(opened)
    assert not registered
    pickled = pickle.dumps(opened)
    arrived = pickle.loads(pickled)
    assert registered, "the process that it arrives in has the plugin from then on"
    assert arrived == opened
    assert contract_from_json(arrived["expert_placement"], "here") == contract()
    assert json.loads(json.dumps(arrived)) == opened
    code = "import pickle, sys; sys.modules['reshard'] = None; pickle.loads(bytes.fromhex(sys.argv[1]))"
    absent = subprocess.run([sys.executable, "-c", code, pickled.hex()], capture_output=True, text=True)
    assert "ModuleNotFoundError" in absent.stderr


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.26.0", True), ("0.32.0+cpu", True), ("0.33.1", True), ("0.25.2", False), ("0.34.0", False), ("dev", False)],
)
def test_an_unsupported_vllm_version_is_refused_and_the_supported_ones_are_named(
    version: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))  # type: ignore[arg-type]
    assert (support.version_fault(hooks.OUTPUT) is None) == fits
    if not fits:
        with pytest.raises(UnsupportedError, match=rf"0\.26 to 0\.33.*{version}"):
            support.require_support("here")


def test_a_router_factory_without_an_expected_parameter_is_detected() -> None:
    arguments = ", ".join(f"{name}=None" for name in hooks.ROUTER_ARGUMENTS)
    functions: dict[str, object] = {}
    exec(
        f"def same({arguments}, more=None): ...\ndef other({arguments.replace('topk_group=None, ', '')}): ...",
        functions,
    )
    assert support.hook_fault(functions["same"]) is None
    assert "topk_group" in str(support.hook_fault(functions["other"]))
    assert support.hook_fault(None)


def test_each_wrapper_replaces_a_function_once() -> None:
    """A second wrapper of a function was once dropped: RESHARD_TRACE recorded nothing beside another hook."""
    module = ModuleType("module")
    module.double = lambda x: 2 * x  # type: ignore[attr-defined]

    def add_one(old: Callable[[int], int]) -> Callable[[int], int]:
        return lambda x: old(x) + 1

    def add_ten(old: Callable[[int], int]) -> Callable[[int], int]:
        return lambda x: old(x) + 10

    for wrap in (add_one, add_one, add_ten, add_one, add_ten):
        replace_once(module, "double", wrap)
    assert module.double(3) == 17


def test_a_class_method_is_replaced_too_and_stays_one() -> None:
    class Config:
        @classmethod
        def name(cls) -> str:
            return cls.__name__

    class Other(Config): ...

    def loud(old: Callable[[type], str]) -> Callable[[type], str]:
        return lambda cls: old(cls).upper()

    for _ in range(2):
        replace_once(Config, "name", loud)
    assert (Config.name(), Other().name()) == ("CONFIG", "OTHER")


def test_the_lock_is_open_where_vllm_reads_a_config_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.vllm.configs.require_support", lambda where: None)
    locked = lock_config(CONFIG, contract())

    class PretrainedConfig:
        @classmethod
        def get_config_dict(cls, path: str, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            return locked, kwargs

    class HFConfigParser:
        def parse(self, fails: bool = False) -> Any:
            if fails:
                raise OSError
            return read()

    def read() -> Any:
        return PretrainedConfig.get_config_dict("here")[0]["model_type"]

    configs.install(SimpleNamespace(PretrainedConfig=PretrainedConfig))  # type: ignore[arg-type]
    configs.install_parsers(SimpleNamespace(HFConfigParser=HFConfigParser))  # type: ignore[arg-type]
    assert read() == "reshard_deepseek_v3"
    assert HFConfigParser().parse() == "deepseek_v3"
    with pytest.raises(OSError):
        HFConfigParser().parse(fails=True)
    assert read() == "reshard_deepseek_v3"
    with configs.open_lock(), ThreadPoolExecutor() as other:
        assert other.submit(read).result() == "reshard_deepseek_v3", "another thread"


@pytest.mark.parametrize(
    ("changes", "consecutive"),
    [
        ({}, True),
        ({"enable_eplb": True}, False),
        ({"expert_placement_strategy": "round_robin"}, False),
        ({"load_format": "fastsafetensors"}, False),
        ({"tensor": "model.layers.1.mlp.experts.0.w1.input_scale"}, False),
    ],
)
def test_a_rank_reads_all_files_if_it_may_need_any_expert(
    changes: dict[str, object], consecutive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"load_format": "auto", "tensor": "model.layers.1.mlp.experts.0.w1.weight_scale", **changes}
    group = SimpleNamespace(rank_in_group=1, world_size=4)
    module = SimpleNamespace(get_ep_group=lambda: group)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", module)  # type: ignore[arg-type]
    config = SimpleNamespace(
        enable_expert_parallel=True,
        enable_eplb=settings.get("enable_eplb", False),
        expert_placement_strategy=settings.get("expert_placement_strategy", "linear"),
    )
    assert _parallel(config, str(settings["load_format"]), [str(settings["tensor"])]) == Parallel(1, 4, consecutive)


class Chooser:
    """A stand-in for a vLLM router."""

    __module__ = "vllm.stand_in"

    def _compute_routing(self, hidden_states: object, logits: torch.Tensor, indices_type: object = None) -> object:
        weights, ids = logits.topk(2, dim=1)
        return weights, ids.int()


@pytest.fixture
def vllm_config(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for vLLM's configuration; its model has a contract."""
    hf_config = SimpleNamespace(expert_placement=contract_to_json(contract()))
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config, model="here"),
        load_config=SimpleNamespace(load_format="auto"),
        device_config=SimpleNamespace(device="cpu"),
    )
    module = SimpleNamespace(get_current_vllm_config=lambda: config)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(config=module))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.config", module)  # type: ignore[arg-type]
    return config


GROUPED = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}


def test_a_router_gets_logits_in_logical_order_and_returns_physical_ids(vllm_config: SimpleNamespace) -> None:
    found = current_contract()
    assert found is not None
    router = in_logical_order(Chooser(), found, GROUPED, "layer")
    logical = torch.tensor([[0.0, 0.1, 0.9, 0.2, 0.3, 0.8, 0.4, 0.5]])
    order = list(zigzag(8, 2))
    weights, ids = router._compute_routing(None, logical[:, order])
    assert [order[physical] for physical in ids[0].tolist()] == [2, 5]
    assert weights.tolist() == logical[:, [2, 5]].tolist()
    assert ids.dtype == torch.int32
    assert not router.supports_monolithic_kernels


def test_a_router_that_gets_trial_logits_gets_as_many_hidden_states(vllm_config: SimpleNamespace) -> None:
    class Strict(Chooser):
        def _compute_routing(self, hidden_states: object, logits: torch.Tensor, indices_type: object = None) -> object:
            assert isinstance(hidden_states, torch.Tensor)
            seen.append(tuple(hidden_states.shape))
            assert len(hidden_states) == len(logits), "Number of tokens mismatch"
            return super()._compute_routing(hidden_states, logits, indices_type)

    class TriesOut:
        def route(self, logits: torch.Tensor, bias: object, router: Callable[[torch.Tensor], Any]) -> Any:
            assert bias is None
            router(torch.zeros(7, 8))
            return router(logits)

    seen: list[tuple[int, ...]] = []
    plain = Strict()
    plain.e_score_correction_bias = None  # type: ignore[attr-defined]
    router = in_logical_order(plain, contract(), GROUPED, "layer")
    router._fused = TriesOut()
    hidden, logits = torch.ones(3, 5), torch.rand(3, 8)
    router._compute_routing(hidden, logits)
    assert seen == [(7, 5), (3, 5)]


def test_an_id_that_marks_padding_is_unchanged(vllm_config: SimpleNamespace) -> None:
    class Padding(Chooser):
        def _compute_routing(self, *arguments: object, **more: object) -> object:
            return torch.ones(1, 2), torch.tensor([[-1, 3]])

    router = in_logical_order(Padding(), contract(), GROUPED, "layer")
    _, ids = router._compute_routing(None, torch.zeros(1, 8))
    assert ids.tolist() == [[-1, zigzag(8, 2).index(3)]]


def test_sleep_saves_where_an_outputs_experts_are_and_waking_up_restores_it(vllm_config: SimpleNamespace) -> None:
    class Runner(torch.nn.Module):
        def __init__(self, router: object, routed_experts: object) -> None:
            super().__init__()
            self.router, self.routed_experts = router, routed_experts

    class Worker:
        vllm_config: Any = None

        def wake_up(self, tags: list[str] | None = None) -> None: ...

    placed.install_runner(SimpleNamespace(MoERunner=Runner))  # type: ignore[arg-type]
    worker.install(SimpleNamespace(Worker=Worker))  # type: ignore[arg-type]
    router = in_logical_order(Chooser(), contract(), GROUPED, "layer")
    runner = Runner(router, object())
    assert [tensor for tensor in vars(router).values() if isinstance(tensor, torch.Tensor)] == []
    buffers = dict(runner.named_buffers())
    assert len(buffers) == 1, "a module's: sleep level 2 saves it"
    assert not runner.state_dict(), "not persistent: a reload leaves it alone"

    def routed() -> list[int]:
        ids: list[int] = router._compute_routing(None, torch.arange(8.0)[None, list(zigzag(8, 2))])[1][0].tolist()
        return ids

    right = routed()
    for buffer in buffers.values():
        buffer.zero_()
    assert routed() != right
    Worker().wake_up(["kv_cache"])
    assert routed() != right
    Worker().wake_up(["weights"])
    assert routed() == right, "a draft's is saved by no vLLM before 0.33"


@pytest.mark.parametrize("eplb", [False, True])
def test_round_robin_on_top_of_an_output_is_refused_when_its_files_are_chosen(
    eplb: bool, vllm_config: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also of one without groups that came from the Hub, which no config tells from an original."""
    said = SimpleNamespace(init_logger=lambda name: SimpleNamespace(warning=print, info=print))
    monkeypatch.setitem(sys.modules, "vllm.logger", said)  # type: ignore[arg-type]
    vllm_config.parallel_config = SimpleNamespace(
        enable_expert_parallel=False,
        enable_eplb=eplb,
        eplb_config=SimpleNamespace(num_redundant_experts=0),
        expert_placement_strategy="round_robin",
    )
    vllm_config.model_config.get_num_experts = lambda: 8
    contract = vllm_config.model_config.hf_config.expert_placement
    (tmp_path / "config.json").write_text(json.dumps({"expert_placement": contract}))
    files = [str(tmp_path / Path(name).name) for name in NAMED]
    for name in files:
        save_file({}, name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: Path(name).name for name in files}}))
    module = SimpleNamespace(filter_duplicate_safetensors_files=lambda files, folder, index: files)
    install_file_choice(module)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"place them once more, and some kernels answer wrongly.*leave that"):
        module.filter_duplicate_safetensors_files(files, str(tmp_path), INDEX)
    vllm_config.parallel_config.expert_placement_strategy = "linear"
    assert sorted(module.filter_duplicate_safetensors_files(files, str(tmp_path), INDEX)) == sorted(files)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"use_grouped_topk": False}, "does not route by groups"),
        ({"topk_group": 3}, r"its groups are \(4, 3\)"),
        ({"custom_routing_function": print}, "a routing function of its own"),
        ({"num_fused_shared_experts": 1}, "fused shared experts"),
        ({"zero_expert_type": "identity"}, "zero experts"),
    ],
)
def test_a_router_that_cannot_be_kept_exact_is_refused(
    arguments: dict[str, object], fault: str, vllm_config: SimpleNamespace
) -> None:
    with pytest.raises(UnsupportedError, match=rf"^layer.*{fault}"):
        in_logical_order(Chooser(), contract(), {**GROUPED, **arguments}, "layer")


@pytest.mark.parametrize("load_format", ["pt", "npcache", "mistral", "gguf", "tensorizer"])
def test_a_load_format_that_does_not_read_the_index_is_refused(load_format: str, vllm_config: SimpleNamespace) -> None:
    assert current_contract() == contract()
    vllm_config.load_config.load_format = load_format
    with pytest.raises(UnsupportedError, match=load_format):
        current_contract()
    del vllm_config.model_config.hf_config.expert_placement
    assert current_contract() is None


def test_the_check_after_loading_refuses_every_layer_that_does_not_route_by_the_contract(
    vllm_config: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = in_logical_order(Chooser(), contract(), GROUPED, "layer")
    layer = SimpleNamespace(create_fused_moe_router=None)
    module: object = layer
    for name in ("layer", "fused_moe", "layers", "model_executor"):
        module = SimpleNamespace(**{name: module})
    for package in ("", ".model_executor", ".model_executor.layers", ".model_executor.layers.fused_moe"):
        monkeypatch.setitem(sys.modules, f"vllm{package}", module)  # type: ignore[arg-type]
        module = next(iter(vars(module).values()))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.fused_moe.layer", layer)  # type: ignore[arg-type]

    def runner(router: object, monolithic: bool = False) -> SimpleNamespace:
        method = vllms_own(is_monolithic=monolithic)
        return vllms_own(router=router, routed_experts=vllms_own(quant_method=method))

    def model(*runners: SimpleNamespace) -> SimpleNamespace:
        modules = [(f"model.layers.{number}.mlp.experts", module) for number, module in enumerate(runners)]
        return SimpleNamespace(named_modules=lambda: modules, config=SimpleNamespace(num_hidden_layers=2))

    good, method = runner(exact), another_packages(is_monolithic=False)
    foreign = (  # as another package's platform plugin puts its classes in the place of vLLM's
        another_packages(**vars(good)),
        runner(another_packages()),
        vllms_own(router=exact, routed_experts=another_packages(**vars(good.routed_experts))),
        vllms_own(router=exact, routed_experts=vllms_own(quant_method=method)),
    )
    check_model(model(good), contract(), is_draft=False)
    for bad, fault in (
        (model(runner(Chooser())), "does not route by the contract"),
        (model(runner(exact, monolithic=True)), "lets its kernel .* route"),
        (model(), "only 0 of its 1 MoE layers"),
        *((model(layer), r"a part that is not vLLM's own \(other\.") for layer in foreign),
    ):
        with pytest.raises(UnsupportedError, match=f"{fault}.*reshard restore"):
            check_model(bad, contract(), is_draft=False)
    layers = {f"model.layers.{number}.mlp": zigzag(8, 2) for number in (1, 2, 3)}
    for stage, expected in ((range(2), 1), (range(2, 4), 2), (range(1), 0)):
        check_model(model(*[runner(exact)] * expected), contract(layers), is_draft=False, stage=stage)
        if expected:
            with pytest.raises(UnsupportedError, match=f"only {expected - 1} of its {expected} MoE layers"):
                check_model(model(*[runner(exact)] * (expected - 1)), contract(layers), is_draft=False, stage=stage)
    with pytest.raises(UnsupportedError, match="only 0 of its 1 MoE layers"):
        check_model(model(), contract(layers), is_draft=True, stage=range(1))


def test_a_row_of_files_that_lacks_a_number_is_refused() -> None:
    """A rank's file that was gone from the directory and from the index was not missed."""
    named = [f"model-ep00-of-01-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    everything = Parallel(ep_rank=0, ep_size=1, consecutive=True)
    assert choose_files(named, named, 8, everything) == named, "the control"
    for gone in named:
        left = [name for name in named if name != gone]
        with pytest.raises(OutputError, match=f"names no {gone}"):
            choose_files(left, left, 8, everything)
