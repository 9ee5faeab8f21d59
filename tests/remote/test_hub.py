"""A repository of the Hugging Face Hub as the source: read by ranges, never downloaded, and through whatever happens.

The client is the real `huggingface_hub`; the server is `hub_server`. What a run from a directory writes is the oracle.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Spec, build
from command_line import run, run_well, slowly
from hub_outputs import MANIFEST, assert_same_output, committed, refused
from hub_server import Fault, Hub, Request, serving
from interruption import resumed_after_every_cut
from oracle import assert_identical_trees
from scratch import checkpoint

import reshard
from reshard import verify, zigzag

JOURNAL = ".reshard-journal"
REPO, COMMIT, LATER = "org/model", "1" * 40, "2" * 40
SPEC = Spec("deepseek_v3", experts=8, layers=3, shuffled=False)
WIDE = Spec("deepseek_v3", experts=8, layers=3, scale=16, aligned=True, shuffled=False)  # 18 MB


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the repository holds."""
    return committed(checkpoint(tmp_path_factory, SPEC), tmp_path_factory.mktemp("hub") / "source")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with tensors of a size at which what is asked for besides does not count."""
    return checkpoint(tmp_path_factory, WIDE)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the same checkpoint in a directory."""
    out = tmp_path_factory.mktemp("hub") / "whole"
    run_well("zigzag", "--src", source, "--ep", 3, "--reflink", "never", "--out", out)
    return out


@pytest.fixture
def hub(tmp_path: Path, source: Path) -> Iterator[Hub]:
    """A server that has the checkpoint as `org/model`, and an empty cache."""
    with serving(tmp_path / "cache") as server:
        server.add(REPO, source, COMMIT)
        yield server


def small_files(source: Path, whole: Path) -> Path:
    """The output of the same checkpoint in many small files, made when first needed."""
    out = whole.with_name("small")
    if not out.exists():
        run_well("zigzag", "--src", source, "--ep", 3, "--max-shard-size", "20KB", "--reflink", "never", "--out", out)
    return out


def streamed(out: Path, *more: object, src: str = REPO) -> str:
    """Write an output straight from the Hub; what was printed."""
    return run_well("zigzag", "--src", src, "--ep", 3, "--out", out, *more)


def everywhere(fault: Fault, every: int, of: str = "/") -> Any:
    """Lets every nth request fail whose path contains `of`, but never twice in a row."""
    asked = 0

    def fail(request: Request) -> Fault | None:
        nonlocal asked
        asked += of in request.path
        return fault if of in request.path and asked % every == 0 else None

    return fail


# ---------------------------------------------------------------------------------------------------------------------
# The same output, of what is needed only
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("src", [REPO, f"hf://{REPO}", f"hf://{REPO}@{COMMIT}", f"hf://{REPO}@main/"])
def test_an_output_from_the_hub_is_the_one_from_a_directory(src: str, hub: Hub, whole: Path, tmp_path: Path) -> None:
    streamed(tmp_path / "out", src=src)
    assert_same_output(whole, tmp_path / "out")
    assert not (tmp_path / "cache").exists()


def test_python_asks_for_a_revision_as_the_option_does(hub: Hub, source: Path, whole: Path, tmp_path: Path) -> None:
    hub.add(REPO, other_weights(tmp_path / "later"), LATER)
    at_first, out = reshard.Hub(revision=COMMIT), tmp_path / "out"
    zigzag(REPO, out, 3, hub=at_first)
    assert_same_output(whole, out)
    assert verify(out, REPO, hub=at_first).ok
    assert not verify(out, REPO).ok, "the control: main has other weights"


def test_the_manifest_names_repository_and_commit_and_no_path(hub: Hub, tmp_path: Path) -> None:
    streamed(tmp_path / "out")
    text = (tmp_path / "out" / MANIFEST).read_text()
    source = json.loads(text)["source"]
    assert (source["path"], source["repo_id"], source["revision"]) == (f"hf://{REPO}@{COMMIT}", REPO, COMMIT)
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", ["--layout", "source"]),
        ("gpt_oss", []),  # fused experts: their rows are reordered
        ("deepseek_v4", ["--max-shard-size", "20KB"]),  # tables of expert ids
    ],
)
def test_other_families_and_layouts_come_out_the_same(
    family: str, options: list[str], hub: Hub, tmp_path: Path
) -> None:
    build(Spec(family, experts=8), tmp_path / "built")
    other = committed(tmp_path / "built", tmp_path / "other")
    hub.add("org/other", other, "3" * 40)
    run_well("zigzag", "--src", other, "--ep", 3, "--reflink", "never", "--out", tmp_path / "expected", *options)
    streamed(tmp_path / "out", *options, src="org/other")
    assert_same_output(tmp_path / "expected", tmp_path / "out")
    run_well("verify", tmp_path / "out", "--src", "hf://org/other")


def test_no_more_than_a_hundredth_is_received_in_vain(hub: Hub, wide: Path, tmp_path: Path) -> None:
    hub.add("org/wide", wide, "3" * 40)
    needed = sum(path.stat().st_size for path in wide.iterdir())
    streamed(tmp_path / "out", src="org/wide")
    assert needed <= hub.sent <= 1.01 * needed
    assert not (tmp_path / "cache").exists()


def test_files_that_xet_stores_are_read_by_plain_ranges(hub: Hub, whole: Path, tmp_path: Path) -> None:
    hub.xet = True
    streamed(tmp_path / "out")
    assert_same_output(whole, tmp_path / "out")
    assert not [request for request in hub.requests if "xet" in request.path]


# ---------------------------------------------------------------------------------------------------------------------
# What may happen on the way
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "of", "waited"),
    [
        (Fault(429, {"Retry-After": "7"}), "/resolve/", 8.0),
        (Fault(503), "/cdn/", 1),
        (Fault(500), "/cdn/", 1),
        (Fault(cut=100), "/cdn/", 1),
        (Fault(cut=0), "/cdn/", 1),
    ],
)
def test_requests_that_fail_are_repeated(
    fault: Fault, of: str, waited: float, hub: Hub, whole: Path, tmp_path: Path
) -> None:
    hub.fault = everywhere(fault, 5, of)
    streamed(tmp_path / "out")
    assert_same_output(whole, tmp_path / "out")
    assert waited in hub.waited


def test_a_server_that_only_fails_is_given_up_and_the_same_command_resumes(
    hub: Hub, whole: Path, tmp_path: Path
) -> None:
    def fail(request: Request) -> Fault | None:
        late = request.range is not None and request.range[0] > 20_000
        return Fault(503) if late and request.path.endswith("model-00002-of-000003.safetensors") else None

    hub.fault = fail
    line = refused("zigzag", "--src", REPO, "--ep", 3, "--out", tmp_path / "out", "--workers", 1)
    assert f"hf://{REPO}@{COMMIT}/model-00002-of-000003.safetensors: cannot be read" in line
    assert "rerun the command" in line
    assert not (tmp_path / "out" / "config.json").exists()
    hub.fault = lambda request: None
    streamed(tmp_path / "out")
    assert_same_output(whole, tmp_path / "out")


def test_a_whole_file_in_the_place_of_a_range_is_an_error(hub: Hub, tmp_path: Path) -> None:
    hub.fault = lambda request: Fault(whole=True)
    line = refused("zigzag", "--src", REPO, "--ep", 3, "--out", tmp_path / "out")
    assert f"hf://{REPO}@{COMMIT}/model-" in line
    assert "ignores ranges" in line
    assert not (tmp_path / "out").exists()


def test_a_branch_that_moves_during_a_run_does_not_matter(hub: Hub, source: Path, whole: Path, tmp_path: Path) -> None:
    later = other_weights(tmp_path / "later")

    def move(request: Request) -> None:
        if "/cdn/" in request.path:
            hub.add(REPO, later, LATER)

    hub.fault = move
    streamed(tmp_path / "out")
    assert hub.branches[REPO]["main"] == LATER
    assert_same_output(whole, tmp_path / "out")


def test_a_run_is_not_resumed_from_another_commit(hub: Hub, source: Path, whole: Path, tmp_path: Path) -> None:
    hub.fault = lambda request: (
        Fault(404) if "/cdn/" in request.path and request.range and request.range[0] > 20000 else None
    )
    refused("zigzag", "--src", REPO, "--ep", 3, "--out", tmp_path / "out")
    assert (tmp_path / "out" / JOURNAL).exists()
    hub.fault = lambda request: None
    hub.add(REPO, source, LATER)  # the same bytes: nobody can know that
    assert "another source" in refused("zigzag", "--src", REPO, "--ep", 3, "--out", tmp_path / "out")
    streamed(tmp_path / "out", "--revision", COMMIT)
    assert_same_output(whole, tmp_path / "out")


def test_a_run_cut_anywhere_is_resumed_and_ends_the_same(hub: Hub, tmp_path: Path) -> None:
    whole = tmp_path / "streamed"
    zigzag(REPO, whole, 3, max_shard_size=4000)

    def write(out: Path, **options: Any) -> object:
        return zigzag(REPO, out, 3, max_shard_size=4000, **options)

    found = resumed_after_every_cut(
        whole, tmp_path / "out", 5, write, lambda out: zigzag(REPO, out, 3, max_shard_size=4000).resumed
    )
    assert found[-1] > found[0]


def killed_after(hub: Hub, point: int, process: subprocess.Popen[bytes], request: Request) -> None:
    """Kill the process that asks, once the server has sent `point` bytes."""
    if hub.sent >= point:
        process.kill()


def wait_for_silence(hub: Hub) -> None:
    """Wait until the server has stopped sending to a client that is gone."""
    before = -1
    while hub.sent != before:
        before = hub.sent
        time.sleep(0.3)


def data_of(path: Path) -> int:
    """The bytes of a safetensors file after its header, or of another file; headers are made here, and never sent."""
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
    return path.stat().st_size - header


def test_a_run_that_is_killed_anywhere_is_resumed_by_the_same_command(
    hub: Hub, whole: Path, source: Path, tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    """In a process of its own, which finds the server by HF_ENDPOINT, and the cache by HF_HUB_CACHE.

    The server kills it at the first request after it has sent a random part of what is needed.
    """
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    needed = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    hub.clear()
    run_well("zigzag", "--src", REPO, "--ep", 3, "--max-shard-size", "20KB", "--out", tmp_path / "not killed")
    whole_run = hub.sent
    chance, points, found = random.Random(0), rounds(4, 20), []
    for number in range(points):
        out = tmp_path / f"out{number}"
        command = slowly(0.05, "zigzag", "--src", REPO, "--ep", 3, "--max-shard-size", "20KB", "--out", out)
        command += ["--workers", "1"] if number % 2 else []  # then files are completed one by one
        hub.clear()
        point = chance.randrange(needed * 9 // 10)  # not so late that it may be done
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        hub.fault = partial(killed_after, hub, point, process)
        assert process.wait() == -signal.SIGKILL, f"done before byte {point} of {needed} was sent"
        hub.fault = lambda request: None
        assert not (out / "config.json").exists()
        wait_for_silence(hub)
        complete = (out / JOURNAL).read_text().splitlines()[1:] if (out / JOURNAL).exists() else []
        found.append(len(complete))
        hub.clear()
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert f"{len(complete)} files were already complete" in done.stdout or not complete
        kept = sum(data_of(out / json.loads(line)["record"]["name"]) for line in complete)
        assert hub.sent <= 1.01 * whole_run - kept, "what was complete is not asked for again"
        assert_same_output(small_files(source, whole), out)
    assert len(set(found)) > 1, "the control: it was killed at different points"


# ---------------------------------------------------------------------------------------------------------------------
# The cache, the token, and being offline
# ---------------------------------------------------------------------------------------------------------------------


def other_weights(directory: Path) -> Path:
    """The checkpoint with other weights."""
    build(replace(SPEC, seed=1), directory)
    return directory


def snapshot(cache: Path, source: Path, *, refs: bool = True) -> Path:
    """The checkpoint in a Hugging Face cache."""
    root = cache / "models--org--model"
    shutil.copytree(source, root / "snapshots" / COMMIT)
    if refs:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(COMMIT)
    return root / "snapshots" / COMMIT


@pytest.mark.parametrize("refs", [True, False])
def test_what_is_cached_is_not_asked_for(refs: bool, hub: Hub, source: Path, whole: Path, tmp_path: Path) -> None:
    snapshot(tmp_path / "cache", source, refs=refs)
    streamed(tmp_path / "out", "--reflink", "never")
    assert_same_output(whole, tmp_path / "out")
    assert hub.requests == []


def test_a_part_in_the_cache_is_not_taken_for_the_whole(hub: Hub, source: Path, whole: Path, tmp_path: Path) -> None:
    part = snapshot(tmp_path / "cache", source)
    for path in part.glob("*.safetensors"):
        path.unlink()
    streamed(tmp_path / "out")
    assert_same_output(whole, tmp_path / "out")
    assert hub.sent


def test_download_fills_the_cache_first(hub: Hub, source: Path, whole: Path, tmp_path: Path) -> None:
    streamed(tmp_path / "out", "--download", "--reflink", "never", "--check-source")
    assert_same_output(whole, tmp_path / "out")
    assert_identical_trees(source, tmp_path / "cache" / "models--org--model" / "snapshots" / COMMIT)
    hub.clear()
    run_well("verify", tmp_path / "out", "--src", REPO)
    assert hub.requests == []


def test_a_source_that_is_not_downloaded_has_no_checksums_to_check(hub: Hub, tmp_path: Path) -> None:
    line = refused("zigzag", "--src", REPO, "--ep", 3, "--out", tmp_path / "out", "--check-source")
    assert "add --download" in line


def test_offline_nothing_is_asked(hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("zigzag", "--src", REPO, "--ep", 3, "--out", tmp_path / "out")
    assert "HF_HUB_OFFLINE" in line
    assert f"hf download {REPO}" in line
    snapshot(tmp_path / "cache", source)
    streamed(tmp_path / "out")
    assert hub.requests == []


def test_a_token_opens_what_needs_one(hub: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    line = refused("zigzag", "--src", REPO, "--ep", 3, "--out", tmp_path / "out")
    assert "--token" in line
    streamed(tmp_path / "out", "--token", "hf_secret")
    assert_same_output(whole, tmp_path / "out")
    assert "hf_secret" not in (tmp_path / "out" / MANIFEST).read_text()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run_well("inspect", REPO)


@pytest.mark.parametrize(
    ("src", "options", "said"),
    [
        ("org/absent", [], "org/absent"),
        (REPO, ["--revision", "absent"], "absent"),
        (f"hf://{REPO}@main", ["--revision", "other"], "--revision"),
        ("hf://model", [], "hf://organization/name"),
        ("/tmp", ["--revision", "main"], "are for repositories"),
        ("ftp://host/model", [], "not supported"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(src: str, options: list[str], said: str, hub: Hub, tmp_path: Path) -> None:
    assert said in refused("zigzag", "--src", src, "--ep", 3, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, source: Path, whole: Path, tmp_path: Path) -> None:
    hub.add(REPO, other_weights(tmp_path / "later"), LATER)
    hub.add(REPO, source, COMMIT, "v1")
    for number, options in enumerate((["--revision", "v1"], ["--revision", COMMIT])):
        streamed(tmp_path / str(number), *options)
        assert_same_output(whole, tmp_path / str(number))
    streamed(tmp_path / "later-out")
    with pytest.raises(AssertionError):
        assert_same_output(whole, tmp_path / "later-out")


# ---------------------------------------------------------------------------------------------------------------------
# The other commands
# ---------------------------------------------------------------------------------------------------------------------


def test_verify_compares_with_the_hub_and_finds_a_difference(hub: Hub, whole: Path, tmp_path: Path) -> None:
    assert "bit for bit" in run_well("verify", whole, "--src", REPO)
    hub.add(REPO, other_weights(tmp_path / "later"), LATER)
    assert run("verify", whole, "--src", REPO).exit_code == 1
    run_well("verify", whole, "--src", REPO, "--revision", COMMIT)


def test_inspect_analyze_and_export_say_the_same_as_of_a_directory(hub: Hub, source: Path) -> None:
    for command in (
        ["inspect", "{}", "--ep", 2, "--json"],
        ["analyze", "{}", "--ep", 2, "--tokens", 64, "--json"],
        ["export", "{}", "--ep", 2, "--to", "vllm"],
    ):
        ours, theirs = (
            run_well(*[str(argument).format(src) for argument in command]).replace(str(src), "SRC")
            for src in (f"hf://{REPO}@{COMMIT}", source)
        )
        assert "SRC" in ours or command[0] == "export"
        if command[0] == "analyze":
            assert json.loads(ours)["candidates"] == json.loads(theirs)["candidates"]
            assert f"vllm serve {REPO} --revision {COMMIT}" in ours
        elif command[0] == "inspect":
            assert ours == theirs


def test_an_output_on_the_hub_is_inspected_exported_and_restored(
    hub: Hub, source: Path, whole: Path, tmp_path: Path
) -> None:
    hub.add("org/output", whole, "3" * 40)
    assert "zigzag" in run_well("inspect", "hf://org/output")
    assert '"ep_size": 3' in run_well("export", "org/output", "--to", "vllm")
    run_well("restore", "org/output", "--out", tmp_path / "back")
    assert_identical_trees(source, tmp_path / "back")
    assert "already complete" in run_well("restore", "org/output", "--out", tmp_path / "back")
    assert "already resharded" in refused("zigzag", "--src", "org/output", "--ep", 3, "--out", tmp_path / "again")
