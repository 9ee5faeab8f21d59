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
from oracle import assert_identical_trees, assert_resharded

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
MODELSLIM = ("quant_model_weights", "quant_model_weight_w8a8_dynamic")  # stems of its files, of newer and older ones


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


def test_an_index_that_engines_do_not_read_is_refused(src: Path) -> None:
    (src / hostile.INDEX).rename(src / "weights.safetensors.index.json")
    line = refused(*zigzag(src))
    assert "weights.safetensors.index.json" in line
    assert "rename" in line


def test_a_checkpoint_in_another_format_is_called_one(src: Path) -> None:
    for path in (*src.glob("*.safetensors"), src / hostile.INDEX):
        path.unlink()
    (src / "pytorch_model.bin").write_bytes(b"weights")
    line = refused(*zigzag(src))
    assert "pytorch_model.bin" in line
    assert "safetensors" in line


# ---------------------------------------------------------------------------------------------------------------------
# msModelSlim's index, and none at all: vLLM then loads every safetensors file
# ---------------------------------------------------------------------------------------------------------------------


def as_msmodelslim_writes_it(src: Path, stem: str) -> None:
    """Rename shards and index, and describe each tensor's quantization: all of it, but for one expert."""
    index = json.loads((src / hostile.INDEX).read_text())
    for number, name in enumerate(hostile.SHARDS, start=1):
        (src / name).rename(src / f"{stem}-{number:05}-of-00003.safetensors")
    files = {name: f"{stem}-{number:05}-of-00003.safetensors" for number, name in enumerate(hostile.SHARDS, start=1)}
    index["weight_map"] = {name: files[file] for name, file in index["weight_map"].items()}
    (src / hostile.INDEX).unlink()
    (src / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    float_expert = "model.layers.1.mlp.experts.5."
    described = {name: "FLOAT" if name.startswith(float_expert) else "W8A8_DYNAMIC" for name in index["weight_map"]}
    (src / "quant_model_description.json").write_text(json.dumps(described | {"group_size": 256}))


@pytest.mark.parametrize("layout", ["ranks", "source"])
@pytest.mark.parametrize("stem", MODELSLIM)
def test_msmodelslim_s_checkpoints_are_resharded_and_restored(stem: str, layout: str, src: Path) -> None:
    as_msmodelslim_writes_it(src, stem)
    out, back = src.with_name("out"), src.with_name("back")
    said = run_well(*zigzag(src, "--layout", layout))
    assert f"note: {stem}.safetensors.index.json is not in the output" in said
    assert [path.name for path in out.glob("*.index.json")] == [hostile.INDEX]  # the only one that vLLM reads
    assert_resharded(src, out, 2, by_rank=layout == "ranks")
    described = json.loads((out / "quant_model_description.json").read_text())
    assert described["model.layers.1.mlp.experts.6.up_proj.weight"] == "FLOAT"  # 0 2 4 6 | 1 3 5 7
    run_well("verify", out, "--src", src)
    run_well("restore", out, "--out", back)
    assert_identical_trees(src, back)


def test_a_damaged_index_of_msmodelslim_is_refused_by_its_name(src: Path) -> None:
    as_msmodelslim_writes_it(src, MODELSLIM[0])
    path = src / f"{MODELSLIM[0]}.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][hostile.EXPERT]
    path.write_text(json.dumps(index))
    line = refused(*zigzag(src))
    assert path.name in line
    assert hostile.EXPERT in line


def test_two_indices_must_say_the_same(src: Path) -> None:
    """vLLM reads only one of them. Both are the source's, and both come back."""
    both, out, back = src / f"{MODELSLIM[0]}.safetensors.index.json", src.with_name("out"), src.with_name("back")
    shutil.copy(src / hostile.INDEX, both)
    run_well(*zigzag(src))
    assert not (out / both.name).exists()
    run_well("restore", out, "--out", back)
    assert_identical_trees(src, back)
    index = json.loads(both.read_text())
    index["weight_map"][hostile.EXPERT] = hostile.SHARDS[0]
    both.write_text(json.dumps(index))
    line = refused(*zigzag(src, "--restart"))
    assert both.name in line
    assert hostile.EXPERT in line


def test_msmodelslim_s_checkpoint_is_exported_for_vllm_ascend(src: Path) -> None:
    plain, renamed = src.with_name("plain.json"), src.with_name("renamed.json")
    arguments = ("export", src, "--to", "vllm-ascend", "--ep", 2, "--out")
    run_well(*arguments, plain)
    as_msmodelslim_writes_it(src, MODELSLIM[0])
    run_well(*arguments, renamed)
    assert renamed.read_text() == plain.read_text()


@pytest.mark.parametrize("names", [hostile.SHARDS, ("model-bf16-00001", "layer-1-experts", "layer-2")])
@pytest.mark.parametrize("layout", ["ranks", "source"])
def test_files_without_an_index_are_taken_as_the_whole_model(layout: str, names: tuple[str, ...], src: Path) -> None:
    (src / hostile.INDEX).unlink()
    for old, new in zip(hostile.SHARDS, names, strict=True):
        (src / old).rename(src / f"{new.removesuffix('.safetensors')}.safetensors")
    out, back = src.with_name("out"), src.with_name("back")
    assert "no index: its 3 safetensors files are taken as the whole model" in run_well(
        *zigzag(src, "--layout", layout)
    )
    assert_resharded(src, out, 2, by_rank=layout == "ranks")
    run_well("verify", out, "--src", src)
    run_well("restore", out, "--out", back)
    assert_identical_trees(src, back)


def test_one_file_of_another_name_is_the_whole_model(tmp_path: Path) -> None:
    src = tmp_path / "src"
    build(Spec("qwen3_moe", files=1), src)
    (src / "model.safetensors").rename(src / "weights.safetensors")
    run_well(*zigzag(src))
    assert_resharded(src, tmp_path / "out", 2)


def test_a_tensor_that_is_twice_in_files_without_an_index_is_refused(src: Path) -> None:
    """Nobody can tell which one an engine would load last."""
    (src / hostile.INDEX).unlink()
    (src / "more.safetensors").write_bytes(hostile.pack({hostile.GATE: hostile.tensor(hostile.GATE, (8, 16))}))
    line = refused(*zigzag(src))
    assert hostile.GATE in line
    assert "more.safetensors" in line


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_file_is_noticed_by_the_numbers_of_the_others(number: int, src: Path) -> None:
    (src / hostile.INDEX).unlink()
    (src / hostile.SHARDS[number]).unlink()
    line = refused(*zigzag(src))
    assert f"{hostile.SHARDS[number]} is missing" in line
