"""README is true: its commands run, its files exist, its picture is current, and it is short.

`tests/serving/test_readme.py` looks at the commands that start vLLM.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import Spec, build
from command_line import run_well
from hub_server import serving
from oracle import assert_identical_trees
from placement_picture import picture
from readme import ROOT, commands, readme
from traces import write_trace

TEXT = (ROOT / "README.md").read_text()
PROGRAMS = {"make", "pip", "reshard", "vllm"}


def run_all(text: str, folder: Path) -> list[str]:
    """Run a text's `reshard` commands in a folder, and return what they printed.

    The folder has DeepSeek-R1 and a trace, and the Hub has deepseek-ai/DeepSeek-R1. `/local` is another folder for each
    command, as it is another disk on each node.
    """
    build(Spec("deepseek_v3", experts=16, layers=3, aligned=True), folder / "DeepSeek-R1")
    tokens = [[token % 16, (token * 5 + 3) % 16] for token in range(8192)]
    tokens = [[first, second if second != first else (first + 1) % 16] for first, second in tokens]
    write_trace(folder / "trace", {f"model.layers.{layer}.mlp": tokens for layer in (1, 2)}, 16)
    printed = []
    with serving(folder / "cache") as hub:
        hub.add("deepseek-ai/DeepSeek-R1", folder / "DeepSeek-R1")
        for command in commands(text):
            if command.program != "reshard":
                continue
            local = f"/local/{len(printed)}"
            words = [word.replace("/local", f"{folder}{local}") for word in command.words[1:]]
            done = subprocess.run(
                [Path(sys.executable).with_name("reshard"), *words],
                cwd=folder,
                env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(folder / "cache")} | command.variables,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{command}: {done.stderr}"
            printed.append(done.stdout)
    return printed


def test_every_reshard_command_runs_in_the_order_of_the_text(tmp_path: Path) -> None:
    printed = run_all(TEXT, tmp_path)
    assert len(printed) == 8
    assert any("Recommendation: " in text for text in printed)
    assert_identical_trees(tmp_path / "DeepSeek-R1", tmp_path / "DeepSeek-R1-again")
    nodes = sorted(tmp_path.glob("local/*/R1-zz"))
    assert len(nodes) == 2
    for node in nodes:
        run_well("verify", node, "--src", tmp_path / "DeepSeek-R1")
    assert "every file and tensor is what was written" in run_well("verify", tmp_path / "R1-zz")


@pytest.mark.parametrize(
    ("shown", "wrong"), [("--ep 8 --trace", "--ep 8 --traces"), ("./R1-zz --src ./DeepSeek-R1", "./R1-zigzag --src .")]
)
def test_a_wrong_command_is_found(shown: str, wrong: str, tmp_path: Path) -> None:
    """The control."""
    assert TEXT.count(shown) >= 1
    with pytest.raises(AssertionError, match=r"No such option|no such file"):
        run_all(TEXT.replace(shown, wrong), tmp_path)


def test_the_other_commands_are_known() -> None:
    assert {command.program for command in readme()} == PROGRAMS
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {command.words[1] for command in readme() if command.program == "make"} == {"demo", "test"} <= targets
    assert [command.words for command in readme() if command.program == "pip"] == [("pip", "install", ".")]


def test_every_link_of_readme_and_docs_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert len(links) > 50
    for page, link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page.name}: {link}"


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def absent_tests(text: str) -> set[str]:
    """The tests and the files of tests that a text names in code, and that are not there."""
    named = re.findall(r"`(tests/[\w/.]+|test_\w+)`", text)
    assert named
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    there = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    return {name for name in named if not (ROOT / name).exists() and name not in there}


def test_every_test_that_the_docs_name_is_there() -> None:
    """The tables of docs/vllm.md say which test shows that a place is safe, refused or handled."""
    assert absent_tests((ROOT / "docs" / "vllm.md").read_text()) == set()
    assert absent_tests("`test_nothing_of_the_kind`") == {"test_nothing_of_the_kind"}, "the control"


def test_the_picture_is_what_its_script_draws() -> None:
    assert (ROOT / "docs" / "placement.svg").read_text() == picture()


def test_it_has_at_most_150_lines_of_120_columns() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert max(len(line) for line in lines if not line.startswith(("|", "    "))) <= 120
