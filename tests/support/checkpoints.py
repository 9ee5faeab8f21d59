"""Builders of small checkpoints that are laid out like the real ones: names, dtypes, configs, loose files.

`build(spec, directory)` writes one. A `Spec` chooses the family (a line of `FAMILIES`), the number of experts,
how tensors are dealt to files and in which order they lie there, and how the experts are quantized. Tensor data
is random bytes, except where somebody computes with it: router weights are small normal numbers, and token
tables hold valid expert ids. Nothing here uses the package under test; the safetensors writer is its own, so
that it can write what the usual one does not: any order, padding, any dtype.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

HIDDEN, DENSE_WIDTH, EXPERT_WIDTH, VOCAB, HEADS = 32, 48, 16, 64, 4
FP8_BLOCK = 16
QUANTIZATIONS = ("native", "none", "fp8", "awq", "compressed-tensors", "modelopt")

DTYPE_BYTES = {
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
}


class Tensor(NamedTuple):
    """A tensor as it lies in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Family:
    """How one family names its tensors and what its config.json says."""

    model_type: str
    architecture: str
    config: dict[str, Any]
    root: str = "model."
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    moe: str = "mlp"
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    router: str = "gate"
    router_biases: tuple[str, ...] = ()
    beside_router: tuple[tuple[str, str], ...] = ()  # names below the module, and shapes: E, 1E or H
    experts_key: str = "n_routed_experts"
    top_k_key: str = "num_experts_per_tok"
    shared: str | None = None
    dense_layers: int = 0
    attention: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    others: tuple[str, ...] = ()
    in_layers: tuple[str, ...] = ()  # more tensors in each layer
    in_moe: tuple[str, ...] = ()  # more tensors in each module that holds experts
    apart: str | None = None  # a layer with experts that are routed by another config
    fused: str | None = None
    native: str = "none"
    text_model_type: str | None = None
    text_keys: tuple[str, ...] = ("text_config",)
    mtp: str | None = None
    groups: int | None = None
    remote_code: str | None = None

    @property
    def group_limited(self) -> bool:
        """Whether the router chooses groups first."""
        return self.groups is not None and self.groups > 1

    @property
    def quantizations(self) -> tuple[str, ...]:
        """The styles in which this family's experts may be stored."""
        return ("native",) if self.fused or self.native == "fp4" else QUANTIZATIONS


MLA = tuple(f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
DEEPSEEK_CONFIG = {
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "ep_size": 1,
}
DEEPSEEK_V2_CONFIG = DEEPSEEK_CONFIG | {
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
}
LING_CONFIG = {
    "first_k_dense_replace": 1,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}
KIMI_LINEAR_CONFIG = {
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_expert_group": 1,
    "num_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_grouped_topk": True,
}

FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        DEEPSEEK_V2_CONFIG,
        attention=MLA,
        shared="shared_experts",
        dense_layers=1,
        groups=4,
        remote_code="DeepseekV2",
    ),
    "deepseek_v2_lite": Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        DEEPSEEK_V2_CONFIG | {"topk_method": "greedy", "routed_scaling_factor": 1.0, "q_lora_rank": None},
        attention=MLA,
        shared="shared_experts",
        dense_layers=1,
        groups=1,
        remote_code="DeepseekV2",
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        DEEPSEEK_CONFIG,
        attention=MLA,
        router_biases=("e_score_correction_bias",),
        shared="shared_experts",
        dense_layers=1,
        native="fp8",
        mtp="model.layers.{}",
        groups=4,
        remote_code="DeepseekV3",
    ),
    "deepseek_v32": Family(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        DEEPSEEK_CONFIG | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 16},
        attention=(*MLA, "self_attn.indexer.wk", "self_attn.indexer.wq_b"),
        router_biases=("e_score_correction_bias",),
        shared="shared_experts",
        dense_layers=1,
        native="fp8",
        mtp="model.layers.{}",
        groups=4,
    ),
    "deepseek_v4": Family(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        {
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_hash_layers": 1,
            "routed_scaling_factor": 1.5,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "expert_dtype": "fp4",
            "hc_mult": 4,
        },
        root="",
        embedding="embed",
        head="head",
        moe="ffn",
        projections=("w1", "w3", "w2"),
        router_biases=("bias",),
        shared="shared_experts",
        attention=("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b"),
        norms=("attn_norm", "ffn_norm"),
        native="fp4",
        mtp="mtp.{}",
    ),
    "kimi_k2": Family(
        "kimi_k2",
        "DeepseekV3ForCausalLM",
        DEEPSEEK_CONFIG | {"routed_scaling_factor": 2.827},
        attention=MLA,
        router_biases=("e_score_correction_bias",),
        shared="shared_experts",
        dense_layers=1,
        native="fp8",
        groups=1,
        remote_code="DeepseekV3",
    ),
    "kimi_k25": Family(
        "kimi_k25",
        "KimiK25ForConditionalGeneration",
        DEEPSEEK_CONFIG | {"routed_scaling_factor": 2.827},
        root="language_model.model.",
        head="language_model.lm_head",
        attention=MLA,
        router_biases=("e_score_correction_bias",),
        shared="shared_experts",
        dense_layers=1,
        others=("vision_tower.encoder.blocks.0.wqkv.weight", "mm_projector.proj.0.weight"),
        native="compressed-tensors",
        text_model_type="kimi_k2",
        groups=1,
        remote_code="KimiK25",
    ),
    "glm4_moe": Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "partial_rotary_factor": 0.5,
        },
        router_biases=("e_score_correction_bias",),
        shared="shared_experts",
        dense_layers=1,
        mtp="model.layers.{}",
        groups=1,
    ),
    "bailing_moe_v2": Family(
        "bailing_moe_v2",
        "BailingMoeV2ForCausalLM",
        LING_CONFIG,
        embedding="word_embeddings",
        router_biases=("expert_bias",),
        experts_key="num_experts",
        shared="shared_experts",
        dense_layers=1,
        attention=("attention.query_key_value", "attention.dense"),
        mtp="model.layers.{}",
        groups=4,
        remote_code="BailingMoeV2",
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "router_aux_loss_coef": 0.001},
        experts_key="num_experts",
    ),
    "mixtral": Family(
        "mixtral",
        "MixtralForCausalLM",
        {"output_router_logits": False, "router_aux_loss_coef": 0.02},
        moe="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        experts_key="num_local_experts",
    ),
    "gpt_oss": Family(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            "swiglu_limit": 7.0,
            "layer_types": ["sliding_attention", "full_attention"],
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
            },
        },
        router="router",
        router_biases=("bias",),
        experts_key="num_local_experts",
        fused="mxfp4",
    ),
    "llama4": Family(
        "llama4",
        "Llama4ForConditionalGeneration",
        {"interleave_moe_layer_step": 2, "router_aux_loss_coef": 0.001, "no_rope_layers": []},
        root="language_model.model.",
        head="language_model.lm_head",
        moe="feed_forward",
        router="router",
        experts_key="num_local_experts",
        shared="shared_expert",
        others=("vision_model.patch_embedding.linear.weight", "multi_modal_projector.linear_1.weight"),
        fused="transposed",
        text_model_type="llama4_text",
    ),
    "qwen3_5_moe": Family(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        {"router_aux_loss_coef": 0.001, "full_attention_interval": 4},
        root="model.language_model.",
        experts_key="num_experts",
        shared="shared_expert",
        others=("model.visual.blocks.0.attn.qkv.weight",),
        fused="plain",
        text_model_type="qwen3_5_moe_text",
        mtp="mtp.layers.{}",
    ),
    "bailing_moe": Family(  # Ling and Ring 2.0 as published
        "bailing_moe",
        "BailingMoeV2ForCausalLM",
        LING_CONFIG | {"num_nextn_predict_layers": 0, "router_dtype": "fp32"},
        embedding="word_embeddings",
        router_biases=("expert_bias",),
        experts_key="num_experts",
        shared="shared_experts",
        dense_layers=1,
        attention=("attention.query_key_value", "attention.dense"),
        groups=4,
        remote_code="BailingMoeV2",
    ),
    "ling_lite": Family(  # the same model type, and another router
        "bailing_moe",
        "BailingMoeForCausalLM",
        {"num_shared_experts": 2, "norm_topk_prob": True, "first_k_dense_replace": 0},
        embedding="word_embeddings",
        experts_key="num_experts",
        shared="shared_experts",
        attention=("attention.query_key_value", "attention.dense"),
        remote_code="BailingMoe",
    ),
    "bailing_hybrid": Family(
        "bailing_hybrid",
        "BailingMoeV3ForCausalLM",
        LING_CONFIG | {"topk_method": "noaux_tc", "layer_group_size": 2, "group_norm_size": 4, "q_lora_rank": None},
        embedding="word_embeddings",
        router_biases=("expert_bias",),
        experts_key="num_experts",
        shared="shared_experts",
        dense_layers=1,
        attention=("attention.q_proj", "attention.g_proj", "attention.dense"),
        mtp="model.layers.{}",
        groups=4,
        remote_code="BailingMoeV3",
    ),
    "axk1": Family(
        "AXK1",
        "AXK1ForCausalLM",
        DEEPSEEK_CONFIG,
        attention=MLA,
        norms=("input_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        router_biases=("e_score_correction_bias",),
        shared="shared_experts",
        dense_layers=1,
        groups=4,
    ),
    "qwen3_5_moe_text": Family(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        {"layer_types": ["linear_attention", "full_attention"], "mtp_num_hidden_layers": 0},
        experts_key="num_experts",
        shared="shared_expert",
        in_moe=("shared_expert_gate.weight",),
        fused="plain",
    ),
    "llama4_text": Family(
        "llama4_text",
        "Llama4ForCausalLM",
        {"interleave_moe_layer_step": 1, "router_aux_loss_coef": 0.001, "no_rope_layers": []},
        moe="feed_forward",
        router="router",
        experts_key="num_local_experts",
        shared="shared_expert",
        fused="transposed",
    ),
    "minimax_m2": Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        {"scoring_func": "sigmoid", "use_routing_bias": True, "num_mtp_modules": 3, "shared_intermediate_size": 0},
        moe="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        beside_router=(("e_score_correction_bias", "E"),),
        experts_key="num_local_experts",
        native="fp8",
    ),
    "qwen2_moe": Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {"decoder_sparse_step": 1, "norm_topk_prob": False, "shared_expert_intermediate_size": EXPERT_WIDTH},
        experts_key="num_experts",
        shared="shared_expert",
        in_moe=("shared_expert_gate.weight",),
    ),
    "olmoe": Family(
        "olmoe",
        "OlmoeForCausalLM",
        {"norm_topk_prob": False, "router_aux_loss_coef": 0.01, "clip_qkv": None},
        experts_key="num_experts",
        norms=("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    ),
    "dots1": Family(
        "dots1",
        "Dots1ForCausalLM",
        {"n_shared_experts": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc"},
        router_biases=("e_score_correction_bias",),
        shared="shared_experts",
        dense_layers=1,
    ),
    "kimi_linear": Family(
        "kimi_linear",
        "KimiLinearForCausalLM",
        KIMI_LINEAR_CONFIG | {"routed_scaling_factor": 2.446},
        moe="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        router_biases=("e_score_correction_bias",),
        experts_key="num_experts",
        top_k_key="num_experts_per_token",
        shared="shared_experts",
        attention=("self_attn.q_proj", "self_attn.f_a_proj", "self_attn.g_b_proj", "self_attn.o_proj"),
        remote_code="KimiLinear",
    ),
    "kimi_k3": Family(
        "kimi_k3",
        "KimiK3ForConditionalGeneration",
        KIMI_LINEAR_CONFIG | {"routed_expert_hidden_size": HIDDEN, "latent_moe_use_norm": True},
        root="language_model.model.",
        head="language_model.lm_head",
        moe="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        router_biases=("e_score_correction_bias",),
        experts_key="num_experts",
        top_k_key="num_experts_per_token",
        shared="shared_experts",
        in_moe=("routed_expert_down_proj.weight", "routed_expert_norm.weight", "routed_expert_up_proj.weight"),
        attention=("self_attn.q_proj", "self_attn.f_a_proj", "self_attn.g_proj", "self_attn.o_proj"),
        others=("vision_tower.encoder.blocks.0.wqkv.weight", "mm_projector.proj.0.weight"),
        native="compressed-tensors",
        text_model_type="kimi_linear",
    ),
    "mimo_v2_flash": Family(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        {
            "moe_layer_freq": [0, 1, 1],
            "n_shared_experts": None,
            "norm_topk_prob": True,
            "routed_scaling_factor": None,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
        router_biases=("e_score_correction_bias",),
        dense_layers=1,
        native="fp8",
        groups=1,
        remote_code="MiMoV2Flash",
    ),
    "hy_v3": Family(
        "hy_v3",
        "HYV3ForCausalLM",
        {
            "expert_hidden_dim": EXPERT_WIDTH,
            "first_k_dense_replace": 1,
            "num_shared_experts": 1,
            "route_norm": True,
            "router_scaling_factor": 2.826,
        },
        router="router.gate",
        beside_router=(("expert_bias", "E"),),
        experts_key="num_experts",
        shared="shared_mlp",
        dense_layers=1,
        mtp="model.layers.{}",
    ),
    "hunyuan_v1_moe": Family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        {"moe_topk": [2, 2, 2], "num_shared_expert": [1, 1, 1], "use_mixed_mlp_moe": True, "moe_layer_num_skipped": 0},
        router="gate.wg",
        experts_key="num_experts",
        top_k_key="",
        shared="shared_mlp",
    ),
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {"moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_interval": 1, "moe_use_aux_free": True},
        beside_router=(("moe_statics.e_score_correction_bias", "1E"),),
        experts_key="moe_num_experts",
        top_k_key="moe_k",
        shared="shared_experts",
        dense_layers=1,
    ),
    "afmoe": Family(
        "afmoe",
        "AfmoeForCausalLM",
        {
            "num_dense_layers": 1,
            "num_expert_groups": 1,
            "num_limited_groups": 1,
            "num_shared_experts": 1,
            "route_norm": True,
            "route_scale": 2.826,
            "score_func": "sigmoid",
        },
        router="router.gate",
        beside_router=(("expert_bias", "E"),),
        experts_key="num_experts",
        shared="shared_experts",
        dense_layers=1,
        attention=("self_attn.q_proj", "self_attn.gate_proj", "self_attn.o_proj"),
        groups=1,
        remote_code="Afmoe",
    ),
    "nemotron_h": Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        {
            "hybrid_override_pattern": "-EE",
            "moe_latent_size": HIDDEN,
            "n_shared_experts": 1,
            "n_groups": 8,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        root="backbone.",
        embedding="embeddings",
        moe="mixer",
        projections=("up_proj", "down_proj"),
        router_biases=("e_score_correction_bias",),
        shared="shared_experts",
        in_moe=("fc1_latent_proj.weight", "fc2_latent_proj.weight"),
        dense_layers=1,
        attention=(),
        norms=("norm",),
        mtp="mtp.layers.{}",
        groups=1,
        remote_code="NemotronH",
    ),
    "deepseek_v41": Family(
        "deepseek_v41",
        "DeepseekV41ForCausalLM",
        {
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
        },
        root="",
        embedding="embed",
        head="head",
        moe="ffn",
        projections=("w1", "w3", "w2"),
        router_biases=("bias", "bias_vl"),
        shared="shared_experts",
        attention=("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b"),
        norms=("attn_norm", "ffn_norm"),
        in_layers=("engram.embed.weight",),
        others=("vision.layers.0.wqkv.weight", "aligner.weight"),
        native="fp4",
        text_model_type="deepseek_v41",
        mtp="mtp.{}",
    ),
    "step3p5": Family(
        "step3p5",
        "Step3p5ForCausalLM",
        {
            "moe_layers_enum": "1,2",
            "moe_router_activation": "sigmoid",
            "moe_router_scaling_factor": 3.0,
            "norm_expert_weight": True,
            "share_expert_dim": EXPERT_WIDTH,
            "use_moe_router_bias": True,
        },
        moe="moe",
        beside_router=(("router_bias", "E"),),
        experts_key="moe_num_experts",
        top_k_key="moe_top_k",
        in_layers=("share_expert.gate_proj.weight", "share_expert.down_proj.weight"),
        fused="step",
        remote_code="Step3p5",
    ),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {"layer_types": ["mamba", "mamba", "attention"], "mamba_n_groups": 1, "shared_intermediate_size": DENSE_WIDTH},
        moe="block_sparse_moe",
        router="router.layer",
        experts_key="num_local_experts",
        in_layers=("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"),
        fused="granite",
    ),
    "jamba": Family(
        "jamba",
        "JambaForCausalLM",
        {"expert_layer_offset": 1, "expert_layer_period": 1, "attn_layer_period": 8, "router_aux_loss_coef": 0.001},
        moe="feed_forward",
        router="router",
        experts_key="num_experts",
        dense_layers=1,
        norms=("input_layernorm", "pre_ff_layernorm"),
    ),
    "gemma4": Family(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {"enable_moe_block": True, "hidden_size_per_layer_input": 0},
        root="model.language_model.",
        moe="",
        router="router.proj",
        beside_router=(("router.scale", "H"), ("router.per_expert_scale", "E")),
        experts_key="num_experts",
        top_k_key="top_k_experts",
        norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm_2"),
        in_layers=("layer_scalar", "mlp.gate_proj.weight", "mlp.down_proj.weight"),
        others=("model.vision_tower.encoder.layers.0.mlp.gate_proj.weight",),
        fused="plain",
        text_model_type="gemma4_text",
    ),
    "qwen3_omni_moe": Family(
        "qwen3_omni_moe",
        "Qwen3OmniMoeForConditionalGeneration",
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        root="thinker.model.",
        apart="talker.model.layers.0",
        head="thinker.lm_head",
        experts_key="num_experts",
        others=("thinker.visual.blocks.0.attn.qkv.weight", "thinker.audio_tower.layers.0.fc1.weight"),
        text_model_type="qwen3_omni_moe_text",
        text_keys=("thinker_config", "text_config"),
    ),
    "qwen4_exp": Family(
        "qwen4_exp",
        "Qwen4ExpForConditionalGeneration",
        {"norm_topk_prob": True, "layer_types": ["linear_attention", "full_attention"], "split_ngram_parts": 2},
        root="model.language_model.",
        experts_key="num_experts",
        shared="shared_expert",
        in_moe=("shared_expert_gate.weight",),
        others=("model.visual.blocks.0.attn.qkv.weight", "model.language_model.ngram_embedding.shard_0.weight"),
        text_model_type="qwen4_exp_text",
        mtp="mtp.layers.{}",
    ),
    "mistral4": Family(  # Mistral Small 4, as Transformers converts it
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {"first_k_dense_replace": 0, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        root="model.language_model.",
        attention=MLA,
        shared="shared_experts",
        others=(
            "model.vision_tower.transformer.layers.0.feed_forward.gate_proj.weight",
            "model.multi_modal_projector.linear_1.weight",
        ),
        fused="scaled",
        text_model_type="mistral4",
        groups=1,
    ),
    "kimi_vl": Family(
        "kimi_vl",
        "KimiVLForConditionalGeneration",
        DEEPSEEK_CONFIG | {"q_lora_rank": None, "routed_scaling_factor": 2.446},
        root="language_model.model.",
        head="language_model.lm_head",
        attention=("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj"),
        router_biases=("e_score_correction_bias",),
        shared="shared_experts",
        dense_layers=1,
        others=("vision_tower.encoder.blocks.0.wqkv.weight", "multi_modal_projector.linear_1.weight"),
        text_model_type="deepseek_v3",
        groups=1,
        remote_code="KimiVL",
    ),
    "deepseek_vl_v2": Family(
        "deepseek_vl_v2",
        "DeepseekVLV2ForCausalLM",
        DEEPSEEK_V2_CONFIG
        | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.0},
        root="language.model.",
        head="language.lm_head",
        attention=MLA,
        router_biases=("e_score_correction_bias",),
        shared="shared_experts",
        dense_layers=1,
        others=("vision.blocks.0.attn.qkv.weight", "projector.layers.0.weight", "view_seperator"),
        text_model_type="deepseek_v2",
        text_keys=("language_config",),
        groups=1,
    ),
    "internvl_chat": Family(  # InternVL3.5
        "internvl_chat",
        "InternVLChatModel",
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "router_aux_loss_coef": 0.001},
        root="language_model.model.",
        head="language_model.lm_head",
        experts_key="num_experts",
        others=("vision_model.encoder.layers.0.attn.qkv.weight", "mlp1.1.weight"),
        text_model_type="qwen3_moe",
        text_keys=("llm_config",),
        remote_code="InternVLChat",
    ),
    "internvl_gpt_oss": Family(
        "internvl_chat",
        "InternVLChatModel",
        {"swiglu_limit": 7.0, "layer_types": ["sliding_attention", "full_attention"]},
        root="language_model.model.",
        head="language_model.lm_head",
        router="router",
        router_biases=("bias",),
        experts_key="num_local_experts",
        others=("vision_model.encoder.layers.0.attn.qkv.weight", "mlp1.1.weight"),
        fused="transposed",
        text_model_type="gpt_oss",
        text_keys=("llm_config",),
        remote_code="InternVLChat",
    ),
    "internvl": Family(  # InternVL3.5 in Transformers' form
        "internvl",
        "InternVLForConditionalGeneration",
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "router_aux_loss_coef": 0.001},
        root="model.language_model.",
        experts_key="num_experts",
        others=("model.vision_tower.encoder.layer.0.attention.q_proj.weight",),
        text_model_type="qwen3_moe",
    ),
    "interns1": Family(
        "interns1",
        "InternS1ForConditionalGeneration",
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "router_aux_loss_coef": 0.001},
        root="model.language_model.",
        experts_key="num_experts",
        others=("model.vision_tower.encoder.layer.0.attention.q_proj.weight",),
        text_model_type="qwen3_moe",
        remote_code="InternS1",
    ),
}


@dataclass(frozen=True)
class Spec:
    """One checkpoint to build. The same spec gives the same bytes."""

    family: str
    experts: int = 8
    layers: int = 3
    top_k: int = 2
    n_group: int = 4
    topk_group: int = 2
    quantization: str = "native"
    router_dtype: str = "BF16"
    token_table_dtype: str = "I64"
    bias_vl: bool = False
    files: int = 3
    shuffled: bool = True
    header_padding: int = 0
    spaced_header: bool = False
    metadata: str = "same"
    indent: int = 2
    final_newline: bool = True
    seed: int = 0
    scale: int = 1  # times the usual width of everything
    aligned: bool = False  # whether headers end at a multiple of 8, as the usual library's do

    def __post_init__(self) -> None:
        """Refuse a spec that no real model could have."""
        if self.quantization not in self.line.quantizations:
            raise ValueError(f"{self.family} is not stored as {self.quantization}")
        if self.line.group_limited and (self.experts % self.n_group or self.topk_group >= self.n_group):
            raise ValueError(f"{self.experts} experts do not make {self.topk_group} of {self.n_group} groups")

    @property
    def line(self) -> Family:
        """The family's line in the table."""
        return FAMILIES[self.family]

    @property
    def hidden(self) -> int:
        """Width of a hidden state."""
        return HIDDEN * self.scale

    @property
    def dense_width(self) -> int:
        """Of a feed-forward layer without experts."""
        return DENSE_WIDTH * self.scale

    @property
    def expert_width(self) -> int:
        """Of one expert."""
        return EXPERT_WIDTH * self.scale

    @property
    def style(self) -> str:
        """How the experts are stored."""
        return self.line.native if self.quantization == "native" else self.quantization

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts: all after the dense ones, and in Llama 4 every second one."""
        return layer % 2 == 1 if self.family == "llama4" else layer >= self.line.dense_layers


def build(spec: Spec, directory: Path) -> None:
    """Write the checkpoint that `spec` describes to `directory`, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    model = _Model(spec)
    model.build()
    _write_tensors(spec, model, directory)
    for name, data in _small_files(spec, model).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (directory / "assets" / "later").mkdir(parents=True)


def write_safetensors(
    path: Path,
    tensors: Sequence[Tensor],
    header_names: Sequence[str] | None = None,
    metadata: dict[str, str] | None = None,
    padding: int = 0,
    spaced: bool = False,
    aligned: bool = False,
) -> None:
    """Write `tensors` in the order given; the header may list them in another order (`header_names`)."""
    entries: dict[str, Any] = {}
    position = 0
    for tensor in tensors:
        end = position + len(tensor.data)
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    header = {} if metadata is None else {"__metadata__": metadata}
    header |= {name: entries[name] for name in header_names or entries}
    separators = (", ", ": ") if spaced else (",", ":")
    text = json.dumps(header, separators=separators).encode() + b" " * padding
    if aligned:
        text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in tensors))


@dataclass
class _Model:
    """Collects the tensors of one model, and the experts that its quantization leaves alone."""

    spec: Spec
    tensors: list[Tensor] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.spec.family} {self.spec.seed}")

    def build(self) -> None:
        spec, family = self.spec, self.spec.line
        self.raw(f"{family.root}{family.embedding}.weight", "BF16", VOCAB, self.spec.hidden)
        for layer in range(spec.layers):
            self.layer(f"{family.root}layers.{layer}", spec.is_moe(layer), hashed=self.is_hashed(layer))
        if family.apart:
            self.layer(family.apart, moe=True)
        if family.mtp:
            self.next_token_layer(family.mtp.format(0 if family.mtp.startswith("mtp") else spec.layers))
        for name in family.others:
            self.raw(name, "BF16", self.spec.hidden, self.spec.hidden)
        self.raw(f"{family.root}norm.weight", "BF16", self.spec.hidden)
        self.raw(f"{family.head}.weight", "BF16", VOCAB, self.spec.hidden)

    def is_hashed(self, layer: int) -> bool:
        return layer < int(self.spec.line.config.get("num_hash_layers", 0))

    def layer(self, prefix: str, moe: bool, hashed: bool = False) -> None:
        family = self.spec.line
        plain_style = family.native if family.native in ("fp8", "fp4") and self.spec.style == family.native else "none"
        for name in family.norms:
            self.raw(f"{prefix}.{name}.weight", "BF16", self.spec.hidden)
        for name in family.attention:
            self.linear(
                f"{prefix}.{name}",
                self.spec.hidden,
                self.spec.hidden,
                "fp8-e8m0" if plain_style == "fp4" else plain_style,
            )
        for name in family.in_layers:
            self.raw(f"{prefix}.{name}", "BF16", self.spec.hidden, self.spec.hidden)
        if self.spec.family == "gpt_oss":
            self.raw(f"{prefix}.self_attn.sinks", "BF16", HEADS)
        block = f"{prefix}.{family.moe}".removesuffix(".")
        if not moe:
            self.feed_forward(block, self.spec.dense_width, plain_style)
            return
        self.router(block, hashed)
        for name in family.in_moe:
            self.raw(f"{block}.{name}", "BF16", self.spec.experts, self.spec.hidden)
        if family.fused:
            self.fused_experts(block, family.fused)
        else:
            for expert in range(self.spec.experts):
                self.expert(f"{block}.experts.{expert}")
        if family.shared:
            # As wide as there are experts in Qwen3.5: a first dimension of E does not make a router tensor.
            width = self.spec.experts if self.spec.family == "qwen3_5_moe" else self.spec.expert_width
            style = "fp8-e8m0" if plain_style == "fp4" else plain_style
            self.feed_forward(f"{block}.{family.shared}", width, style)
        if self.spec.family == "qwen3_5_moe":
            self.raw(f"{block}.shared_expert_gate.weight", "BF16", 1, self.spec.hidden)

    def next_token_layer(self, prefix: str) -> None:
        """The layer past the last one, which predicts one token more."""
        self.layer(prefix, moe=True)
        if self.spec.line.mtp == "model.layers.{}":
            self.raw(f"{prefix}.eh_proj.weight", "BF16", self.spec.hidden, 2 * self.spec.hidden)
            self.raw(f"{prefix}.embed_tokens.weight", "BF16", VOCAB, self.spec.hidden)
            self.raw(f"{prefix}.shared_head.head.weight", "BF16", VOCAB, self.spec.hidden)
            self.raw(f"{prefix}.shared_head.norm.weight", "BF16", self.spec.hidden)
        self.raw(f"{prefix}.enorm.weight", "BF16", self.spec.hidden)
        self.raw(f"{prefix}.hnorm.weight", "BF16", self.spec.hidden)

    def router(self, block: str, hashed: bool) -> None:
        spec = self.spec
        prefix = f"{block}.{spec.line.router}"
        self.normal(f"{prefix}.weight", spec.router_dtype, spec.experts, self.spec.hidden)
        if hashed:
            ids = [e for _ in range(VOCAB) for e in self.random.sample(range(spec.experts), spec.top_k)]
            code = {"I64": "q", "I32": "i"}[spec.token_table_dtype]
            data = struct.pack(f"<{len(ids)}{code}", *ids)
            self.tensors.append(Tensor(f"{prefix}.tid2eid", spec.token_table_dtype, (VOCAB, spec.top_k), data))
            return
        for bias in spec.line.router_biases:
            self.normal(f"{prefix}.{bias}", "BF16" if spec.line.fused else "F32", spec.experts)
        for name, shape in spec.line.beside_router:
            sizes = {"E": (spec.experts,), "1E": (1, spec.experts), "H": (spec.hidden,)}[shape]
            self.normal(f"{block}.{name}", "F32", *sizes)
        if spec.bias_vl:
            self.normal(f"{prefix}.bias_vl", "F32", spec.experts)

    def expert(self, prefix: str) -> None:
        for name, rows, columns in self.matrices(self.spec.expert_width):
            style = self.spec.style
            if style in ("compressed-tensors", "modelopt") and self.random.random() < 0.1:
                self.unquantized.append(f"{prefix}.{name}")
                style = "none"
            self.linear(f"{prefix}.{name}", rows, columns, style)

    def matrices(self, width: int) -> list[tuple[str, int, int]]:
        """Name, rows and columns of a feed-forward's matrices; the last one leads back to the hidden size."""
        *wide, back = self.spec.line.projections
        hidden = self.spec.hidden
        return [*((name, width, hidden) for name in wide), (back, hidden, width)]

    def fused_experts(self, block: str, layout: str) -> None:
        experts = self.spec.experts
        if layout == "step":
            for name, rows, columns in self.matrices(self.spec.expert_width):
                self.raw(f"{block}.{name}.weight", "BF16", experts, rows, columns)
            return
        inside = layout == "granite"
        for name, rows, columns in (
            ("input_linear" if inside else "gate_up_proj", 2 * self.spec.expert_width, self.spec.hidden),
            ("output_linear" if inside else "down_proj", self.spec.hidden, self.spec.expert_width),
        ):
            prefix = f"{block}.experts.{name}"
            if inside:
                self.raw(f"{block}.{name}.weight", "BF16", experts, rows, columns)
            elif layout == "mxfp4":
                self.raw(f"{prefix}_blocks", "U8", experts, rows, columns // 16, 8)
                self.raw(f"{prefix}_scales", "U8", experts, rows, columns // 16)
                self.raw(f"{prefix}_bias", "BF16", experts, rows)
            elif layout == "transposed":
                self.raw(prefix, "BF16", experts, columns, rows)
            elif layout == "scaled":
                self.raw(prefix, "F8_E4M3", experts, rows, columns)
                self.raw(f"{prefix}_scale_inv", "BF16", experts, 1, 1)
                self.raw(f"{prefix}_activation_scale", "BF16", experts)
            else:
                self.raw(prefix, "BF16", experts, rows, columns)

    def feed_forward(self, prefix: str, width: int, style: str) -> None:
        for name, rows, columns in self.matrices(width):
            self.linear(f"{prefix}.{name}", rows, columns, style)

    def linear(self, name: str, rows: int, columns: int, style: str) -> None:
        """A linear layer [rows, columns] in one of the storage styles."""
        blocks = (ceil(rows / FP8_BLOCK), ceil(columns / FP8_BLOCK))
        parts: dict[str, tuple[tuple[str, str, tuple[int, ...]], ...]] = {
            "none": (("weight", "BF16", (rows, columns)),),
            "fp8": (("weight", "F8_E4M3", (rows, columns)), ("weight_scale_inv", "F32", blocks)),
            "fp8-e8m0": (("weight", "F8_E4M3", (rows, columns)), ("scale", "F8_E8M0", blocks)),
            "fp4": (("weight", "I8", (rows, columns // 2)), ("scale", "F8_E8M0", (rows, columns // 16))),
            "awq": (
                ("qweight", "I32", (columns, rows // 8)),
                ("qzeros", "I32", (columns // 16, rows // 8)),
                ("scales", "F16", (columns // 16, rows)),
            ),
            "compressed-tensors": (
                ("weight_packed", "U8", (rows, columns // 2)),
                ("weight_scale", "F8_E4M3", (rows, columns // 16)),
                ("weight_global_scale", "F32", (1,)),
            ),
            "modelopt": (
                ("weight", "U8", (rows, columns // 2)),
                ("weight_scale", "F8_E4M3", (rows, columns // 16)),
                ("weight_scale_2", "F32", ()),
                ("input_scale", "F32", ()),
            ),
        }
        for part, dtype, shape in parts[style]:
            self.raw(f"{name}.{part}", dtype, *shape)

    def raw(self, name: str, dtype: str, *shape: int) -> None:
        data = self.random.randbytes(prod(shape) * DTYPE_BYTES[dtype])
        self.tensors.append(Tensor(name, dtype, shape, data))

    def normal(self, name: str, dtype: str, *shape: int) -> None:
        count = prod(shape)
        data = struct.pack(f"<{count}f", *(self.random.gauss(0, 1) for _ in range(count)))
        if dtype == "BF16":
            upper = bytearray(2 * count)
            upper[0::2], upper[1::2] = data[2::4], data[3::4]
            data = bytes(upper)
        self.tensors.append(Tensor(name, dtype, shape, data))


def _write_tensors(spec: Spec, model: _Model, directory: Path) -> None:
    """Deal the tensors to files at random, or keep them as they come in runs of one length."""
    tensors = list(model.tensors)
    if spec.shuffled:
        model.random.shuffle(tensors)
    metadata = None if spec.metadata == "none" else {"format": "pt", "made_by": "café"}
    weight_map: dict[str, str] = {}
    for number in range(spec.files):
        part = tensors[number * len(tensors) // spec.files : (number + 1) * len(tensors) // spec.files]
        header_names = [tensor.name for tensor in part]
        if spec.shuffled:
            model.random.shuffle(header_names)
        own = metadata | {"part": str(number)} if metadata and spec.metadata == "varied" else metadata
        name = "model.safetensors" if spec.files == 1 else f"model-{number + 1:05d}-of-{spec.files:06d}.safetensors"
        write_safetensors(
            directory / name, part, header_names, own, spec.header_padding, spec.spaced_header, spec.aligned
        )
        weight_map |= {tensor.name: name for tensor in part}
    if spec.files > 1:
        total = sum(len(tensor.data) for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_bytes(_json(spec, index))


def _small_files(spec: Spec, model: _Model) -> dict[str, bytes]:
    """All files that hold no tensors; the sub-folder has namesakes of files that get special treatment."""
    files = {
        "config.json": _json(spec, _config(spec, model)),
        "generation_config.json": _json(spec, {"do_sample": True, "temperature": 0.6, "top_p": 0.95}),
        "tokenizer.json": _json(spec, {"model": {"vocab": {f"experts.{i}.w1": i for i in range(VOCAB)}}}),
        "modeling_moe.py": b"class Moe:\r\n    pass\r\n",
        "README.md": "# A model\n\nexperts.1.down_proj — naïve\n".encode(),
        "LICENSE": b"Do what you like.",
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "empty.txt": b"",
        "inference/model.py": b"import torch\n",
        "inference/config.json": b'{"n_routed_experts": 256}',
        "figures/a.png": model.random.randbytes(3000),
    }
    if spec.style == "modelopt":
        quantized = [name for layer in (1, 2) for name in _expert_modules(spec, layer) if name not in model.unquantized]
        quantization = {
            "quant_algo": "MIXED_PRECISION",
            "exclude_modules": ["lm_head", *model.unquantized],
            "quantized_layers": {name: {"quant_algo": "NVFP4", "group_size": 16} for name in quantized},
        }
        files["hf_quant_config.json"] = _json(spec, {"quantization": quantization})
    return files


def _expert_modules(spec: Spec, layer: int) -> list[str]:
    family = spec.line
    prefix = f"{family.root}layers.{layer}.{family.moe}.experts"
    return [f"{prefix}.{e}.{name}" for e in range(spec.experts) for name in family.projections]


def _config(spec: Spec, model: _Model) -> dict[str, Any]:
    family = spec.line
    architecture = [family.architecture]
    text: dict[str, Any] = {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.dense_width,
        "moe_intermediate_size": spec.expert_width,
        "num_attention_heads": HEADS,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
        family.experts_key: spec.experts,
        **family.config,
    }
    if family.top_k_key:
        text[family.top_k_key] = spec.top_k
    if family.group_limited:
        text |= {"n_group": spec.n_group, "topk_group": spec.topk_group}
    elif family.groups:
        text |= {"n_group": 1, "topk_group": 1}
    if family.mtp:
        text["mtp_num_hidden_layers" if family.text_model_type else "num_nextn_predict_layers"] = 1
    if quantization := _quantization_config(spec, model):
        text["quantization_config"] = quantization
    top: dict[str, Any] = {"architectures": architecture}
    if family.remote_code:
        top["auto_map"] = {
            "AutoConfig": f"configuration_moe.{family.remote_code}Config",
            "AutoModelForCausalLM": f"modeling_moe.{family.architecture}",
        }
    if family.text_model_type:
        text["model_type"] = family.text_model_type
        for key in reversed(family.text_keys):
            text = {key: text, "vision_config": {"depth": 1}}
        if family.apart:
            text["talker_config"] = {"text_config": {family.experts_key: spec.experts, family.top_k_key: 1}}
        return top | {"model_type": family.model_type, **text}
    return top | {"model_type": family.model_type, **text}


def _quantization_config(spec: Spec, model: _Model) -> dict[str, Any] | None:
    """What config.json says of the experts' storage; lists of exceptions name experts by their id."""
    configs: dict[str, dict[str, Any]] = {
        "fp8": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        },
        "fp4": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0"},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "modules_to_not_convert": ["gate", "lm_head"]},
        "compressed-tensors": {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "ignore": ["re:.*lm_head", "re:.*self_attn.*", *model.unquantized, "re:.*shared_experts.*"],
        },
        "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", *model.unquantized]},
    }
    return configs.get(spec.style)


def _json(spec: Spec, value: object) -> bytes:
    text = json.dumps(value, indent=spec.indent, ensure_ascii=False)
    return (text + "\n" * spec.final_newline).encode()
