"""What may befall a run, on real file systems: killed, the power cut, the disk full, the source unreadable or changed.

Each time the same command, when the trouble is over, ends as if there had been none, and leaves nothing beside.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from checkpoints import Spec, build
from click.testing import Result
from command_line import run, run_well, slowly
from filesystems import Mounted, mounted
from interruption import Cut, cut_after, is_loadable
from oracle import assert_identical_trees, read_safetensors, tree
from scratch import checkpoint

from reshard import CheckpointError, OutputError, Zigzag, plan_placement, write_resharding, zigzag

JOURNAL = ".reshard-journal"
RANKS = 3
SHARD_SIZE = 1_000_000
OPTIONS = ["--ep", RANKS, "--max-shard-size", SHARD_SIZE, "--quiet"]
REST = 0.02  # seconds after each of some thirty files


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 18 MB."""
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=8, layers=3, scale=16, aligned=True))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its output, made in peace."""
    out = tmp_path_factory.mktemp("crash") / "whole"
    run_well("zigzag", "--src", source, "--out", out, *OPTIONS)
    return out


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    """A run in a process of its own, under way."""
    command = slowly(REST, "zigzag", "--src", source, "--out", out, *OPTIONS)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / JOURNAL).exists() and process.poll() is None:
        time.sleep(0.001)
    return process


def test_a_run_killed_at_any_point_is_finished_by_the_same_command(
    source: Path, whole: Path, tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    chance = random.Random(0)
    points = rounds(10, 50)
    left = []
    out = tmp_path / "out"
    for _ in range(points):
        process = start(source, out)
        time.sleep(chance.random() * 0.6)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out / JOURNAL).exists():
            left.append(len(list(out.iterdir())))
            is_last = (out / "config.json").exists()
            assert not is_last or tree(out).keys() - {JOURNAL} == tree(whole).keys()
            run_well("zigzag", "--src", source, "--out", out, *OPTIONS)
        assert_identical_trees(whole, out)
        shutil.rmtree(out)
    assert len(left) > points // 2
    assert len(set(left)) > 2, f"all were killed at the same point: {left}"


def recorded(out: Path) -> list[dict[str, Any]]:
    """What the journal in `out` says of complete files."""
    if not (out / JOURNAL).exists():
        return []
    lines = (out / JOURNAL).read_bytes().split(b"\n")[1:-1]
    return [json.loads(line)["record"] for line in lines]


def lies(out: Path) -> list[str]:
    """The files that the journal calls complete and that are not."""
    return [
        record["name"]
        for record in recorded(out)
        if not (out / record["name"]).is_file()
        or blake3((out / record["name"]).read_bytes()).hexdigest() != record["digest"]
    ]


def cut_power_during_a_run(disk: Mounted, command: list[str], after: float) -> None:
    """Start `command`, cut the power of `disk` after some files, and switch it on again."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    out = disk.path / "out"
    while not recorded(out) and process.poll() is None:
        time.sleep(0.002)
    time.sleep(after)
    disk.cut_power()
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    disk.unmount()
    disk.mount()


@pytest.mark.parametrize("kind", ["xfs", "ext4-journal"])
def test_what_the_journal_calls_complete_is_so_after_a_power_cut(
    kind: str, source: Path, whole: Path, tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    chance = random.Random(1)
    found = 0
    with mounted(kind, tmp_path, 512) as disk:
        out = disk.path / "out"
        command = slowly(REST, "zigzag", "--src", source, "--out", out, *OPTIONS)
        for _ in range(rounds(3, 25)):
            cut_power_during_a_run(disk, command, chance.random() * 0.5)
            found += len(recorded(out))
            assert lies(out) == []
            if (out / JOURNAL).exists() or not (out / "config.json").exists():
                run_well("zigzag", "--src", source, "--out", out, *OPTIONS)
            assert_identical_trees(whole, out)
            shutil.rmtree(out)
    assert found > 3


def test_without_the_flush_of_each_file_a_power_cut_makes_the_journal_lie(source: Path, tmp_path: Path) -> None:
    """The control of the test above."""
    script = (
        "import os, reshard.execute.syscalls\n"
        "fsync = os.fsync\n"
        "def of_journal_only(fd):\n"
        "    if os.readlink(f'/proc/self/fd/{fd}').endswith('journal'):\n"
        "        fsync(fd)\n"
        "os.fsync = of_journal_only\n"
        "reshard.execute.syscalls.forget = lambda *arguments: None\n"
    )
    with mounted("ext4-journal", tmp_path, 512) as disk:
        command = slowly(REST, "zigzag", "--src", source, "--out", disk.path / "out", *OPTIONS)
        command[2] = script + command[2]
        cut_power_during_a_run(disk, command, 0.5)
        assert lies(disk.path / "out")


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_as_much_room_as_it_asks_for_lets_it_go_on(
    kind: str, source: Path, whole: Path, tmp_path: Path
) -> None:
    arguments = ["zigzag", "--src", source, "--out", tmp_path / kind / "out", *OPTIONS]
    with mounted(kind, tmp_path, 320) as disk, (disk.path / "filler").open("wb", buffering=0) as filler:
        out = disk.path / "out"
        fill(filler, leaving=50 << 20)
        process = start(source, out)
        while not recorded(out) and process.poll() is None:
            time.sleep(0.001)
        fill(filler, leaving=0)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert len(errors.splitlines()) == 1
        assert "No space left on device; rerun the command to resume" in errors
        complete = recorded(out)
        assert complete
        for _ in range(2):  # while the disk is full it is refused, and loses nothing
            needed, free = room_asked_for(run(*arguments))
            assert recorded(out) == complete
            assert lies(out) == []
            assert not is_loadable(out)
        assert free < 1 << 20 < needed < 50 << 20
        filler.truncate(filler.tell() - (needed - free + (1 << 20)))
        run_well(*arguments)
        assert_identical_trees(whole, out)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_run_goes_on_where_the_disk_has_the_room_it_asked_for_and_no_more(
    kind: str, source: Path, tmp_path: Path
) -> None:
    arguments = ["zigzag", "--src", source, "--out", tmp_path / kind / "out", "--ep", RANKS, "--quiet"]
    with mounted(kind, tmp_path, 320) as disk, (disk.path / "filler").open("wb", buffering=0) as filler:
        fill(filler, leaving=0)
        needed, free = room_asked_for(run(*arguments))
        filler.truncate(filler.tell() - (needed - free + (1 << 20)))
        with pytest.raises(Cut):
            zigzag(source, disk.path / "out", RANKS, progress=cut_after(2), workers=2)
        assert sum(path.stat().st_size for path in (disk.path / "out").glob("*.partial")) > 2 << 20
        run_well(*arguments)


def room_asked_for(refused: Result) -> tuple[int, int]:
    """How many bytes a run that was refused in one line needs, and how many it found free."""
    assert refused.exit_code == 1, refused.output
    assert len(refused.stderr.splitlines()) == 1
    found = re.search(r"needs (\d+) bytes, (\d+) are free", refused.stderr)
    assert found, refused.stderr
    return int(found[1]), int(found[2])


def fill(file: FileIO, leaving: int) -> None:
    """Write to `file` until no more than `leaving` bytes are free beside it."""
    for size in (1 << 20, 1 << 12):
        try:
            while shutil.disk_usage(str(file.name)).free > leaving:
                file.write(bytes(size))
        except OSError as error:
            assert error.errno == errno.ENOSPC


@pytest.fixture
def failing(source: Path, tmp_path: Path) -> Iterator[tuple[Mounted, str]]:
    """A disk with the source on it, and a tensor in the middle of it."""
    tensor = "model.layers.1.mlp.experts.3.up_proj.weight"
    holder = next(path.name for path in source.glob("*.safetensors") if tensor in read_safetensors(path)[1])
    with mounted("ext4", tmp_path, 64) as disk:
        shutil.copytree(source, disk.path / "source", ignore=shutil.ignore_patterns(holder))
        os.sync()
        shutil.copy2(source / holder, disk.path / "source")  # behind all others, so that their headers can be read
        os.sync()
        yield disk, tensor


def break_from(disk: Mounted, data: bytes) -> bytes:
    """Make every block from the one with `data` on fail to be read; what the image held."""
    whole = disk.image.read_bytes()
    at = whole.find(data[:4096])
    assert at > 0
    os.truncate(disk.image, at)
    for path in (disk.path / "source").glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return whole


def mend(disk: Mounted, image: bytes) -> None:
    """Undo `break_from`."""
    disk.unmount()
    disk.image.write_bytes(image)
    disk.mount()


def test_a_source_that_cannot_be_read_is_named_with_file_tensor_and_byte_and_the_run_goes_on_when_it_can(
    failing: tuple[Mounted, str], whole: Path, tmp_path: Path
) -> None:
    disk, tensor = failing
    source, out = disk.path / "source", tmp_path / "out"
    arguments = ["zigzag", "--src", source, "--out", out, *OPTIONS]
    file, found = next(
        (path, tensors[tensor])
        for path in source.glob("*.safetensors")
        if tensor in (tensors := read_safetensors(path)[1])
    )
    for size in (SHARD_SIZE, 10**9):
        image = break_from(disk, found.data)
        result = run(*arguments, "--max-shard-size", size, "--workers", 1)
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1
        assert "Input/output error" in result.stderr
        assert "cannot be read at byte" in result.stderr
        assert str(file.parent) in result.stderr
        assert ": tensor model." in result.stderr
        assert not (out / "config.json").exists()
        mend(disk, image)
        run_well(*arguments, "--max-shard-size", size)
        if size == SHARD_SIZE:
            expected = json.loads((whole / "reshard_manifest.json").read_bytes())["files"]
            assert json.loads((out / "reshard_manifest.json").read_bytes())["files"] == expected
        shutil.rmtree(out)


def test_verify_says_which_files_cannot_be_read(failing: tuple[Mounted, str], tmp_path: Path) -> None:
    disk, tensor = failing
    run_well("zigzag", "--src", disk.path / "source", "--out", tmp_path / "out", *OPTIONS)
    shutil.rmtree(disk.path / "source")
    shutil.copytree(tmp_path / "out", disk.path / "source")
    os.sync()
    run_well("verify", disk.path / "source")
    path = next(path for path in (disk.path / "source").glob("*.safetensors") if tensor in read_safetensors(path)[1])
    image = break_from(disk, read_safetensors(path)[1][tensor].data)
    result = run("verify", disk.path / "source")
    assert result.exit_code == 1
    assert "cannot be read" in result.stdout
    assert "Input/output error" in result.stdout
    mend(disk, image)
    run_well("verify", disk.path / "source")


def change_time(path: Path) -> None:
    """As another program would that writes the same bytes again."""
    os.utime(path, ns=(1, 1))


def change_size(path: Path) -> None:
    """As a download that goes on."""
    with path.open("ab") as file:
        file.write(b"more")


def change_header(path: Path) -> None:
    """Another file of the same size and time: two experts' tensors exchanged by name."""
    status = path.stat()
    data = path.read_bytes()
    names = sorted(
        name for name in read_safetensors(path)[1] if name.endswith("down_proj.weight") and ".experts." in name
    )
    first, second = f'"{names[0]}"'.encode(), f'"{names[1]}"'.encode()
    assert len(first) == len(second)
    header = 8 + int.from_bytes(data[:8], "little")
    changed = data[:header].replace(first, b'"?"').replace(second, first).replace(b'"?"', second)
    path.write_bytes(changed + data[header:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [change_time, change_size, change_header])
@pytest.mark.parametrize("layout", ["ranks", "source"])
def test_a_source_that_changes_under_the_run_ends_it_and_is_not_mixed_with_what_was(
    change: Callable[[Path], None], layout: Any, source: Path, tmp_path: Path
) -> None:
    mine, out = shutil.copytree(source, tmp_path / "source"), tmp_path / "out"
    plan = plan_placement(mine, out, Zigzag(RANKS), layout=layout)
    with pytest.raises(Cut):
        write_resharding(plan, out, progress=cut_after(3), workers=1)
    path = sorted(mine.glob("*.safetensors"))[-1]
    change(path)
    with pytest.raises(CheckpointError, match=f"{path.name}: changed while it was being read"):
        write_resharding(plan, out)
    assert not (out / "config.json").exists()
    with pytest.raises((OutputError, CheckpointError), match=r"another source|bytes that no tensor claims"):
        zigzag(mine, out, RANKS, layout=layout)
    if change is not change_size:
        zigzag(mine, out, RANKS, layout=layout, restart=True)
        run_well("verify", out, "--src", mine)


def test_a_file_changed_after_it_was_opened_is_noticed_at_its_end(source: Path, tmp_path: Path) -> None:
    mine, out = shutil.copytree(source, tmp_path / "source"), tmp_path / "out"
    plan = plan_placement(mine, out, Zigzag(RANKS), layout="source")
    path = min(mine.glob("*.safetensors"))

    def touch(written: int) -> None:
        os.utime(path, ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while"):
        write_resharding(plan, out, progress=touch, workers=1)


def test_holes_stay_holes_and_digests_are_those_of_zeros(source: Path, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    shutil.copytree(source, sparse)
    for path in sparse.glob("*.safetensors"):
        data = path.read_bytes()
        tensors = read_safetensors(path)[1]
        with path.open("wb") as file:
            file.write(data[: 8 + int.from_bytes(data[:8], "little")])
            file.truncate(len(data))
            for name, tensor in tensors.items():
                if ".experts." not in name or ".experts.2." in name:
                    file.seek(tensor.start)
                    file.write(tensor.data)

    def taken(directory: Path) -> int:
        os.sync()
        return sum(path.stat().st_blocks * 512 for path in directory.glob("*.safetensors"))

    assert taken(sparse) < 0.7 * taken(source)
    for layout in ("ranks", "source"):
        out, back = tmp_path / layout, tmp_path / f"{layout}-back"
        options = ["--layout", layout, "--digests", "all", "--reflink", "never", "--allow-holes"]
        run_well("zigzag", "--src", sparse, "--out", out, "--ep", RANKS, *options)
        run_well("verify", out, "--src", sparse, "--allow-holes")
        run_well("restore", out, "--out", back)
        assert_identical_trees(sparse, back)
        for directory in (out, back):
            assert taken(directory) < 1.3 * taken(sparse)


def test_a_sparse_source_needs_no_more_room_than_its_data(tmp_path: Path) -> None:
    with mounted("ext4", tmp_path, 64) as disk:
        source = disk.path / "source"
        build(Spec("qwen3_moe", aligned=True, files=1), source)
        path = source / "model.safetensors"
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:header])
        size = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        hole = 200 << 20
        entries["model.layers.0.self_attn.large.weight"] = {
            "dtype": "U8", "shape": [hole], "data_offsets": [size, size + hole],
        }  # fmt: skip
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[header:])
        os.truncate(path, path.stat().st_size + hole)
        command = ["zigzag", "--src", source, "--ep", 2, "--allow-holes"]
        report = json.loads(run_well(*command, "--out", disk.path / "out", "--dry-run", "--json"))
        assert report["space_needed"] < 26 << 20 < report["space_free"] < hole < report["output_size"]
        run_well(*command, "--out", disk.path / "out")
        run_well("verify", disk.path / "out", "--src", source, "--allow-holes")
        with path.open("r+b") as file:  # the control: with data there, it does need it
            file.seek(-(24 << 20), os.SEEK_END)
            file.write(bytes(24 << 20))
        result = run(*command, "--out", disk.path / "again")
        assert result.exit_code == 1
        assert "free some space" in result.stderr


def test_quick_looks_at_everything_but_tensors(whole: Path, tmp_path: Path) -> None:
    def spoil(what: Callable[[Path], None]) -> tuple[int, int]:
        out = shutil.copytree(whole, tmp_path / "out")
        what(out)
        codes = run("verify", out, "--quick").exit_code, run("verify", out).exit_code
        shutil.rmtree(out)
        return codes

    def overwrite(path: Path, at: int, data: bytes) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    def shard(out: Path) -> Path:
        return min(out.glob("model-ep01-*.safetensors"))

    assert spoil(lambda out: None) == (0, 0)
    assert spoil(lambda out: shard(out).unlink()) == (1, 1)
    assert spoil(lambda out: os.truncate(shard(out), shard(out).stat().st_size - 1)) == (1, 1)
    assert spoil(lambda out: overwrite(shard(out), 20, b"X")) == (1, 1)
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json", "reshard_manifest.json"):
        assert spoil(lambda out, name=name: overwrite(out / name, 5, b"X")) == (1, 1), name
    assert spoil(lambda out: overwrite(shard(out), shard(out).stat().st_size - 1000, b"X" * 999)) == (0, 1)
    refused = run("verify", whole, "--quick", "--src", whole)
    assert refused.exit_code == 2
    assert "--quick reads no tensors" in refused.stderr


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_the_number_of_workers_changes_nothing(workers: int, source: Path, whole: Path, tmp_path: Path) -> None:
    run_well("zigzag", "--src", source, "--out", tmp_path / "out", *OPTIONS, "--workers", workers)
    assert_identical_trees(whole, tmp_path / "out")
    run_well("verify", tmp_path / "out", "--workers", workers)
    run_well("restore", tmp_path / "out", "--out", tmp_path / "back", "--workers", workers)
    assert_identical_trees(source, tmp_path / "back")
    assert run("verify", tmp_path / "out", "--workers", 0).exit_code == 2
