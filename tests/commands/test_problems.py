"""What `verify` says of an output that is not right: every problem, on one stream, and only once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import Spec, build
from command_line import run, run_well
from oracle import read_safetensors

SHARDS = "model-ep*.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a `source` and its output `out`, two files with several experts' tensors for each rank."""
    directory = tmp_path_factory.mktemp("problems")
    build(Spec("deepseek_v3", experts=8), directory / "source")
    run_well("zigzag", "--src", directory / "source", "--ep", 2, "--out", directory / "out")
    return directory


@pytest.fixture
def out(good: Path, tmp_path: Path) -> Path:
    """A copy of the output to spoil."""
    return shutil.copytree(good / "out", tmp_path / "out")


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_all_problems_are_on_stdout_and_their_number_is_on_stderr(out: Path) -> None:
    shards = sorted(out.glob(SHARDS))[:2]
    for path in (*shards, out / "tokenizer.json"):
        flip_last_byte(path)
    names = [path.name for path in shards] + ["tokenizer.json"]
    for more in ([], ["--quiet"]):
        result = run("verify", out, *more)
        assert result.exit_code == 1
        problems = [line for line in result.stdout.splitlines() if line.startswith("problem: ")]
        assert len(problems) == 3
        for name in names:
            assert sum(name in line for line in problems) == 1
        assert result.stderr == f"reshard: error: {out}: 3 problems found; see the standard output\n"
    result = run("verify", out, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert not report["ok"]
    assert len(report["problems"]) == 3
    assert "3 problems" in result.stderr


def test_one_problem_is_one_and_none_is_none(out: Path) -> None:
    assert "problem:" not in run_well("verify", out)
    (out / "tokenizer.json").unlink()
    assert "1 problem found" in run("verify", out).stderr


def test_a_name_in_a_problem_cannot_write_to_the_terminal(out: Path) -> None:
    (out / "evil\x1b[2J\n.json").write_text("{}")
    result = run("verify", out)
    assert result.exit_code == 1
    assert "\x1b" not in result.stdout
    assert sum("evil" in line for line in result.stdout.splitlines()) == 1


@pytest.mark.parametrize("layout", ["ranks", "source"])
def test_two_names_exchanged_in_a_header_are_found_by_every_command_that_reads_an_output(
    layout: str, good: Path, tmp_path: Path
) -> None:
    source, out = good / "source", tmp_path / "out"
    run_well("zigzag", "--src", source, "--ep", 2, "--out", out, "--layout", layout, "--digests", "all")
    path, names = next(
        (path, names)
        for path in sorted(out.glob("*.safetensors"))
        if len(names := [name for name in read_safetensors(path)[1] if name.endswith("up_proj.weight")]) > 1
    )
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    first, second = (f'"{name}"'.encode() for name in sorted(names)[-2:])
    assert len(first) == len(second)
    changed = data[:header].replace(first, b"?").replace(second, first).replace(b"?", second)
    path.write_bytes(changed + data[header:])
    for command in (
        ["verify", out],
        ["verify", out, "--quick"],
        ["verify", out, "--src", source],
        ["restore", out, "--out", tmp_path / "back"],
        ["stage", out, "--ranks", "0-1", "--out", tmp_path / "staged"],
        ["zigzag", "--src", source, "--ep", 2, "--out", out, "--layout", layout, "--digests", "all"],
    ):
        result = run(*command)
        assert result.exit_code == 1, command
        assert path.name in result.output, command
        assert "header" in result.output, command
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "staged").exists()
