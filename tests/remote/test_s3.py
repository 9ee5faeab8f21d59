"""A bucket as the source. The client is the user's own `s3fs`; the server is that of `moto`, which speaks S3."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from checkpoints import Spec, build
from command_line import run_well
from hub_outputs import assert_same_output, committed, refused
from moto.server import ThreadedMotoServer
from oracle import assert_identical_trees

import reshard.checkpoint.remote
from reshard import CheckpointError, zigzag

SPEC = Spec("deepseek_v3", experts=8, layers=3, shuffled=False)
URL = "s3://models/R1"


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """An S3 server with the bucket `models`; the user's environment names it."""
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(variable, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem().mkdir("models")
        yield
    s3fs.S3FileSystem.clear_instance_cache()
    moto.stop()


@pytest.fixture
def source(server: None, tmp_path: Path) -> Path:
    """A checkpoint, which is in the bucket too."""
    build(SPEC, tmp_path / "built")
    source = committed(tmp_path / "built", tmp_path / "source")
    upload(source, "models/R1")
    return source


def upload(directory: Path, to: str) -> None:
    """Put a directory into the bucket, in the place of what was there."""
    store = s3fs.S3FileSystem()
    if store.exists(to):
        store.rm(to, recursive=True)
    for path in directory.rglob("*"):
        if path.is_file():
            store.put_file(str(path), f"{to}/{path.relative_to(directory)}")


def test_an_output_from_a_bucket_is_the_one_from_a_directory(source: Path, tmp_path: Path) -> None:
    run_well("zigzag", "--src", source, "--ep", 3, "--reflink", "never", "--out", tmp_path / "expected")
    run_well("zigzag", "--src", f"{URL}/", "--ep", 3, "--out", tmp_path / "out")
    assert_same_output(tmp_path / "expected", tmp_path / "out")
    assert "already complete" in run_well("zigzag", "--src", URL, "--ep", 3, "--out", tmp_path / "out")
    run_well("verify", tmp_path / "out", "--src", URL)
    assert "deepseek_v3" in run_well("inspect", URL)
    upload(tmp_path / "out", "models/out")
    run_well("restore", "s3://models/out", "--out", tmp_path / "back")
    assert_identical_trees(source, tmp_path / "back")


def test_an_object_that_changes_during_a_run_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    build(Spec("deepseek_v3", experts=8, layers=3, shuffled=False, seed=1), other)
    fetch, fetched, lock = reshard.checkpoint.remote.RemoteFiles._range, [], threading.Lock()

    def change(self: object, name: str, offset: int, size: int) -> bytes:
        with lock:
            fetched.append(name)
            if len(fetched) == 25:
                upload(other, "models/R1")
        return fetch(self, name, offset, size)  # type: ignore[arg-type]

    monkeypatch.setattr(reshard.checkpoint.remote.RemoteFiles, "_range", change)
    with pytest.raises(CheckpointError, match=f"{URL}.*"):
        zigzag(URL, tmp_path / "out", 3)
    assert len(fetched) >= 25
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.undo()
    assert "another source" in refused("zigzag", "--src", URL, "--ep", 3, "--out", tmp_path / "out")


def test_a_bucket_that_is_not_there_is_said_in_a_line(server: None, tmp_path: Path) -> None:
    for url in ("s3://absent/R1", "s3://models/absent"):
        assert url in refused("zigzag", "--src", url, "--ep", 3, "--out", tmp_path / "out")


def test_the_library_that_a_store_needs_is_named() -> None:
    assert "gs://bucket/R1: reading gs:// needs gcsfs: pip install gcsfs" in refused("inspect", "gs://bucket/R1")
