"""--check-source: a source is compared with the checksums that it was downloaded by."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import Spec, build
from command_line import run, run_well
from filesystems import mounted
from oracle import assert_identical_trees

from reshard import Zigzag, plan_placement, write_resharding, zigzag

COMMIT = "0123456789abcdef" * 2 + "01234567"
LAYOUTS = ["ranks", "source"]


def checksum(name: str, data: bytes) -> str:
    """As the Hub names a file: large ones by SHA-256, small ones as Git does."""
    if name.endswith((".safetensors", "tokenizer.json")):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob " + str(len(data)).encode() + b"\0" + data).hexdigest()


def as_cache(source: Path, cache: Path) -> Path:
    """The checkpoint `source` as the Hugging Face cache keeps it; returns the snapshot."""
    snapshot, blobs = cache / "models--org--model" / "snapshots" / COMMIT, cache / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_dir():
            (snapshot / name).mkdir(parents=True, exist_ok=True)
            continue
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / checksum(path.name, path.read_bytes())
        shutil.copy(path, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def as_local_dir(source: Path, folder: Path) -> Path:
    """The same as `hf download --local-dir` leaves it."""
    shutil.copytree(source, folder)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            record = folder / ".cache" / "huggingface" / "download" / f"{path.relative_to(source)}.metadata"
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(f"{COMMIT}\n{checksum(path.name, path.read_bytes())}\n1700000000.5\n")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sound checkpoint with token tables, routers and sub-folders; its tensors lie in no particular order."""
    build(Spec("deepseek_v4", experts=8, layers=3, files=3), tmp_path / "source")
    return tmp_path / "source"


def flip(path: Path, at: int) -> None:
    """Change one byte of the file, where a link leads."""
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("kept_as", [as_cache, as_local_dir])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_source_passes_and_the_user_is_told_before(
    layout: str, kept_as: Callable[[Path, Path], Path], source: Path, tmp_path: Path
) -> None:
    found = kept_as(source, tmp_path / "kept")
    command = ["zigzag", "--src", found, "--ep", 2, "--layout", layout, "--check-source"]
    result = run(*command, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "files of the source with their checksums on the Hub" in result.stderr
    plan = json.loads(run_well(*command, "--out", tmp_path / "new", "--dry-run", "--json"))
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert (plan["checksums"]["read_first_size"] > weights) == (layout == "ranks")
    run_well("verify", tmp_path / "out", "--src", found)
    run_well("zigzag", "--src", found, "--ep", 2, "--layout", layout, "--out", tmp_path / "unchecked")
    assert_identical_trees(tmp_path / "unchecked", tmp_path / "out")
    assert "their checksums on the Hub" in run_well(*command, "--out", tmp_path / "new", "--dry-run")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at", [-1, 20_000, 9])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_changed_byte_of_the_weights_is_found(
    number: int, at: int, layout: str, source: Path, tmp_path: Path
) -> None:
    """Byte 9 is in the header's first name; the file stays valid, which is why nothing else notices."""
    snapshot = as_cache(source, tmp_path / "cache")
    path = sorted(snapshot.glob("*.safetensors"))[number]
    if at == 9:
        text = path.read_bytes()
        path.write_bytes(text.replace(b"\x22made_by\x22", b"\x22made_bx\x22"))
        assert path.read_bytes() != text
    else:
        flip(path, at)
    out = tmp_path / "out"
    command = ["zigzag", "--src", snapshot, "--ep", 2, "--out", out, "--layout", layout]
    result = run(*command, "--check-source")
    assert result.exit_code == 1, result.output
    line = result.stderr.splitlines()[-1]
    assert path.name in line
    assert "SHA-256" in line
    assert "download it again" in line
    assert not (out / "config.json").exists()
    assert out.exists() == (layout == "source")
    run_well(*command, *["--restart"] * out.exists())  # the control: without the option nothing notices


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "figures/a.png", "generation_config.json"])
def test_a_changed_small_file_is_found(name: str, layout: str, source: Path, tmp_path: Path) -> None:
    snapshot = as_cache(source, tmp_path / "cache")
    text = (snapshot / name).read_bytes()
    (snapshot / name).write_bytes(text + b"\n")
    result = run(
        "zigzag", "--src", snapshot, "--ep", 2, "--out", tmp_path / "out", "--layout", layout, "--check-source"
    )
    assert result.exit_code == 1
    assert name in result.stderr.splitlines()[-1]


def test_a_file_without_a_checksum_is_named(source: Path, tmp_path: Path) -> None:
    snapshot = as_cache(source, tmp_path / "cache")
    (snapshot / "mine.txt").write_text("mine\n")
    result = run("zigzag", "--src", snapshot, "--ep", 2, "--out", tmp_path / "out", "--check-source")
    assert result.exit_code == 0, result.output
    assert "which are not compared: 1: mine.txt" in result.stderr


def test_a_folder_without_checksums_is_refused(source: Path, tmp_path: Path) -> None:
    result = run("zigzag", "--src", source, "--ep", 2, "--out", tmp_path / "out", "--check-source")
    assert result.exit_code == 1
    assert "no checksums of its weights" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system that can share blocks."""
    with mounted("xfs", tmp_path, 400) as disk:
        yield disk.path


def test_blocks_that_are_shared_and_not_read_are_checked_too(xfs: Path) -> None:
    build(Spec("qwen3_moe", scale=16, aligned=True), xfs / "source")
    snapshot = as_cache(xfs / "source", xfs / "cache")
    done: list[int] = []
    outcome = zigzag(snapshot, xfs / "out", 2, layout="source", check_source=True, progress=done.append)
    assert outcome.shared > 0
    flip(sorted(snapshot.glob("*.safetensors"))[1], -1000)
    result = run("zigzag", "--src", snapshot, "--ep", 2, "--out", xfs / "again", "--layout", "source", "--check-source")
    assert result.exit_code == 1
    assert "SHA-256" in result.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
def test_progress_ends_at_the_work_that_was_announced(layout: str, source: Path, tmp_path: Path) -> None:
    snapshot = as_cache(source, tmp_path / "cache")
    plan = plan_placement(snapshot, tmp_path / "out", Zigzag(2), layout=layout, check_source=True)  # type: ignore[arg-type]
    done: list[int] = []
    write_resharding(plan, tmp_path / "out", progress=done.append)
    assert sum(done) == plan.work


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_an_earlier_run_copied_unchecked_is_checked_too(layout: str, source: Path, tmp_path: Path) -> None:
    snapshot = as_cache(source, tmp_path / "cache")
    flip(min(snapshot.glob("*.safetensors")), -1)
    command = ["zigzag", "--src", snapshot, "--ep", 2, "--out", tmp_path / "out", "--layout", layout]
    run_well(*command)
    result = run(*command, "--check-source")  # it is complete already
    assert result.exit_code == 1
    assert "SHA-256" in result.stderr
    run_well(*command)


def test_what_an_interrupted_run_copied_unchecked_is_checked_too(source: Path, tmp_path: Path) -> None:
    snapshot = as_cache(source, tmp_path / "cache")
    damaged = min(snapshot.glob("*.safetensors"))
    flip(damaged, -1)
    plan = plan_placement(snapshot, tmp_path / "out", Zigzag(2), layout="source")

    def stop(written: int) -> None:
        if len(list((tmp_path / "out").glob("*.safetensors"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_resharding(plan, tmp_path / "out", progress=stop, workers=1)
    assert (tmp_path / "out" / damaged.name).exists()
    command = ["zigzag", "--src", snapshot, "--ep", 2, "--out", tmp_path / "out", "--layout", "source"]
    result = run(*command, "--check-source")
    assert result.exit_code == 1
    assert "SHA-256" in result.stderr
    assert "resumed" in run_well(*command)
