"""What lines look like on a terminal, in a pipe, and in a pipe whose reader has left."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

import pytest
from checkpoints import Spec
from command_line import run_well
from scratch import checkpoint

RESHARD = str(Path(sys.executable).with_name("reshard"))
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without expert groups, of which zigzag has a note to make."""
    return checkpoint(tmp_path_factory, Spec("kimi_k2", experts=64))


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("terminal") / "output"
    run_well("zigzag", "--src", source, "--ep", 2, "--out", out)
    return out


def on_terminal(*arguments: object, columns: int = 80, variables: Mapping[str, str] | None = None) -> str:
    """What a command shows on a terminal, both of its outputs together."""
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    hidden = {"NO_COLOR", "COLUMNS", "LINES"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | dict(variables or {})
    with subprocess.Popen([RESHARD, *map(str, arguments)], stdout=side, stderr=side, env=environment) as process:
        os.close(side)
        shown = b""
        try:
            while block := os.read(terminal, 1 << 16):
                shown += block
        except OSError:  # how Linux says that the other side is closed
            pass
        process.wait()
    os.close(terminal)
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [60, 80])
def test_lines_break_at_words_and_keep_every_word(columns: int, source: Path) -> None:
    arguments = ("inspect", source, "--ep", 2)
    shown = COLOUR.sub("", on_terminal(*arguments, columns=columns))
    whole = run_well(*arguments)
    assert shown.split() == whole.split()
    assert max(map(len, whole.splitlines())) > columns, (
        "the control: there is something to break, and a pipe gets it whole"
    )
    long = [line for line in shown.splitlines() if len(line) > columns and str(source) not in line]
    assert long == []
    experts = [line for line in shown.splitlines() if re.fullmatch(r"[ 0-9]+", line)]
    (start,) = {len(line) - len(line.lstrip()) for line in experts}
    assert start == next(line for line in shown.splitlines() if line.strip().startswith("0 ")).rindex("  ") + 2


def test_a_command_to_copy_is_never_broken(output: Path, source: Path, tmp_path: Path) -> None:
    shown = on_terminal("zigzag", "--src", source, "--ep", 2, "--out", output, columns=40)
    assert f"check it:  reshard verify {output} --src {source}\n" in shown
    assert f"vllm serve {output} --tensor-parallel-size 2 --enable-expert-parallel\n" in shown
    shown = on_terminal("export", source, "--to", "vllm", "--ep", 2, "--out", tmp_path / "map.json", columns=40)
    serve = (
        f"RESHARD_PLACEMENT={tmp_path}/map.json vllm serve {source} --tensor-parallel-size 2 --enable-expert-parallel"
    )
    assert serve in shown


def test_an_error_and_a_note_are_coloured_as_hf_colours_them(source: Path, tmp_path: Path) -> None:
    assert "\x1b[31m\x1b[1mreshard: error:\x1b[0m nowhere: " in on_terminal("inspect", "nowhere")
    zigzag = ("zigzag", "--src", source, "--ep", 2, "--out")
    assert "\x1b[33mnote:\x1b[0m this model's router has no" in on_terminal(*zigzag, tmp_path / "out")
    help_ = on_terminal("verify", "--help")
    assert "\x1b[4mOptions:\x1b[0m" in help_ and "\x1b[4mExamples:\x1b[0m" in help_
    assert "\x1b[1m-q, --quiet\x1b[0m" in help_


@pytest.mark.parametrize("command", [("inspect", "nowhere"), ("verify", "--help")])
def test_no_color_means_none_and_so_does_a_pipe(command: tuple[str, ...]) -> None:
    assert COLOUR.search(on_terminal(*command)), "the control"
    assert not COLOUR.search(on_terminal(*command, variables={"NO_COLOR": "1"}))
    assert COLOUR.search(on_terminal(*command, variables={"NO_COLOR": ""})), "https://no-color.org: not an empty string"
    piped = subprocess.run([RESHARD, *command], capture_output=True, text=True)
    assert not COLOUR.search(piped.stdout + piped.stderr)


@pytest.mark.parametrize(
    "command",
    [("inspect", "SOURCE"), ("inspect", "SOURCE", "--json"), ("verify", "OUTPUT", "-v"), ("verify", "--help")],
)
def test_a_pipe_whose_reader_has_left_ends_quietly(command: tuple[str, ...], source: Path, output: Path) -> None:
    words = [word.replace("SOURCE", str(source)).replace("OUTPUT", str(output)) for word in command]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([RESHARD, *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141, "as if SIGPIPE had ended it"


def test_a_terminal_of_any_width_or_none_and_a_closed_output_will_do(source: Path) -> None:
    words = run_well("inspect", source, "--ep", 2).split()
    for columns in (0, 1):
        assert COLOUR.sub("", on_terminal("inspect", source, "--ep", 2, columns=columns)).split() == words
    closed = subprocess.run(f"{RESHARD} inspect {source} >&-", shell=True, capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_a_full_disk_under_the_output_is_an_error(source: Path) -> None:
    """The control of the test above: only a pipe may end quietly."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([RESHARD, "inspect", source], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert "No space left on device" in done.stderr


def test_verbose_lists_the_files_and_quiet_nothing(output: Path, source: Path, tmp_path: Path) -> None:
    files = [path for path in output.rglob("*") if path.is_file()]
    plain, verbose = (run_well("verify", output, *more).splitlines() for more in ((), ("-v",)))
    assert sorted(line.split()[-1] for line in verbose[: len(files)]) == sorted(
        str(p.relative_to(output)) for p in files
    )
    assert len(verbose) == len(files) + len(plain)
    assert run_well("verify", output, "-q") == ""
    assert "model-ep01-of-02-00001" in run_well(
        "zigzag", "--src", source, "--ep", 2, "-o", tmp_path / "out", "-n", "-v"
    )
    assert not (tmp_path / "out").exists()
