"""The functions of vLLM and Transformers that the plugin replaces or calls, as data, and what it needs of each.

This is the one list of them. `support` checks the running vLLM against it, and `hook_check` checks vLLM's source files,
without importing them: so a version can be judged that is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass

OUTPUT, PLACEMENT, TRACE = "an output", "a placement", "a trace"


@dataclass(frozen=True, slots=True)
class Hook:
    """A function or class.

    `parameters` are those that we rely on. `needed_by` names what goes wrong without it: `OUTPUT`, `PLACEMENT` or
    `TRACE`. If `replaced`, the plugin replaces it there; otherwise it only calls, overrides or looks it up.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    needed_by: tuple[str, ...]
    replaced: bool = True

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


ROUTER_ARGUMENTS = (
    "top_k",
    "global_num_experts",
    "use_grouped_topk",
    "num_expert_group",
    "topk_group",
    "e_score_correction_bias",
    "custom_routing_function",
    "num_fused_shared_experts",
)
_MOE = "vllm.model_executor.layers.fused_moe"
_LOADER = "vllm.model_executor.model_loader"
_WORKER = "vllm.v1.worker.gpu_worker"
_EPLB = "vllm.distributed.eplb.eplb_state"
_ROUTER = f"{_MOE}.router.base_router"
_ALL, _ANY_MODEL = (OUTPUT, PLACEMENT, TRACE), (OUTPUT, PLACEMENT)
_STAGE = ("num_hidden_layers", "pp_rank", "pp_size")
_WEIGHT = ("param", "loaded_weight", "weight_name", "shard_id", "expert_id", "return_success")

VLLM_HOOKS = (
    Hook("vllm.transformers_utils.config", "HFConfigParser.parse", (), (OUTPUT,)),
    Hook("vllm.transformers_utils.config", "MistralConfigParser.parse", (), (OUTPUT,)),
    Hook("vllm.config.vllm", "VllmConfig.__post_init__", (), _ALL),
    Hook(f"{_MOE}.layer", "create_fused_moe_router", ROUTER_ARGUMENTS, _ANY_MODEL),
    Hook(f"{_MOE}.runner.moe_runner", "MoERunner.__init__", ("router", "routed_experts"), _ANY_MODEL),
    Hook(
        f"{_MOE}.routed_experts",
        "RoutedExperts._map_global_expert_id_to_local_expert_id",
        ("expert_id",),
        (PLACEMENT,),
    ),
    Hook(f"{_MOE}.routed_experts", "RoutedExperts.weight_loader", _WEIGHT, (PLACEMENT,)),
    Hook(f"{_LOADER}.base_loader", "BaseModelLoader.load_model", ("vllm_config", "model_config"), _ANY_MODEL),
    Hook(f"{_LOADER}.base_loader", "initialize_model", ("vllm_config", "model_config"), _ANY_MODEL),
    Hook(f"{_LOADER}.base_loader", "process_weights_after_loading", ("model", "model_config"), _ANY_MODEL),
    Hook(f"{_LOADER}.default_loader", "filter_duplicate_safetensors_files", (), _ANY_MODEL),
    Hook(f"{_LOADER}.default_loader", "compute_local_expert_ids", ("num_experts", "ep_size", "ep_rank"), (PLACEMENT,)),
    Hook(f"{_LOADER}.weight_utils", "should_skip_weight", ("weight_name", "local_expert_ids"), (PLACEMENT,)),
    Hook(_WORKER, "Worker.load_model", (), _ALL),
    Hook(_WORKER, "Worker.reload_weights", (), _ANY_MODEL),
    Hook(_WORKER, "Worker.start_weight_update", (), _ANY_MODEL),
    Hook(_WORKER, "Worker.update_weights", (), _ANY_MODEL),
    Hook(_WORKER, "Worker.sleep", ("level",), (PLACEMENT,)),
    Hook(_WORKER, "Worker.wake_up", ("tags",), _ANY_MODEL),
    Hook(_WORKER, "Worker.save_sharded_state", (), _ANY_MODEL),
    Hook(_WORKER, "Worker.save_tensorized_model", (), _ANY_MODEL),
    Hook("vllm.lora.worker_manager", "WorkerLoRAManager.__init__", ("vllm_config",), (OUTPUT,)),
    Hook("vllm.lora.lora_model", "LoRAModel.from_lora_tensors", ("tensors",), (OUTPUT,), replaced=False),
    Hook(_WORKER, "Worker.execute_model", ("scheduler_output",), (TRACE,)),
    Hook(_EPLB, "EplbState.add_model", ("model", "model_config"), (PLACEMENT,)),
    Hook(_EPLB, "rearrange_expert_weights_inplace", (), (PLACEMENT,), replaced=False),
    Hook(_EPLB, "EplbState.rearrange", ("is_profile",), (PLACEMENT,)),
    Hook(_EPLB, "_commit_eplb_maps", ("model_state", "new_physical_to_logical_map"), (PLACEMENT,)),
    Hook(_EPLB, "_commit_eplb_maps_for_layer", ("model_state", "new_physical_to_logical_map", "layer"), (PLACEMENT,)),
    Hook(_ROUTER, "BaseRouter._select_experts", ("hidden_states", "router_logits"), (PLACEMENT,), replaced=False),
    Hook(_ROUTER, "BaseRouter._compute_routing", ("hidden_states", "router_logits"), _ALL, replaced=False),
    Hook(_ROUTER, "BaseRouter._apply_eplb_mapping", ("topk_ids",), (PLACEMENT,), replaced=False),
    Hook(_ROUTER, "BaseRouter._convert_indices_dtype", (), (PLACEMENT,), replaced=False),
    Hook("vllm.v1.worker.ubatching", "dbo_current_ubatch_id", (), (PLACEMENT,), replaced=False),
    Hook(f"{_MOE}.config", "RoutingMethodType.Unspecified", (), _ANY_MODEL, replaced=False),
    Hook(f"{_MOE}.routed_experts_capturer", "RoutedExpertsCapturer.capture", (), (TRACE,), replaced=False),
    Hook("vllm.config", "get_current_vllm_config", (), _ALL, replaced=False),
    Hook("vllm.distributed.parallel_state", "get_ep_group", (), _ANY_MODEL, replaced=False),
    Hook("vllm.distributed.parallel_state", "get_pp_group", (), (OUTPUT, TRACE), replaced=False),
    Hook("vllm.distributed.utils", "get_pp_indices", _STAGE, (OUTPUT,), replaced=False),
    Hook("vllm.distributed.parallel_state", "get_tp_group", (), (TRACE,), replaced=False),
    Hook("vllm.logger", "init_logger", (), _ALL, replaced=False),
)
TRANSFORMERS_HOOKS = (
    *(
        Hook("transformers.configuration_utils", f"PretrainedConfig.{name}", (), (OUTPUT,))
        for name in ("get_config_dict", "save_pretrained", "to_json_file")
    ),
    Hook("transformers.modeling_utils", "PreTrainedModel.__init__", ("config",), (OUTPUT,)),
    *(
        Hook(f"transformers.models.auto.{module}", f"{name}.from_pretrained", (), (OUTPUT,))
        for module, name in (
            ("tokenization_auto", "AutoTokenizer"),
            ("processing_auto", "AutoProcessor"),
            ("image_processing_auto", "AutoImageProcessor"),
            ("video_processing_auto", "AutoVideoProcessor"),
            ("feature_extraction_auto", "AutoFeatureExtractor"),
        )
    ),
)
