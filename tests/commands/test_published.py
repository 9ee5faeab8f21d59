"""Checkpoints as they are published: each is resharded right, or refused with the line that helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import published
import pytest
from command_line import run, run_well
from oracle import assert_identical_trees, assert_resharded


def named(case: Callable[[Path], None]) -> str:
    """The name of a case, for pytest."""
    return case.__name__


@pytest.mark.parametrize("case", published.RIGHT, ids=named)
def test_a_published_form_is_resharded_verified_and_restored(case: Callable[[Path], None], tmp_path: Path) -> None:
    source, output, restored = tmp_path / "source", tmp_path / "output", tmp_path / "restored"
    case(source)
    run_well("zigzag", "--src", source, "--ep", 4, "--out", output)
    assert_resharded(source, output, 4)
    compared = json.loads(run_well("verify", output, "--src", source, "--json"))["routers"]
    assert compared["routers"] == len(json.loads(run_well("inspect", source, "--json"))["moe_layers"])
    run_well("restore", output, "--out", restored)
    assert_identical_trees(source, restored)


@pytest.mark.parametrize("case", published.REFUSED, ids=named)
def test_a_published_form_that_cannot_be_resharded_is_refused_with_a_line_that_helps(
    case: Callable[[Path], None], tmp_path: Path
) -> None:
    case(tmp_path / "source")
    result = run("zigzag", "--src", tmp_path / "source", "--ep", 4, "--out", tmp_path / "output")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    for words in published.REFUSED[case]:
        assert words in line
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("case", "stays"),
    [
        (published.mixtral_llmc_names, True),
        (published.q35_fused_ct_regex, True),
        (published.mergekit_mixtral, True),
        (published.ling2_published, False),  # the control: it is group-limited, and so it is locked
    ],
)
def test_a_config_that_names_experts_in_patterns_and_prose_only_stays(
    case: Callable[[Path], None], stays: bool, tmp_path: Path
) -> None:
    case(tmp_path / "source")
    run_well("zigzag", "--src", tmp_path / "source", "--ep", 4, "--out", tmp_path / "output")
    old, new = (json.loads((tmp_path / name / "config.json").read_bytes()) for name in ("source", "output"))
    assert (old == new) == stays
