"""A draft with a model of its own: each model that vLLM builds keeps its own contract, not its target's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stand_ins import vllms_own

from reshard import UnsupportedError
from reshard.placement.contract import Contract, contract_to_json, locked_values
from reshard.placement.permutations import zigzag
from reshard.vllm import loading, routing
from reshard.vllm.hooks import ROUTER_ARGUMENTS
from reshard.vllm.outputs import INDEX
from reshard.vllm.routing import LogicalOrder

CONFIG = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
# Experts, groups, groups of a token: of the target, and of a draft.
TARGET, DRAFT = (16, 4, 2), (8, 2, 1)


class Chooser:
    """A stand-in for a vLLM router."""

    __module__ = "vllm.stand_in"

    def _compute_routing(self, hidden_states: object, logits: torch.Tensor) -> object:
        weights, ids = logits.topk(2, dim=1)
        return weights, ids.int()


def contract(shape: tuple[int, int, int]) -> dict[str, Any]:
    """The contract of an output with this shape."""
    experts, n_group, topk_group = shape
    layers = {"model.layers.1.mlp": zigzag(experts, 2)}
    return contract_to_json(Contract("zigzag", 2, n_group, topk_group, layers, locked_values(CONFIG)))


def model_config(shape: tuple[int, int, int], output: bool, *, draft: bool = False, model: object = "x") -> Any:
    """A stand-in for vLLM's ModelConfig, of an original or of an output."""
    hf_config = SimpleNamespace(shape=shape, num_hidden_layers=2)
    if output:
        hf_config.expert_placement = contract(shape)
    return SimpleNamespace(
        hf_config=hf_config,
        model=str(model),
        runner_type="draft" if draft else "generate",
        get_num_experts=lambda: shape[0],
    )


class Loaded:
    """A model with one MoE layer."""

    __module__ = "vllm.stand_in"

    def __init__(self, shape: tuple[int, int, int], create: Callable[..., Any]) -> None:
        _, n_group, topk_group = shape
        self.config = SimpleNamespace(num_hidden_layers=2)
        values = {"use_grouped_topk": True, "num_expert_group": n_group, "topk_group": topk_group}
        self.router = create(**{**dict.fromkeys(ROUTER_ARGUMENTS), **values})
        self.routed_experts = vllms_own(quant_method=vllms_own(is_monolithic=False))

    def modules(self) -> list[Any]:
        return []

    def named_modules(self) -> list[tuple[str, Any]]:
        return [("model.layers.1.mlp.experts", self)]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loaded]:
    """Loads a model as vLLM does: `load(model_config, load_format)`; the current configuration is the target's."""
    arguments = ", ".join(f"{name}=None" for name in ROUTER_ARGUMENTS)
    functions: dict[str, Any] = {"Chooser": Chooser}
    exec(f"def create_fused_moe_router({arguments}): return Chooser()", functions)
    layer = SimpleNamespace(create_fused_moe_router=functions["create_fused_moe_router"])
    parallel = SimpleNamespace(enable_eplb=False, pipeline_parallel_size=1, expert_placement_strategy="linear")
    current = SimpleNamespace(
        model_config=None,
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=parallel,
        device_config=SimpleNamespace(device="cpu"),
        additional_config={},
    )

    class BaseModelLoader:
        def __init__(self, load_format: str) -> None:
            self.load_config = SimpleNamespace(load_format=load_format)

        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Loaded:
            model: Loaded = base_loader.initialize_model(vllm_config=vllm_config, model_config=model_config)
            base_loader.process_weights_after_loading(model, model_config, "cpu")
            return model

    base_loader: Any = SimpleNamespace(
        BaseModelLoader=BaseModelLoader,
        initialize_model=lambda vllm_config, model_config: Loaded(
            model_config.hf_config.shape, layer.create_fused_moe_router
        ),
        process_weights_after_loading=lambda model, model_config, device: None,
    )
    module = SimpleNamespace(get_current_vllm_config=lambda: current)
    packages: dict[str, Any] = {"vllm.model_executor.layers.fused_moe.layer": layer, "vllm.config": module}
    inner = layer
    for name in ("vllm.model_executor.layers.fused_moe", "vllm.model_executor.layers", "vllm.model_executor", "vllm"):
        child = next(key for key in packages if key.rpartition(".")[0] == name and key != "vllm.config")
        inner = packages[name] = SimpleNamespace(**{child.rpartition(".")[2]: inner, "config": module})
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    routing.install(layer)  # type: ignore[arg-type]
    loading.install_check(base_loader)

    def load(model_config: Any, load_format: str = "auto") -> Loaded:
        if current.model_config is None:
            current.model_config = model_config
        return BaseModelLoader(load_format).load_model(vllm_config=current, model_config=model_config)  # type: ignore[no-any-return]

    return load


def order(model: Loaded) -> tuple[int, ...] | None:
    """The placement that the model's router follows, None for an unchanged one."""
    return model.router.reshard_place.physical_to_logical if isinstance(model.router, LogicalOrder) else None


@pytest.mark.parametrize("target_is_output", [True, False])
@pytest.mark.parametrize("draft_is_output", [True, False])
def test_a_draft_in_another_directory_follows_its_own_contract(
    target_is_output: bool, draft_is_output: bool, load: Callable[..., Loaded]
) -> None:
    """It was given its target's: refused, or routed by other groups."""
    target = load(model_config(TARGET, target_is_output))
    draft = load(model_config(DRAFT, draft_is_output, draft=True))
    assert order(target) == (zigzag(16, 2) if target_is_output else None)
    assert order(draft) == (zigzag(8, 2) if draft_is_output else None)


def test_a_draft_in_the_output_itself_follows_the_outputs_contract(load: Callable[..., Loaded]) -> None:
    assert order(load(model_config(TARGET, True))) == zigzag(16, 2)
    assert order(load(model_config(TARGET, True, draft=True))) == zigzag(16, 2)


def test_a_draft_whose_config_object_lost_its_contract_is_refused(load: Callable[..., Loaded], tmp_path: Path) -> None:
    load(model_config(TARGET, False))
    (tmp_path / "config.json").write_text(json.dumps({"expert_placement": contract(DRAFT)}))
    with pytest.raises(UnsupportedError, match="does not route by the contract"):
        load(model_config(DRAFT, False, draft=True, model=tmp_path))


@pytest.mark.parametrize(("output", "refused"), [(True, True), (False, False)])
def test_the_load_format_that_counts_is_the_drafts_own(
    output: bool, refused: bool, load: Callable[..., Loaded]
) -> None:
    load(model_config(TARGET, True))
    draft = model_config(DRAFT, output, draft=True)
    if not refused:
        assert order(load(draft, "pt")) is None
        return
    with pytest.raises(UnsupportedError, match="load format pt does not read the index"):
        load(draft, "pt")


def test_a_rank_reads_the_files_of_its_drafts_experts(
    load: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Served on 3 ranks, a draft of 8 experts for 2 ranks lies in other files than a target of 16."""
    group = SimpleNamespace(get_ep_group=lambda: SimpleNamespace(rank_in_group=1, world_size=3))
    logger = SimpleNamespace(warning=lambda *_: None, info=lambda *_: None)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", group)  # type: ignore[arg-type]
    said = SimpleNamespace(init_logger=lambda name: logger)
    monkeypatch.setitem(sys.modules, "vllm.logger", said)  # type: ignore[arg-type]
    names = [f"model-ep{rank:02}-of-03-00001-of-00001.safetensors" for rank in range(3)]
    for name in names:
        save_file({}, tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: name for name in names}}))
    default_loader: Any = SimpleNamespace(filter_duplicate_safetensors_files=lambda files, folder, index: files)
    loading.install_file_choice(default_loader)
    parallel = SimpleNamespace(enable_expert_parallel=True, enable_eplb=False, expert_placement_strategy="linear")
    vllm_config = SimpleNamespace(parallel_config=parallel)
    monkeypatch.setattr(group, "get_ep_group", lambda: SimpleNamespace(rank_in_group=1, world_size=2))

    def chosen(shape: tuple[int, int, int]) -> list[str]:
        load_config = SimpleNamespace(load_format="auto")
        config = model_config(shape, True, draft=True, model=tmp_path)
        contract = config.hf_config.expert_placement
        (tmp_path / "config.json").write_text(json.dumps({"expert_placement": contract}))
        with loading.building(loading.Build(vllm_config, config, load_config)):
            found = default_loader.filter_duplicate_safetensors_files(
                [str(tmp_path / name) for name in names], str(tmp_path), INDEX
            )
        return [Path(path).name for path in found]

    assert chosen((3, 3, 1)) == names[2:], "experts 2 of 3"
    assert chosen((6, 3, 1)) == names[1:], "experts 3, 4 and 5 of 6"
