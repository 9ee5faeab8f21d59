"""Help can be believed: every example runs, every path is completed, and the words are the same everywhere."""

from __future__ import annotations

import os
import pty
import random
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from checkpoints import Spec, build
from command_line import run, run_well, time_limit
from hub_server import serving
from traces import write_trace

from reshard.cli.main import main

RESHARD = Path(sys.executable).with_name("reshard")


def commands(group: click.Group = main, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, the groups too."""
    yield name.strip(), group
    ctx = click.Context(group)
    for word in group.list_commands(ctx):
        command = group.get_command(ctx, word)
        assert command is not None, word
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}".strip(), command


COMMANDS = dict(commands())


def test_the_first_help_lists_each_command_with_the_first_line_of_its_own() -> None:
    listed = dict(re.findall(r"^  (\w+) +(.+)$", run_well("--help").partition("Commands:\n")[2], re.MULTILINE))
    first_lines = {name: str(command.help).splitlines()[0] for name, command in COMMANDS.items() if name}
    assert len(listed) == 10
    assert listed == {name: line for name, line in first_lines.items() if " " not in name}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_and_fits_a_terminal(name: str) -> None:
    help_ = run_well(*name.split(), "--help")
    assert max(map(len, help_.splitlines())) <= 80
    assert "..." not in help_.replace("[ARGS]...", "").replace("[OPTIONS]...", ""), "no sentence is cut off"
    if name != "trace":
        assert f"$ reshard {name}".strip() in help_.partition("Examples:\n")[2]


def test_every_example_of_every_help_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(Spec("deepseek_v3", experts=16), tmp_path / "DeepSeek-R1")
    (tmp_path / "map.json").write_text(f'{{"physical_to_logical": {list(reversed(range(16)))}}}')
    chance = random.Random(0)
    layers = [f"model.layers.{number}.mlp" for number in (1, 2)]
    ids = {layer: [chance.sample(range(16), 2) for _ in range(8192)] for layer in layers}
    write_trace(tmp_path / "trace", ids, 16)
    lines = [line for name in ("zigzag", *COMMANDS) for line in examples_of(name)]
    assert len(lines) > 20
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(tmp_path / "cache") as hub:
        hub.add("deepseek-ai/DeepSeek-R1", tmp_path / "DeepSeek-R1")
        for line in dict.fromkeys(lines):
            words, _, file = line.removeprefix("reshard ").partition(" > ")
            result = run(*shlex.split(words))
            assert result.exit_code == 0, f"{line}: {result.output}"
            if file:
                Path(file).write_text(result.stdout)
    assert hub.requests
    assert {path.name for path in tmp_path.iterdir()} >= {"R1-zz", "R1-balanced", "R1", "R1.html", "placement.json"}


def examples_of(name: str) -> list[str]:
    """The examples in the help of a command, each as one line for a shell."""
    shown = run_well(*name.split(), "--help").partition("Examples:\n")[2]
    return [line.strip() for line in shown.replace("\\\n", " ").replace("  $ ", "\0").split("\0")[1:]]


def test_what_is_read_is_never_called_out() -> None:
    for name in ("verify", "restore", "stage", "inspect"):
        usage, _, help_ = run_well(name, "--help").partition("\n")
        assert usage.endswith(" DIRECTORY")
        assert not re.search(r"\bOUT\b", re.sub(r"--out OUT\b", "", help_)), name
        assert "'DIRECTORY'" in run(name).stderr


def test_short_options_are_the_same_everywhere() -> None:
    short = {"-q": "--quiet", "-v": "--verbose", "-o": "--out", "-n": "--dry-run"}
    found: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            long = [option for option in parameter.opts if option.startswith("--")]
            for option in parameter.opts:
                if re.fullmatch("-[a-z]", option):
                    found.setdefault(option, set()).update(long)
            for option, name in short.items():
                assert (name in parameter.opts) == (option in parameter.opts), parameter.opts
    assert found == {option: {name} for option, name in short.items()}


@pytest.mark.parametrize(
    "command",
    [
        "zigzag --src src --ep 0 --out out",
        "zigzag --src src --ep 1 --out out",
        "place --strategy zigzag --src src --ep -8 --out out",
        "place --strategy node-zigzag --nodes 3 --src src --ep 8 --out out",
        "place --strategy balanced --src src --ep 8 --out out",
        "zigzag --src src --ep 8 --out out --max-shard-size 5",
        "zigzag --src src --ep 8 --out out --max-shard-size 999B",
        "zigzag --src src --ep 8 --out out --workers 0",
        "zigzag --src src --ep 8 --out out --quiet --verbose",
        "zigzag --src src --ep 8 --out out --layout sideways",
        "inspect src --ep 1",
        "analyze src --ep 1",
        "analyze src --ep 8 --nodes 3",
        "analyze src --ep 8 --batch 0",
        "analyze src --ep 8 --tokens 4 --batch 8",
        "analyze src --ep 8 --html - --json",
        "analyze src --ep 8 --placement balanced",
        "analyze src --ep 8 --seed 99999999999999999999",
        "zigzag --src src --ep 8 --out out --merge",
        "zigzag --src src --ep 8 --out out --ranks 3-1",
        "zigzag --src '' --ep 8 --out out",
        "zigzag --src src --ep 8 --out ''",
        "verify ''",
        "inspect ''",
        "export src --to sglang --ep 8 --out map.txt",
        "export src --to vllm --ep 1",
        "export src --to vllm --ep 8 --strategy node-zigzag --nodes 3",
        "export src --to orca --ep 8",
        "stage output --ranks 3-1 --out out",
        "verify output --quick --src src",
    ],
)
def test_what_is_wrong_whatever_the_files_is_a_usage_error(command: str) -> None:
    """None of the paths exists: the words alone are enough."""
    result = run(*shlex.split(command))
    assert result.exit_code == 2, result.output
    assert "Error: " in result.stderr


@pytest.mark.parametrize("command", ["zigzag --src src --ep 8 --out out --max-shard-size 1KB", "inspect src --ep 2"])
def test_the_least_values_are_no_usage_errors(command: str) -> None:
    """The control: the source is what is missing."""
    assert run(*command.split()).exit_code == 1


def test_a_file_goes_to_the_standard_output(tmp_path: Path) -> None:
    build(Spec("deepseek_v3", experts=8), tmp_path / "src")
    analyze = ("analyze", tmp_path / "src", "--ep", 2, "--tokens", 16)
    run_well(*analyze, "--html", tmp_path / "page.html")
    printed = run(*analyze, "--html", "-").stdout.replace("--html -", f"--html {tmp_path / 'page.html'}")
    assert printed == (tmp_path / "page.html").read_text(), "pages name their command"
    export = ("export", tmp_path / "src", "--ep", 2, "--to", "vllm")
    run_well(*export, "--out", tmp_path / "map.json")
    assert run(*export, "-o", "-").stdout == run(*export).stdout == (tmp_path / "map.json").read_text()
    assert not Path("-").exists()


def test_bash_completes_commands_options_values_and_paths(tmp_path: Path) -> None:
    """In a real shell at a real terminal, set up as `reshard --help` says."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "map.json").touch()
    expected = {
        "verify ./chec": "verify ./checkpoint/",
        "zigzag --src ./chec": "zigzag --src ./checkpoint/",
        "zigzag --out ./chec": "zigzag --out ./checkpoint/",
        "restore -o ./chec": "restore -o ./checkpoint/",
        "inspect ./chec": "inspect ./checkpoint/",
        "analyze src --trace ./chec": "analyze src --trace ./checkpoint/",
        "place --map ./ma": "place --map ./map.json",
        "zig": "zigzag",
        "trace in": "trace info",
        "zigzag --max": "zigzag --max-shard-size",
        "export --to sg": "export --to sglang",
        "verify ./noth": "verify ./noth",
    }
    (setup,) = re.findall(r'eval ".*"', run_well("--help"))
    with time_limit(300):
        found = completed(setup, list(expected), tmp_path)
    assert found == list(expected.values())
    with time_limit(300):
        without = completed(":", ["zig"], tmp_path)
    assert without == ["zig"], "the control: without the line, bash cannot"


def completed(setup: str, lines: list[str], folder: Path) -> list[str]:
    """What bash makes of each line after `reshard ` with a tab; `reshard` there prints how it is called."""
    environment = {**os.environ, "PATH": f"{RESHARD.parent}:{os.environ['PATH']}", "TERM": "dumb"}
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe("bash", ["bash", "--noprofile", "--norc", "-i"], environment)
    os.write(terminal, f"{setup}\nreshard() {{ printf 'CAL%s<%s>\\n' LED \"$*\"; }}\n".encode())
    found: list[str] = []
    for line in lines:
        os.write(terminal, f"reshard {line}\t\n".encode())
        shown = ""
        while not (calls := re.findall(r"CALLED<(.*?) ?>", shown)):
            shown += os.read(terminal, 1 << 12).decode()
        found += calls
    os.write(terminal, b"exit\n")
    os.close(terminal)
    os.waitpid(child, 0)
    return found
