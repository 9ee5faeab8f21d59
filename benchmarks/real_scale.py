"""`make scale`: DeepSeek-R1 at its real size, through the command line: time and peak memory against their limits.

All of R1 as sparse files (inspect, the dry run), and R1's layer 3 in bytes (zigzag, verify, restore). Takes 35 GB of
disk below the given directory and removes what it wrote. Fails where a limit is passed or a restored file differs.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import deepseek_r1
from measure import measure

RESHARD = Path(sys.executable).with_name("reshard")


def main() -> None:
    """Measure, print a table, and exit with 1 where something was not as it should be."""
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix="reshard-scale-", dir=parent) as name:
        work = Path(name)
        print(f"{'':44} {'seconds':>8} {'limit':>6} {'peak MB':>8} {'limit':>6}")
        sparse, layer, resharded, restored = (work / folder for folder in ("R1", "layer3", "layer3-zz", "restored"))
        deepseek_r1.build_sparse(sparse)
        rows = [
            row("R1, sparse: inspect", 10, 600, "inspect", sparse),
            row("R1, sparse: inspect --ep 8", 10, 600, "inspect", sparse, "--ep", "8"),
            row("R1, sparse: zigzag --dry-run", 10, 600, *zigzag(sparse, work / "R1-zz"), "--dry-run"),
        ]
        deepseek_r1.build_layer(layer)
        rows += [
            row("layer 3, 11.5 GB: zigzag --ep 8", None, 500, *zigzag(layer, resharded)),
            row("layer 3: verify", None, 500, "verify", resharded),
            row("layer 3: verify --src (routers in torch)", None, 1000, "verify", resharded, "--src", layer),
            row("layer 3: restore", None, 500, "restore", resharded, "--out", restored),
        ]
        identical = digests(layer) == digests(restored)
        print(f"restored files are {'identical' if identical else 'NOT IDENTICAL'} by sha256")
    if not (identical and all(rows)):
        sys.exit(1)


def zigzag(source: Path, out: Path) -> list[str | Path]:
    """The arguments of the run that is measured."""
    return ["zigzag", "--src", source, "--ep", "8", "--out", out]


def row(label: str, seconds: float | None, megabytes: float, *arguments: str | Path) -> bool:
    """Run reshard, print what it took, and tell whether it kept to its limits."""
    took = measure([RESHARD, *arguments])
    kept = took.status == 0 and took.peak <= megabytes * 1e6 and (seconds is None or took.seconds <= seconds)
    limits = f"{took.seconds:8.1f} {seconds or '':>6} {took.peak / 1e6:8.0f} {megabytes:6.0f}"
    print(f"{label:44} {limits}{'' if kept else '  FAILED'}", flush=True)
    return kept


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


if __name__ == "__main__":
    main()
