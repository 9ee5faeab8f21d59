"""What a source's directory holds beside the checkpoint, and the line that says what a directory is if it is none."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import hostile
import pytest
from checkpoints import Spec, build
from command_line import run, run_well
from oracle import assert_identical_trees

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
MODELSLIM = "quant_model_weights.safetensors.index.json"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A sound checkpoint."""
    hostile.write_base(tmp_path / "src")
    return tmp_path / "src"


def zigzag(src: Path, *more: object) -> tuple[str, ...]:
    """Arguments of `reshard zigzag`."""
    return tuple(map(str, ("zigzag", "--src", src, "--ep", 2, "--out", src.with_name("out"), *more)))


def refused(*arguments: object) -> str:
    """The one line with which a command refuses."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    return line


# ---------------------------------------------------------------------------------------------------------------------
# What is left out
# ---------------------------------------------------------------------------------------------------------------------


def test_git_and_a_download_s_records_are_left_out_and_the_user_is_told(src: Path) -> None:
    bare = src.with_name("bare")
    shutil.copytree(src, bare)
    (bare / "inner").mkdir()
    subprocess.run(["git", "init", "-q", src], check=True)
    (src / "inner").mkdir()
    (src / "inner" / ".git").write_text("gitdir: ../.git/modules/inner\n")
    (src / ".git" / "lfs").mkdir()
    (src / ".git" / "lfs" / "object").write_bytes(bytes(100))
    (src / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (src / ".cache" / "huggingface" / "download" / "config.json.metadata").write_text("0" * 40)
    out, back = src.with_name("out"), src.with_name("back")
    names = [".cache/huggingface", ".git", "inner/.git"]
    assert "left out, and not brought back by restore: " + ", ".join(names) in run_well(*zigzag(src))
    assert not list(out.rglob(".git")) + list(out.rglob(".cache"))
    run_well("verify", out, "--src", src)
    assert json.loads((out / "reshard_manifest.json").read_text())["source"]["left_out"] == names
    said = run_well("restore", out, "--out", back)
    assert all(f"never had {name}" in said for name in names)
    assert_identical_trees(bare, back)


def test_other_hidden_files_and_caches_are_copied(src: Path) -> None:
    (src / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (src / ".cache" / "other").mkdir(parents=True)
    (src / ".cache" / "huggingface").mkdir(parents=True)
    (src / ".cache" / "other" / "file").write_text("kept\n")
    run_well(*zigzag(src))
    out = src.with_name("out")
    assert (out / ".cache" / "other" / "file").read_text() == "kept\n"
    assert (out / ".gitattributes").exists()
    assert not (out / ".cache" / "huggingface").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Second copies of the weights, and adapters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth", "model.gguf"])
def test_weights_in_another_format_beside_safetensors_are_refused(name: str, src: Path) -> None:
    (src / name).write_bytes(bytes(2 << 20))
    for arguments in (zigzag(src), ("inspect", src)):
        line = refused(*arguments)
        assert name in line
        assert "instead of the output's weights" in line
    assert not src.with_name("out").exists()


@pytest.mark.parametrize(
    ("name", "size"), [("training_args.bin", 2 << 20), ("optimizer.pt", 2 << 20), ("vocab.bin", 2000)]
)
def test_what_holds_no_weights_is_copied(name: str, size: int, src: Path) -> None:
    (src / name).write_bytes(bytes(size))
    run_well(*zigzag(src))
    assert (src.with_name("out") / name).stat().st_size == size


def test_a_whole_copy_in_a_sub_folder_is_copied_and_named(src: Path) -> None:
    (src / "original").mkdir()
    (src / "original" / "model.bin").write_bytes(bytes(2 << 20))
    assert "not resharded: original/model.bin" in run_well(*zigzag(src))


@pytest.mark.parametrize("for_experts", [True, False])
def test_an_adapter_for_experts_is_refused(for_experts: bool, src: Path) -> None:
    """It names experts by the original's ids; the control, an adapter for attention, is copied."""
    module = "mlp.experts.3.down_proj" if for_experts else "self_attn.o_proj"
    name = f"base_model.model.model.layers.1.{module}.lora_A.weight"
    (src / "adapter").mkdir()
    (src / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (src / "adapter" / "adapter_model.safetensors").write_bytes(hostile.pack({name: hostile.tensor(name, (4, 8))}))
    if not for_experts:
        run_well(*zigzag(src))
        return
    line = refused(*zigzag(src))
    assert "adapter/adapter_model.safetensors" in line
    assert name in line


# ---------------------------------------------------------------------------------------------------------------------
# What is no checkpoint, or not a whole one
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [hostile.SHARD, hostile.INDEX, hostile.CONFIG])
def test_a_git_lfs_pointer_is_called_one(name: str, src: Path) -> None:
    (src / name).write_bytes(POINTER)
    for arguments in (zigzag(src), ("inspect", src)):
        line = refused(*arguments)
        assert name in line
        assert "Git LFS pointer" in line
        assert "git lfs pull" in line


def test_small_files_that_are_pointers_are_named(src: Path) -> None:
    (src / "tokenizer.json").write_bytes(POINTER)
    assert "only Git LFS pointers: tokenizer.json" in run_well(*zigzag(src, "--dry-run"))


@pytest.mark.parametrize("with_manifest", [False, True])
def test_an_unfinished_output_is_called_one(with_manifest: bool, src: Path) -> None:
    run_well(*zigzag(src))
    out = src.with_name("out")
    (out / "config.json").unlink()
    (out / ".reshard-journal").write_text("")
    if not with_manifest:
        (out / "reshard_manifest.json").unlink()
    commands = [("inspect", out), ("analyze", out, "--ep", "2"), ("zigzag", "--src", out, "--ep", 2, "--out", "x")]
    if not with_manifest:
        commands += [("verify", out), ("restore", out, "--out", "x"), ("stage", out, "--ranks", "0", "--out", "x")]
    for command in commands:
        line = refused(*command)
        assert "unfinished output" in line
        assert "rerun the command" in line


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("command", ["zigzag", "verify", "analyze"])
def test_an_output_is_no_original(command: str, with_manifest: bool, src: Path) -> None:
    run_well(*zigzag(src))
    out = src.with_name("out")
    again = out.with_name("again")
    shutil.copytree(out, again)
    if not with_manifest:
        (again / "reshard_manifest.json").unlink()
    arguments = {
        "zigzag": ("zigzag", "--src", again, "--ep", 2, "--out", out.with_name("new")),
        "verify": ("verify", out, "--src", again),
        "analyze": ("analyze", again, "--ep", 2),
    }[command]
    assert "already resharded" in refused(*arguments)


@pytest.mark.parametrize("other", [MODELSLIM, "quant_model_weight_w8a8_dynamic.safetensors.index.json"])
def test_msmodelslim_s_index_is_called_by_its_name(other: str, src: Path) -> None:
    (src / hostile.INDEX).rename(src / other)
    line = refused(*zigzag(src))
    assert other in line
    assert "msModelSlim's index" in line
    (src / other).rename(src / hostile.INDEX)  # what the line says to do
    run_well(*zigzag(src))


def test_shards_without_an_index_get_the_line_that_helps(src: Path) -> None:
    (src / hostile.INDEX).unlink()
    line = refused(*zigzag(src))
    assert "3 safetensors files" in line
    assert "no index" in line
    assert "save_pretrained" in line


def test_one_file_of_another_name_gets_the_line_that_helps(tmp_path: Path) -> None:
    build(Spec("qwen3_moe", files=1), tmp_path / "src")
    (tmp_path / "src" / "model.safetensors").rename(tmp_path / "src" / "weights.safetensors")
    line = refused(*zigzag(tmp_path / "src"))
    assert "weights.safetensors" in line
    assert "rename" in line


def test_a_checkpoint_in_another_format_is_called_one(src: Path) -> None:
    for path in (*src.glob("*.safetensors"), src / hostile.INDEX):
        path.unlink()
    (src / "pytorch_model.bin").write_bytes(b"weights")
    line = refused(*zigzag(src))
    assert "pytorch_model.bin" in line
    assert "safetensors" in line
