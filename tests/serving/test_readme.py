"""The commands in README that start vLLM are commands of vLLM, and ask for what README says."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from harness import BIN
from readme import Command, readme

PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
for words in json.load(sys.stdin):
    parsed = parser.parse_args(words)
    keys = ("model_tag", "tensor_parallel_size", "enable_expert_parallel", "additional_config")
    print("parsed " + json.dumps({key: getattr(parsed, key) for key in keys}))
"""


def parsed(shown: list[Command]) -> list[dict[str, Any]]:
    """What vLLM 0.32's own parser makes of commands that start with `vllm serve`."""
    words = json.dumps([command.words[2:] for command in shown])
    done = subprocess.run([BIN / "python", "-c", PARSE], input=words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line.removeprefix("parsed ")) for line in done.stdout.splitlines() if line.startswith("parsed ")]


def test_every_vllm_command_is_one_of_vllms() -> None:
    shown = [command for command in readme() if command.program == "vllm"]
    assert {command.words[1] for command in shown} == {"serve"}
    found = parsed(shown)
    assert len(found) == len(shown) == 6
    assert all(one["enable_expert_parallel"] and one["tensor_parallel_size"] > 1 for one in found)
    placed = [command.variables.get("RESHARD_PLACEMENT") for command in shown]
    assert [name for name in placed if name] == ["zigzag", "balanced.json"]
    assert [one["additional_config"] for one in found if one["additional_config"]] == [
        {"reshard": {"placement": "zigzag"}}
    ]


def test_a_wrong_option_is_found() -> None:
    """The control."""
    done = subprocess.run(
        [BIN / "python", "-c", PARSE],
        input='[["./R1", "--expert-parallel"]]',
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "unrecognized arguments: --expert-parallel" in done.stderr
