"""The shape of the code: which package may import which, how long a module may be, and what `reshard` exports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import reshard

ROOT = Path(reshard.__file__).parent
MAX_LINES = 350

# What each package may import, beside itself, `errors`, `arguments` and `_version`. Data flows down this list.
MAY_IMPORT = {
    "placement": set(),
    "checkpoint": set(),
    "model": {"checkpoint", "placement"},
    "plan": {"checkpoint", "model", "placement"},
    "record": {"checkpoint", "model", "placement"},
    "execute": {"checkpoint", "plan", "record"},
    "traffic": {"checkpoint", "model", "placement"},
    "commands": {"checkpoint", "model", "placement", "plan", "record", "execute", "traffic"},
    "cli": {"checkpoint", "model", "placement", "plan", "record", "execute", "traffic", "commands"},
    "vllm": {"placement", "traffic.trace_file"},
}
PUBLIC = """
    Analysis Balanced Checkpoint CheckpointError Contract Copies Coselection Digests Effect Export FileSummary
    FromFile Hub Inspection IntegrityError Linear Manifest MoeLayer MoeModel NodeZigzag Outcome OutputError Placed
    Ray RecordingInfo ReshardError Resharding RouterComparison Routing Staging Strategy TraceError TraceInfo
    UnsupportedError Upload Uploaded Verification Zigzag __version__ analyze export inspect place plan_placement
    plan_stage plan_upload read_checkpoint read_manifest read_model restore send_upload stage trace_info upload
    verify write_export write_page write_resharding write_staging zigzag
"""


def imported(source: str, package: str) -> Iterator[str]:
    """The modules of reshard that a module of `package` imports anywhere in its `source`, as `package.module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["reshard", package][: 3 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("reshard.") for name in names if name.startswith("reshard."))


def strangers(source: str, package: str) -> list[str]:
    """What a module of `package` imports and may not."""
    allowed = {package, "errors", "arguments", "_version", "__version__", *MAY_IMPORT[package]}
    return [
        name
        for name in imported(source, package)
        if not any(name == other or name.startswith(f"{other}.") for other in allowed)
    ]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_lies_before_it(package: str) -> None:
    found = {path.name: strangers(path.read_text(), package) for path in (ROOT / package).glob("*.py")}
    assert [name for name, wrong in found.items() if wrong] == []


@pytest.mark.parametrize(
    "source",
    [
        "from ..commands.place import place",
        "from ..commands import place",
        "from .. import zigzag",
        "import reshard.commands.place",
        "from reshard.commands.place import place",
        "def late():\n    from ..execute.run import run",
    ],
)
def test_an_import_against_the_flow_is_found(source: str) -> None:
    assert len(strangers(source, "plan")) == 1
    assert strangers("from .files import Plan\nfrom ..errors import OutputError\nimport os", "plan") == []


def test_every_package_is_in_the_list() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(MAY_IMPORT)


def test_the_packages_form_no_cycle() -> None:
    order: list[str] = []
    while rest := MAY_IMPORT.keys() - set(order):
        free = [package for package in rest if {name.split(".")[0] for name in MAY_IMPORT[package]} <= set(order)]
        assert free, f"a cycle among {sorted(rest)}"
        order += free


def drawn(picture: str) -> tuple[set[str], set[tuple[str, str]]]:
    """The packages in the picture of the design, and its arrows, each from the package before to the one after."""
    return set(re.findall(r'<g id="(\w+)"', picture)), set(re.findall(r'data-from="(\w+)" data-to="(\w+)"', picture))


def faults_of(picture: str) -> list[str]:
    """What the picture shows and the rules do not have, and the other way round."""
    boxes, arrows = drawn(picture)
    allowed = {package: {name.split(".")[0] for name in names} for package, names in MAY_IMPORT.items()}
    faults = [f"box {name}" for name in boxes ^ allowed.keys()]
    faults += [f"arrow {before} to {after}" for before, after in arrows if before not in allowed.get(after, ())]
    for package, names in allowed.items():
        reached = {package}
        while more := {before for before, after in arrows if after in reached} - reached:
            reached |= more
        faults += [f"no way from {name} to {package}" for name in names - reached]
    return faults


def test_the_picture_of_the_design_shows_these_packages_and_this_flow() -> None:
    picture = (ROOT.parent / "docs" / "design.svg").read_text()
    assert faults_of(picture) == []
    assert faults_of(picture.replace('id="plan"', 'id="plans"')), "the controls"
    assert faults_of(picture.replace('"plan" data-to="execute"', '"execute" data-to="plan"'))


def test_no_module_is_longer_than_one_can_hold_in_mind() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_every_package_says_what_it_is_for() -> None:
    for package in MAY_IMPORT:
        docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()))
        assert docstring is not None
        assert len(docstring.split()) > 40, package


def test_the_public_names_are_these() -> None:
    assert sorted(PUBLIC.split()) == sorted(reshard.__all__)
    assert [name for name in PUBLIC.split() if not hasattr(reshard, name)] == []
