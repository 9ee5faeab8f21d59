"""Compare streaming an output from the Hub with `hf download` of its source, from the same local server.

Builds one layer of DeepSeek-R1 (11.5 GB), serves it by the server that the tests have, and runs `reshard zigzag` and
`hf download` in turns, each after the page cache was emptied. Prints, for each: time, processor time, peak memory, the
most disk that it took, and what the server sent. Needs root (to empty the cache), 25 GB of disk, and about 10 minutes
for a round: `streamed.py DIRECTORY [ROUNDS]`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import deepseek_r1
from hub_server import Hub, serving
from measure import Measured, cool, measure, median, spread

REPO = "org/layer"
EP = "8"
BIN = Path(sys.executable).parent
INTERVAL = 0.5  # seconds between two looks at the disk


@dataclass(frozen=True)
class Run:
    """What a command took. `disk` is the most bytes that its directory had, `sent` the bytes of files it was sent."""

    took: Measured
    disk: int
    sent: int


def main() -> None:
    """Measure in turns, and print every run and what they come to."""
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir())
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory(prefix="reshard-streamed-", dir=parent) as name:
        work = Path(name)
        deepseek_r1.build_layer(work / "layer")
        size = sum(path.stat().st_size for path in (work / "layer").iterdir())
        with serving(work / "cache") as hub:
            hub.add(REPO, work / "layer")
            os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            streamed, downloaded = [], []
            for number in range(rounds):
                turn = [(streamed, zigzag), (downloaded, download)]
                for found, run in turn if number % 2 == 0 else reversed(turn):
                    found.append(run(hub, work / "out"))
    ratios = [ours.took.seconds / theirs.took.seconds for ours, theirs in zip(streamed, downloaded, strict=True)]
    print(f"source: {size / 1e9:.2f} GB, {rounds} rounds, {os.cpu_count()} processors")
    print(f"streamed over downloaded, wall time: {spread(ratios)}; at most 1.1: {median(ratios) <= 1.1}")
    for what, found in (("streamed", streamed), ("downloaded", downloaded)):
        print(
            f"{what}: {spread([run.took.seconds for run in found])} s, {spread([run.took.cpu for run in found])} s of "
            f"processor, peak memory {max(run.took.peak for run in found) / 1e9:.2f} GB, peak disk "
            f"{max(run.disk for run in found) / size:.4f} of the source, sent "
            f"{max(run.sent for run in found) / size:.4f} of it"
        )


def zigzag(hub: Hub, out: Path) -> Run:
    """Stream the layer into an output."""
    return _run(hub, out, [BIN / "reshard", "zigzag", "--src", REPO, "--ep", EP, "--out", out, "--quiet"])


def download(hub: Hub, out: Path) -> Run:
    """Download the layer, as one does before rewriting it."""
    return _run(hub, out, [BIN / "hf", "download", REPO, "--local-dir", out])


def _run(hub: Hub, out: Path, command: list[str | Path]) -> Run:
    """Run a command that writes `out`, then remove that; a failure ends the benchmark."""
    cool()
    hub.clear()
    with _watched(out) as most:
        took = measure(command)
    print(f"  {took.seconds:8.2f} s {took.cpu:8.2f} s cpu  {' '.join(map(str, command))}", flush=True)
    if took.status:
        raise SystemExit(f"failed: {command}")
    shutil.rmtree(out)
    return Run(took, most[0], hub.sent)


@contextmanager
def _watched(out: Path) -> Iterator[list[int]]:
    """A block during which the most disk that `out` takes, in bytes, is noted in a list of one number."""
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(INTERVAL):
            most[0] = max(most[0], _allocated(out))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()
        most[0] = max(most[0], _allocated(out))


def _allocated(out: Path) -> int:
    found = 0
    for path in out.rglob("*"):
        try:
            found += path.lstat().st_blocks * 512
        except FileNotFoundError:  # it was renamed meanwhile
            continue
    return found


if __name__ == "__main__":
    main()
