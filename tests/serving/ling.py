"""Makes a tiny random Ling 2.0, whose classes Transformers does not have. Used by models.py, in vLLM's environment.

Names and config keys are those of the published checkpoints: model type `bailing_moe`, `BailingMoeV2ForCausalLM`, and
a class for the config that comes with the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LING: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
    "model_type": "bailing_moe",
    "hidden_act": "silu",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "num_nextn_predict_layers": 0,
    "embedding_dropout": 0.0,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
CONFIG_CLASS = """from transformers import PretrainedConfig


class BailingMoeV2Config(PretrainedConfig):
    model_type = "bailing_moe"

    def __init__(self, n_group=8, topk_group=4, **kwargs):
        self.n_group, self.topk_group = n_group, topk_group
        super().__init__(**kwargs)
"""
GATE_STD, BIAS_STD, EXPERT_STD, STD = 0.5, 0.1, 0.16, 0.02


def make_ling(directory: Path, overrides: dict[str, Any]) -> None:
    """Write config, its class, and two files of tensors."""
    config = {**LING, **overrides}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "configuration_bailing_moe_v2.py").write_text(CONFIG_CLASS)
    tensors = _tensors(config)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    hidden, experts, head = config["hidden_size"], config["num_experts"], config["head_dim"]
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]

    def random(*shape: int, std: float = STD) -> torch.Tensor:
        return torch.randn(shape) * std

    def feed_forward(prefix: str, width: int, std: float = STD) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.gate_proj.weight": random(width, hidden, std=std),
            f"{prefix}.up_proj.weight": random(width, hidden, std=std),
            f"{prefix}.down_proj.weight": random(hidden, width, std=std),
        }

    tensors = {
        "model.word_embeddings.weight": random(config["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": random(config["vocab_size"], hidden, std=EXPERT_STD),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        tensors |= {
            f"{layer}.input_layernorm.weight": torch.ones(hidden),
            f"{layer}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{layer}.attention.query_key_value.weight": random(heads * head, hidden),
            f"{layer}.attention.query_layernorm.weight": torch.ones(head),
            f"{layer}.attention.key_layernorm.weight": torch.ones(head),
            f"{layer}.attention.dense.weight": random(hidden, config["num_attention_heads"] * head),
        }
        if number < config["first_k_dense_replace"]:
            tensors |= feed_forward(f"{layer}.mlp", config["intermediate_size"])
            continue
        tensors[f"{layer}.mlp.gate.weight"] = random(experts, hidden, std=GATE_STD)
        tensors[f"{layer}.mlp.gate.expert_bias"] = random(experts, std=BIAS_STD)
        tensors |= feed_forward(f"{layer}.mlp.shared_experts", config["moe_intermediate_size"])
        for expert in range(experts):
            tensors |= feed_forward(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"], EXPERT_STD)
    return tensors
