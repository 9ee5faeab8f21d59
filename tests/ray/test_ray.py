"""Outputs that tasks on a Ray cluster write: on a file system that all nodes share, and on each node's own disk.

The cluster is a real one of four nodes on this machine, one of which is killed in the middle. What one process writes
is the oracle.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import Spec
from command_line import run, run_well
from hub_outputs import MANIFEST, assert_same_output, committed
from hub_server import Fault, Hub, Request, serving
from oracle import assert_identical_trees
from ray_cluster import Nodes, ray_nodes
from scratch import checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
JOURNAL = ".reshard-journal"
REPO, COMMIT = "org/model", "1" * 40
EP = ["--ep", "4", "--max-shard-size", "20KB", "--reflink", "never"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, which all nodes see."""
    built = checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=8, layers=3, shuffled=False))
    return committed(built, tmp_path_factory.mktemp("ray") / "source")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    out = tmp_path_factory.mktemp("ray") / "whole"
    run_well("zigzag", "--src", source, *EP, "--out", out)
    return out


@pytest.fixture(scope="module")
def hub(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A server that has the checkpoint; every process that is started from here asks it in the place of the Hub."""
    cache = tmp_path_factory.mktemp("ray") / "cache"
    with serving(cache) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_HUB_CACHE", str(cache))
        server.add(REPO, source, COMMIT)
        yield server


@pytest.fixture(scope="module")
def nodes(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Four nodes; a test that kills one starts another."""
    with ray_nodes(tmp_path_factory.mktemp("nodes"), 4) as found:
        yield found


@pytest.fixture(autouse=True)
def at_once(hub: Hub) -> None:
    """The server answers, and nothing is noted yet."""
    hub.fault = lambda request: None
    hub.clear()


def command(*arguments: object) -> list[str]:
    """`reshard zigzag` in a process of its own."""
    return [sys.executable, "-m", "reshard", "zigzag", *EP, *map(str, arguments)]


def done_well(*arguments: object, cwd: Path | None = None) -> str:
    """What it printed."""
    found = subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return found.stdout


def refused(*arguments: object) -> str:
    """The line with which it refuses; nothing else is printed, so no stack of calls either."""
    found = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)
    assert found.returncode == 1, found.stdout
    lines = found.stderr.splitlines()
    assert len(lines) == 1, found.stderr
    return lines[0]


def complete(out: Path) -> int:
    """How many files an unfinished run has."""
    try:
        return max(0, len((out / JOURNAL).read_text().splitlines()) - 1)
    except FileNotFoundError:
        return 0


def on_nodes(nodes: Nodes, out: Path) -> tuple[object, ...]:
    """The options of a run of one worker on each node."""
    return "--src", REPO, "--out", out, "--ray", nodes.address, "--workers", 1


def interruptible(nodes: Nodes, out: Path, files: int) -> subprocess.Popen[str]:
    """A run that has completed so many files, and goes on."""
    words = command(*on_nodes(nodes, out))
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: complete(out) >= files, process)
    return process


def until(condition: object, process: subprocess.Popen[str] | None = None) -> None:
    """Wait for a condition, which a process that ends cannot fulfil any more."""
    deadline = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def slowly(request: Request) -> None:
    """Let a range take so long that all nodes are at work when one is killed."""
    if request.range is not None:
        time.sleep(0.3)


# ---------------------------------------------------------------------------------------------------------------------
# A file system that all nodes share
# ---------------------------------------------------------------------------------------------------------------------


def test_tasks_write_what_one_process_writes(nodes: Nodes, source: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "src", copy_function=shutil.copy2)
    done_well("--src", "src", "--out", "out", "--ray", nodes.address, cwd=tmp_path)
    assert_same_output(whole, tmp_path / "out")
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["source"]["path"] == str(tmp_path / "src")
    assert "already complete" in done_well("--src", "src", "--out", "out", "--ray", nodes.address, cwd=tmp_path)
    assert "already complete" in run_well("zigzag", "--src", tmp_path / "src", *EP, "--out", tmp_path / "out")


def test_a_node_that_is_killed_in_the_middle_is_not_missed(nodes: Nodes, hub: Hub, whole: Path, tmp_path: Path) -> None:
    hub.fault = slowly
    out = tmp_path / "out"
    process = interruptible(nodes, out, files=2)
    nodes.kill(nodes.alive[-1])
    _, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    assert_same_output(whole, out)
    run_well("verify", out, "--src", REPO)
    asked = Counter((request.path, request.range) for request in hub.requests if "/cdn/" in request.path)
    assert max(asked.values()) > min(asked.values()), "the control: what the node had begun was done again"
    nodes.add()


def test_a_killed_driver_is_resumed_by_the_same_command(nodes: Nodes, hub: Hub, whole: Path, tmp_path: Path) -> None:
    hub.fault = slowly
    out = tmp_path / "out"
    process = interruptible(nodes, out, files=3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = complete(out)
    assert not (out / "config.json").exists()
    hub.fault = lambda request: None
    assert f"{before} files were already complete" in done_well(*on_nodes(nodes, out))
    assert_same_output(whole, out)


def test_a_run_on_ray_is_resumed_without_it(nodes: Nodes, hub: Hub, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def gone_once_two_files_are_complete(request: Request) -> Fault | None:
        if request.range and "/cdn/" in request.path and complete(out) >= 2:
            return Fault(404)
        return slowly(request)

    hub.fault = gone_once_two_files_are_complete
    line = refused("--src", REPO, "--out", out, "--ray", nodes.address, "--workers", 1)
    assert f"hf://{REPO}@{COMMIT}/model-0000" in line
    hub.fault = lambda request: None
    assert complete(out) >= 2
    run_well("zigzag", "--src", REPO, *EP, "--out", out)
    assert_same_output(whole, out)


def test_an_out_that_is_not_shared_is_noticed(nodes: Nodes, source: Path) -> None:
    line = refused("--src", source, "--out", nodes.local / "unshared", "--ray", nodes.address)
    assert "was written on another node; share OUT, or give --ranks-per-node" in line
    shutil.rmtree(nodes.local / "unshared")


# ---------------------------------------------------------------------------------------------------------------------
# A disk of its own for each node
# ---------------------------------------------------------------------------------------------------------------------


def test_each_node_gets_its_ranks_and_can_be_lost(nodes: Nodes, hub: Hub, tmp_path: Path) -> None:
    """The same as `--ranks` writes on each node. The last node is lost; the one that replaces it begins anew."""
    *kept, lost = nodes.alive
    hub.fault = slowly
    ours = ("--src", REPO, "--out", nodes.local / "out", "--ray", nodes.address, "--ranks-per-node", 1, "--workers", 1)
    process = subprocess.Popen(command(*ours), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: complete(nodes.disk(lost) / "out") >= 1, process)
    nodes.kill(lost)
    said, complaints = process.communicate(timeout=120)
    assert process.returncode == 1, said
    (line,) = complaints.splitlines()
    assert "EP ranks 3-3: Ray gave its task up" in line
    assert "rerun the command to resume" in line
    manifests = [nodes.disk(number) / "out" / MANIFEST for number in kept]
    before = [path.stat().st_mtime_ns for path in manifests]  # the others have finished
    assert "does not fit 4 EP ranks on 3 nodes" in refused(*ours)
    replacement = nodes.add()
    hub.fault = lambda request: None
    done_well(*ours)
    assert before == [path.stat().st_mtime_ns for path in manifests]
    for rank, number in enumerate([*kept, replacement]):
        run_well("zigzag", "--src", REPO, *EP, "--ranks", rank, "--out", tmp_path / f"rank{rank}")
        assert_identical_trees(tmp_path / f"rank{rank}", nodes.disk(number) / "out")
        run_well("verify", nodes.disk(number) / "out")
    assert not list(nodes.local.iterdir()), "nothing was written here"
    assert "already complete" in done_well(*ours)


# ---------------------------------------------------------------------------------------------------------------------
# Options, and where there is no Ray
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks-per-node", 2], "is for --ray"),
        (["--ray", "--merge", "--ranks", 0], "--merge does not go with --ray"),
        (["--ray", "--ranks-per-node", 3], "must divide the 4 EP ranks"),
        (["--ray", "--ranks-per-node", 2, "--ranks", 0], "goes without --ranks"),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(
    options: list[object], said: str, source: Path, tmp_path: Path
) -> None:
    result = run("zigzag", "--src", source, *EP, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_too_few_nodes_are_said_in_a_line(nodes: Nodes, source: Path, tmp_path: Path) -> None:
    words = [*command("--src", source, "--out", tmp_path / "out", "--ray", nodes.address, "--ranks-per-node", 1)]
    found = subprocess.run([*words, "--ep", "8"], capture_output=True, text=True, timeout=120)
    assert "does not fit 8 EP ranks on 4 nodes of Ray" in found.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "no address"])
def test_a_cluster_that_is_not_there_is_said_in_a_line(address: str, source: Path, tmp_path: Path) -> None:
    line = refused("--src", source, "--out", tmp_path / "out", "--ray", address)
    assert f"--ray {address}: no cluster there" in line
    assert "ray start --head" in line
    assert not (tmp_path / "out").exists()


def test_ray_is_imported_only_if_it_is_asked_for(source: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "if sys.argv[1] == 'absent': sys.modules['ray'] = None\n"
        "import reshard\n"
        "from reshard.cli.main import main\n"
        "try: main(sys.argv[2:])\n"
        "finally: assert 'ray' not in sys.modules or sys.modules['ray'] is None\n"
    )
    words = ["zigzag", "--src", str(source), *EP, "--out"]
    for asked, options in (("there", []), ("absent", [])):
        out = str(tmp_path / asked)
        subprocess.run([sys.executable, "-c", script, asked, *words, out, *options], check=True, capture_output=True)
    out = str(tmp_path / "none")
    found = subprocess.run(
        [sys.executable, "-c", script, "absent", *words, out, "--ray"], capture_output=True, text=True
    )
    assert found.returncode == 1
    assert "pip install 'reshard[ray]'" in found.stderr
    assert not Path(out).exists()
