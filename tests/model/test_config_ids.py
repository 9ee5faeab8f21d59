"""Expert ids in config files: each string, by what it must become."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Spec, build
from command_line import run_well

from reshard import UnsupportedError, Zigzag, plan_placement

LAYER = "model.layers.1.mlp"
# 8 experts for 3 ranks: 0 3 6 | 1 4 7 | 2 5, so logical 5 becomes physical 7 and logical 1 becomes physical 3.


def mapped(tmp_path: Path, quantization: Any, experts: int = 8) -> Any:
    """`quantization_config` as a zigzag output for 3 ranks has it."""
    source = tmp_path / "source"
    build(Spec("qwen3_moe", experts=experts), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return json.loads(plan_placement(source, tmp_path / "out", Zigzag(3)).config)["quantization_config"]


def ignored(tmp_path: Path, *strings: str) -> list[str]:
    """The quantization ignore list `strings` as a zigzag output for 3 ranks has it."""
    result: list[str] = mapped(tmp_path, {"ignore": list(strings)})["ignore"]
    return result


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"{LAYER}.experts.5.down_proj", f"{LAYER}.experts.7.down_proj"),
        (f"{LAYER}.experts.5", f"{LAYER}.experts.7"),
        ("*.experts.5.down_proj", "*.experts.7.down_proj"),
        ("experts.1.up_proj", "experts.3.up_proj"),
        (rf"re:.*{LAYER}\.experts\.5\.down_proj", rf"re:.*{LAYER}\.experts\.7\.down_proj"),
        (r"re:.*experts\.1\..*", r"re:.*experts\.3\..*"),
        (r"re:.*experts\.1.*", r"re:.*experts\.3.*"),  # with 8 experts there is no 10
        (r".*\.experts\.5\.down_proj", r".*\.experts\.7\.down_proj"),
        (r".*\.experts\.1[02]?\..*", r".*\.experts\.3[02]?\..*"),  # nor 12
        (".*experts[.]5[.].*", ".*experts[.]7[.].*"),
        (r"-:.*\.experts\.5\..*", r"-:.*\.experts\.7\..*"),
    ],
)
def test_a_name_of_one_expert_gets_its_new_id(before: str, after: str, tmp_path: Path) -> None:
    assert ignored(tmp_path, before) == [after]


@pytest.mark.parametrize(
    "text",
    [
        "lm_head",
        f"{LAYER}.gate",
        f"{LAYER}.shared_expert.down_proj",
        f"{LAYER}.experts",
        "*.experts.*",
        f"{LAYER}.experts.*.down_proj",
        r"re:.*\.experts\..*",
        r"re:.*experts\.\d+\.down_proj",
        r"re:.*\.([0-7])\.down_proj",
        r"re:model\.layers\.[01]\..*",
        r".*\.experts\..*",
        f"{LAYER}.experts.1?",  # as a regular expression all of them, as a glob none: there are 8
    ],
)
def test_what_names_no_expert_or_all_of_them_stays(text: str, tmp_path: Path) -> None:
    assert ignored(tmp_path, text) == [text]


@pytest.mark.parametrize(
    "text",
    [
        r"re:.*experts\.(1|2)\..*",
        r"re:.*\.[2-5]\.down_proj",
        "re:.*experts.(",
        f"{LAYER}.experts.[0-3].down_proj",
        r"re:^model\.language_model\.layers\.1\.mlp\.experts\.5\..*",
        "*.5.down_proj",
        "*experts?5.*",
        "*.mlp.experts*.5.*",
        f"{LAYER}.experts.*5.down_proj",
        "re:a{99999999999999999999}",
        f"{LAYER}.experts.{'9' * 5000}.down_proj",
        f"{LAYER}.experts.8.down_proj",
    ],
)
def test_what_cannot_be_told_is_refused_and_shown(text: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        ignored(tmp_path, text)
    assert "config.json" in str(caught.value)
    assert repr(text)[:150] in str(caught.value)


@pytest.mark.parametrize("text", ["mlp.experts.1", f"{LAYER}.experts.1", "experts.1"])
def test_a_name_that_is_part_of_other_experts_names_is_refused(text: str, tmp_path: Path) -> None:
    """AWQ skips each module whose name contains the text: with 16 experts, 1 is also 10 to 15."""
    with pytest.raises(UnsupportedError, match=r"config\.json.*engines differ"):
        mapped(tmp_path, {"quant_method": "awq", "modules_to_not_convert": [text]}, experts=16)


def test_a_name_whose_new_one_is_part_of_others_is_refused(tmp_path: Path) -> None:
    """Expert 3 of 16 becomes 1 on 3 ranks; 3 is part of no other number below 16."""
    with pytest.raises(UnsupportedError, match="engines differ"):
        mapped(tmp_path, {"modules_to_not_convert": ["mlp.experts.3"]}, experts=16)


@pytest.mark.parametrize(
    ("before", "after"), [("mlp.experts.5", "mlp.experts.7"), ("mlp.experts.1.up_proj", "mlp.experts.3.up_proj")]
)
def test_a_name_that_is_part_of_no_other_gets_its_new_id(before: str, after: str, tmp_path: Path) -> None:
    found = mapped(tmp_path, {"quant_method": "awq", "modules_to_not_convert": [before]})
    assert found["modules_to_not_convert"] == [after]


@pytest.mark.parametrize("text", [".5.down_proj", "s.5.down_proj.weight", "5.down_proj"])
def test_a_name_cut_before_the_id_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="engines differ"):
        ignored(tmp_path, text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("experts", f"{LAYER}.experts") for value in ({"0": 4, "5": 8}, [0, 1, 2])),
        ("high_precision_experts", {LAYER: [0, 1, 2]}),
        ("high_precision_experts", {"model.layers.1.block": {"gate_proj": [5]}}),
        ("high_precision_experts", {LAYER: 5}),
        ("pruned_experts", [5, 9]),
        ("pruned_experts", ["5", "9"]),
        ("pruned_experts", "0-3, 7"),
        ("fallbackExpert", 5),
        ("shared_expert_id", 5),
    ],
)
def test_numbers_that_may_be_expert_ids_are_refused(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"config\.json: '{key}'"):
        mapped(tmp_path, {"nested": [{key: value}]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts_by_layer", [8, 8]),
        ("moe_num_experts", [8, 8]),
        ("n_shared_experts", 1),
        ("experts_per_token", [2, 2]),
        ("expert_layer_period", 2),
        ("enable_expert_bias", True),
        ("expert_dtype", "fp4"),
        ("*.experts.*", {"bits": 4, "group_size": 16, "weight_block_size": [128, 128], "block_structure": "16x1"}),
    ],
)
def test_counts_and_sizes_are_not_taken_for_expert_ids(key: str, value: object, tmp_path: Path) -> None:
    assert mapped(tmp_path, {key: value}) == {key: value}


def test_numbers_in_another_config_file_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(Spec("qwen3_moe", experts=8), source)
    (source / "hf_quant_config.json").write_text(json.dumps({"experts": [0, 1, 2]}))
    with pytest.raises(UnsupportedError, match="hf_quant_config"):
        plan_placement(source, source.parent / "out", Zigzag(3))


@pytest.mark.parametrize("text", [r"re:.*\.experts\.5\..*", "*.experts.5.*"])
def test_a_pattern_of_one_expert_is_refused_where_experts_are_fused(text: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(Spec("gpt_oss", experts=8), source)
    (source / "hf_quant_config.json").write_text(json.dumps({"ignore": [text]}))
    with pytest.raises(UnsupportedError, match="cannot tell"):
        plan_placement(source, source.parent / "out", Zigzag(3))


def ignored_by(family: str, text: str, tmp_path: Path, experts: int = 8) -> list[str]:
    """The ignore list of one pattern as the output of a model of that family has it."""
    source = tmp_path / "source"
    build(Spec(family, experts=experts), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"ignore": [text]}}))
    planned = json.loads(plan_placement(source, tmp_path / "out", Zigzag(3)).config)
    result: list[str] = planned["quantization_config"]["ignore"]
    return result


PROJECTIONS = r"re:.*mlp\.experts\.[0-9]+\.(gate|up|down)_proj$"  # as llm-compressor writes it for every model
ALL = "|".join(map(str, range(8)))


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("mixtral", PROJECTIONS),  # its names: block_sparse_moe and w1
        ("minimax_m2", PROJECTIONS),
        ("gpt_oss", PROJECTIONS),  # fused
        ("qwen3_5_moe", PROJECTIONS),  # fused
        ("llama4", PROJECTIONS),
        ("qwen3_moe", r"re:.*block_sparse_moe\.experts\.[0-9]+\.w[123]$"),
        ("qwen3_moe", r"re:^model\.language_model\.layers\.[0-9]+\.mlp\.experts\.[0-9]+\..*"),
        ("mixtral", rf"re:.*mlp\.experts\.({ALL})\.gate_proj$"),
        ("mixtral", r"re:.*layers\.1\.mlp\.experts\.[0-7]\.gate_proj"),
        ("mixtral", "*.mlp.experts.[0-9].up_proj"),
    ],
)
def test_a_pattern_of_all_experts_stays_in_the_words_of_another_checkpoint(
    family: str, text: str, tmp_path: Path
) -> None:
    assert ignored_by(family, text, tmp_path) == [text]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "text",
    [
        r"re:.*mlp\.experts\.[0-6]\.(gate|up|down)_proj$",
        r"re:.*mlp\.experts\.[5]\.gate_proj$",
        r"re:.*mlp\.experts\.(0|1|2|3|4|5|6)\.gate_proj$",
        r"re:.*mlp\.experts\.([0-9]+\.gate|[5]\.up)_proj$",
        r"re:.*mlp\.experts\.[0-9]+\.gate_proj|.*other\.experts\.5\.x",
        r"re:.*other\.experts\.[0-9]+\.x$",  # words of no checkpoint that we know
        "re:.*mlp.experts.[0-9]+.gate_proj(",
    ],
)
def test_a_pattern_of_some_experts_is_refused_in_other_words_too(family: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot tell"):
        ignored_by(family, text, tmp_path)


def test_all_experts_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """One digit names all of 8 experts, and not all of 16."""
    text = r"re:.*mlp\.experts\.[0-9]\.gate_proj$"
    with pytest.raises(UnsupportedError, match="cannot tell"):
        ignored_by("mixtral", text, tmp_path, experts=16)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("group", ["(?:%s)", "(%s)"])
def test_a_long_alternation_over_all_experts_is_read(group: str, family: str, tmp_path: Path) -> None:
    """320 ids are more text than reshard tries out as a pattern. One id less, and it is refused."""
    ids = list(map(str, range(320)))
    whole, part = (rf"re:.*mlp\.experts\.{group % '|'.join(some)}\.down_proj$" for some in (ids, ids[:-1]))
    assert len(part) > 1000
    assert ignored_by(family, whole, tmp_path / "whole", experts=320) == [whole]
    with pytest.raises(UnsupportedError, match="cannot tell"):
        ignored_by(family, part, tmp_path / "part", experts=320)


LONG = [
    rf"model\.layers\.{layer}\.mlp\.experts\.{e}\.{p}_proj"
    for layer in (1, 2)
    for e in range(8)
    for p in ("up", "down")
]


@pytest.mark.parametrize("around", ["re:%s", "re:^(?:%s)$", "-:(%s)", "%s"])
@pytest.mark.parametrize("more", ["lm_head", r".*self_attn.*", "^.*mlp.experts$"])
def test_a_long_alternation_of_names_is_mapped_name_by_name(around: str, more: str, tmp_path: Path) -> None:
    names = [name for name in LONG if r"\.6\." not in name]
    before = around % "|".join([*names, more])
    assert len(before) > 1000
    (after,) = ignored(tmp_path, before)
    tail = [f"{LAYER[:13]}{layer}.mlp.experts.%s.{p}_proj" for layer in (1, 2) for p in ("up", "down", "gate")]
    old, new = (re.compile(text.removeprefix("re:").removeprefix("-:")) for text in (before, after))
    for logical, physical in enumerate((0, 3, 6, 1, 4, 7, 2, 5)):
        for name in tail:
            for way in ("match", "search"):
                expected = bool(getattr(old, way)(name % logical))
                assert bool(getattr(new, way)(name % physical)) == expected
                assert expected == (logical != 6 and "gate" not in name)


def test_each_name_of_a_long_alternation_goes_by_the_order_of_its_layer(tmp_path: Path) -> None:
    source, orders = tmp_path / "source", tmp_path / "orders.json"
    build(Spec("qwen3_moe", experts=8), source)
    config = json.loads((source / "config.json").read_text())
    names = [name for name in LONG if r"\.6\." not in name]
    config["quantization_config"] = {"ignore": [f"re:^(?:{'|'.join(names)})$"]}
    (source / "config.json").write_text(json.dumps(config))
    order = {f"model.layers.{layer}.mlp": [(layer + e) % 8 for e in range(8)] for layer in range(3)}
    orders.write_text(json.dumps({"physical_to_logical": order}))
    arguments = ["place", "--strategy", "file", "--map", orders, "--src", source, "--ep", 2, "--out", tmp_path / "out"]
    run_well(*arguments)
    (text,) = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    for layer in (1, 2):
        found = {int(e) for e in re.findall(rf"layers\\.{layer}\\.mlp\\.experts\\.([0-9]+)\\.up_proj", text)}
        assert found == {(e - layer) % 8 for e in range(8) if e != 6}


@pytest.mark.parametrize(
    "more",
    [
        r".*experts\.1",  # also 10 to 19, where there are as many
        r".*experts\.1.",
        r".*\.5\.down_proj",
        r".*experts\.[0-5]\.down_proj",
        r".*experts\.(1|2)\.down_proj",
        r".*experts\.8\.down_proj",
        r".*experts\.05\.down_proj",
        r".*experts.experts\.5\.down_proj",
    ],
)
def test_a_long_alternation_with_one_alternative_that_cannot_be_told_is_refused(more: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"config\.json"):
        ignored(tmp_path, f"re:{'|'.join([*LONG, more])}")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("_name_or_path", "models/merged/clown-moe-experts-4x7b"),
        ("_name_or_path", "/models/experts.4/merged"),
        ("base_model_name_or_path", "experts/5"),
        ("origin", "clown-moe-experts-4x7b"),
        ("origin", "team/experts.4x7b"),
        ("note", "16 experts. Keeps experts.5.down_proj as it was"),
        ("summary", "16 experts, 8 active; experts 5 and 7 are the busiest"),
        ("summary", "all experts: 16, in 8 groups. " * 50),
    ],
)
def test_prose_that_mentions_experts_is_prose(key: str, text: str, tmp_path: Path) -> None:
    assert mapped(tmp_path, {"nested": [{key: text}]}) == {"nested": [{key: text}]}


@pytest.mark.parametrize(
    "text",
    [
        f"{LAYER}.experts.5.down_proj, {LAYER}.experts.6.down_proj",
        f"{LAYER}.experts.5.down_proj " * 50,
        "*experts[5]*",
        "experts:5",
    ],
)
def test_what_may_name_experts_is_no_prose(text: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot tell"):
        mapped(tmp_path, {"summary": text})


def test_tokens_and_indices_of_other_weights_are_not_touched(tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(Spec("qwen3_moe", experts=8), source)
    for name in ("tokenizer.json", "vocab.json", "pytorch_model.bin.index.json"):
        (source / name).write_text(json.dumps({f"{LAYER}.experts.5.down_proj": 1}))
    assert (
        not {"tokenizer.json", "vocab.json", "pytorch_model.bin.index.json"}
        & plan_placement(source, source.parent / "out", Zigzag(3)).originals.keys()
    )
