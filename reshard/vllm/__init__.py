"""The vLLM plugin: serves originals placed, and routes a resharded group-limited model as the original.

vLLM loads it in every process through the entry point group `vllm.general_plugins`. What it changes in vLLM:

    configs    config.json of an output reads as the original's to vLLM alone, with the contract still in it
    routing    the routers of a model with a contract score groups by logical expert and answer with physical ids
    loading    a rank opens the shared files and its own ranks' only; nothing serves before every router was checked
    recording  where RESHARD_TRACE names a directory, and of any MoE model: which experts each token chose

and of an original, where RESHARD_PLACEMENT asks for it:

    request, served       what is asked for, resolved or refused, and how it travels to every process
    placed                routers answer physical ids; `map_ids`, `fused` and `grouped_topk` do that on a GPU
    placed_weights, proof experts are loaded to their places, and that is proved before anything serves
    agreement             all ranks serve the same placement
    weight_filter, eplb, worker   vLLM's own ways to read, move and change experts, with a placement

Models without a contract or a placement, and directories that are no output, go the way they always went. A vLLM that
this does not fit is told so when a group-limited output is loaded, or a placement asked for, and not before.
"""

from __future__ import annotations

from types import ModuleType


def register() -> None:
    """What the entry point calls, once or many times in a process; imports nothing of vLLM before vLLM does."""
    import os

    from wrapt import register_post_import_hook

    from . import configs, eplb, loading, placed_weights, recording, request, routing, weight_filter, worker

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
    register_post_import_hook(weight_filter.install_choice, "vllm.model_executor.model_loader.default_loader")
    register_post_import_hook(weight_filter.install_question, "vllm.model_executor.model_loader.weight_utils")
    register_post_import_hook(eplb.install, "vllm.distributed.eplb.eplb_state")
    register_post_import_hook(worker.install, "vllm.v1.worker.gpu_worker")
    if os.environ.get(recording.VARIABLE):
        register_post_import_hook(recording.install, "vllm.v1.worker.gpu_worker")


def _install_runner(module: ModuleType) -> None:
    from .placed import install_runner  # imports torch, which vLLM has done by then

    install_runner(module)
