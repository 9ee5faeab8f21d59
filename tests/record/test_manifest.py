"""The manifest: its published schema is true of real ones, and it says what was done."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from checkpoints import FAMILIES, Spec, build
from command_line import run, run_well

from reshard import read_manifest, zigzag
from reshard.placement.contract import placement_from_json
from reshard.placement.permutations import Placement
from reshard.record.manifest import manifest_schema

SCHEMA = json.loads((files("reshard.record") / "manifest.schema.json").read_text())


def test_the_published_schema_is_the_one_that_the_structs_give() -> None:
    assert manifest_schema() == SCHEMA


@pytest.mark.parametrize("family", FAMILIES)
def test_every_manifest_obeys_the_published_schema(family: str, tmp_path: Path) -> None:
    build(Spec(family, experts=8), tmp_path / "source")
    zigzag(tmp_path / "source", tmp_path / "out", 3)
    manifest = json.loads((tmp_path / "out" / "reshard_manifest.json").read_text())
    jsonschema.validate(manifest, SCHEMA)
    manifest["files"][0]["digest"] = "not a digest"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_a_placement_is_parsed_once_however_many_layers_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(Spec("deepseek_v3", experts=8), tmp_path / "source")
    zigzag(tmp_path / "source", tmp_path / "out", 2)
    parsed = []

    def parse(value: Any, layers: list[str], where: str) -> Placement:
        parsed.append(layers)
        return placement_from_json(value, layers, where)

    monkeypatch.setattr("reshard.record.manifest.placement_from_json", parse)
    assert len(read_manifest(tmp_path / "out").moe_layers) > 1
    assert len(parsed) == 1


def test_a_snapshot_in_the_hub_cache_is_found_by_its_repository_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some-org--Some-MoE"
    build(Spec("qwen3_moe"), tmp_path / "blobs")
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for blob in (tmp_path / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    run_well("zigzag", "--src", "some-org/Some-MoE", "--ep", 2, "--out", tmp_path / "out")
    source = json.loads((tmp_path / "out" / "reshard_manifest.json").read_text())["source"]
    assert (source["repo_id"], source["revision"]) == ("some-org/Some-MoE", revision)
    result = run("zigzag", "--src", "some-org/Another", "--ep", 2, "--out", tmp_path / "other")
    assert result.exit_code == 1
    assert "hf download some-org/Another" in result.stderr
