"""Gives a served model new weights, and loses and restores its memory, as vLLM does. Runs in vLLM's environment.

Reads one JSON object from standard input: `model`, `prompts`, `max_tokens` and `llm` as in generate.py; `other`,
another checkpoint of the same shape; `output`, an output of reshard; `alike`, the output of `other` that was placed as
the model was; and `steps`, if not all of them are wanted. Prints one line of JSON: for each step, the tokens that were
generated after it, or its error. `lost` has the tokens that were generated without the buffer. With the step "experts",
`routed` has the experts that vLLM captures from then on: [token][MoE layer][choice].

CPUs have no sleep mode. So `sleep` does what a GPU worker does for level 2: it saves the buffers of modules, zeroes all
memory of the model, also what its routers hold outside of modules, restores the buffers, and loads the weights again.

Nor can vLLM 0.32 return experts on CPUs. So `load_as_if_experts_are_returned` sets the option while the model is
loaded, and `experts` binds vLLM's own capturer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate


def load_as_if_experts_are_returned() -> None:
    """Set --enable-return-routed-experts while a model is loaded; a CPU's configuration must not have it."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    load = BaseModelLoader.load_model

    def load_model(loader: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config.aux_output_config.enable_return_routed_experts = True
        try:
            return load(loader, vllm_config, model_config, *args, **kwargs)
        finally:
            vllm_config.aux_output_config.enable_return_routed_experts = False

    BaseModelLoader.load_model = load_model


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request."""
    import torch
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams

    if "experts" in request.get("steps", ()):
        load_as_if_experts_are_returned()
    llm = LLM(model=request["model"], **{**generate.FIXED, **request["llm"]})
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)

    def tokens() -> list[list[int]]:
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, sampling, use_tqdm=False)]

    def sleep(worker: Any, restore: bool = True) -> None:
        model = worker.model_runner.get_model()
        saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for tensor in (*model.parameters(), *model.buffers(), *held_by_routers(model)):
            tensor.data.zero_()
        for name, buffer in model.named_buffers():
            if restore or "_expert_map" not in name:
                buffer.data.copy_(saved[name])
        worker.reload_weights()
        if not restore:  # generate without the placement's buffer, then restore it
            lost.append(tokens())
            for name, buffer in model.named_buffers():
                buffer.data.copy_(saved[name])

    def update(worker: Any) -> None:
        tensors = checkpoint(request["model"])
        for parameter in worker.model_runner.get_model().parameters():
            parameter.data.zero_()
        worker.reload_weights(weights_iterator=iter(tensors))

    def elsewhere(worker: Any) -> None:
        """Make the worker think that its own files are others, and reload those."""
        worker.model_config.model = request["other"]
        try:
            worker.reload_weights()
        finally:
            worker.model_config.model = request["model"]

    def by_the_runner(worker: Any) -> None:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(worker.vllm_config):
            worker.model_runner.reload_weights(weights_path=request["output"])

    def by_slot(worker: Any) -> None:
        worker.reload_weights(weights_iterator=iter([]), is_checkpoint_format=False)

    def experts(worker: Any) -> None:
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
            RoutedExpertsCapturer,
            bind_routed_experts_capturer,
        )

        runner, execute = worker.model_runner, worker.execute_model
        capturer = RoutedExpertsCapturer(runner.vllm_config.scheduler_config.max_num_batched_tokens, runner.vllm_config)
        bind_routed_experts_capturer(runner.get_model(), capturer)

        def execute_model(scheduled: Any) -> Any:
            result = execute(scheduled)
            rows = capturer.device_buffer[: scheduled.total_num_scheduled_tokens]
            routed.extend(rows[:, request["first_moe_layer"] :].tolist())
            return result

        worker.execute_model = execute_model

    def held_by_routers(model: Any) -> list[Any]:
        """Tensors of routers, which are no modules."""
        routers = [module.router for module in model.modules() if hasattr(module, "router")]
        return [value for router in routers for value in vars(router).values() if isinstance(value, torch.Tensor)]

    def checkpoint(folder: str) -> list[tuple[str, Any]]:
        """The tensors in a directory, as a trainer would send them."""
        return [item for path in sorted(Path(folder).glob("*.safetensors")) for item in load_file(path).items()]

    def inner(folder: str) -> list[tuple[str, Any]]:
        """Those of the module `model`, without its name."""
        tensors = checkpoint(folder)
        return [(name.removeprefix("model."), tensor) for name, tensor in tensors if name.startswith("model.")]

    lost: list[list[list[int]]] = []
    routed: list[list[list[int]]] = []
    steps: dict[str, Callable[[Any], Any]] = {
        "at first": lambda worker: None,
        "reload": lambda worker: worker.reload_weights(),
        "sleep": sleep,
        "update": update,
        "by slot": by_slot,
        "load_weights": lambda worker: worker.get_model().load_weights(checkpoint(request["other"])),
        "load_weights of a module": lambda worker: worker.get_model().model.load_weights(inner(request["other"])),
        "other tensors": lambda worker: worker.reload_weights(weights_iterator=iter(checkpoint(request["other"]))),
        "elsewhere": elsewhere,
        "an output, by the runner": by_the_runner,
        "experts": experts,
        "alike": lambda worker: worker.reload_weights(weights_path=request["alike"]),
        "an output": lambda worker: worker.reload_weights(weights_path=request["output"]),
        "save": lambda worker: worker.save_sharded_state("/nowhere"),
        "another model": lambda worker: worker.reload_weights(weights_path=request["other"]),
        "back": lambda worker: worker.reload_weights(weights_path=request["model"]),
        "sleep without the buffer": lambda worker: sleep(worker, restore=False),
    }
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name in request.get("steps", steps):
            step = steps[name]
            try:
                llm.collective_rpc(step)
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
                continue
            found[name] = tokens()
    return {**found, "lost": lost, "routed": routed}


def main() -> None:
    """Answer the request on standard input."""
    answers = os.dup(1)
    os.dup2(2, 1)
    line = json.dumps(run(json.load(sys.stdin)))
    os.write(answers, f"{line}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
