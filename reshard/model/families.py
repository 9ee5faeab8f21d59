"""How model families name their experts and routers, and how they route. Data: a new family is a new `Family`.

A family is listed only when its router is known to treat all experts alike (group limits apart), because only then is
renumbering exact. `source` says where its router was read. An unknown `model_type` is refused, not guessed at.
`docs/families.md` shows the table; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ..placement.contract import GROUP_KEYS


class Role(Enum):
    """What a tensor does in the router. All but the last two have one row for each expert."""

    LOGITS = "its rows turn a hidden state into logits"
    LOGIT_BIAS = "added to the logits"
    CORRECTION = "added to the scores, to rank experts only"
    WEIGHT_SCALE = "multiplied with a chosen expert's weight"
    IDS = "its values are expert ids"
    INPUT = "applied to the hidden state, not indexed by expert"


@dataclass(frozen=True, slots=True)
class RouterTensor:
    """A router tensor's role, and its dimensions: `E` is one entry for each expert, `1` is one, others are free."""

    role: Role
    shape: tuple[str, ...]


_LOGITS = RouterTensor(Role.LOGITS, ("E", "hidden"))
_CORRECTION = RouterTensor(Role.CORRECTION, ("E",))

# All router tensors that some family has, by their name below the block.
ROUTER_TENSORS: Mapping[str, RouterTensor] = {
    "gate.weight": _LOGITS,
    "gate.wg.weight": _LOGITS,
    "router.weight": _LOGITS,
    "router.gate.weight": _LOGITS,
    "router.layer.weight": _LOGITS,
    "router.proj.weight": _LOGITS,
    "router.bias": RouterTensor(Role.LOGIT_BIAS, ("E",)),
    "gate.bias": _CORRECTION,
    "gate.bias_vl": _CORRECTION,
    "gate.e_score_correction_bias": _CORRECTION,
    "gate.expert_bias": _CORRECTION,
    "e_score_correction_bias": _CORRECTION,
    "expert_bias": _CORRECTION,
    "router_bias": _CORRECTION,
    "moe_statics.e_score_correction_bias": RouterTensor(Role.CORRECTION, ("1", "E")),
    "router.per_expert_scale": RouterTensor(Role.WEIGHT_SCALE, ("E",)),
    "router.scale": RouterTensor(Role.INPUT, ("hidden",)),
    "gate.tid2eid": RouterTensor(Role.IDS, ("vocab", "top_k")),
}
GATE = ("gate.weight",)
DEEPSEEK_GATE = ("gate.weight", "gate.e_score_correction_bias")
DEEPSEEK_V4_GATE = ("gate.weight", "gate.bias", "gate.bias_vl", "gate.tid2eid")
LING_GATE = ("gate.weight", "gate.expert_bias")


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Parameters:
        name: for people
        block: the module that holds a layer's experts and router (`….<block>.experts.<id>.<anything>`); `*` is a number
        model_types: of config.json; where families share one, `<model type>:<architecture>`
        scoring: how router logits become scores if config.json does not say
        source: where the router was read
        group_limited: whether the published models are; for the documentation, since config.json decides
        assumes_groups: if config.json does not give the number of expert groups, some engine assumes several, so
            reshard insists that config.json gives it
        router: names of the router's tensors below the block, of `ROUTER_TENSORS`. Anything else there is an error; a
            layer may lack all but those with the logits
        fused: modules of the block that each hold all experts, beside `experts`: dimension 0 is the expert
        beside: modules that every token goes through, in addition to `SHARED_MODULES`: not indexed by expert
        apart: parts of the checkpoint, by the beginning of their names, that route by a config of their own: their
            experts keep their ids
        score_names: what config.json calls a scoring, if it is none of `SCORINGS`
        normalizes: whether the weights of the chosen experts sum to 1 if config.json does not say
        lists: whether config.json may give numbers of experts as lists, one for each layer
        even_ranks: whether some of vLLM's kernels need the same number of experts on every EP rank
        groups_differ: what differs between engines if config.json limits groups, which is refused then

    """

    name: str
    block: str
    model_types: tuple[str, ...]
    scoring: str
    source: str
    group_limited: bool = False
    assumes_groups: bool = False
    router: tuple[str, ...] = GATE
    fused: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    score_names: Mapping[str, str] | None = None
    normalizes: bool = True
    lists: bool = False
    even_ranks: bool = False
    groups_differ: str = ""


_VLLM = "vLLM 0.33 "
_BOTH = "vLLM 0.33 and Transformers 5.19 "
FAMILIES = (
    Family(
        "DeepSeek-V2", "mlp", ("deepseek_v2",), "softmax", _VLLM + "deepseek_v2", group_limited=True,
        router=DEEPSEEK_GATE,
    ),
    Family(
        "DeepSeek-V3, R1, V3.1", "mlp", ("deepseek_v3",), "sigmoid", _VLLM + "deepseek_v2",
        group_limited=True, assumes_groups=True, router=DEEPSEEK_GATE,
    ),
    Family(
        "DeepSeek-V3.2", "mlp", ("deepseek_v32",), "sigmoid", _VLLM + "deepseek_v2",
        group_limited=True, assumes_groups=True, router=DEEPSEEK_GATE,
    ),
    Family(
        "DeepSeek-V4, V4.1", "ffn", ("deepseek_v4", "deepseek_v41"), "sqrtsoftplus",
        _VLLM + "deepseek_v4, deepseek_v41", router=DEEPSEEK_V4_GATE, even_ranks=True,
    ),
    Family(
        "Kimi-K2", "mlp", ("kimi_k2", "kimi_k25"), "sigmoid", _VLLM + "deepseek_v2, kimi_k25", assumes_groups=True,
        router=DEEPSEEK_GATE,
    ),
    Family(
        "Kimi-Linear, Kimi-K3", "block_sparse_moe", ("kimi_linear", "kimi_k3"), "sigmoid", _VLLM + "kimi_k3",
        beside=("routed_expert_down_proj", "routed_expert_norm", "routed_expert_up_proj"), router=DEEPSEEK_GATE,
    ),
    Family(
        "GLM-4.5 and later", "mlp", ("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa"), "sigmoid",
        _VLLM + "glm4_moe, deepseek_v2", router=DEEPSEEK_GATE,
    ),
    Family(
        "Ling 2.0", "mlp", ("bailing_moe:BailingMoeV2ForCausalLM", "bailing_moe_v2"), "sigmoid", _VLLM + "bailing_moe",
        group_limited=True, assumes_groups=True, router=LING_GATE,
    ),
    Family("Ling 1.x", "mlp", ("bailing_moe:BailingMoeForCausalLM",), "softmax", _VLLM + "bailing_moe"),
    Family(
        "Ling 2.5 to 3.0", "mlp", ("bailing_hybrid",), "sigmoid", _VLLM + "bailing_moe_linear, bailing_moe_v3",
        group_limited=True, assumes_groups=True, router=LING_GATE,
    ),
    Family(
        "A.X-K1", "mlp", ("AXK1", "axk1"), "sigmoid", _BOTH + "axk1", group_limited=True, assumes_groups=True,
        router=DEEPSEEK_GATE,
    ),
    Family(
        "Qwen3-MoE", "mlp", ("qwen3_moe", "qwen3_next", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_5_moe_text"), "softmax",
        _VLLM + "qwen3_moe, qwen3_next",
    ),
    Family("Qwen2-MoE", "mlp", ("qwen2_moe",), "softmax", _BOTH + "qwen2_moe", normalizes=False),
    Family(
        "Qwen3-Omni", "thinker.model.layers.*.mlp", ("qwen3_omni_moe",), "softmax",
        _VLLM + "qwen3_omni_moe_thinker, qwen3_moe", apart=("talker.",),
    ),
    Family("Qwen4-Exp", "mlp", ("qwen4_exp", "qwen4_exp_text"), "softmax", "Transformers 5.19 qwen4_exp"),
    Family("Mixtral", "block_sparse_moe", ("mixtral",), "softmax", _VLLM + "mixtral"),
    Family(
        "Mistral 4", "mlp", ("mistral4",), "softmax", "Transformers 5.19 mistral4",
        groups_differ="Transformers ranks its groups by their two best experts, vLLM by the best one",
    ),
    Family(
        "MiniMax-M2", "block_sparse_moe", ("minimax_m2",), "sigmoid", _BOTH + "minimax_m2",
        router=("gate.weight", "e_score_correction_bias"),
    ),
    Family(
        "gpt-oss", "mlp", ("gpt_oss",), "softmax of the chosen", _VLLM + "gpt_oss",
        router=("router.weight", "router.bias"),
    ),
    Family(
        "Llama 4", "feed_forward", ("llama4", "llama4_text"), "sigmoid of the chosen", _VLLM + "llama4",
        router=("router.weight",),
    ),
    Family("OLMoE", "mlp", ("olmoe",), "softmax", _BOTH + "olmoe", normalizes=False),
    Family(
        "dots.llm1", "mlp", ("dots1",), "sigmoid", "Transformers 5.19 dots1", normalizes=False,
        score_names={"noaux_tc": "sigmoid"}, router=DEEPSEEK_GATE,
    ),
    Family("MiMo-V2-Flash", "mlp", ("mimo_v2_flash",), "sigmoid", _BOTH + "mimo_v2", router=DEEPSEEK_GATE),
    Family(
        "Hunyuan 3", "mlp", ("hy_v3",), "sigmoid", _BOTH + "hy_v3", router=("router.gate.weight", "expert_bias"),
        beside=("shared_mlp",),
    ),
    Family(
        "Hunyuan-A13B", "mlp", ("hunyuan_v1_moe",), "softmax", "Transformers 5.19 hunyuan_v1_moe",
        router=("gate.wg.weight",), beside=("shared_mlp",), lists=True,
    ),
    Family(
        "ERNIE 4.5", "mlp", ("ernie4_5_moe",), "softmax", _BOTH + "ernie4_5_moe",
        router=("gate.weight", "moe_statics.e_score_correction_bias"),
    ),
    Family("Trinity", "mlp", ("afmoe",), "sigmoid", _BOTH + "afmoe", router=("router.gate.weight", "expert_bias")),
    Family(
        "Nemotron-H", "mixer", ("nemotron_h",), "sigmoid", _BOTH + "nemotron_h",
        beside=("fc1_latent_proj", "fc2_latent_proj"), router=DEEPSEEK_GATE,
    ),
    Family(
        "Step-3.5, Step-3.7", "moe", ("step3p5", "step3p7"), "sigmoid", _VLLM + "step3p5",
        router=("gate.weight", "router_bias"), fused=("gate_proj", "up_proj", "down_proj"), beside=("share_expert",),
    ),
    Family(
        "Granite MoE", "block_sparse_moe", ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        "softmax of the chosen", _BOTH + "granitemoe", router=("router.layer.weight",),
        fused=("input_linear", "output_linear"),
    ),
    Family(
        "Jamba", "feed_forward", ("jamba",), "softmax", _BOTH + "jamba", router=("router.weight",), normalizes=False
    ),
    Family(
        "Gemma 4", "layers.*", ("gemma4", "gemma4_text"), "softmax", _BOTH + "gemma4",
        router=("router.proj.weight", "router.scale", "router.per_expert_scale"),
        beside=(
            *("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "layer_scalar"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm_2"),
            *("post_feedforward_layernorm_1", "post_feedforward_layernorm_2"),
            *("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"),
        ),
    ),
)  # fmt: skip

BY_MODEL_TYPE: Mapping[str, Family] = {model_type: family for family in FAMILIES for model_type in family.model_types}
# Models for images or audio around a language model: which model types that may have, and where this was read. Its
# config lies under one of `TEXT_CONFIG_KEYS`.
WRAPPERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "kimi_vl": (("deepseek_v3",), _VLLM + "kimi_vl"),
    "deepseek_vl_v2": (("deepseek_v2",), _VLLM + "deepseek_vl2, deepseek_ocr"),
    "internvl_chat": (("qwen3_moe", "gpt_oss"), _VLLM + "internvl"),
    "internvl": (("qwen3_moe", "gpt_oss"), _VLLM + "interns1"),
    "interns1": (("qwen3_moe",), _VLLM + "interns1"),
    "mistral3": (("mistral4",), "Transformers 5.19 mistral3"),
}
# Known, and not exact after renumbering; the reason completes "its router …". Sources: vLLM 0.33, files of these names.
REFUSED: Mapping[str, str] = {
    "interns1_pro": "takes the best experts of each group of consecutive experts",
    "intern_s1_pro": "takes the best experts of each group of consecutive experts",
    "longcat_flash": "has rows for zero experts, after those of the experts",
    "longcat_flash_ngram": "has rows for zero experts, after those of the experts",
    "ernie4_5_moe_vl": "chooses among some experts for text, and among others for images",
    "ernie4_5_vl_moe": "chooses among some experts for text, and among others for images",
    "nemotron_h_puzzle": "has another number of experts in each layer",
}

# Modules beside the router that every token goes through: not indexed by expert, whatever their shape.
SHARED_MODULES = ("shared_experts", "shared_expert", "shared_expert_gate")
FUSED_MODULES = frozenset(module for family in FAMILIES for module in family.fused)

# Where config.json says how many experts a layer has, how many a token chooses, and how they are scored and weighted.
NUM_EXPERTS_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
TOP_K_KEYS = (
    *("num_experts_per_tok", "experts_per_token", "num_experts_per_token"),
    *("moe_k", "moe_topk", "moe_top_k", "top_k_experts"),
)
SCORING_KEYS = (
    *("scoring_func", "score_function", "score_func"),
    *("moe_router_activation", "moe_router_activation_func"),
)
NORMALIZE_KEYS = ("norm_topk_prob", "route_norm", "moe_renormalize", "norm_expert_weight")
SCALING_KEYS = ("routed_scaling_factor", "router_scaling_factor", "route_scale", "moe_router_scaling_factor")
# The values that reshard accepts: they treat all experts alike, apart from group limits. Anything else is refused.
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
# Vision and audio models keep their language model's config under one of these keys.
TEXT_CONFIG_KEYS = ("text_config", "language_config", "llm_config", "thinker_config")
ROUTING_KEYS = (
    *(*NUM_EXPERTS_KEYS, *TOP_K_KEYS, *SCORING_KEYS, *GROUP_KEYS, *NORMALIZE_KEYS, *SCALING_KEYS),
    "topk_method",
)
# Router rows must be of a type that we can compute with; expert ids must be integers.
ROUTER_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
EXPERT_ID_DTYPES = ("I64", "I32", "I16", "I8", "U8")
