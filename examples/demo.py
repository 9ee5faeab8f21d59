"""`make demo`: reshard a small DeepSeek-V3-shaped checkpoint for 8 EP ranks, verify it, restore it, show what changed.

The demo runs the command line as a user would, and checks by sha256 itself that the source was restored.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import deepseek_v3

HERE = Path(__file__).parent
RESHARD = Path(sys.executable).with_name("reshard")


def main() -> None:
    """Run the demo in examples/out, after emptying that folder."""
    out = HERE / "out"
    shutil.rmtree(out, ignore_errors=True)
    source, resharded, restored = (out / name for name in ("DeepSeek-mini", "DeepSeek-mini-zz", "restored"))
    deepseek_v3.build(source)
    run("inspect", source, "--ep", 8)
    run("zigzag", "--src", source, "--ep", 8, "--out", resharded)
    run("inspect", resharded)
    run("verify", resharded, "--src", source)
    run("restore", resharded, "--out", restored)

    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, resharded))
    print("\nconfig.json changes, so that no engine loads the output and routes it wrongly:")
    for key in ("model_type", "architectures", "auto_map", "n_group", "topk_group"):
        print(f"  {key:14} {json.dumps(before[key])[:42]:44} -> {json.dumps(after.get(key))}")
    contract = json.dumps(after["expert_placement"])
    print(f"  expert_placement: {contract[:90]}…")

    print("\nsha256 of every file, source and restored:")
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for file in files:
        one, other = (hashlib.sha256((folder / file).read_bytes()).hexdigest() for folder in (source, restored))
        print(f"  {'equal' if one == other else 'DIFFERENT':9} {one[:16]}…  {file}")
        if one != other:
            sys.exit(f"{file}: restored differs from source; please report this as a bug")


def run(*arguments: object) -> None:
    """Print a reshard command and run it; stop if it fails."""
    words = [str(word.relative_to(HERE.parent)) if isinstance(word, Path) else str(word) for word in arguments]
    print(f"\n$ reshard {' '.join(words)}", flush=True)
    subprocess.run([RESHARD, *words], cwd=HERE.parent, check=True)


if __name__ == "__main__":
    main()
