"""Files of two outputs in one directory: their names, sizes and tensors are the same, and one digest in their headers
tells them apart. Before, only a full `verify` found them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import Spec, build
from command_line import run, run_well
from earlier_contracts import MARKS, header_of, with_shaped_gates
from forgery import forge, record

ORDERS = {"one": [0, 2, 4, 6, 1, 3, 5, 7], "other": [7, 6, 5, 4, 3, 2, 1, 0]}


@pytest.fixture(params=["deepseek_v3", "qwen3_moe"])
def outputs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with a `source` and two outputs of it, `one` and `other`."""
    build(Spec(request.param, experts=8, layers=2, quantization="none", shuffled=False), tmp_path / "source")
    for name, order in ORDERS.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"physical_to_logical": order}))
        options = ["--strategy", "file", "--map", path, "--ep", 2, "--out", tmp_path / name]
        run_well("place", "--src", tmp_path / "source", *options)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["model-shared-00001-of-00001.safetensors", "model-ep01-of-02-00001-of-00001.safetensors"]
)
def test_every_command_finds_a_file_of_another_output(name: str, outputs: Path) -> None:
    one, other = outputs / "one" / name, outputs / "other" / name
    headers = [header_of(path) for path in (one, other)]
    marks = [header.pop("__metadata__") for header in headers]
    assert one.stat().st_size == other.stat().st_size
    assert marks[0] != marks[1]
    assert headers[0] == headers[1], "nothing but the digest tells the headers apart"
    assert json.loads(run_well("inspect", outputs / "one", "--json"))["notes"] == []
    run_well("verify", outputs / "one", "--quick")
    shutil.copy(other, one)
    quick = run("verify", outputs / "one", "--quick")
    assert quick.exit_code == 1
    assert f"{name} are numbered in another way than the placement says" in " ".join(quick.output.split())
    (note,) = json.loads(run_well("inspect", outputs / "one", "--json"))["notes"]
    assert "files of two checkpoints lie here" in note
    for command in (["stage", "--ranks", "1"], ["restore"]):
        refused = run(command[0], outputs / "one", *command[1:], "--out", outputs / command[0])
        assert refused.exit_code == 1
        assert name in refused.output
        assert not (outputs / command[0] / "config.json").exists()


def test_verify_finds_a_file_of_another_output_that_the_manifest_vouches_for(outputs: Path) -> None:
    """Someone copied it and its digests."""
    name = "model-ep01-of-02-00001-of-00001.safetensors"
    shutil.copy(outputs / "other" / name, outputs / "one")
    theirs = {
        entry["name"]: entry
        for entry in json.loads((outputs / "other" / "reshard_manifest.json").read_bytes())["files"]
    }
    forge(
        outputs / "one",
        lambda manifest: manifest.update(
            files=[theirs[name] if entry["name"] == name else entry for entry in manifest["files"]]
        ),
    )
    result = run("verify", outputs / "one", "--quick")
    assert result.exit_code == 1
    assert "are numbered in different ways, by their headers" in " ".join(result.output.split())


@pytest.mark.parametrize("outputs", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("marks", [(), MARKS[:1]])
def test_an_output_whose_files_say_less_is_verified_staged_and_restored(marks: tuple[str, ...], outputs: Path) -> None:
    """Files of the first outputs have no mark, and those of later ones have no digest in it.

    Those with expert groups are in test_contract_versions.py.
    """
    for name in with_shaped_gates(outputs / "source", outputs / "one", marks):
        record(outputs / "one", name)
    run_well("verify", outputs / "one", "--src", outputs / "source")
    assert json.loads(run_well("inspect", outputs / "one", "--json"))["notes"] == []
    run_well("stage", outputs / "one", "--ranks", "1", "--out", outputs / "staged")
    run_well("verify", outputs / "staged")
    run_well("restore", outputs / "one", "--out", outputs / "restored")
