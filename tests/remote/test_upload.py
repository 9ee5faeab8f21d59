"""Outputs that are published on the Hugging Face Hub: what is sent, what is not sent again, and what comes back.

The client is the real `huggingface_hub`, with LFS and with the real `hf_xet`; the server is `hub_server`. What comes
back is compared with the source and the output on this disk.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from checkpoints import Spec
from command_line import run, run_well
from hub_outputs import MANIFEST, committed, refused
from hub_server import Fault, Hub, Request, serving
from huggingface_hub import snapshot_download
from oracle import assert_identical_trees
from scratch import checkpoint

import reshard

SOURCE, REPO, COMMIT = "deep/model", "org/zigzag", "1" * 40
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own request
LAST = {"config.json", "model.safetensors.index.json"}
CARD = """---
license: mit
base_model: deep/base
base_model_relation: quantized
tags:
- mine
---
# The model

It says {hello}.
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it comes from the Hub, with a card and attributes."""
    built = checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=8, layers=3, shuffled=False))
    source = committed(built, tmp_path_factory.mktemp("upload") / "source")
    (source / "README.md").write_text(CARD)
    (source / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    return source


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output that the tests publish, to be read only. It was made from a repository."""
    root = tmp_path_factory.mktemp("upload")
    with serving(root / "cache") as hub:
        hub.add(SOURCE, source, COMMIT)
        run_well("zigzag", "--src", SOURCE, "--ep", 2, "--max-shard-size", "20KB", "--out", root / "out")
    return root / "out"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that nothing was uploaded to, and a client that has a token and no Xet."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with serving(tmp_path / "cache") as server:
        server.token = "hf_secret"
        yield server


def head(hub: Hub, branch: str = "main") -> Path:
    """The files that a branch has."""
    return hub.commits[hub.branches[REPO][branch]]


def names(root: Path) -> set[str]:
    """Of all files below a directory."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# What is sent, and what comes back
# ---------------------------------------------------------------------------------------------------------------------


def test_what_was_uploaded_is_downloaded_verified_and_restored(
    hub: Hub, source: Path, output: Path, tmp_path: Path
) -> None:
    said = run_well("upload", output, REPO)
    assert f"{hub.url}/{REPO}" in said
    assert hub.branches[REPO]["main"] in said
    back = Path(snapshot_download(REPO, local_dir=tmp_path / "back"))
    assert "every file and tensor is what was written" in run_well("verify", back)
    assert "bit for bit" in run_well("verify", back, "--src", source)
    run_well("restore", back, "--out", tmp_path / "restored")
    assert_identical_trees(source, tmp_path / "restored")
    run_well("restore", REPO, "--out", tmp_path / "streamed")
    assert_identical_trees(source, tmp_path / "streamed")
    for name in names(output) - {MANIFEST, "README.md", ".gitattributes"}:
        assert (back / name).read_bytes() == (output / name).read_bytes(), name
    weights = next(back.glob("model-ep00*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert run("verify", back).exit_code == 1, "the control"


def test_the_output_is_left_as_it_was(hub: Hub, output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "before")
    run_well("upload", output, REPO)
    assert_identical_trees(tmp_path / "before", output)
    run_well("verify", output)


def test_nothing_can_be_loaded_before_all_is_there(hub: Hub, output: Path) -> None:
    run_well("upload", output, REPO)
    roots = [names(hub.commits[commit]) for commit in hub.uploads.history[REPO]]
    assert len(roots) == 4
    assert roots[1] == {".gitattributes", MANIFEST, "README.md"}
    assert not roots[2] & LAST
    assert roots[3] == names(output)


def test_the_hubs_own_files_can_be_edited_there(hub: Hub, source: Path, output: Path, tmp_path: Path) -> None:
    run_well("upload", output, REPO)
    back = Path(snapshot_download(REPO, local_dir=tmp_path / "back"))
    (back / "README.md").write_text("# Mine\n")
    (back / ".gitattributes").write_text("*.json filter=lfs\n")
    run_well("verify", back, "--src", source)
    run_well("restore", back, "--out", tmp_path / "restored")
    assert_identical_trees(source, tmp_path / "restored")
    (back / "tokenizer.json").write_text("?")
    assert run("verify", back).exit_code == 1, "the control"


def test_no_path_of_this_machine_and_no_token_is_sent(hub: Hub, source: Path, tmp_path: Path) -> None:
    run_well("zigzag", "--src", source, "--ep", 2, "--out", tmp_path / "out")
    assert str(source) in (tmp_path / "out" / MANIFEST).read_text()
    run_well("upload", tmp_path / "out", REPO)
    for path in head(hub).rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert str(source.parent).encode() not in path.read_bytes(), path
            assert b"hf_secret" not in path.read_bytes(), path
    assert json.loads((head(hub) / MANIFEST).read_text())["source"]["path"] == "source"


def test_python_uploads_as_the_command_does(hub: Hub, output: Path) -> None:
    planned = reshard.plan_upload(output, REPO)
    assert hub.branches == {}
    assert planned.card is not None
    assert "hf_secret" not in repr(reshard.plan_upload(output, REPO, token="hf_secret"))
    done = reshard.upload(output, REPO)
    assert done.commit == hub.branches[REPO]["main"]
    assert not done.already_complete
    assert {file.name: file.size for file in done.upload.files} == {
        name: (head(hub) / name).stat().st_size for name in names(head(hub)) - {".gitattributes"}
    }
    assert reshard.upload(output, REPO).already_complete


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------


def metadata(card: str) -> dict[str, object]:
    """The YAML at the beginning of a card, read by PyYAML."""
    found = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    assert found is not None
    return dict(yaml.safe_load(found[1]))


def test_the_card_keeps_what_the_sources_says_and_names_the_base(hub: Hub, output: Path) -> None:
    run_well("upload", output, REPO)
    card = (head(hub) / "README.md").read_text()
    assert metadata(card) == {
        "license": "mit",
        "base_model": SOURCE,
        "tags": ["mine", "reshard", "expert-parallelism"],
    }
    assert card.endswith("# The model\n\nIt says {hello}.\n")
    assert COMMIT in card
    assert "2 expert-parallel (EP)" in card


def test_the_commands_of_the_card_work(hub: Hub, source: Path, output: Path, tmp_path: Path) -> None:
    """All but those that install and serve; vLLM's is the one that `zigzag` prints for this repository."""
    hub.add(SOURCE, source, COMMIT)
    run_well("upload", output, REPO)
    card = (head(hub) / "README.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", card, re.DOTALL) for line in block.splitlines()]
    assert f"vllm serve {REPO} --tensor-parallel-size 2 --enable-expert-parallel" in commands
    assert "pip install reshard vllm" in commands, "DeepSeek-V3 routes by groups"
    ran = []
    for command in commands:
        words = [word.replace("./", f"{tmp_path}/") for word in shlex.split(command)]
        if words[0] == "hf":
            snapshot_download(words[2], local_dir=words[words.index("--local-dir") + 1])
        elif words[0] == "reshard":
            if "--out" in words:
                words[words.index("--out") + 1] = str(tmp_path / f"out{len(ran)}")
            run_well(*words[1:])
            ran.append(words[1])
    assert ran == ["verify", "restore", "zigzag"]
    assert_identical_trees(source, tmp_path / "out1")
    placements = [
        json.loads((root / MANIFEST).read_text())["physical_to_logical"] for root in (output, tmp_path / "out2")
    ]
    assert placements[0] == placements[1]


def test_an_original_that_nobody_knows_is_not_named_but_can_be(hub: Hub, source: Path, tmp_path: Path) -> None:
    run_well("zigzag", "--src", source, "--ep", 2, "--out", tmp_path / "out")
    assert "--base-model" in run_well("upload", tmp_path / "out", REPO, "--dry-run")
    said = run_well("upload", tmp_path / "out", REPO, "--base-model", SOURCE)
    assert "--base-model" not in said
    assert metadata((head(hub) / "README.md").read_text())["base_model"] == SOURCE


def test_a_source_without_a_card_gets_one_and_any_engine_is_said_to_serve(
    hub: Hub, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    built = checkpoint(tmp_path_factory, Spec("qwen3_moe", experts=8))
    source = committed(built, tmp_path / "source")
    (source / "README.md").unlink()
    run_well("zigzag", "--src", source, "--ep", 2, "--layout", "source", "--out", tmp_path / "out")
    run_well("upload", tmp_path / "out", REPO, "--base-model", SOURCE)
    card = (head(hub) / "README.md").read_text()
    assert metadata(card) == {"base_model": SOURCE, "tags": ["reshard", "expert-parallelism"]}
    assert "Any engine" in card
    assert "pip install" not in card
    assert "--layout source" in card
    run_well("restore", REPO, "--out", tmp_path / "restored")
    assert_identical_trees(source, tmp_path / "restored")


@pytest.mark.parametrize(
    "metadata_", ["---\n- a\n- list\n---\n# Text\n", "---\nkey: [\n---\n# Text\n", "# Text\n", "\xff"]
)
def test_a_card_whose_metadata_cannot_be_read_is_kept_as_text(
    metadata_: str, hub: Hub, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_bytes(metadata_.encode("latin-1"))
    run_well("zigzag", "--src", tmp_path / "source", "--ep", 2, "--out", tmp_path / "out")
    said = run_well("upload", tmp_path / "out", REPO, "--base-model", SOURCE)
    card = (head(hub) / "README.md").read_text()
    assert metadata(card)["base_model"] == SOURCE
    assert metadata_.startswith("\xff") or metadata_.strip() in card
    assert ("cannot be read" in said) == metadata_.startswith("---")
    run_well("restore", REPO, "--out", tmp_path / "restored")
    assert_identical_trees(tmp_path / "source", tmp_path / "restored")


def test_a_card_of_the_users_is_sent_as_it_is_and_the_output_still_verifies(
    hub: Hub, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    built = committed(checkpoint(tmp_path_factory, Spec("qwen3_moe", experts=8)), tmp_path / "source")
    (built / "README.md").unlink()
    run_well("zigzag", "--src", built, "--ep", 2, "--out", tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    run_well("verify", tmp_path / "out")
    run_well("upload", tmp_path / "out", REPO)
    assert (head(hub) / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n# Mine, later\n")
    run_well("upload", tmp_path / "out", REPO)
    assert "later" in (head(hub) / "README.md").read_text()
    (tmp_path / "out" / "other.md").write_text("?")
    assert "other.md: not in" in run("verify", tmp_path / "out").stdout, "the control: only a card may be added"


def test_a_card_that_the_repository_has_is_kept(hub: Hub, output: Path) -> None:
    run_well("upload", output, REPO)
    (head(hub) / "README.md").write_text("---\nlicense: mit\n---\n# Edited\n")
    hub.forget_etags()
    assert "README.md of the repository is kept" in run_well("upload", output, REPO)
    assert "Edited" in (head(hub) / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted and repeated
# ---------------------------------------------------------------------------------------------------------------------


def failing_after(good: int, path: str) -> tuple[list[str], object]:
    """A fault from the nth request on whose path contains `path`."""
    asked: list[str] = []

    def fail(request: Request) -> Fault | None:
        if path in request.path:
            asked.append(request.path)
        return Fault(403) if path in request.path and len(asked) > good else None

    return asked, fail


@pytest.mark.parametrize(
    ("path", "good"), [("/lfs/", 3), ("/lfs/", 0), ("/commit/", 0), ("/commit/", 1), ("/commit/", 2)]
)
def test_what_is_there_is_not_sent_again(path: str, good: int, hub: Hub, output: Path) -> None:
    _, hub.fault = failing_after(good, path)
    assert "rerun the command to resume" in refused("upload", output, REPO)
    before = hub.uploads.received
    hub.fault = lambda request: None
    run_well("upload", output, REPO)
    assert names(head(hub)) == names(output)
    large = {path.read_bytes() for path in head(hub).rglob("*") if path.is_file() and path.stat().st_size > hub.SMALL}
    assert hub.uploads.received == sum(map(len, large)), "each large file arrived once"
    assert before < hub.uploads.received or path == "/commit/", "the control: something was left to send"


def test_a_finished_upload_is_repeated_without_sending_anything(hub: Hub, output: Path) -> None:
    run_well("upload", output, REPO)
    sent, commits = hub.uploads.received, list(hub.uploads.history[REPO])
    assert "already complete" in run_well("upload", output, REPO)
    assert (hub.uploads.received, hub.uploads.history[REPO]) == (sent, commits)


def test_xet_sends_each_block_once(
    hub: Hub, source: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    _, hub.fault = failing_after(1, "/commit/")
    assert "rerun the command to resume" in refused("upload", output, REPO)
    sent = hub.uploads.xet_received
    assert sent > sum(path.stat().st_size for path in output.glob("*.safetensors")) / 2, "the control"
    hub.fault = lambda request: None
    run_well("upload", output, REPO)
    assert hub.uploads.received == 0, "nothing came by LFS"
    assert hub.uploads.xet_received < 1.1 * sent, "only the index and config were left"
    assert "already complete" in run_well("upload", output, REPO)
    run_well("restore", REPO, "--out", tmp_path / "restored")
    assert_identical_trees(source, tmp_path / "restored")


def test_a_killed_upload_is_resumed_by_the_same_command(hub: Hub, output: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-m", "reshard", "upload", str(output), REPO]
    arrived = []

    def rest(request: Request) -> None:
        if request.path.startswith("/lfs/"):
            arrived.append(request.path)
            time.sleep(0.1)

    hub.fault = rest
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(arrived) < 6 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    before = set(names(head(hub)))
    assert not before & LAST, "the control: it was killed in the middle"
    stored = {path.name for path in (hub.uploads.store / "lfs").iterdir()}
    arrived.clear()
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert names(head(hub)) == names(output)
    assert not {path.removeprefix("/lfs/") for path in arrived} & stored
    assert "files" in done.stderr, "a log says what is going on"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what is asked for first
# ---------------------------------------------------------------------------------------------------------------------


def test_a_dry_run_sends_nothing_and_shows_the_card(hub: Hub, output: Path) -> None:
    said = run_well("upload", output, REPO, "--dry-run")
    assert "a new repository" in said
    assert f"base_model: {SOURCE}" in said
    assert hub.branches == {}
    assert {request.method for request in hub.requests} == {"GET"}
    run_well("upload", output, REPO)
    assert {"POST", "PUT"} < {request.method for request in hub.requests}, "the control"


def test_a_damaged_output_is_not_sent(hub: Hub, output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    line = refused("upload", tmp_path / "out", REPO)
    assert "config.json" in line
    assert "nothing was uploaded" in line
    assert hub.requests == []


def test_what_is_no_whole_output_is_refused(hub: Hub, source: Path, output: Path, tmp_path: Path) -> None:
    run_well("stage", output, "--ranks", 0, "--out", tmp_path / "staged")
    assert "upload the whole output" in refused("upload", tmp_path / "staged", REPO)
    assert "expected an output" in refused("upload", source, REPO)
    assert "organization/name" in refused("upload", output, "name")
    assert "organization/name" in refused("upload", output, REPO, "--base-model", "name")
    assert hub.requests == []


def test_without_a_token_or_with_a_wrong_one_a_line_says_what_to_do(
    hub: Hub, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "401" in refused("upload", output, REPO)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "hf auth login" in refused("upload", output, REPO)
    run_well("upload", output, REPO, "--token", "hf_secret")


def test_a_repository_with_something_else_is_refused(hub: Hub, source: Path, output: Path, tmp_path: Path) -> None:
    hub.add(REPO, source, COMMIT)
    assert "has LICENSE already, which is not of this output" in refused("upload", output, REPO)
    run_well("zigzag", "--src", source, "--ep", 4, "--out", tmp_path / "other")
    run_well("upload", tmp_path / "other", "org/other")
    assert "not of this output" in refused("upload", output, "org/other")
    hub.uploads.history.clear()
    run_well("zigzag", "--src", source, "--ep", 2, "--max-shard-size", "20KB", "--out", tmp_path / "same")
    run_well("upload", tmp_path / "same", "org/third")
    assert "has another output" in refused("upload", output, "org/third"), "the same names, another source"


def test_a_branch_of_its_own_begins_where_the_repository_began(
    hub: Hub, source: Path, output: Path, tmp_path: Path
) -> None:
    run_well("zigzag", "--src", source, "--ep", 4, "--out", tmp_path / "other")
    run_well("upload", tmp_path / "other", REPO)
    first = names(head(hub))
    said = run_well("upload", output, REPO, "--revision", "ep2")
    assert "/tree/ep2" in said
    assert names(head(hub)) == first
    assert names(head(hub, "ep2")) == names(output)
    card = (head(hub, "ep2") / "README.md").read_text()
    assert f"vllm serve {REPO} --revision ep2 " in card
    back = Path(snapshot_download(REPO, revision="ep2", local_dir=tmp_path / "back"))
    run_well("verify", back)
    assert "already complete" in run_well("upload", output, REPO, "--revision", "ep2")
    run_well("upload", output, "org/new", "--revision", "ep2")
    assert names(hub.commits[hub.branches["org/new"]["ep2"]]) == names(output)


def test_private_is_private(hub: Hub, output: Path) -> None:
    run_well("upload", output, REPO, "--private")
    assert hub.uploads.private == {REPO}
    run_well("upload", output, REPO, "--private")
    run_well("upload", output, "org/public")
    assert hub.uploads.private == {REPO}
    assert "is public" in refused("upload", output, "org/public", "--private")


def test_a_file_that_the_hub_ignores_is_missed(hub: Hub, output: Path) -> None:
    hub.uploads.ignored = {next(output.glob("model-ep01*")).name}
    assert "does not have model-ep01" in refused("upload", output, REPO)
