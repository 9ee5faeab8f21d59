"""What `--json` prints is described by one schema: of every command, and of every way to fail."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from checkpoints import Spec
from command_line import run, run_well
from hub_server import Hub, serving
from scratch import checkpoint
from traces import write_trace

import reshard.cli
from reshard.cli.reports import SCHEMA_VERSION

RESHARD = Path(sys.executable).with_name("reshard")
SCHEMA = json.loads((Path(reshard.cli.__file__).parent / "output.schema.json").read_text())


def without_surplus(schema: Any) -> Any:
    """`schema` that also refuses keys it does not describe."""
    if isinstance(schema, list):
        return [without_surplus(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: without_surplus(value) for key, value in schema.items()}
    return {"additionalProperties": False, **strict} if "properties" in schema and "type" in schema else strict


STRICT = jsonschema.Draft202012Validator(without_surplus(copy.deepcopy(SCHEMA)))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its output, a damaged copy of that, one without its manifest's end, and a trace."""
    root = tmp_path_factory.mktemp("json")
    (root / "src").symlink_to(checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=8)))
    run_well("zigzag", "--src", root / "src", "--ep", 2, "--out", root / "output")
    shutil.copytree(root / "output", root / "damaged")
    (root / "damaged" / "tokenizer.json").write_text("?")
    shutil.copytree(root / "output", root / "torn")
    manifest = root / "torn" / "reshard_manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    layers = json.loads(run_well("inspect", root / "src", "--json"))["moe_layers"]
    chance = random.Random(0)
    ids = {layer: [chance.sample(range(8), 2) for _ in range(4096)] for layer in layers}
    write_trace(root / "trace", ids, 8)
    return root


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that takes uploads in the place of the Hub."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(tmp_path / "cache") as server:
        yield server


def printed(command: str, work: Path, status: int) -> Any:
    """The one document that a command prints, which the schema describes to the last key."""
    result = run(*command.replace("WORK", str(work)).split(), "--json")
    assert result.exit_code == status, result.output
    found = json.loads(result.stdout)
    STRICT.validate(found)
    return found


def sizes(directory: Path) -> dict[str, int]:
    """The bytes of each file in a directory, by its path there."""
    return {str(path.relative_to(directory)): path.stat().st_size for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("inspect WORK/src", "inspect"),
        ("inspect WORK/src --ep 2 --verbose", "inspect"),
        ("inspect WORK/output", "inspect"),
        ("zigzag --src WORK/src --ep 2 --out NEW --dry-run", "plan"),
        ("zigzag --src WORK/src --ep 2 --out NEW", "writing"),
        ("zigzag --src WORK/src --ep 2 --out WORK/output", "writing"),
        ("zigzag --src WORK/src --ep 2 --ranks 1 --out NEW", "writing"),
        ("zigzag --src WORK/src --ep 2 --ranks 1 --out NEW --dry-run", "plan"),
        ("place --strategy balanced --trace WORK/trace --src WORK/src --ep 2 --out NEW", "writing"),
        ("verify WORK/output", "verify"),
        ("verify WORK/output --src WORK/src", "verify"),
        ("verify WORK/output --quick", "verify"),
        ("stage WORK/output --ranks 0 --out NEW", "stage"),
        ("stage WORK/output --ranks 0-1 --out NEW", "stage"),
        ("restore WORK/output --out NEW", "restore"),
        ("upload WORK/output org/new --dry-run", "upload_plan"),
        ("upload WORK/output org/new --private --revision ep2", "upload"),
        ("analyze WORK/src --ep 2 --tokens 64", "analyze"),
        ("analyze WORK/src --ep 2 --trace WORK/trace", "analyze"),
        ("analyze WORK/src --ep 2 --trace WORK/trace --spare 1", "analyze"),
        ("trace info WORK/trace", "trace_info"),
        ("export WORK/src --to vllm --ep 2", "export"),
        ("export WORK/output --to vllm --out NEW.json", "export"),
        ("export WORK/src --to vllm --ep 2 --spare 1", "export"),
        ("export WORK/src --to vllm --ep 2 --spare 1 --trace WORK/trace", "export"),
    ],
)
def test_every_command_prints_what_the_schema_describes(command: str, kind: str, work: Path, tmp_path: Path) -> None:
    words = command.replace("NEW", str(tmp_path / "new"))
    found = printed(words, work, 0)
    jsonschema.validate(found, {**SCHEMA, "oneOf": [{"$ref": f"#/$defs/{kind}"}]})
    assert found["schema_version"] == SCHEMA_VERSION
    assert found["command"] == " ".join(word for word in command.split()[:2] if word.isalpha())
    if kind in ("writing", "stage", "restore"):
        on_disk = sizes(Path(found["out"]))
        assert {file["name"]: file["size"] for file in found["files"]} == on_disk
        assert found["output_size"] == sum(on_disk.values())
    if kind == "plan":
        run_well(*words.replace("WORK", str(work)).replace("--dry-run", "").split())
        last = {"config.json", "model.safetensors.index.json", "reshard_manifest.json"}
        assert sizes(tmp_path / "new").keys() - {file["name"] for file in found["files"]} == last


def test_a_run_with_merge_lists_the_files_of_its_ranks(work: Path, tmp_path: Path) -> None:
    command = "zigzag --src WORK/src --ep 2 --out"
    whole = printed(f"{command} {tmp_path / 'whole'}", work, 0)
    assert whole["ranks"] is None
    for rank in (0, 1):
        found = printed(f"{command} {tmp_path / 'out'} --ranks {rank} --merge", work, 0)
        assert found["ranks"] == [rank]
        assert found["out"] == str(tmp_path / "out")
        needed = {file["name"] for file in whole["files"] if file["rank"] in (None, rank)}
        assert {file["name"] for file in found["files"]} == needed < sizes(tmp_path / "whole").keys()
        assert found["output_size"] == sum(file["size"] for file in found["files"])
    assert sizes(tmp_path / "out") == sizes(tmp_path / "whole")


def test_every_kind_of_document_is_tried() -> None:
    """A kind that is added to the schema must be added above."""
    marks = test_every_command_prints_what_the_schema_describes.pytestmark
    tried = {kind for mark in marks if mark.name == "parametrize" for _, kind in mark.args[1]}
    named = {one["$ref"].removeprefix("#/$defs/") for one in SCHEMA["oneOf"]}
    assert tried == named - {"failure"}


@pytest.mark.parametrize(
    ("command", "status", "kind"),
    [
        ("verify WORK/torn", 1, "IntegrityError"),
        ("inspect WORK/torn", 1, "IntegrityError"),
        ("stage WORK/torn --ranks 0 --out NEW", 1, "IntegrityError"),
        ("restore WORK/torn --out NEW", 1, "IntegrityError"),
        ("export WORK/torn --to vllm", 1, "IntegrityError"),
        ("verify WORK/nothing", 1, "IntegrityError"),
        ("inspect WORK/nothing", 1, "CheckpointError"),
        ("analyze WORK/nothing --ep 2", 1, "CheckpointError"),
        ("analyze WORK/src --ep 2 --nodes 2 --placement balanced --trace WORK/nothing", 1, "TraceError"),
        ("zigzag --src WORK/nothing --ep 2 --out NEW", 1, "CheckpointError"),
        ("zigzag --src WORK/src --ep 9 --out NEW", 1, "OutputError"),
        ("place --strategy file --map WORK/nothing --src WORK/src --ep 2 --out NEW", 1, "CheckpointError"),
        ("trace info WORK/nothing", 1, "TraceError"),
        ("upload WORK/output name", 1, "OutputError"),
        ("upload WORK/damaged org/new", 1, "IntegrityError"),
        ("zigzag --src WORK/src --ep 0 --out NEW", 2, "BadParameter"),
        ("zigzag --src WORK/src --sideways", 2, "NoSuchOption"),
        ("zigzag --src WORK/src --ep 2 --out NEW --merge", 2, "UsageError"),
        ("zigzag --src WORK/src --ep 2 --out NEW --revision main", 1, "CheckpointError"),
        ("verify", 2, "MissingParameter"),
        ("verify WORK/output --quick --src WORK/src", 2, "UsageError"),
        ("trace info", 2, "MissingParameter"),
    ],
)
def test_an_error_is_an_object_too(command: str, status: int, kind: str, work: Path, tmp_path: Path) -> None:
    words = command.replace("NEW", str(tmp_path / "new"))
    found = printed(words, work, status)
    assert found["command"] == ("trace info" if command.startswith("trace") else command.split()[0])
    assert found["error"]["exit_status"] == status
    assert found["error"]["type"] == kind
    plain = run(*words.replace("WORK", str(work)).split())
    assert found["error"]["message"] in plain.stderr
    assert plain.stdout == "", "the control: without --json, nothing is on the standard output"


def test_a_report_that_says_what_is_wrong_is_the_only_document(work: Path) -> None:
    found = printed("verify WORK/damaged", work, 1)
    assert not found["ok"]
    assert len(found["problems"]) == 1


def test_a_command_that_is_none_has_an_object_without_a_name() -> None:
    result = run("zagzig", "--json")
    assert result.exit_code == 2
    STRICT.validate(found := json.loads(result.stdout))
    assert found["command"] == ""


def test_the_command_has_its_name_however_it_is_started(work: Path) -> None:
    for start in ([RESHARD], [sys.executable, "-m", "reshard"]):
        done = subprocess.run([*start, "trace", "info", work / "trace", "--json"], capture_output=True, check=True)
        assert json.loads(done.stdout)["command"] == "trace info"


def test_a_key_that_is_not_described_and_one_that_is_missing_are_found(work: Path) -> None:
    """The control of the tests above."""
    found = printed("verify WORK/output", work, 0)
    for wrong in ({**found, "size": 1}, {key: value for key, value in found.items() if key != "read_size"}):
        with pytest.raises(jsonschema.ValidationError):
            STRICT.validate(wrong)
    with pytest.raises(jsonschema.ValidationError):
        STRICT.validate({**found, "files": len(found["files"])})
    jsonschema.validate({**found, "new": 1}, SCHEMA)  # as the schema promises its readers


def test_the_object_that_the_docs_show_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    docs = (Path(__file__).parent.parent.parent / "docs" / "command-line.md").read_text()
    (shown,) = re.findall(r"\$ reshard inspect nowhere --json\n((?: +\S.*\n)+)", docs)
    assert textwrap.dedent(shown) == run("inspect", "nowhere", "--json").stdout
