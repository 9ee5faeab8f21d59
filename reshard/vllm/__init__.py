"""The vLLM plugin: applies a placement to an original, and routes a resharded group-limited model as its original does.

vLLM calls `register` in every process, through the entry point group `vllm.general_plugins`. For outputs of reshard the
plugin replaces functions of vLLM as follows:

    configs    config.json of a group-limited output reads as the original's, to vLLM only, and keeps the contract
    routing    with a contract, routers score groups of logical experts and return physical ids
    loading    a rank opens only the shared files and its own (`rank_files`); every router is checked before the model
               serves
    gates      gates have one dimension in the files; the plugin gives them their two again
    outputs    options that bring in the original's expert ids, or skip that choice of files, are refused
    updates    so are new weights in the original's numbering, but for the output's own files
    lora       so are adapters of experts and routers
    returned   the experts that vLLM returns have the original's ids
    recording  if RESHARD_TRACE names a directory: records which experts each token chose, for any MoE model;
               `imbalance_log` says now and then how evenly they load the ranks

For an original, if RESHARD_PLACEMENT is set:

    request               resolves the requested placement, and refuses options that it cannot go with
    served                the resolved placement, as it travels to every process
    placed                routers return physical ids; on a GPU through `map_ids`, `fused` and `grouped_topk`
    placed_weights, proof load each expert into its slot, and check that before the model serves
    agreement             checks that all ranks serve the same placement
    weight_filter, eplb   apply the placement where vLLM filters or moves expert weights
    copies                if experts have copies: chooses among them, by `choose_copies` and `choose_by_weight`
    worker                refuses what a running model cannot do: load, sleep, reload or save in ways that lose it;
                          for outputs, reloads in another numbering

`hooks` lists what the plugin replaces. `support` says whether the installed vLLM fits; for one that is newer than those
that we read, `hook_check` reads its sources. `patching` replaces functions, and `runners` finds MoE layers.

Every other model loads as it does without the plugin. If the plugin does not support the installed vLLM, it says so
only when a group-limited output is loaded or a placement is requested.
"""

from __future__ import annotations

from types import ModuleType


def register() -> None:
    """Register the hooks. vLLM calls this at least once per process; it imports no vLLM module itself."""
    import os

    from wrapt import register_post_import_hook

    from . import configs, eplb, loading, lora, placed_weights, recording, request, routing, weight_filter, worker

    register_post_import_hook(configs.install, "transformers.configuration_utils")
    register_post_import_hook(configs.install_models, "transformers.modeling_utils")
    register_post_import_hook(configs.install_parsers, "vllm.transformers_utils.config")
    for chooser in configs.CHOOSERS:
        register_post_import_hook(configs.install_chooser, f"transformers.models.auto.{chooser}")
    register_post_import_hook(request.install, "vllm.config.vllm")
    register_post_import_hook(_install_runner, "vllm.model_executor.layers.fused_moe.runner.moe_runner")
    register_post_import_hook(placed_weights.install, "vllm.model_executor.layers.fused_moe.routed_experts")
    register_post_import_hook(routing.install, "vllm.model_executor.layers.fused_moe.layer")
    register_post_import_hook(loading.install_check, "vllm.model_executor.model_loader.base_loader")
    register_post_import_hook(loading.install_file_choice, "vllm.model_executor.model_loader.default_loader")
    register_post_import_hook(weight_filter.install_expert_set, "vllm.model_executor.model_loader.default_loader")
    register_post_import_hook(weight_filter.install_skip, "vllm.model_executor.model_loader.weight_utils")
    register_post_import_hook(eplb.install, "vllm.distributed.eplb.eplb_state")
    register_post_import_hook(worker.install, "vllm.v1.worker.gpu_worker")
    register_post_import_hook(lora.install, "vllm.lora.worker_manager")
    if os.environ.get(recording.VARIABLE):
        register_post_import_hook(recording.install, "vllm.v1.worker.gpu_worker")
        register_post_import_hook(recording.install_notice, "vllm.config.vllm")


def _install_runner(module: ModuleType) -> None:
    from .placed import install_runner  # imports torch, which vLLM has imported by then

    install_runner(module)
