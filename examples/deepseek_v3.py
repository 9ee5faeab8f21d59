"""The demo's checkpoint: shaped like DeepSeek-V3 in everything but size.

It has one dense layer, two MoE layers and an MTP layer; 64 experts in 8 groups; projections in FP8 blocks of 128 x 128
with their scales; router weights and correction biases; four files and an index, like a downloaded model.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, EXPERT_WIDTH, DENSE_WIDTH, VOCAB = 256, 128, 512, 1024
EXPERTS, GROUPS, CHOSEN_GROUPS, TOP_K = 64, 8, 4, 8
HEADS, Q_RANK, KV_RANK, NOPE, ROPE, V_HEAD = 4, 64, 32, 32, 16, 32
LAYERS, DENSE_LAYERS, FILES, BLOCK = 3, 1, 4, 128

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "first_k_dense_replace": DENSE_LAYERS,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE_WIDTH,
    "kv_lora_rank": KV_RANK,
    "max_position_embeddings": 4096,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": EXPERT_WIDTH,
    "moe_layer_freq": 1,
    "n_group": GROUPS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": HEADS,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": Q_RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "rms_norm_eps": 1e-06,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": CHOSEN_GROUPS,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": V_HEAD,
    "vocab_size": VOCAB,
}


def build(directory: Path) -> None:
    """Write the checkpoint to `directory`, which must not exist."""
    directory.mkdir(parents=True)
    torch.manual_seed(0)
    tensors = _tensors()
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(FILES)]
    for number, (name, tensor) in enumerate(tensors.items()):
        shards[number * FILES // len(tensors)][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{FILES:06}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 4096}')
    (directory / "figures").mkdir()
    (directory / "figures" / "NOTE.txt").write_text("reshard copies small files and sub-folders too\n")


def _tensors() -> dict[str, torch.Tensor]:
    tensors = {"model.embed_tokens.weight": _bf16(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        tensors |= _layer(f"model.layers.{layer}", dense=layer < DENSE_LAYERS)
    tensors |= {"model.norm.weight": _bf16(HIDDEN), "lm_head.weight": _bf16(VOCAB, HIDDEN)}
    mtp = f"model.layers.{LAYERS}"
    tensors |= {
        f"{mtp}.embed_tokens.weight": _bf16(VOCAB, HIDDEN),
        f"{mtp}.enorm.weight": _bf16(HIDDEN),
        f"{mtp}.hnorm.weight": _bf16(HIDDEN),
        f"{mtp}.eh_proj.weight": _bf16(HIDDEN, 2 * HIDDEN),
        f"{mtp}.shared_head.norm.weight": _bf16(HIDDEN),
        f"{mtp}.shared_head.head.weight": _bf16(VOCAB, HIDDEN),
    }
    return tensors | _layer(mtp, dense=False)


def _layer(prefix: str, *, dense: bool) -> dict[str, torch.Tensor]:
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    tensors = {
        f"{prefix}.input_layernorm.weight": _bf16(HIDDEN),
        f"{prefix}.post_attention_layernorm.weight": _bf16(HIDDEN),
        f"{attention}.q_a_layernorm.weight": _bf16(Q_RANK),
        f"{attention}.kv_a_layernorm.weight": _bf16(KV_RANK),
        **_fp8(f"{attention}.q_a_proj", Q_RANK, HIDDEN),
        **_fp8(f"{attention}.q_b_proj", HEADS * (NOPE + ROPE), Q_RANK),
        **_fp8(f"{attention}.kv_a_proj_with_mqa", KV_RANK + ROPE, HIDDEN),
        **_fp8(f"{attention}.kv_b_proj", HEADS * (NOPE + V_HEAD), KV_RANK),
        **_fp8(f"{attention}.o_proj", HIDDEN, HEADS * V_HEAD),
    }
    if dense:
        return tensors | _mlp(mlp, DENSE_WIDTH)
    tensors |= _mlp(f"{mlp}.shared_experts", EXPERT_WIDTH)
    tensors[f"{mlp}.gate.weight"] = _bf16(EXPERTS, HIDDEN)
    tensors[f"{mlp}.gate.e_score_correction_bias"] = torch.randn(EXPERTS) * 0.1
    for expert in range(EXPERTS):
        tensors |= _mlp(f"{mlp}.experts.{expert}", EXPERT_WIDTH)
    return tensors


def _mlp(prefix: str, width: int) -> dict[str, torch.Tensor]:
    return {
        **_fp8(f"{prefix}.gate_proj", width, HIDDEN),
        **_fp8(f"{prefix}.up_proj", width, HIDDEN),
        **_fp8(f"{prefix}.down_proj", HIDDEN, width),
    }


def _bf16(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 0.05).bfloat16()


def _fp8(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    return {
        f"{name}.weight": torch.randn(rows, columns).to(torch.float8_e4m3fn),
        f"{name}.weight_scale_inv": torch.rand(blocks) * 0.01 + 0.001,
    }
