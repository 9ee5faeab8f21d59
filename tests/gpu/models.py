"""Makes random models for vLLM on a GPU: small ones with Transformers' classes, or layers of DeepSeek-R1 at full size.

python models.py KIND DIRECTORY [--mtp] [--config JSON]       KIND: deepseek_v3, deepseek_v2, r1
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "q_lora_rank": 256,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "max_position_embeddings": 1024,
}
BLOCK = 128


def make_r1(directory: Path, layers: int, given: Mapping[str, torch.Tensor] | None = None) -> None:
    """Make a dense layer and `layers` MoE layers of R1: names, shapes and dtypes as published, but a small vocabulary.

    Tensors in `given`, by their names in the new model, replace random ones; given embeddings set the vocabulary.
    """
    given = given or {}
    vocabulary = len(given.get("model.embed_tokens.weight", range(1024)))
    facts = json.loads((ROOT / "tests" / "facts" / "deepseek-r1-layout.json").read_text())
    config = {**facts["config"], "vocab_size": vocabulary, "num_hidden_layers": 1 + layers, "first_k_dense_replace": 1}
    config["num_nextn_predict_layers"] = 0
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import deepseek_r1

    directory.mkdir(parents=True)
    source_layers = {0: 0, **{1 + number: 3 + number for number in range(layers)}}
    weight_map: dict[str, str] = {}
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    everything = deepseek_r1.tensors()
    for layer in (None, *source_layers):
        wanted = None if layer is None else source_layers[layer]
        tensors = {}
        for found in everything:
            if found.layer != wanted:
                continue
            name = found.name.replace(f"layers.{wanted}.", f"layers.{layer}.", 1)
            shape = [vocabulary if length == 129280 else length for length in found.shape]
            if name in given:
                assert list(given[name].shape) == shape, f"{name}: found {list(given[name].shape)}, expected {shape}"
                tensors[name] = given[name].to({"BF16": torch.bfloat16, "F32": torch.float32}[found.dtype])
            else:
                tensors[name] = _random(name, found.dtype, shape, generator)
        file = f"model-{'head' if layer is None else f'{layer:05}'}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def _random(name: str, dtype: str, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, device=generator.device, generator=generator)
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith("weight_scale_inv"):
        return torch.full(shape, 2.0 / 7168**0.5 / 64).cpu()  # scales rows of FP8 values of deviation 64 to norm 2
    if dtype == "F8_E4M3":
        return (values * 64).to(torch.float8_e4m3fn).cpu()
    if name.endswith("mlp.gate.weight"):
        values *= 0.03
    elif name.endswith("e_score_correction_bias"):
        return (values * 0.02).to(torch.float32).cpu()
    return values.to({"BF16": torch.bfloat16, "F32": torch.float32}[dtype]).cpu()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--mtp", action="store_true")
    parser.add_argument("--config", type=json.loads, default={})
    arguments = parser.parse_args()
    if arguments.kind == "r1":
        make_r1(arguments.directory, layers=2)
    else:
        sys.path.insert(0, str(ROOT / "tests" / "serving"))  # for the modules beside it
        small = runpy.run_path(str(ROOT / "tests" / "serving" / "models.py"))
        small["make"].__globals__["FILE_SIZE"] = "400MB"
        small["make"](arguments.kind, arguments.directory, {**SMALL, **arguments.config}, arguments.mtp, 0)
