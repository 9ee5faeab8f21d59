"""Makes tiny random MoE checkpoints for vLLM, with Transformers' own classes. Runs in vLLM's environment.

    python models.py KIND DIRECTORY [--config JSON] [--mtp] [--seed N]

KIND is one of `KINDS` or `ling`; `--config` overrides keys of its config.json, `--mtp` adds a draft layer like
DeepSeek-V3's. As in published checkpoints, each expert has its own tensors, and tensors are spread over several files.
Weights of routers and experts are so large that another choice of experts gives other tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 256
GATE_STD = 0.5
BIAS_STD = 0.1
WEIGHT_FACTOR = 8  # for experts and output embeddings, on top of Transformers' initial values
FILE_SIZE = "400KB"

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,  # vLLM's CPU kernels need multiples of 32
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
DEEPSEEK: dict[str, Any] = {
    **COMMON,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,  # with 64 for RoPE, the only latent size that vLLM's CPU attention supports
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
V3: dict[str, Any] = {**DEEPSEEK, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0}

# Model type, its config, and keys of published config.json files that Transformers does not keep.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", V3, {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}),
    "kimi_k2": (
        "deepseek_v3",
        {**V3, "n_group": 1, "topk_group": 1},
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**DEEPSEEK, "norm_topk_prob": False, "routed_scaling_factor": 4.0, "topk_method": "group_limited_greedy"},
        {"scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    "axk1": ("axk1", V3, {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}),
    "llama4": (  # its experts are one tensor, which vLLM's model code slices itself
        "llama4_text",
        {
            **COMMON,
            **{"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "head_dim": 32},
            **{"interleave_moe_layer_step": 1, "attention_chunk_size": 128, "intermediate_size": 32},
        },
        {},
    ),
    "exaone_moe": (  # a model type that reshard does not know
        "exaone_moe",
        {
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 16},
            **{"layer_types": ["full_attention"] * 3, "sliding_window": 128},
        },
        {},
    ),
    "olmoe": ("olmoe", {**COMMON, "num_experts": 16, "num_attention_heads": 2, "num_key_value_heads": 2}, {}),
    "ernie4_5_moe": (  # its bias has the shape [1, E]
        "ernie4_5_moe",
        {
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32},
            **{"moe_num_experts": 16, "moe_k": 4, "moe_num_shared_experts": 1},
            **{"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1},
        },
        {},
    ),
    "afmoe": (  # its gate lies below the router, and its bias beside that
        "afmoe",
        {
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 16},
            **{"num_shared_experts": 1, "num_dense_layers": 1, "route_scale": 2.5},
            **{"layer_types": ["full_attention"] * 3, "sliding_window": 128},
        },
        {"n_group": 1, "topk_group": 1, "score_func": "sigmoid", "route_norm": True},
    ),
    "hy_v3": (
        "hy_v3",
        {
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 16},
            **{"num_shared_experts": 1, "router_scaling_factor": 2.5, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        },
        {"expert_hidden_dim": 32, "route_norm": True, "first_k_dense_replace": 1, "qk_norm": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 16},
            "shared_expert_intermediate_size": 32,
        },
        {},
    ),
    "qwen3_moe": ("qwen3_moe", {**COMMON, "num_experts": 16, "head_dim": 32, "norm_topk_prob": True}, {}),
}
LING_KIND = "ling"
WITHOUT_INDEX = ("qwen2_moe",)  # vLLM loads all files of a model that has no index


def make(kind: str, directory: Path, overrides: dict[str, Any], mtp: bool, seed: int) -> None:
    """Write a checkpoint with a tokenizer into `directory`, which is created or replaced."""
    torch.manual_seed(seed)
    if kind == LING_KIND:
        shutil.rmtree(directory, ignore_errors=True)
        from ling import make_ling  # here: benchmarks run this file from elsewhere

        make_ling(directory, overrides)
        save_tokenizer(directory)
        return
    model_type, values, published = KINDS[kind]
    config = AutoConfig.for_model(model_type, **{**values, **overrides})
    if mtp:  # a draft layer is one more MoE layer with a few extra tensors
        config.num_hidden_layers += 1
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    enlarge(model)
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, max_shard_size=FILE_SIZE)
    save_tokenizer(directory)
    path = directory / "config.json"
    saved = json.loads(path.read_text())
    saved.update(published)
    if mtp:
        saved["num_hidden_layers"] -= 1
        saved["num_nextn_predict_layers"] = 1
        add_draft_tensors(directory, layer=saved["num_hidden_layers"], hidden=saved["hidden_size"])
    path.write_text(json.dumps(saved, indent=2) + "\n")
    check(directory, fused=kind == "llama4")
    if kind == "axk1":  # its dense layer has the norm, too, as vLLM expects; Transformers does not make that one
        add_tensors(directory, {"model.layers.0.post_mlp_layernorm.weight": torch.ones(saved["hidden_size"])})
    if kind in WITHOUT_INDEX:
        (directory / "model.safetensors.index.json").unlink()


def enlarge(model: torch.nn.Module) -> None:
    """Scale routers, experts and output embeddings up, so that routing decides the tokens."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(".gate.weight"):
                tensor.normal_(std=GATE_STD)
            elif name.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.normal_(std=BIAS_STD)
            elif ".experts." in name or name == "lm_head.weight":
                tensor.mul_(WEIGHT_FACTOR)


def add_draft_tensors(directory: Path, layer: int, hidden: int) -> None:
    """Make the last layer a multi-token-prediction layer: add its tensors, named as DeepSeek-V3's, in another file."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    head = load_file(directory / index["weight_map"]["lm_head.weight"])["lm_head.weight"]
    embedding = load_file(directory / index["weight_map"]["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    prefix = f"model.layers.{layer}"
    tensors = {
        f"{prefix}.embed_tokens.weight": embedding,
        f"{prefix}.enorm.weight": torch.ones(hidden),
        f"{prefix}.hnorm.weight": torch.ones(hidden),
        # Passes on mostly the previous hidden state, so that some drafts are accepted and some are not.
        f"{prefix}.eh_proj.weight": torch.cat([torch.eye(hidden) * 0.1, torch.eye(hidden)], dim=1),
        f"{prefix}.shared_head.norm.weight": torch.ones(hidden),
        f"{prefix}.shared_head.head.weight": head,
    }
    add_tensors(directory, tensors)


def add_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add tensors in a file of their own."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    save_file(tensors, directory / "model-more.safetensors", metadata={"format": "pt"})
    index["weight_map"].update(dict.fromkeys(tensors, "model-more.safetensors"))
    path.write_text(json.dumps(index, indent=2) + "\n")


def save_tokenizer(directory: Path, ids: Sequence[int] = range(VOCABULARY)) -> None:
    """Save a tokenizer with one word for each id of a model: w000 w001 w002 …; `ids` limits it to those ids."""
    words = {f"w{number:03}": position for position, number in enumerate(ids)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w000", eos_token="w001", unk_token="w002", pad_token="w001"
    ).save_pretrained(directory)


def check(directory: Path, fused: bool) -> None:
    """Check that the checkpoint is laid out like published ones."""
    names = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(names.values())) >= 2, "one file only"
    assert fused or any(".experts.0." in name for name in names), "experts are fused"


def main() -> None:
    """Make what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=[*KINDS, LING_KIND])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--config", type=json.loads, default={})
    parser.add_argument("--mtp", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.kind, arguments.directory, arguments.config, arguments.mtp, arguments.seed)


if __name__ == "__main__":
    main()
