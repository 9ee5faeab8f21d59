"""Every family, from published names and config keys to the routers' choices; and what stays refused, by its reason.

The round trips of all families are in `tests/commands/test_roundtrip.py`. Here are their controls, and the table in
the documentation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, Spec, Tensor, build, write_safetensors
from command_line import run, run_well
from oracle import OF_HIDDEN_SIZE, assert_resharded, read_safetensors

from reshard.commands.compare import compare_routers
from reshard.commands.original import read_original
from reshard.model.families import BY_MODEL_TYPE, REFUSED, WRAPPERS
from reshard.model.families import FAMILIES as TABLE
from reshard.model.router import Router, route
from reshard.model.routing import Routing
from reshard.record.manifest import read_manifest

DOCUMENTATION = Path(__file__).parents[2]
RANKS = 3


def change_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_bytes())
    change(config)
    path.write_text(json.dumps(config))


def add(directory: Path, *tensors: Tensor) -> None:
    """Put more tensors into the checkpoint, which has one file."""
    (path,) = directory.glob("*.safetensors")
    old = [Tensor(name, found.dtype, found.shape, found.data) for name, found in read_safetensors(path)[1].items()]
    write_safetensors(path, [*old, *tensors])


def located(directory: Path) -> dict[str, tuple[Path, int, bytes]]:
    """File, start and bytes of each tensor."""
    return {
        name: (path, tensor.start, tensor.data)
        for path in directory.glob("*.safetensors")
        for name, tensor in read_safetensors(path)[1].items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_indexed_by_expert_that_stays_in_the_old_order_is_found_by_the_oracle_and_by_the_routers(
    family: str, tmp_path: Path
) -> None:
    """The control of the round trips: every router tensor, and fused experts, put back as the source has them."""
    source, output = tmp_path / "source", tmp_path / "output"
    build(Spec(family, experts=8, layers=2), source)
    run_well("zigzag", "--src", source, "--ep", RANKS, "--out", output)
    original, manifest = read_original(source), read_manifest(output)
    assert_resharded(source, output, RANKS)
    compared = compare_routers(original, output, manifest)
    assert (compared.routers, compared.problems) == (len(original.model.layers), ())
    old, new = located(source), located(output)
    layer = original.model.layers[-1]
    assert layer.router
    for tensor in (*layer.router, *layer.fused, *layer.expert_ids):
        path, start, data = new[tensor.name]
        before = path.read_bytes()
        assert data != old[tensor.name][2], f"{tensor.name} has not changed"
        path.write_bytes(before[:start] + old[tensor.name][2] + before[start + len(data) :])
        with pytest.raises(AssertionError, match="has other bytes"):
            assert_resharded(source, output, RANKS)
        if tensor in layer.router:
            assert compare_routers(original, output, manifest).problems, f"nobody noticed {tensor.name}"
        path.write_bytes(before)
    assert layer.experts or layer.fused


def test_a_router_tensor_that_is_not_indexed_by_expert_keeps_its_bytes(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    build(Spec("gemma4", experts=32), source)  # as many experts as a hidden state has numbers
    run_well("zigzag", "--src", source, "--ep", RANKS, "--out", output)
    old, new = located(source), located(output)
    names = [name for name in old if name.endswith(OF_HIDDEN_SIZE)]
    assert names
    assert all(old[name][2] == new[name][2] for name in names)


def test_a_scale_for_each_expert_multiplies_the_weights_of_the_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 6))
    scale = torch.arange(1.0, 7.0, dtype=torch.float64)
    routing = Routing(6, 2, "softmax", True, 1.0, 1, 1)
    plain, scaled = (route(hidden, Router(weight, None, None, found), routing) for found in (None, scale))
    assert torch.equal(plain.experts_TK, scaled.experts_TK)
    for token in range(5):
        for position, expert in enumerate(plain.experts_TK[token].tolist()):
            assert scaled.weights_TK[token, position] == plain.weights_TK[token, position] * (expert + 1)


# Ling: one model type, two routers


def describe(source: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_well("inspect", source, "--json"))
    return found


def test_ling_2_as_published_is_group_limited_and_ling_1_of_the_same_model_type_is_not(tmp_path: Path) -> None:
    found = {}
    for family in ("bailing_moe", "ling_lite"):
        build(Spec(family, experts=8), tmp_path / family)
        found[family] = describe(tmp_path / family)
    assert {one["model_type"] for one in found.values()} == {"bailing_moe"}
    keys = ("family", "scoring", "n_group", "plugin_required")
    assert [found["bailing_moe"][key] for key in keys] == ["Ling 2.0", "sigmoid", 4, True]
    assert [found["ling_lite"][key] for key in keys] == ["Ling 1.x", "softmax", 1, False]


@pytest.mark.parametrize("architectures", [None, [], ["BailingMoeV9ForCausalLM"], "BailingMoeV2ForCausalLM"])
def test_a_shared_model_type_without_a_known_architecture_is_refused(architectures: Any, tmp_path: Path) -> None:
    build(Spec("bailing_moe", experts=8), tmp_path / "source")
    change_config(tmp_path / "source", lambda config: config.update(architectures=architectures))
    result = run("inspect", tmp_path / "source")
    assert result.exit_code == 1
    assert "BailingMoeV2ForCausalLM or BailingMoeForCausalLM" in result.output


@pytest.mark.parametrize("family", ["bailing_moe", "bailing_hybrid", "axk1"])
def test_where_engines_assume_groups_config_has_to_give_them(family: str, tmp_path: Path) -> None:
    build(Spec(family, experts=8), tmp_path / "source")
    change_config(tmp_path / "source", lambda config: config.pop("n_group"))
    result = run("inspect", tmp_path / "source")
    assert result.exit_code == 1
    assert "expected a value for n_group" in result.output


# A language model inside another model


def test_a_wrapper_routes_like_the_language_model_inside(tmp_path: Path) -> None:
    found = {}
    for name in ("kimi_vl", "internvl_chat", "internvl_gpt_oss"):
        build(Spec(name, experts=8), tmp_path / name)
        found[name] = describe(tmp_path / name)
    keys = ("model_type", "family", "scoring", "plugin_required")
    assert {name: tuple(one[key] for key in keys) for name, one in found.items()} == {
        "kimi_vl": ("kimi_vl", "DeepSeek-V3, R1, V3.1", "sigmoid", False),
        "internvl_chat": ("internvl_chat", "Qwen3-MoE", "softmax", False),
        "internvl_gpt_oss": ("internvl_chat", "gpt-oss", "softmax of the chosen", False),
    }


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ({"model_type": "mixtral"}, "known around qwen3_moe or gpt_oss"),  # known, but not there
        ({"model_type": "qwen9_moe"}, "has model type 'qwen9_moe'"),
        ({"model_type": None}, "has model type None"),
        ({"text_config": {"model_type": "gpt_oss"}}, "known as Qwen3-MoE, but llm_config.text_config"),
    ],
)
def test_a_wrapper_around_a_model_that_it_is_not_known_with_is_refused(
    inside: dict[str, Any], said: str, tmp_path: Path
) -> None:
    build(Spec("internvl_chat", experts=8), tmp_path / "source")
    change_config(tmp_path / "source", lambda config: config["llm_config"].update(inside))
    result = run("inspect", tmp_path / "source")
    assert result.exit_code == 1
    assert said in result.output


def test_a_wrapper_alone_is_no_family(tmp_path: Path) -> None:
    assert "known around deepseek_v3" in refused("deepseek_v3", tmp_path / "source", model_type="kimi_vl")


def test_groups_that_engines_rank_differently_are_refused(tmp_path: Path) -> None:
    build(Spec("mistral4", experts=8), tmp_path / "source")
    run_well("inspect", tmp_path / "source")
    change_config(tmp_path / "source", lambda config: config["text_config"].update(n_group=4, topk_group=2))
    result = run("inspect", tmp_path / "source")
    assert result.exit_code == 1
    assert "n_group = 4: Transformers ranks its groups" in result.output


# Refused, by name and reason


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_whose_experts_are_not_alike_is_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    build(Spec("qwen3_moe", experts=8), tmp_path / "source")
    change_config(tmp_path / "source", lambda config: config.update(model_type=model_type))
    result = run("zigzag", "--src", tmp_path / "source", "--ep", RANKS, "--out", tmp_path / "output")
    assert result.exit_code == 1
    assert REFUSED[model_type] in result.output
    assert not (tmp_path / "output").exists()


def refused(family: str, source: Path, **change: Any) -> str:
    """What `inspect` says of a checkpoint with one file and a changed config."""
    build(Spec(family, experts=8, files=1), source)
    change_config(source, lambda config: config.update(change))
    result = run("inspect", source)
    assert result.exit_code == 1, result.output
    return result.output


@pytest.mark.parametrize(
    ("key", "value"), [("moe_topk", [2, 1, 2]), ("num_experts", [8, 16, 8]), ("num_experts", [8, 8, None])]
)
def test_numbers_that_differ_by_layer_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    assert f"{key} differs by layer" in refused("hunyuan_v1_moe", tmp_path / "source", **{key: value})


def test_lists_of_numbers_are_read_only_where_the_family_has_them(tmp_path: Path) -> None:
    assert "num_experts_per_tok must be a whole number" in refused(
        "qwen3_moe", tmp_path / "source", num_experts_per_tok=[2, 2, 2]
    )


@pytest.mark.parametrize(
    ("family", "key"), [("step3p5", "num_experts_per_tok"), ("afmoe", "num_local_experts"), ("jamba", "moe_topk")]
)
def test_two_keys_for_one_number_have_to_agree(family: str, key: str, tmp_path: Path) -> None:
    said = refused(family, tmp_path / "source", **{key: 5})
    assert f"{key} = 5" in said
    assert " but " in said


def test_expert_groups_under_another_key_are_refused(tmp_path: Path) -> None:
    assert "num_expert_group = 4 may limit" in refused("kimi_linear", tmp_path / "source", num_expert_group=4)


def test_false_means_no_groups_but_not_where_engines_assume_some(tmp_path: Path) -> None:
    no_groups = {"n_group": False, "topk_group": False, "group_limited_greedy": False}
    build(Spec("hunyuan_v1_moe", experts=8), tmp_path / "hunyuan")
    change_config(tmp_path / "hunyuan", lambda config: config.update(no_groups))
    assert describe(tmp_path / "hunyuan")["n_group"] == 1
    assert "expected a value for n_group" in refused("bailing_moe", tmp_path / "ling", **no_groups)


def test_a_layer_with_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    """As the drafts of DeepSeek-V4.1 may have (`dspark_n_routed_experts`)."""
    source = tmp_path / "source"
    build(Spec("deepseek_v41", experts=8, files=1), source)
    old = located(source)
    smaller = [
        Tensor(f"mtp.1.ffn.gate.{leaf}", dtype, shape, b"\0" * size)
        for leaf, dtype, shape, size in (("weight", "BF16", (4, 32), 256), ("bias", "F32", (4,), 16))
    ]
    experts = [
        Tensor(name.replace("mtp.0.", "mtp.1."), "U8", (len(data),), data)
        for name, (_, _, data) in old.items()
        for expert in range(4)
        if name.startswith(f"mtp.0.ffn.experts.{expert}.")
    ]
    add(source, *smaller, *experts)
    result = run("inspect", source)
    assert result.exit_code == 1
    assert "mtp.1.ffn.gate" in result.output
    assert "8 experts" in result.output


def test_the_talker_of_qwen3_omni_routes_by_another_config_and_keeps_its_experts(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    build(Spec("qwen3_omni_moe", experts=8), source)
    named = [f"{part}.model.layers.0.mlp.experts.1.down_proj" for part in ("thinker", "talker")]
    change_config(source, lambda config: config.update(quantization_config={"ignore": [*named, "re:.*mlp.experts.*"]}))
    assert all(layer.startswith("thinker.") for layer in describe(source)["moe_layers"])
    run_well("zigzag", "--src", source, "--ep", RANKS, "--out", output)
    old, new = located(source), located(output)
    talker = {name: found[2] for name, found in old.items() if name.startswith("talker.")}
    assert any(".experts.7." in name for name in talker)
    assert talker == {name: found[2] for name, found in new.items() if name.startswith("talker.")}
    thinker, *kept = json.loads((output / "config.json").read_bytes())["quantization_config"]["ignore"]
    assert thinker != named[0]
    assert kept == [named[1], "re:.*mlp.experts.*"]


@pytest.mark.parametrize("text", ["mlp.experts.1.down_proj", "re:.*mlp.experts.1.down_proj", "*.mlp.experts.1.*"])
def test_an_id_that_may_be_of_thinker_or_talker_is_refused(text: str, tmp_path: Path) -> None:
    build(Spec("qwen3_omni_moe", experts=8), tmp_path / "source")
    change_config(tmp_path / "source", lambda config: config.update(quantization_config={"ignore": [text]}))
    result = run("zigzag", "--src", tmp_path / "source", "--ep", RANKS, "--out", tmp_path / "output")
    assert result.exit_code == 1
    assert "cannot tell which experts this means" in result.output


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("step3p5", "model.layers.1.moe.expert_bias"),
        ("granitemoehybrid", "model.layers.1.block_sparse_moe.expert_0.input_linear.input_scale"),
        ("gemma4", "model.language_model.layers.1.router.norm.weight"),
        ("minimax_m2", "model.layers.1.block_sparse_moe.gate.e_score_correction_bias"),
        ("ernie4_5_moe", "model.layers.1.mlp.moe_statics.expert_usage"),
        ("kimi_k3", "language_model.model.layers.1.block_sparse_moe.routed_expert_scale"),
        ("qwen3_moe", "model.layers.1.mlp.router.weight"),
    ],
)
def test_a_tensor_that_the_table_does_not_have_is_refused_by_name(family: str, name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(Spec(family, experts=8, files=1), source)
    run_well("inspect", source)
    add(source, Tensor(name, "F32", (8,), b"\0" * 32))
    result = run("inspect", source)
    assert result.exit_code == 1
    assert name in result.output


def test_a_table_of_expert_ids_that_are_no_integers_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(Spec("deepseek_v4", experts=8, files=1), source)
    add(source, Tensor("layers.1.ffn.gate.tid2eid", "F32", (64, 2), b"\0" * 512))
    result = run("inspect", source)
    assert result.exit_code == 1
    assert "layers.1.ffn.gate.tid2eid" in result.output
    assert "expected one of I64, I32, I16, I8, U8, found F32" in result.output


# The table


def table() -> str:
    """The families as docs/families.md shows them."""
    rows = [
        f"| {family.name} | {', '.join(f'`{name}`' for name in family.model_types)} | `{family.block}` | "
        f"{', '.join(f'`{name}`' for name in family.router)} | {'yes' if family.group_limited else ''} | "
        f"{family.source} |"
        for family in TABLE
    ]
    head = [
        "| family | model types | block | router tensors below it | group-limited | router read in |",
        "|" + " --- |" * 6,
    ]
    return "\n".join([*head, *rows])


def wrappers() -> str:
    """The wrappers as docs/families.md shows them."""
    rows = [
        f"| `{name}` | {', '.join(f'`{inner}`' for inner in inside)} | {source} |"
        for name, (inside, source) in WRAPPERS.items()
    ]
    return "\n".join(["| wrapper | model types inside | read in |", "|" + " --- |" * 3, *rows])


def test_the_documentation_shows_the_tables() -> None:
    text = (DOCUMENTATION / "docs" / "families.md").read_text()
    for shown in (table(), wrappers()):
        assert shown in text, f"docs/families.md has to show\n{shown}"


def test_the_docs_name_every_family_and_marks_those_with_groups() -> None:
    text = " ".join((DOCUMENTATION / "docs" / "outputs.md").read_text().split())
    _, _, rest = text.partition("Known families (group-limited ones in bold): ")
    names, _, _ = rest.partition(" ([families.md]")
    expected = "; ".join(f"**{family.name}**" if family.group_limited else family.name for family in TABLE)
    assert names == expected


def test_every_family_has_a_checkpoint_in_the_tests() -> None:
    built, wrapped = set(), set()
    for line in FAMILIES.values():
        if line.model_type in WRAPPERS:
            wrapped.add((line.model_type, line.text_model_type))
        types = (f"{line.model_type}:{line.architecture}", line.model_type, line.text_model_type)
        built.add(next(BY_MODEL_TYPE[name] for name in types if name in BY_MODEL_TYPE).name)
    assert built == {family.name for family in TABLE}
    assert wrapped >= {(name, inside[0]) for name, (inside, _) in WRAPPERS.items()}
