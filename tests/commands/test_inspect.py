"""What `inspect --ep` says of a source, against what `zigzag` says; and words for models without experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import hostile
import published
import pytest
from checkpoints import Spec, build
from command_line import run, run_well

from reshard.checkpoint.header import ALIGNMENT
from reshard.commands.original import read_original
from reshard.commands.outline import Writing
from reshard.commands.resharding import plan_resharding
from reshard.execute.reflink import MAX_BLOCK
from reshard.placement.contract import mark_of
from reshard.placement.strategies import Placed
from reshard.plan.layouts import DEFAULT_BLOCK_SIZE, MAX_ADDED, MAX_GROWTH
from reshard.record.manifest import Layout

EVEN = "cannot be dealt evenly to"


def zigzag(src: Path, ep_size: int) -> tuple[str, ...]:
    """Arguments of `reshard zigzag --dry-run`."""
    return tuple(map(str, ("zigzag", "--src", src, "--ep", ep_size, "--out", src.with_name("out"), "--dry-run")))


def change_config(src: Path, **changes: object) -> None:
    """Write these keys into config.json; None removes one."""
    config = json.loads((src / "config.json").read_text()) | changes
    (src / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refused(*arguments: object) -> str:
    """The one line with which a command refuses, without the program's name."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("reshard: error: ")


def said_by_inspect(src: Path, ep_size: int) -> str | None:
    """The line with which `inspect --ep` refuses, or says that `zigzag` would; None if it does neither."""
    result = run("inspect", src, "--ep", ep_size, "--json")
    if result.exit_code:
        return refused("inspect", src, "--ep", ep_size)
    before, notes = "zigzag would refuse it: ", json.loads(result.stdout)["notes"]
    lines = [note.removeprefix(before) for note in notes if note.startswith(before)]
    assert len(lines) <= 1
    return lines[0] if lines else None


def adapter(src: Path, module: str, cut: int = 0) -> None:
    """Add an adapter for `module`, whose file lacks its last `cut` bytes."""
    name = f"base_model.model.model.layers.1.{module}.lora_A.weight"
    (src / "adapter").mkdir()
    (src / "adapter" / "adapter_config.json").write_text("{}")
    whole = hostile.pack({name: hostile.tensor(name, (4, 8))})
    (src / "adapter" / "adapter_model.safetensors").write_bytes(whole[: len(whole) - cut])


def quantized(src: Path, **values: object) -> None:
    """Write a file that engines read as a config of the quantization."""
    (src / "quant.json").write_text(json.dumps(values))


Change = Callable[[Path], None]
# What only a plan of the output finds: by name, a source that zigzag refuses, its words, and one that it takes.
REFUSED_BY_THE_PLAN: dict[str, tuple[Change, str, Change]] = {
    "a pattern": (
        partial(change_config, quantization_config={"ignore": ["re:.*experts.[0-3].down_proj"]}),
        "cannot tell which experts",
        partial(change_config, quantization_config={"ignore": ["re:.*experts.[0-9]+.down_proj"]}),
    ),
    "part of a name": (
        partial(change_config, quantization_config={"ignore": ["0.down_proj"]}),
        "engines differ",
        partial(change_config, quantization_config={"ignore": ["model.layers.1.mlp.experts.0.down_proj"]}),
    ),
    "an expert that is not there": (
        partial(quantized, ignore=["model.layers.1.mlp.experts.8.down_proj"]),
        "names expert 8, but its layer has 8",
        partial(quantized, ignore=["model.layers.1.mlp.experts.7.down_proj"]),
    ),
    "numbers that may be ids": (
        partial(quantized, pruned_experts=[5]),
        "may be expert ids",
        partial(quantized, num_experts=[5]),
    ),
    "a config nested too deeply": (
        lambda src: (src / "quant.json").write_text("[" * 100_000 + "]" * 100_000) and None,
        "levels deep",
        lambda src: (src / "deep.json").write_text("[" * 100_000 + "]" * 100_000) and None,
    ),
    "names that cannot be locked": (
        partial(change_config, architectures=["DeepseekV3ForCausalLM", 5]),
        "architectures must be a list of names",
        partial(change_config, architectures=["DeepseekV3ForCausalLM", "Other"]),
    ),
    "an adapter": (
        partial(adapter, module="mlp.experts.3.down_proj"),
        "an adapter for experts",
        partial(adapter, module="self_attn.q_proj"),
    ),
    "a broken adapter": (
        partial(adapter, module="self_attn.q_proj", cut=1),
        "truncated",
        partial(adapter, module="self_attn.q_proj"),
    ),
}


@pytest.mark.parametrize("name", REFUSED_BY_THE_PLAN)
def test_inspect_says_why_zigzag_would_refuse(name: str, tmp_path: Path) -> None:
    """The control is a source that differs little, and that both take."""
    fault, words, harmless = REFUSED_BY_THE_PLAN[name]
    for change in (fault, harmless):
        src = tmp_path / "src"
        hostile.write_base(src)
        change(src)
        assert "would refuse" not in run_well("inspect", src)
        if change is fault:
            line = refused(*zigzag(src, 2))
            assert words in line
            assert said_by_inspect(src, 2) == line
            assert f"zigzag would refuse it: {line}" in run_well("inspect", src, "--ep", 2)
        else:
            run_well(*zigzag(src, 2))
            assert said_by_inspect(src, 2) is None
        shutil.rmtree(src)


@pytest.mark.parametrize(("keys", "too_long"), [(("one", "two"), True), (("one", "one"), False), (("one",), False)])
def test_inspect_says_that_a_header_of_the_output_would_be_too_long(
    keys: tuple[str, ...], too_long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the output has the metadata of all files of the source. The limit is lower here, to save time."""
    src = tmp_path / "src"
    hostile.write_base(src)
    for file, key in zip(hostile.SHARDS, keys, strict=False):
        text, data = hostile.split((src / file).read_bytes())
        header = json.loads(text)
        header["__metadata__"][key] = "x" * 600_000
        (src / file).write_bytes(hostile.join(json.dumps(header).encode(), data))
    run_well(*zigzag(src, 2))
    monkeypatch.setattr("reshard.checkpoint.header.MAX_HEADER_SIZE", 1_000_000)
    monkeypatch.setattr("reshard.plan.layouts.MAX_HEADER_SIZE", 1_000_000)
    if too_long:
        line = refused(*zigzag(src, 2))
        assert "exceeds what safetensors allows" in line
        assert said_by_inspect(src, 2) == line
    else:
        run_well(*zigzag(src, 2))
        assert said_by_inspect(src, 2) is None


@pytest.mark.parametrize("layout", ["ranks", "source"])
def test_no_header_of_an_output_is_longer_than_those_of_its_source_allow(layout: Layout, tmp_path: Path) -> None:
    """What `headers_fit` counts on: the slack for padding is left out here, for it hides all else in a small model."""
    hostile.write_single_file(tmp_path / "src")
    original = read_original(tmp_path / "src")
    checkpoint = original.checkpoint
    order = dict.fromkeys(original.shape.layers, (7, 6, 5, 4, 3, 2, 1, 0))
    files = plan_resharding(original, "mine", 2, Placed(order), Writing(layout=layout)).plan.files
    longest = max(file.parts[0].content.size for file in files if file.tensors)
    (header,) = checkpoint.shards.values()
    marks = len(json.dumps(mark_of(order)))
    block = DEFAULT_BLOCK_SIZE if layout == "source" else ALIGNMENT
    assert longest <= len(header.raw) + MAX_GROWTH * len(header.tensors) + marks + block
    assert marks + MAX_BLOCK < MAX_ADDED


@pytest.mark.parametrize("attack", [attack for attack in hostile.ATTACKS if attack.only_for_zigzag], ids=str)
def test_inspect_says_why_zigzag_would_refuse_a_damaged_checkpoint(attack: hostile.Attack, tmp_path: Path) -> None:
    hostile.write_base(tmp_path / "src")
    attack.damage(tmp_path / "src")
    assert said_by_inspect(tmp_path / "src", 2) == refused(*zigzag(tmp_path / "src", 2))


@pytest.mark.parametrize("case", [*published.RIGHT, *published.REFUSED], ids=lambda case: case.__name__)
def test_inspect_says_of_published_forms_what_zigzag_says(case: Change, tmp_path: Path) -> None:
    case(tmp_path / "src")
    if case in published.REFUSED:
        assert said_by_inspect(tmp_path / "src", 4) == refused(*zigzag(tmp_path / "src", 4))
    else:
        notes = json.loads(run_well(*zigzag(tmp_path / "src", 4), "--json"))["notes"]
        assert json.loads(run_well("inspect", tmp_path / "src", "--ep", 4, "--json"))["notes"] == notes


def test_inspect_does_not_spell_the_output_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and names of 90,000 tensors take longer than all else. The control is `zigzag`, which needs them."""
    hostile.write_base(tmp_path / "src")

    def spelled(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr("reshard.plan.layouts.renumber", spelled)
    monkeypatch.setattr("reshard.plan.layouts.build_header", spelled)
    run_well("inspect", tmp_path / "src", "--ep", 2)
    with pytest.raises(AssertionError):
        run(*zigzag(tmp_path / "src", 2))


def test_inspect_has_the_notes_of_zigzag(tmp_path: Path) -> None:
    src = tmp_path / "src"
    build(Spec("qwen3_moe"), src)
    (src / ".git").mkdir()
    (src / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    notes = json.loads(run_well(*zigzag(src, 2), "--json"))["notes"]
    assert len(notes) > 2
    assert json.loads(run_well("inspect", src, "--ep", 2, "--json"))["notes"] == notes


@pytest.mark.parametrize("family", ["deepseek_v4", "deepseek_v41"])
def test_ranks_with_unequal_numbers_of_experts_are_noted_where_kernels_refuse_them(family: str, tmp_path: Path) -> None:
    """vLLM's MegaMoE asserts that EP ranks divide experts. The controls are ranks that do, and another family."""
    build(Spec(family, experts=8), tmp_path / "src")
    build(Spec("glm4_moe", experts=8), tmp_path / "other")
    for command in (zigzag, lambda src, ep_size: ("inspect", src, "--ep", ep_size)):
        assert EVEN in run_well(*command(tmp_path / "src", 3))
        assert EVEN not in run_well(*command(tmp_path / "src", 4))
        assert EVEN not in run_well(*command(tmp_path / "other", 3))


def renamed(src: Path, old: str, new: str) -> None:
    """The checkpoint with `new` for `old` in all names of tensors."""
    shards = {file: hostile.unpack((src / file).read_bytes()) for file in hostile.SHARDS}
    hostile.write_shards(
        src, {file: {name.replace(old, new): t for name, t in found.items()} for file, found in shards.items()}
    )


@pytest.mark.parametrize("model_type", ["deepseek_v3", "step3", "llama"])
def test_experts_of_mlx_are_called_so(model_type: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    hostile.write_base(src)
    renamed(src, ".mlp.experts.", ".mlp.switch_mlp.")
    change_config(src, model_type=model_type)
    line = refused(*zigzag(src, 2))
    assert "MLX" in line
    assert ".switch_mlp." in line
    assert refused("inspect", src) == line


@pytest.mark.parametrize("counted", [True, False])
def test_an_unknown_model_with_experts_of_other_names_is_called_unknown(counted: bool, tmp_path: Path) -> None:
    """As Step-3 and others name them: the config counts experts, or a tensor is a router's."""
    src = tmp_path / "src"
    hostile.write_base(src)
    renamed(src, ".mlp.experts.", ".moe.")
    if counted:
        hostile.no_moe_layers(src)
    change_config(src, model_type="step3", n_routed_experts=8 if counted else None)
    line = refused(*zigzag(src, 2))
    assert "does not know the router of model type 'step3'" in line
    assert "RESHARD_PLACEMENT" in line


def test_a_known_model_that_lost_its_experts_is_no_dense_model(tmp_path: Path) -> None:
    src = tmp_path / "src"
    hostile.write_base(src)
    hostile.no_moe_layers(src)
    line = refused(*zigzag(src, 2))
    assert "n_routed_experts = 8" in line
    assert "mlp.experts" in line


@pytest.mark.parametrize("model_type", ["llama", "granitemoehybrid"])
@pytest.mark.parametrize("experts", [None, 0, 1])
def test_only_a_model_without_experts_is_called_one(experts: int | None, model_type: str, tmp_path: Path) -> None:
    """Granite 4 has dense models of its MoE's model type, with num_local_experts = 0."""
    src = tmp_path / "src"
    hostile.write_base(src)
    hostile.dense_model(src)
    change_config(src, model_type=model_type, num_local_experts=experts)
    assert "not a MoE model" in refused(*zigzag(src, 2))
