"""Placement files: the documented form, its schema, what else is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from reshard.errors import CheckpointError
from reshard.placement import placement_file as module
from reshard.placement.permutations import zigzag
from reshard.placement.placement_file import (
    PlacementFile,
    encode_placement_file,
    placement_digest,
    placement_file_schema,
    read_placement_file,
)

SCHEMA = json.loads(Path(module.__file__).with_name("placement.schema.json").read_text())
LAYERS = ["model.layers.1.mlp", "model.layers.2.mlp"]
FILE = PlacementFile(
    strategy="zigzag",
    ep_size=2,
    model_type="deepseek_v3",
    num_experts=4,
    layers=LAYERS,
    physical_to_logical={LAYERS[0]: [0, 2, 1, 3], LAYERS[1]: [3, 2, 1, 0]},
)


def written(path: Path, **changes: Any) -> Path:
    """The file `FILE`, some of its keys changed after it was written."""
    path.write_text(json.dumps({**json.loads(encode_placement_file(FILE)), **changes}))
    return path


def test_a_file_is_read_as_it_was_written_and_obeys_the_published_schema(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_bytes(encode_placement_file(FILE))
    found = read_placement_file(path)
    assert found.physical_to_logical == FILE.physical_to_logical
    assert encode_placement_file(found) == path.read_bytes()
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    assert placement_file_schema() == SCHEMA, "write the schema anew"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(path.read_text()), "ep_size": 0}, SCHEMA)


@pytest.mark.parametrize(
    "content",
    [
        {"physical_to_logical": list(zigzag(8, 2))},
        {"physical_to_logical": {"model.layers.1.mlp": list(zigzag(8, 2))}, "comment": "by hand"},
        {"physical_to_logical": list(zigzag(8, 2)), "ep_size": 2, "moe_layers": [{"name": "model.layers.1.mlp"}]},
    ],
    ids=["one list", "by layer", "a manifest"],
)
def test_any_object_with_a_placement_is_read(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(content))
    found = read_placement_file(path)
    assert found.orders == [list(zigzag(8, 2))]
    assert found.num_experts == 8
    assert found.ep_size == content.get("ep_size")
    assert found.layers == (["model.layers.1.mlp"] if len(content) > 1 else [])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"reshard_placement": 2}, "reshard_placement is 2, but this reshard reads only 1"),
        ({"physical_to_logical": [0, 1, 2, 2]}, r"all layers: expected each of the experts 0 to 3"),
        ({"physical_to_logical": [0, 1, 2, 4]}, "expected each of the experts 0 to 3"),
        ({"physical_to_logical": [0, 1, 2]}, "expected each of the experts 0 to 3"),
        ({"physical_to_logical": [0, 1, 2, 3, 0]}, "5 slots cannot be divided evenly among 2 ranks"),
        ({"physical_to_logical": {"model.layers.1.mlp": [0, 1, 2, 3]}}, r"only one of them has 'model.layers.2.mlp'"),
        ({"physical_to_logical": {}, "layers": []}, "has no layer"),
        ({"physical_to_logical": [0, 1, 2, "3"]}, "Expected `int`, got `str`"),
        ({"physical_to_logical": [0, 1, 2, -3]}, "not a placement file"),
        ({"ep_size": 4}, "were changed after the placement was made"),
        ({"model_type": "other"}, "were changed after the placement was made"),
        ({"ep_size": 5, "digest": None}, "ep_size is 5, but there are 4 experts"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"strategy": None}, "not a placement file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_cannot_be_is_refused_with_its_name_and_the_fault(
    changes: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    read_placement_file(written(tmp_path / "sound.json"))
    with pytest.raises(CheckpointError, match=rf"bad\.json: .*{fault}"):
        read_placement_file(written(tmp_path / "bad.json", **changes))


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """The last one counted, with no word."""
    layer = "model.layers.1.mlp"
    path = tmp_path / "bad.json"
    for text, key in (
        (f'{{"physical_to_logical": {{"{layer}": [0, 1], "{layer}": [1, 0]}}}}', layer),
        ('{"physical_to_logical": [0, 1], "ep_size": 2, "physical_to_logical": [1, 0]}', "physical_to_logical"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=rf"bad\.json: .*'{key}' comes twice"):
            read_placement_file(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"physical_to_logical": null}', "[" * 100_000])
def test_what_is_no_placement_at_all_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"bad\.json: .*placement file"):
        read_placement_file(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_placement_file(tmp_path / "absent.json")


def test_copies_are_in_the_form(tmp_path: Path) -> None:
    path = written(tmp_path / "copies.json", physical_to_logical=[0, 2, 1, 1, 3, 0])
    found = read_placement_file(path)
    assert found.has_copies
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    assert not FILE.has_copies


def test_equal_placements_have_equal_digests_whoever_wrote_them() -> None:
    one = placement_digest(zigzag(8, 2), 2)
    assert one == placement_digest({"a": list(zigzag(8, 2)), "b": zigzag(8, 2)}, 2)
    others = [placement_digest(zigzag(8, 4), 2), placement_digest(zigzag(8, 2), 4), placement_digest(range(8), 2)]
    others.append(placement_digest({"a": zigzag(8, 2), "b": range(8)}, 2))
    others.append(placement_digest({"b": zigzag(8, 2), "a": range(8)}, 2))
    assert len({one, *others}) == 6
