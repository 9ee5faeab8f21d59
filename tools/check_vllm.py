"""Tells whether the plugin's hooks fit a vLLM that is not installed: downloads its wheel and reads the sources in it.

    python tools/check_vllm.py [VERSION | DIRECTORY]

Without an argument, the wheel is the newest that pip finds. DIRECTORY holds `vllm`, as a site-packages does. The exit
status is 1 if a function moved, was renamed or lost a parameter; each is named, with what needs it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from reshard.vllm.hook_check import source_faults
from reshard.vllm.hooks import VLLM_HOOKS


def main(arguments: list[str]) -> int:
    """Check one vLLM; the exit status."""
    asked = arguments[0] if arguments else ""
    if asked and Path(asked, "vllm").is_dir():
        return report(asked, Path(asked))
    with tempfile.TemporaryDirectory() as directory:
        wheel = download(asked, Path(directory))
        extract(wheel, Path(directory))
        return report(wheel.name, Path(directory))


def download(version: str, directory: Path) -> Path:
    """Download the wheel of a version of vLLM, or of the newest."""
    wanted = f"vllm=={version}" if version else "vllm"
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(directory)]
    ran = subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted])
    if ran.returncode != 0:
        sys.exit(f"pip cannot download {wanted}")
    return next(directory.glob("*.whl"))


def extract(wheel: Path, directory: Path) -> None:
    """Extract the Python sources of a wheel into `directory`, and delete the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory, [name for name in archive.namelist() if name.endswith(".py")])
    wheel.unlink()


def report(name: str, root: Path) -> int:
    """Print what does not fit; the exit status."""
    faults = {hook: source_faults(root, (hook,)) for hook in VLLM_HOOKS}
    for hook, found in faults.items():
        for fault in found:
            print(f"{name}: {fault} (needed for {', '.join(hook.needed_by)})")
    if not any(faults.values()):
        print(f"{name}: the {len(faults)} functions of vLLM that reshard relies on are there")
    return 1 if any(faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
