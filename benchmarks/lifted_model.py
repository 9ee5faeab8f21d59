"""A model of DeepSeek-R1's layers without a checkpoint, whose routers choose as those of a small trained model.

A model directory has a config, a tokenizer, and `lifted.safetensors`: embeddings, head and routers of the small model,
lifted to the new hidden size (`serve_ep.lifted`). vLLM starts it with `--load-format dummy`, so no expert is ever on
disk, and a plugin (`install`) fills its parameters: experts and other FP8 weights with random values of a tiny scale,
the rest from `lifted.safetensors`. All layers then add next to nothing to a token's embedding. So what a router chooses
for a token depends on the token's id alone, and `expected_choices` computes it without vLLM.

The small model has few routers. To give more layers a routing of their own, several layers share a router, but read
different places of the text: layer `j` of those sees at token `t` what the router was given `j` steps further on.
Tensors carry their shape in their name: V tokens, L layers, E experts, K choices, H hidden size.
"""

from __future__ import annotations

import json
import os
import runpy
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from serve_ep import ROOT, TINY_MODELS, lifted
from small_moe import R1_ROUTING, choose
from torch import Tensor

from reshard.model.routing import Routing

VARIABLE = "RESHARD_LIFTED"  # the path of lifted.safetensors; without it the plugin does nothing
PLUGIN = {"lifted": "lifted_model:install"}
FILE = "lifted.safetensors"
COPIES = 3  # layers that share a router and read different places of the text
TINY_SCALE = 1e-7  # of FP8 weights
LARGEST_BYTE = 112  # of random FP8 values, without their sign: bytes from 127 are NaN


def spread_out(gates: Mapping[str, Tensor], copies: int) -> dict[str, Tensor]:
    """Repeat each router `copies` times; a copy reads its text further on, and wraps around at the end.

    Parameters:
        gates: what `small_moe.save_gates` wrote: routers [E, H], biases [E], and inputs [T, H] for each kind of text

    Returns:
        the same for copies * G layers; layer `1 + copy * G + gate` is a copy of the router `gate`
    """
    names = sorted({name[: name.index(".mlp.gate")] for name in gates}, key=lambda name: int(name.split(".")[2]))
    found = {}
    for copy in range(copies):
        for gate, layer in enumerate(names):
            for name, tensor in gates.items():
                if name.startswith(f"{layer}."):
                    new = name.replace(layer, f"model.layers.{1 + copy * len(names) + gate}", 1)
                    rolled = tensor.roll(-copy * len(tensor) // copies, 0) if ".input." in name else tensor
                    found[new] = rolled.clone()
    return found


def make(directory: Path, gates: Mapping[str, Tensor], config: Mapping[str, Any], *, copies: int = COPIES) -> None:
    """Write a model directory.

    Parameters:
        directory: is made; must not exist
        gates: see `spread_out`
        config: config.json without `vocab_size`; its first layer is dense
    """
    from safetensors.torch import save_file

    layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    tensors = lifted(spread_out(gates, copies), layers, config["hidden_size"])
    tensors = {name: tensor if name.endswith("bias") else tensor.bfloat16() for name, tensor in tensors.items()}
    vocabulary = len(tensors["model.embed_tokens.weight"])
    directory.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / FILE)
    runpy.run_path(str(TINY_MODELS))["save_tokenizer"](directory, range(vocabulary))
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary}, indent=1))


def r1_config(layers: int) -> dict[str, Any]:
    """The config of R1 with a dense layer and `layers` MoE layers."""
    facts = json.loads((ROOT / "tests" / "facts" / "deepseek-r1-layout.json").read_text())
    config = {**facts["config"], "num_hidden_layers": 1 + layers, "first_k_dense_replace": 1}
    return {name: value for name, value in {**config, "num_nextn_predict_layers": 0}.items() if name != "auto_map"}


def expected_choices(tensors: Mapping[str, Tensor], dtype: torch.dtype, routing: Routing = R1_ROUTING) -> Tensor:
    """The experts that each layer's router chooses for each token, computed without vLLM: int16 [L, V, K].

    Parameters:
        tensors: of lifted.safetensors
        dtype: of the logits; DeepSeek's gate gives float32 for up to 16 tokens on Hopper, else bfloat16
    """
    embedding_VH = tensors["model.embed_tokens.weight"].float()
    given_VH = (embedding_VH / embedding_VH.pow(2).mean(dim=1, keepdim=True).sqrt()).bfloat16().float()
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".mlp.gate.weight")]
    found = []
    for name in sorted(names, key=lambda name: int(name.split(".")[2])):
        logits_VE = (given_VH @ tensors[f"{name}.weight"].float().T).to(dtype).float()
        bias_E = tensors[f"{name}.e_score_correction_bias"].float()
        found.append(choose(logits_VE.sigmoid(), bias_E, routing)[0].to(torch.int16))
    return torch.stack(found)


# The plugin


def install() -> None:
    """The vLLM plugin that fills a model that is loaded with `--load-format dummy`; see VARIABLE."""
    from wrapt import register_post_import_hook

    if os.environ.get(VARIABLE):
        register_post_import_hook(_fill_dummies, "vllm.model_executor.model_loader.dummy_loader")


def _fill_dummies(dummy_loader: ModuleType) -> None:
    def load_weights(loader: Any, model: torch.nn.Module, model_config: Any) -> None:
        from safetensors.torch import load_file

        fill(model, load_file(os.environ[VARIABLE]))

    dummy_loader.DummyModelLoader.load_weights = load_weights


@torch.no_grad()
def fill(model: torch.nn.Module, given: Mapping[str, Tensor]) -> None:
    """Fill all parameters of a vLLM model: from `given` by name, norms with 1, the rest at random by its name.

    Raises ValueError if a tensor of `given` has no parameter.
    """
    parameters = dict(model.named_parameters())
    if missing := sorted(given.keys() - parameters.keys()):
        raise ValueError(f"{missing[0]}: the model has no such parameter; it has {sorted(parameters)[:3]} and more")
    for name, parameter in parameters.items():
        if name in given:
            load = getattr(parameter, "weight_loader", lambda to, tensor: to.data.copy_(tensor))
            load(parameter, given[name].to(parameter.device))
        elif parameter.dtype == torch.float8_e4m3fn:
            _fill_bytes(parameter.data.view(torch.uint8), name)
        elif "scale" in name:
            parameter.data.fill_(TINY_SCALE)
        elif "norm" in name:
            parameter.data.fill_(1)
        else:
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            parameter.data.normal_(0, 0.1, generator=generator)


def _fill_bytes(bytes_: Tensor, name: str) -> None:
    """Random FP8 values, in pieces: random bytes of a layer's experts would need as much memory again."""
    generator = torch.Generator(bytes_.device).manual_seed(zlib.crc32(name.encode()))
    for piece in bytes_.flatten().split(1 << 28):
        piece.random_(0, 2 * LARGEST_BYTE, generator=generator)
        piece.add_((piece >= LARGEST_BYTE).to(torch.uint8) * (128 - LARGEST_BYTE))  # from here on they are negative
