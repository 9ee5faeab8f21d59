"""Small checkpoints with the structure of published ones that were once handled wrongly or refused.

Names, dtypes and config keys are as reported in public; shapes are tiny, and data are random, but normal numbers in
routers. Each function writes one into a directory; `RIGHT` and `REFUSED` say what must become of it.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from checkpoints import DTYPE_BYTES, Tensor, write_safetensors

HIDDEN, WIDTH, VOCAB, EXPERTS = 16, 24, 32, 8
INDEX = "model.safetensors.index.json"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Part = tuple[str, str, tuple[int, ...]]  # what stands behind the module's name, dtype, shape

PLAIN: tuple[Part, ...] = (("weight", "BF16", (WIDTH, HIDDEN)),)
NVFP4: tuple[Part, ...] = (
    ("weight", "U8", (WIDTH, HIDDEN // 2)),
    ("weight_scale", "F8_E4M3", (WIDTH, 2)),
    ("weight_scale_2", "F32", ()),
    ("input_scale", "F32", ()),
)
AWQ: tuple[Part, ...] = (
    ("qweight", "I32", (HIDDEN, 3)),
    ("qzeros", "I32", (2, 3)),
    ("scales", "F16", (2, WIDTH)),
)
W8A8: tuple[Part, ...] = (
    ("weight", "I8", (WIDTH, HIDDEN)),
    ("weight_scale", "F32", (WIDTH, 1)),
    ("weight_offset", "F32", (WIDTH, 1)),
)
MXFP4: tuple[Part, ...] = (("weight_packed", "U8", (WIDTH, 8)), ("weight_scale", "U8", (WIDTH, 1)))

DEEPSEEK_V3: dict[str, Any] = {
    **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_routed_experts": EXPERTS},
    **{"num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    **{"norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_hidden_layers": 3, "first_k_dense_replace": 1},
    **{"num_nextn_predict_layers": 1, "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH},
}
QWEN3: dict[str, Any] = {
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": EXPERTS},
    **{"num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    **{"num_hidden_layers": 2, "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH},
}
QWEN35_TEXT: dict[str, Any] = {
    **{"model_type": "qwen3_5_moe_text", "num_experts": EXPERTS, "num_experts_per_tok": 2, "num_hidden_layers": 2},
    **{"hidden_size": HIDDEN, "mtp_num_hidden_layers": 1, "layer_types": ["linear_attention", "full_attention"]},
    "shared_expert_intermediate_size": WIDTH,
}
MIXTRAL: dict[str, Any] = {
    **{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2},
}
ALL_EXPERTS = r"re:.*mlp\.experts\.[0-9]+\.(gate|up|down)_proj$"

_random = random.Random(7)


def tensor(name: str, dtype: str, *shape: int) -> Tensor:
    """Random bytes."""
    return Tensor(name, dtype, shape, _random.randbytes(prod(shape) * DTYPE_BYTES[dtype]))


def rows(name: str, *shape: int) -> Tensor:
    """Normal numbers in float32, as routers hold them."""
    count = prod(shape)
    return Tensor(name, "F32", shape, struct.pack(f"<{count}f", *(_random.gauss(0, 1) for _ in range(count))))


def feed_forward(prefix: str, parts: Iterable[Part] = PLAIN, names: Iterable[str] = PROJECTIONS) -> list[Tensor]:
    """The three matrices of a feed-forward or of an expert."""
    return [tensor(f"{prefix}.{name}.{part}", dtype, *shape) for name in names for part, dtype, shape in parts]


def moe(
    block: str,
    experts: int = EXPERTS,
    parts: Callable[[int], Iterable[Part]] = lambda _: PLAIN,
    names: Iterable[str] = PROJECTIONS,
) -> list[Tensor]:
    """Experts one by one, with a gate; `parts` says how each is stored."""
    found = [one for e in range(experts) for one in feed_forward(f"{block}.experts.{e}", parts(e), tuple(names))]
    return [*found, rows(f"{block}.gate.weight", experts, HIDDEN)]


def stack(layers: Mapping[str, list[Tensor]], root: str = "model") -> list[Tensor]:
    """A whole model; `layers` has what is in each layer, but attention."""
    found = [tensor(f"{root}.embed_tokens.weight", "BF16", VOCAB, HIDDEN)]
    for name, tensors in layers.items():
        found += [tensor(f"{name}.self_attn.o_proj.weight", "BF16", HIDDEN, HIDDEN), *tensors]
    return [*found, tensor(f"{root}.norm.weight", "BF16", HIDDEN), tensor("lm_head.weight", "BF16", VOCAB, HIDDEN)]


def qwen3_layers(count: int = 2) -> dict[str, list[Tensor]]:
    """Layers of Qwen3-MoE."""
    return {f"model.layers.{i}": moe(f"model.layers.{i}.mlp") for i in range(count)}


def write(directory: Path, config: Mapping[str, Any], tensors: list[Tensor], stem: str = "model") -> None:
    """Config, two files, and an index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    half = -(-len(tensors) // 2)
    parts = {f"{stem}-00001-of-00002.safetensors": tensors[:half], f"{stem}-00002-of-00002.safetensors": tensors[half:]}
    for name, part in parts.items():
        write_safetensors(directory / name, part, metadata={"format": "pt"})
    weight_map = {one.name: name for name, part in parts.items() for one in part}
    index = INDEX if stem == "model" else f"{stem}.safetensors.index.json"
    size = sum(len(one.data) for one in tensors)
    (directory / index).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))


def ling2_published(directory: Path) -> None:
    """Ling and Ring 2.0 say model type `bailing_moe`."""
    config = {
        **{"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "num_experts": EXPERTS},
        "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
        **{"num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "score_function": "sigmoid"},
        **{"moe_router_enable_expert_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        **{"num_shared_experts": 1, "first_k_dense_replace": 1, "router_dtype": "fp32", "num_hidden_layers": 2},
        "num_nextn_predict_layers": 0,
    }
    block = "model.layers.1.mlp"
    layers = {
        "model.layers.0": feed_forward("model.layers.0.mlp"),
        "model.layers.1": [
            *moe(block),
            rows(f"{block}.gate.expert_bias", EXPERTS),
            *feed_forward(f"{block}.shared_experts"),
        ],
    }
    write(directory, config, stack(layers))


def fused(block: str) -> list[Tensor]:
    """A MoE block of Qwen3.5."""
    return [
        tensor(f"{block}.experts.gate_up_proj", "BF16", EXPERTS, 2 * WIDTH, HIDDEN),
        tensor(f"{block}.experts.down_proj", "BF16", EXPERTS, HIDDEN, WIDTH),
        rows(f"{block}.gate.weight", EXPERTS, HIDDEN),
        *feed_forward(f"{block}.shared_expert"),
        tensor(f"{block}.shared_expert_gate.weight", "BF16", 1, HIDDEN),
    ]


def qwen35(root: str) -> list[Tensor]:
    """Qwen3.5's language model."""
    layers = {f"{root}.layers.{i}": fused(f"{root}.layers.{i}.mlp") for i in range(2)}
    return [tensor(f"{root}.layers.0.linear_attn.A_log", "F32", 4), *stack(layers, root)]


def q35_text_only(directory: Path) -> None:
    """Text-only Qwen3.5 and 3.6, as quantizers and `save_pretrained` write them."""
    write(directory, {**QWEN35_TEXT, "architectures": ["Qwen3_5MoeForCausalLM"]}, qwen35("model"))


def q35_fused_ct_regex(directory: Path) -> None:
    """Fused experts, and a pattern of all experts that is written with ids."""
    quantization = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    config = {
        **{"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"},
        **{"text_config": QWEN35_TEXT, "vision_config": {"model_type": "qwen3_5_moe", "depth": 1}},
        "quantization_config": {**quantization, "ignore": ["lm_head", ALL_EXPERTS]},
    }
    visual = tensor("model.visual.blocks.0.mlp.linear_fc1.weight", "BF16", HIDDEN, HIDDEN)
    draft = [tensor("mtp.fc.weight", "BF16", HIDDEN, 2 * HIDDEN), *fused("mtp.layers.0.mlp")]
    write(directory, config, [visual, *qwen35("model.language_model"), *draft])


def llama4_text_only(directory: Path) -> None:
    """Llama 4 without its vision model, in one file."""
    directory.mkdir(parents=True)
    config = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "num_local_experts": EXPERTS}
    (directory / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1, "num_hidden_layers": 1}))
    block = "model.layers.0.feed_forward"
    layer = [
        tensor(f"{block}.experts.gate_up_proj", "BF16", EXPERTS, HIDDEN, 2 * WIDTH),
        tensor(f"{block}.experts.down_proj", "BF16", EXPERTS, WIDTH, HIDDEN),
        rows(f"{block}.router.weight", EXPERTS, HIDDEN),
        *feed_forward(f"{block}.shared_expert"),
    ]
    write_safetensors(directory / "model.safetensors", stack({"model.layers.0": layer}), metadata={"format": "pt"})


def q3vl_proj_first(directory: Path) -> None:
    """ModelOpt's names for Qwen3-VL: `experts.gate_proj.<id>`."""
    text = {**QWEN3, "model_type": "qwen3_vl_moe_text"}
    del text["architectures"]
    config = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
    layers = {}
    for number in range(2):
        block = f"model.language_model.layers.{number}.mlp"
        experts = [
            tensor(f"{block}.experts.{name}.{e}.{part}", dtype, *shape)
            for name in PROJECTIONS
            for e in range(EXPERTS)
            for part, dtype, shape in NVFP4
        ]
        layers[f"model.language_model.layers.{number}"] = [*experts, rows(f"{block}.gate.weight", EXPERTS, HIDDEN)]
    write(directory, {**config, "text_config": text, "vision_config": {}}, stack(layers, "model.language_model"))


def no_index(directory: Path) -> None:
    """Several files, which vLLM finds by their suffix."""
    write(directory, QWEN3, [])
    for path in directory.glob("model*"):
        path.unlink()
    tensors = stack(qwen3_layers())
    for number in range(2):
        part = [one for one in tensors if f".layers.{number}.mlp.experts" in one.name]
        write_safetensors(directory / f"layer-{number}-experts-0-8.safetensors", part, metadata={"format": "pt"})
    part = [one for one in tensors if ".experts." not in one.name]
    write_safetensors(directory / "model-bf16-00001.safetensors", part, metadata={"format": "pt"})


def lora_subfolder(directory: Path) -> None:
    """An adapter for experts in a sub-folder, which names them by the original's ids."""
    write(directory, QWEN3, stack(qwen3_layers(1)))
    (directory / "adapter").mkdir()
    names = [f"base_model.model.model.layers.0.mlp.experts.{e}.down_proj.lora_A.weight" for e in range(EXPERTS)]
    loras = [tensor(name, "F32", 8, HIDDEN) for name in names]
    write_safetensors(directory / "adapter" / "adapter_model.safetensors", loras)
    adapter = {"rank_pattern": {"model.layers.0.mlp.experts.5.down_proj": 8}, "peft_type": "LORA"}
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))


def awq_substring_expert(directory: Path) -> None:
    """AWQ looks for `mlp.experts.1` anywhere in a name, which means 1 and 10 to 15."""
    quantization = {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["mlp.experts.1", "lm_head"]}
    block = moe("model.layers.0.mlp", 16, lambda e: PLAIN if str(e).startswith("1") else AWQ)
    config = {**QWEN3, "num_experts": 16, "num_hidden_layers": 1, "quantization_config": quantization}
    write(directory, config, stack({"model.layers.0": block}))


def msmodelslim(directory: Path) -> None:
    """For vLLM Ascend: an index of another name, and each tensor's kind of quantization."""
    layers = {"model.layers.0": feed_forward("model.layers.0.mlp")}
    for number in (1, 2):
        block = f"model.layers.{number}.mlp"
        layers[f"model.layers.{number}"] = [
            *moe(block, parts=lambda e, last=number == 2: PLAIN if last and e == 5 else W8A8),
            rows(f"{block}.gate.e_score_correction_bias", EXPERTS),
            *feed_forward(f"{block}.shared_experts"),
        ]
    tensors = stack(layers)
    write(directory, DEEPSEEK_V3, tensors, "quant_model_weight_w8a8_dynamic")
    described = {one.name: "FLOAT" if one.dtype == "BF16" else "W8A8_DYNAMIC" for one in tensors}
    description = {**described, "model_quant_type": "W8A8_DYNAMIC", "group_size": 256}
    (directory / "quant_model_description.json").write_text(json.dumps(description))


def mixtral_llmc_names(directory: Path) -> None:
    """llm-compressor's pattern of all experts in Qwen's words, over `block_sparse_moe` and `w1`."""
    quantization = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "ignore": ["lm_head"]}
    groups = {"config_groups": {"group_0": {"targets": [ALL_EXPERTS]}}}
    config = {**MIXTRAL, "num_local_experts": EXPERTS, "quantization_config": {**quantization, **groups}}
    block = moe("model.layers.0.block_sparse_moe", parts=lambda _: MXFP4, names=("w1", "w2", "w3"))
    write(directory, config, stack({"model.layers.0": block}))


def mergekit_mixtral(directory: Path) -> None:
    """mergekit's name of the model has `experts-4` in it."""
    config = {**MIXTRAL, "num_local_experts": 4, "_name_or_path": "models/merged/clown-moe-experts-4x7b"}
    block = moe("model.layers.0.block_sparse_moe", 4, names=("w1", "w3", "w2"))
    write(directory, config, stack({"model.layers.0": block}))
    (directory / "mergekit_moe_config.yml").write_text("experts:\n - source_model: a\n")


RIGHT = (
    *(ling2_published, q35_text_only, llama4_text_only, msmodelslim, no_index, mixtral_llmc_names),
    *(q35_fused_ct_regex, mergekit_mixtral),
)
REFUSED = {  # with what the line says
    q3vl_proj_first: (
        "experts.gate_proj.0.weight",
        "named ….experts.<id>.<anything>; export the model under such names",
    ),
    awq_substring_expert: ("config.json", "'mlp.experts.1'", "write out the full names of the modules"),
    lora_subfolder: ("adapter/adapter_model.safetensors", "experts.0.down_proj"),
}
