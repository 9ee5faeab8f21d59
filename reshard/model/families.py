"""How model families name their experts and routers, and how they route. Data: a new family is a new line,
if its router tensors have names that are listed here; otherwise `layers` and `router` have to learn the names too.

A family is listed only when its router is known to treat all experts alike (group limits apart), because only then is
renumbering exact. An unknown `model_type` is refused, not guessed at.

Sources: the families' published configs and indices, and their model files in Transformers and vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ..placement.contract import GROUP_KEYS


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    `block` is the module that holds a layer's experts and router (`….<block>.experts.<id>.<anything>`); `scoring` is
    how router logits become scores if config.json does not say. `assumes_groups`: if config.json does not give the
    number of expert groups, some engine assumes eight, so reshard insists that config.json gives it.
    """

    name: str
    block: str
    model_types: tuple[str, ...]
    scoring: str
    assumes_groups: bool = False


FAMILIES = (
    Family("DeepSeek-V2", "mlp", ("deepseek_v2",), "softmax"),
    Family("DeepSeek-V3, R1, V3.1", "mlp", ("deepseek_v3",), "sigmoid", assumes_groups=True),
    Family("DeepSeek-V3.2", "mlp", ("deepseek_v32",), "sigmoid", assumes_groups=True),
    Family("DeepSeek-V4", "ffn", ("deepseek_v4",), "sqrtsoftplus"),
    Family("Kimi-K2", "mlp", ("kimi_k2", "kimi_k25"), "sigmoid", assumes_groups=True),
    Family("GLM-4.5 and later", "mlp", ("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa"), "sigmoid"),
    Family("Ling 2.0", "mlp", ("bailing_moe_v2",), "sigmoid", assumes_groups=True),
    Family("Qwen3-MoE", "mlp", ("qwen3_moe", "qwen3_next", "qwen3_vl_moe", "qwen3_5_moe"), "softmax"),
    Family("Mixtral", "block_sparse_moe", ("mixtral",), "softmax"),
    Family("gpt-oss", "mlp", ("gpt_oss",), "softmax of the chosen"),
    Family("Llama 4", "feed_forward", ("llama4",), "sigmoid of the chosen"),
)  # fmt: skip

BY_MODEL_TYPE: Mapping[str, Family] = {model_type: family for family in FAMILIES for model_type in family.model_types}


class Indexed(Enum):
    """How a router tensor is indexed by expert."""

    ROWS = "one row for each expert"
    VALUES = "its values are expert ids"


@dataclass(frozen=True, slots=True)
class RouterTensor:
    """How a router tensor is indexed by expert, and how many dimensions it has."""

    indexed: Indexed
    dimensions: int


# Below `<block>.gate` or `<block>.router`. Anything else there is an error.
ROUTER_MODULES = ("gate", "router")
ROUTER_TENSORS: Mapping[str, RouterTensor] = {
    "weight": RouterTensor(Indexed.ROWS, 2),  # [E, hidden]
    "bias": RouterTensor(Indexed.ROWS, 1),  # [E], likewise the other biases
    "bias_vl": RouterTensor(Indexed.ROWS, 1),
    "e_score_correction_bias": RouterTensor(Indexed.ROWS, 1),
    "expert_bias": RouterTensor(Indexed.ROWS, 1),
    "tid2eid": RouterTensor(Indexed.VALUES, 2),  # [vocab, top_k]
}

# Modules beside the router that every token goes through: not indexed by expert, whatever their shape.
SHARED_MODULES = ("shared_experts", "shared_expert", "shared_expert_gate")

# Where config.json says how many experts a layer has, and how many a token chooses.
NUM_EXPERTS_KEYS = ("n_routed_experts", "num_experts", "num_local_experts")
TOP_K_KEYS = ("num_experts_per_tok", "experts_per_token")
SCORING_KEYS = ("scoring_func", "score_function")
# The values that reshard accepts: they treat all experts alike, apart from group limits. Anything else is refused.
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
# Vision and audio models keep their language model's config under one of these keys.
TEXT_CONFIG_KEYS = ("text_config", "language_config", "llm_config")
ROUTING_KEYS = (
    *(*NUM_EXPERTS_KEYS, *TOP_K_KEYS, *SCORING_KEYS, *GROUP_KEYS),
    *("topk_method", "norm_topk_prob", "routed_scaling_factor"),
)
# Router rows must be of a type that we can compute with; expert ids must be integers.
ROUTER_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
EXPERT_ID_DTYPES = ("I64", "I32", "I16", "I8", "U8")
