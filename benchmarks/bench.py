"""`make bench`: compare reshard's time and memory with `cp` and with other ways to convert checkpoints.

Builds its data, empties the page cache before each cold run, and writes benchmarks/results.md and
benchmarks/growth.svg. Only commands that ran in pairs are compared: each ratio is the median over pairs. Needs root (to
empty the cache and to mount XFS and Btrfs from a file), some 45 GB of disk and half an hour.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import deepseek_r1
from measure import Measured, cool, measure, median, spread

HERE = Path(__file__).parent
RESHARD = Path(sys.executable).with_name("reshard")
EP = "8"
PAIRS = 5
GB = 1e9
GROWTH_RUNS = 3


@dataclass(frozen=True)
class Row:
    """A line of the results: what was found, and its limit: a maximum, or with `is_minimum` a minimum."""

    what: str
    found: str
    value: float
    limit: float | None = None
    is_minimum: bool = False

    @property
    def verdict(self) -> str:
        """Whether the value is within the limit."""
        if self.limit is None:
            return ""
        kept = self.value >= self.limit if self.is_minimum else self.value <= self.limit
        return f"{'at least' if self.is_minimum else 'at most'} {self.limit:g}: {'yes' if kept else '**no**'}"


def main() -> None:
    """Measure everything and write the results."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # let Python cache byte code, as it does for installed packages
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix="reshard-bench-", dir=parent) as name:
        work = Path(name)
        rows = [*help_text(), *growth(work), *whole_model(work)]
        deepseek_r1.build_layer(work / "layer3")
        rows += [*beside_cp(work), *beside_others(work)]
        for kind in ("xfs", "btrfs"):
            rows += shared_blocks(work, kind)
    report = results(rows)
    (HERE / "results.md").write_text(report)
    print(report)


def run(*command: str | Path, cold: bool = True) -> Measured:
    """Run a command; a failure ends the benchmark."""
    if cold:
        cool()
        # measure the work, not how long the program takes to load: put the programs back into the cache
        for program in (RESHARD, "cp"):
            subprocess.run([program, "--version"], stdout=subprocess.DEVNULL, check=True)
    took = measure(command)
    print(
        f"  {took.seconds:8.2f} s {took.cpu:8.2f} s cpu {took.peak / 1e6:8.0f} MB  {' '.join(map(str, command))}",
        flush=True,
    )
    if took.status:
        raise SystemExit(f"failed: {command}")
    return took


def zigzag(source: Path, out: Path, *options: str) -> list[str | Path]:
    """The `reshard zigzag` command to measure."""
    return [RESHARD, "zigzag", "--src", source, "--ep", EP, "--out", out, "--quiet", *options]


def pairs(
    first: Callable[[], Measured], second: Callable[[], Measured], number: int
) -> list[tuple[Measured, Measured]]:
    """Measure both, `number` times, alternating which goes first."""
    found = []
    for turn in range(number):
        if turn % 2:
            other, one = second(), first()
        else:
            one, other = first(), second()
        found.append((one, other))
    return found


def into(out: Path, *command: str | Path) -> Measured:
    """Run a command that writes `out`, then remove `out`."""
    took = run(*command)
    shutil.rmtree(out)
    return took


def beside_cp(work: Path) -> Iterator[Row]:
    """Compare zigzag, with all digests, with cp."""
    source, out, copy = work / "layer3", work / "zz", work / "copy"
    found = pairs(lambda: into(out, *zigzag(source, out)), lambda: into(copy, "cp", "-r", source, copy), PAIRS)
    walls = [one.seconds / other.seconds for one, other in found]
    cpus = [one.cpu / other.cpu for one, other in found]
    yield Row(
        "R1 layer 3, 11.5 GB, cold: `zigzag` with digests over `cp -r`, wall time", spread(walls), median(walls), 1.05
    )
    yield Row("the same, processor time", spread(cpus), median(cpus), 2.0)
    rates = [11.5 / one.seconds for one, _ in found]
    yield Row("the same: `zigzag` in GB/s", spread(rates), median(rates))
    peak = max(one.peak for one, _ in found) / 1e6
    yield Row("the same: `zigzag`, peak memory in MB", f"{peak:.0f}", peak, 300)
    run(*zigzag(source, out))
    verified = [run(RESHARD, "verify", out, "--quiet") for _ in range(3)]
    yield Row("the same, cold: `verify` in GB/s", spread([11.5 / one.seconds for one in verified]), 0)
    part = max(out.glob("*ep00*"))
    read = [run("dd", f"if={part}", "of=/dev/null", "bs=4M", "status=none") for _ in range(3)]
    yield Row(
        "`dd` of one of its files to nowhere, in GB/s",
        spread([part.stat().st_size / GB / one.seconds for one in read]),
        0,
    )
    compared = run(RESHARD, "verify", out, "--src", source, "--quiet")
    yield Row(
        "`verify --src`, seconds; peak memory in MB (routers in PyTorch)", _both(compared), compared.peak / 1e6, 1000
    )
    restored = run(RESHARD, "restore", out, "--out", work / "restored", "--quiet")
    if digests(source) != digests(work / "restored"):
        raise SystemExit("restore did not give the source back")
    yield Row(
        "`restore`, every file identical by sha256, seconds; peak memory in MB",
        _both(restored),
        restored.peak / 1e6,
        300,
    )
    shutil.rmtree(out)
    shutil.rmtree(work / "restored")


def _both(took: Measured) -> str:
    return f"{took.seconds:.1f}; {took.peak / 1e6:.0f}"


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        found[path.name] = digest.hexdigest()
    return found


def beside_others(work: Path) -> Iterator[Row]:
    """Compare the ways in which people convert checkpoints today with zigzag."""
    source, out, other_out = work / "layer3", work / "zz", work / "other"
    for script, what, limited in (
        ("load_and_save.py", "load all and save (`load_file`, `save_file`)", True),
        ("stream_tensors.py", "a tensor-by-tensor streaming writer", False),
    ):
        command = [sys.executable, HERE / script, source, EP, other_out]
        found = pairs(lambda command=command: into(other_out, *command), lambda: into(out, *zigzag(source, out)), 3)
        walls = [one.seconds / other.seconds for one, other in found]
        peaks = [one.peak / other.peak for one, other in found]
        yield Row(f"{what} over `zigzag`, wall time", spread(walls), median(walls), 2 if limited else None, True)
        yield Row("the same, peak memory", spread(peaks), median(peaks), 20 if limited else None, True)


def shared_blocks(work: Path, kind: str) -> Iterator[Row]:
    """Compare `--layout source` with shared blocks with a real copy on the same file system."""
    with disk(work, kind, 36) as mounted:
        source, out, copy = mounted / "layer3", mounted / "zz", mounted / "copy"
        shutil.copytree(work / "layer3", source)
        command = [*zigzag(source, out, "--layout", "source", "--reflink", "always")]
        found = pairs(lambda: into(out, *command), lambda: into(copy, "cp", "-r", "--reflink=never", source, copy), 3)
        walls = [one.seconds / other.seconds for one, other in found]
        yield Row(
            f"{kind}: `--layout source`, blocks shared, over `cp -r --reflink=never`, wall time",
            spread(walls),
            median(walls),
            0.02,
        )
        before = used(mounted)
        run(*command)
        grown = (used(mounted) - before) / 11.5e9 * 100
        yield Row("the same: more disk, % of the checkpoint", f"{grown:.3g}", grown, 1)
        shutil.rmtree(out)
        for digests in ("copied", "all"):
            before = used(mounted)
            took = run(*zigzag(source, out, "--reflink", "always", "--digests", digests))
            grown = (used(mounted) - before) / 11.5e9 * 100
            what = f"{kind}: files by rank, blocks shared, `--digests {digests}`: seconds; more disk, %"
            yield Row(what, f"{took.seconds:.2f}; {grown:.2g}", took.seconds)
            shutil.rmtree(out)


def whole_model(work: Path) -> Iterator[Row]:
    """Run over all of R1 as sparse files, on a disk with 10 GB free."""
    with disk(work, "ext4", 11) as mounted:
        source, out = mounted / "R1", mounted / "R1-zz"
        deepseek_r1.build_sparse(source)
        free = shutil.disk_usage(mounted).free / GB
        planned = [run(*zigzag(source, out, "--dry-run", "--allow-holes"), cold=False) for _ in range(PAIRS)]
        seconds = [took.seconds for took in planned]
        inspected = run(RESHARD, "inspect", source, "--ep", EP, cold=False)
        whole = run(*zigzag(source, out, "--allow-holes"))
        quick = run(RESHARD, "verify", out, "--quick", "--quiet")
        verified = run(RESHARD, "verify", out, "--quiet")
        peak = max(took.peak for took in (*planned, inspected, whole, quick, verified)) / 1e6
        yield Row(
            "full sparse R1 (641 GiB, 163 files, 91,991 tensors): `--dry-run`, seconds",
            spread(seconds),
            median(seconds),
            3,
        )
        yield Row("the same: `inspect --ep 8`, seconds", f"{inspected.seconds:.1f}", inspected.seconds)
        yield Row(
            f"the same, on a disk with {free:.1f} GB free: the whole run, seconds",
            f"{whole.seconds:.0f}",
            whole.seconds,
        )
        yield Row("the same: `verify`, seconds", f"{verified.seconds:.0f}", verified.seconds)
        yield Row("the same: `verify --quick`, seconds", f"{quick.seconds:.1f}", quick.seconds)
        yield Row("the same: peak memory of all these, MB", f"{peak:.0f}", peak, 300)
        shutil.rmtree(out)
        deepseek_r1.fill_routers(source)
        analyzed = run(RESHARD, "analyze", source, "--ep", EP, "--nodes", "2", "--html", mounted / "page.html")
        yield Row(
            "the same, its gates filled: `analyze --nodes 2 --html`, seconds",
            f"{analyzed.seconds:.0f}",
            analyzed.seconds,
            120,
        )
        yield Row("the same: peak memory, MB", f"{analyzed.peak / 1e6:.0f}", analyzed.peak / 1e6, 2000)


def help_text() -> Iterator[Row]:
    """How fast the command line starts."""
    seconds = [run(RESHARD, "--help", cold=False).seconds for _ in range(11)]
    yield Row("`reshard --help`, seconds", spread(seconds), median(seconds), 0.2)


def growth(work: Path) -> Iterator[Row]:
    """How time grows as only tensors, only bytes or only files grow; draws growth.svg."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    series = {
        "tensors": ([(8, 448, 1024, 8), (16, 448, 512, 8), (32, 448, 256, 8), (64, 448, 128, 8)], "ranks"),
        "bytes": ([(4, 1792, 128, 4), (4, 1792, 256, 4), (4, 1792, 512, 4), (4, 1792, 1024, 4)], "ranks"),
        "files": ([(16, 448, 128, count) for count in (128, 256, 512, 1024)], "source"),
    }
    figure, axes = pyplot.subplots(1, len(series), figsize=(12, 3.6))
    for axis, (what, (points, layout)) in zip(axes, series.items(), strict=True):
        sizes, times = [], []
        for layers, hidden, width, files in points:
            source, out = work / "growing", work / "grown"
            deepseek_r1.build_like(source, layers, hidden, width, files)
            shards = list(source.glob("*.safetensors"))
            sizes.append(
                {
                    "tensors": len(json.loads((source / "model.safetensors.index.json").read_bytes())["weight_map"]),
                    "bytes": sum(path.stat().st_size for path in shards),
                    "files": len(shards),
                }[what]
            )
            taken = [into(out, *zigzag(source, out, "--layout", layout)).seconds for _ in range(GROWTH_RUNS)]
            times.append(median(taken))
            shutil.rmtree(source)
        axis.plot(sizes, times, "o-")
        axis.set(xlabel=what, xlim=(0, None), ylim=(0, None))
        per_doubling = [later / earlier for earlier, later in pairwise(times)]
        text = ", ".join(f"{time:.2f}" for time in times)
        yield Row(
            f"growth: {what} {sizes[0]:,} to {sizes[-1]:,}, doubled thrice: seconds; most for one doubling",
            f"{text}; {max(per_doubling):.2f}",
            max(per_doubling),
            2.5,
        )
    axes[0].set_ylabel("seconds, cold")
    figure.suptitle("reshard zigzag: time as tensors, bytes and files grow, each alone")
    figure.tight_layout()
    figure.savefig(HERE / "growth.svg", metadata={"Date": None})


@contextmanager
def disk(work: Path, kind: str, gigabytes: int) -> Iterator[Path]:
    """Mount a new file system of this kind, kept in a sparse file; unmount and remove it at the end."""
    image, mounted = work / f"{kind}.img", work / kind
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(gigabytes * 10**9)
    subprocess.run(
        [f"mkfs.{kind}", *(["-m", "0"] if kind == "ext4" else []), "-q", image], check=True, stderr=subprocess.DEVNULL
    )
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)
        image.unlink()


def used(mounted: Path) -> int:
    """Bytes used on the file system, once all writes are on disk and all removed files are freed."""
    before = -1
    while True:
        subprocess.run(["sync", "-f", mounted], check=True)
        found = os.statvfs(mounted)
        now = (found.f_blocks - found.f_bfree) * found.f_frsize
        if now == before:
            return now
        before = now
        time.sleep(2)  # file systems free removed files some time later


def results(rows: Sequence[Row]) -> str:
    """The text of results.md."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kind = subprocess.run(["stat", "-f", "-c", "%T", tempfile.gettempdir()], capture_output=True, text=True, check=True)
    copier = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    machine = (
        f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release().split('-')[0]}, a virtual disk "
        f"({kind.stdout.strip()}), {copier}, Python {platform.python_version()}. The XFS and Btrfs file systems are "
        "files there."
    )
    about = (
        "`make bench` writes this file; do not edit it. A ratio is the median over pairs of runs, one run after the "
        "other, with the minimum and maximum in parentheses. The page cache is emptied before each run, except for "
        "`--help`, `--dry-run` and `inspect`. `cp` returns before its data is on disk; `zigzag` does not."
    )
    lines = [
        "# Benchmarks",
        "",
        *textwrap.wrap(about, 118),
        "",
        *textwrap.wrap(f"Machine: {machine}", 118),
        "",
        "| what | found | to reach |",
        "| --- | --- | --- |",
        *(f"| {row.what} | {row.found} | {row.verdict} |" for row in rows),
        "",
        "![growth](growth.svg)",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
