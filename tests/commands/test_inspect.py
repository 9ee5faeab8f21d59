"""What `inspect --ep` says of a source, against what `zigzag` says; and words for models without experts."""

from __future__ import annotations

import json
from pathlib import Path

import hostile
import pytest
from checkpoints import Spec, build
from command_line import run, run_well

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


@pytest.mark.parametrize("fault", ["a pattern", "a name of the output", "an adapter"])
def test_inspect_says_why_zigzag_would_refuse(fault: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    hostile.write_base(src)
    if fault == "a pattern":
        change_config(src, quantization_config={"ignore": ["re:.*experts.[0-3].down_proj"]})
    elif fault == "an adapter":
        name = "base_model.model.model.layers.1.mlp.experts.3.down_proj.lora_A.weight"
        (src / "adapter").mkdir()
        (src / "adapter" / "adapter_config.json").write_text("{}")
        (src / "adapter" / "adapter_model.safetensors").write_bytes(hostile.pack({name: hostile.tensor(name, (4, 8))}))
    else:
        (src / "quant.json").write_text(json.dumps({"pruned_experts": [5]}))
    line = refused(*zigzag(src, 2))
    assert f"zigzag would refuse it: {line}" in run_well("inspect", src, "--ep", 2)
    assert "would refuse" not in run_well("inspect", src)


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
