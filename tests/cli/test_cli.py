"""The habits of the command line: bars on terminals only, quiet means quiet, a start that imports nothing heavy."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import Spec, build
from command_line import run, run_well
from safetensors.torch import save_file
from scratch import checkpoint

from reshard.cli.main import COMMANDS

RESHARD = Path(sys.executable).with_name("reshard")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A group-limited checkpoint."""
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=8))


def test_help_and_inspect_import_nothing_heavy(source: Path) -> None:
    script = (
        "import sys; from reshard.cli.main import main; main(sys.argv[1:], standalone_mode=False);"
        "print(sorted({'torch', 'numpy', 'huggingface_hub', 'tqdm', 'safetensors'} & sys.modules.keys()))"
    )
    # inspect asks the safetensors library about each header, and that imports numpy
    for arguments, found in (
        (["--help"], "[]"),
        (["inspect", "--help"], "[]"),
        (["inspect", str(source), "--ep", "2"], "['numpy', 'safetensors']"),
    ):
        command = [sys.executable, "-c", script, *arguments]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert output.splitlines()[-1] == found


def test_help_imports_no_command_and_the_package_nothing_at_all() -> None:
    count = "print(*sorted(name for name in sys.modules if name.startswith('reshard.')), sep='\\n')"
    for script, found in (
        ("import sys, reshard", ["reshard._version"]),
        (
            "import sys; from reshard.cli.main import main; main(['--help'], standalone_mode=False)",
            ["_version", "cli", "cli.group", "cli.main", "cli.reports", "cli.terminal", "errors"],
        ),
    ):
        command = [sys.executable, "-c", f"{script}; {count}"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        imported = [line for line in output.splitlines() if line.startswith("reshard.")]
        assert imported == [name if name.startswith("reshard.") else f"reshard.{name}" for name in found]


def test_a_bar_in_bytes_with_a_rate_appears_on_a_terminal(source: Path, tmp_path: Path) -> None:
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [RESHARD, "zigzag", "--src", source, "--ep", "2", "--out", tmp_path / "out"]
    subprocess.run(command, stderr=stderr, stdout=subprocess.DEVNULL, check=True)
    os.close(stderr)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "100%" in shown
    assert "B/s" in shown


def test_quiet_prints_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_well("zigzag", "--src", source, "--ep", 2, "--out", out, "--quiet") == ""
    assert run_well("verify", out, "--quiet") == ""
    assert run_well("restore", out, "--out", tmp_path / "back", "--quiet") == ""


def test_the_summary_says_what_was_written_where_and_what_to_run_next(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run_well("zigzag", "--src", source, "--ep", 2, "--out", out)
    assert f"to {out} in " in summary
    assert f"reshard verify {out} --src {source}" in summary
    assert f"vllm serve {out} --tensor-parallel-size 2 --enable-expert-parallel" in summary
    assert "plugin needed: " in summary


@pytest.mark.parametrize(("family", "notes"), [("deepseek_v3", 0), ("deepseek_v2_lite", 1), ("kimi_k2", 1)])
def test_a_model_without_expert_groups_is_told_once_that_zigzag_will_not_help(
    family: str, notes: int, tmp_path: Path
) -> None:
    build(Spec(family, experts=8), tmp_path / "source")
    summary = run_well("zigzag", "--src", tmp_path / "source", "--ep", 2, "--out", tmp_path / "out")
    assert summary.count("not expected to help") == notes


@pytest.mark.parametrize(("family", "limited"), [("deepseek_v3", True), ("kimi_k2", False)])
def test_the_summary_names_adapters_of_any_size_and_says_whose_expert_ids_they_have(
    family: str, limited: bool, tmp_path: Path
) -> None:
    """A small adapter was copied with no word, and an engine without the plugin applies it to other experts."""
    build(Spec(family), source := tmp_path / "source")
    for folder in ("adapters/one", "two"):
        (source / folder).mkdir(parents=True)
        (source / folder / "adapter_config.json").write_text("{}")
        lora = torch.zeros(1 << 19 if folder == "two" else 1)
        name = "base_model.model.layers.0.self_attn.o_proj.lora_A"
        save_file({name: lora}, source / folder / "adapter_model.safetensors")
    summary = run_well("zigzag", "--src", source, "--ep", 2, "--out", tmp_path / "out")
    assert summary.count("LoRA adapters, copied unchanged: adapters/one/, two/; those that change routers") == 1
    assert "not resharded" not in summary, "once is enough"
    assert ("an engine without reshard's plugin applies them to other experts" in summary) != limited


def test_inspect_shows_each_rank_its_experts_and_whether_the_plugin_is_needed(source: Path, tmp_path: Path) -> None:
    shown = run_well("inspect", source, "--ep", 3)
    assert "8 experts, top 2, sigmoid, 4 groups, 2 chosen" in shown
    assert "plugin       needed: each token's experts come from 2 of 4 groups of 2" in shown
    for rank, experts in enumerate(("0 3 6", "1 4 7", "2 5")):
        assert any(line.split()[:1] == [str(rank)] and line.endswith(f"  {experts}") for line in shown.splitlines())
    run_well("zigzag", "--src", source, "--ep", 3, "--out", tmp_path / "out")
    found, planned = (
        json.loads(run_well("inspect", *arguments, "--json")) for arguments in ([tmp_path / "out"], [source, "--ep", 3])
    )
    assert found.pop("resharded") and not planned.pop("resharded")
    for different in ("path", "files"):
        assert found.pop(different) != planned.pop(different)
    assert found == planned


def test_bytes_per_rank_and_by_kind_add_up(source: Path) -> None:
    report = json.loads(run_well("inspect", source, "--ep", 3, "--json"))
    assert sum(rank["expert_size"] for rank in report["ranks"]) == report["expert_size"]
    index = json.loads((source / "model.safetensors.index.json").read_text())
    assert report["tensors"] == len(index["weight_map"])
    assert 0 < report["router_size"] < report["expert_size"] < report["tensors_size"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("0.5GB", 5 * 10**8),
        ("4GiB", 4 << 30),
        ("1.5Ki", 1536),
        ("1000", 1000),
        ("20 kb", 20_000),
    ],
)
def test_shard_sizes_are_written_as_on_the_hub(text: str, size: int, source: Path, tmp_path: Path) -> None:
    arguments = ["zigzag", "--src", source, "--ep", 2, "--out", tmp_path / "out", "--dry-run", "--json"]
    report = json.loads(run_well(*arguments, "--max-shard-size", text))
    weights = [file for file in report["files"] if file["tensors"]]
    assert all(file["size"] < size + 10_000 or file["tensors"] == 1 for file in weights)
    assert (len(weights) > 3) == (size < 10**6)


def test_inspect_ends_with_the_command_that_serves_the_original_placed(source: Path, tmp_path: Path) -> None:
    serve = f"RESHARD_PLACEMENT=zigzag vllm serve {source} --tensor-parallel-size 4 --enable-expert-parallel"
    assert run_well("inspect", source, "--ep", 4).splitlines()[-1].endswith(serve)
    assert "RESHARD_PLACEMENT" not in run_well("inspect", source)
    run_well("zigzag", "--src", source, "--ep", 4, "--out", tmp_path / "out")
    assert "RESHARD_PLACEMENT" not in run_well("inspect", tmp_path / "out"), "an output is placed already"


FAILING: dict[str, list[object]] = {
    "zigzag": ["--src", "absent", "--ep", 2, "--out", "out"],
    "place": ["--strategy", "zigzag", "--src", "absent", "--ep", 2, "--out", "out"],
    "verify": ["absent"],
    "stage": ["absent", "--ranks", 0, "--out", "out"],
    "restore": ["absent", "--out", "out"],
    "upload": ["absent", "org/name"],
    "inspect": ["absent"],
    "analyze": ["absent", "--ep", 2],
    "export": ["absent", "--ep", 2, "--to", "sglang"],
    "trace": ["info", "absent"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_under_json_is_an_object_on_stdout_too(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, found = run(command, *FAILING[command]), run(command, *FAILING[command], "--json")
    assert (plain.exit_code, plain.stdout) == (1, "")
    assert (found.exit_code, found.stderr) == (1, plain.stderr)
    line = plain.stderr.removeprefix("reshard: error: ").rstrip("\n")
    assert json.loads(found.stdout)["error"]["message"] == line


def test_stdout_is_one_document_whatever_ends_a_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, more = tmp_path / "out", tmp_path / "more"
    run_well("zigzag", "--src", source, "--ep", 2, "--out", out)
    few = run("analyze", source, "--ep", 99, "--placement", "zigzag", "--json")
    assert json.loads(few.stdout)["error"]["message"] in few.stderr
    (out / "LICENSE").write_text("another")
    report = json.loads(run("verify", out, "--json").stdout)
    assert (report["ok"], "error" in report) == (False, False)
    (out / "reshard_manifest.json").write_text("{")
    damaged = run("verify", out, "--json")
    assert "reshard_manifest.json" in json.loads(damaged.stdout)["error"]["message"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    full = run("zigzag", "--src", source, "--ep", 2, "--out", more, "--dry-run", "--json")
    assert full.exit_code == 1
    assert json.loads(full.stdout)["space_free"] == 0
