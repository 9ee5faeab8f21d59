"""What `reshard` refuses, and how: one line on stderr, the right exit status, nothing touched, nothing left behind.

Everything here goes through the command line. The damaged checkpoints come from `hostile.ATTACKS`; the safetensors
library itself is asked whether the damage is real. The rest is about directories that must not be written to, records
that were tampered with, disks that are full, and commands that are interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import hostile
import pytest
from checkpoints import Spec, build
from click.testing import Result
from command_line import Endless, slowly, time_limit
from forgery import MANIFEST, forge
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from reshard.execute.run import default_workers

RESHARD = Path(sys.executable).with_name("reshard")


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def invoke(*args: object) -> Result:
    """Run a command in this process."""
    with time_limit(30):
        return command_line.run(*args)


def run(*args: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, with both streams in pipes."""
    return subprocess.run([RESHARD, *map(str, args)], capture_output=True, text=True, timeout=120)


def zigzag(src: Path, out: Path, *more: object, ep: object = 2) -> Result:
    """Run `reshard zigzag` in this process."""
    return invoke("zigzag", "--src", src, "--ep", ep, "--out", out, *more)


def succeeds(result: Result) -> Result:
    """Insist on exit status 0."""
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def error_line(result: Result | subprocess.CompletedProcess[str]) -> str:
    """Insist on exit status 1 and one `reshard: error: …` line, and return that line."""
    if isinstance(result, Result):
        status = result.exit_code
        assert isinstance(result.exception, SystemExit), repr(result.exception)
    else:
        status = result.returncode
    assert status == 1, (result.stdout, result.stderr)
    assert result.stderr.startswith("reshard: error: ")
    assert "Traceback" not in result.stdout + result.stderr
    line, end = result.stderr[:-1], result.stderr[-1]
    assert end == "\n"
    assert line.isprintable(), "the error is not one line of plain text"
    assert len(line) < 2_000, "the error line is endless"
    return line


def usage_error(result: Result) -> None:
    """Insist on exit status 2 and an explanation."""
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert "Error:" in result.stderr
    assert "Traceback" not in result.output


def says(line: str, needle: str) -> bool:
    """Whether the line contains these words; a number must stand by itself."""
    if not needle.isdigit():
        return needle in line
    plain = re.sub(r"(?<=\d)[,_](?=\d{3})", "", line)  # thousands may be set apart
    return needle in re.findall(r"(?<![A-Za-z])\d+", f"{line} {plain}")


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a directory, or one file: kind, time and content."""

    def describe(path: Path) -> tuple[object, ...]:
        status = path.lstat()
        seen: tuple[object, ...] = (status.st_mode, status.st_mtime_ns)
        if stat.S_ISLNK(status.st_mode):
            return (*seen, str(path.readlink()))
        if stat.S_ISREG(status.st_mode):
            return (*seen, hashlib.sha256(path.read_bytes()).hexdigest())
        return seen

    if not os.path.lexists(root):
        return {}
    return {str(path.relative_to(root)): describe(path) for path in [root, *root.rglob("*")]}


def loadable(folder: Path) -> list[Path]:
    """What an engine could take for a model, anywhere below a directory."""
    return [p for p in folder.rglob("*") if p.name in (hostile.CONFIG, hostile.INDEX) or p.suffix == ".safetensors"]


@pytest.fixture
def src(tmp_path: Path) -> Iterator[Path]:
    """A sound checkpoint, removed after the test: one attack makes it 100 MB."""
    hostile.write_base(tmp_path / "src")
    yield tmp_path / "src"
    shutil.rmtree(tmp_path / "src", ignore_errors=True)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty directory to put outputs in."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def out(src: Path, work: Path) -> Path:
    """A finished output of that checkpoint."""
    succeeds(zigzag(src, work / "out"))
    return work / "out"


def test_a_command_that_hangs_is_not_taken_for_one_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of `invoke`: what ends it is no error that the command line turns into a line."""
    monkeypatch.setattr("reshard.cli.outputs.plan_placement", lambda *arguments, **options: time.sleep(60))
    with pytest.raises(Endless), time_limit(1):
        command_line.run("zigzag", "--src", "here", "--ep", 2, "--out", "there")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_the_sound_checkpoint_is_accepted(src: Path, work: Path) -> None:
    before = snapshot(src)
    succeeds(invoke("inspect", src))
    succeeds(zigzag(src, work / "out"))
    succeeds(invoke("verify", work / "out", "--src", src))
    assert snapshot(src) == before


def test_the_sound_single_file_checkpoint_is_accepted(tmp_path: Path, work: Path) -> None:
    hostile.write_single_file(tmp_path / "src")
    succeeds(invoke("inspect", tmp_path / "src"))
    succeeds(zigzag(tmp_path / "src", work / "out"))


def test_a_checkpoint_of_symlinks_as_the_hub_cache_keeps_it_is_accepted(src: Path, work: Path) -> None:
    blobs = src.with_name("blobs")
    src.rename(blobs)
    src.mkdir()
    for blob in blobs.iterdir():
        (src / blob.name).symlink_to(Path("..") / "blobs" / blob.name)
    before = snapshot(src), snapshot(blobs)
    succeeds(zigzag(src, work / "out"))
    assert (snapshot(src), snapshot(blobs)) == before


@pytest.mark.parametrize("attack", hostile.ATTACKS, ids=str)
def test_a_damaged_checkpoint_is_refused_in_one_line(attack: hostile.Attack, src: Path, work: Path) -> None:
    attack.damage(src)
    before = snapshot(src)
    results = [zigzag(src, work / "out")]
    if not attack.only_for_zigzag:
        results.append(invoke("inspect", src))
    for result in results:
        line = error_line(result).replace(str(src.parent), "")
        assert [needle for needle in attack.says if not says(line, needle)] == [], line
    assert snapshot(src) == before
    assert loadable(work) == []


@pytest.mark.parametrize(
    "name",
    ["shard cut in half", "header nested 100000 deep", "index is not JSON", "config absent", "an expert missing"],
)
def test_the_installed_command_refuses_a_damaged_checkpoint_in_one_line(name: str, src: Path, work: Path) -> None:
    (attack,) = (attack for attack in hostile.ATTACKS if attack.name == name)
    attack.damage(src)
    line = error_line(run("zigzag", "--src", src, "--ep", 2, "--out", work / "out"))
    assert all(says(line, needle) for needle in attack.says)
    assert loadable(work) == []


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user who may not read everything, where the tests run as root."""
    was = os.geteuid()
    os.seteuid(was or 65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.mark.parametrize("name", [hostile.SHARD, hostile.INDEX, hostile.CONFIG])
def test_an_unreadable_file_is_refused_in_one_line(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        Path(folder).chmod(0o755)
        src = Path(folder, "src")
        hostile.write_base(src)
        with unprivileged():
            succeeds(invoke("inspect", src))
        (src / name).chmod(0)
        with unprivileged():
            assert name in error_line(zigzag(src, Path(folder, "out")))
            assert name in error_line(invoke("inspect", src))


# ---------------------------------------------------------------------------------------------------------------------
# The safetensors library as referee
# ---------------------------------------------------------------------------------------------------------------------

Described = dict[str, tuple[str, tuple[int, ...]]]


def read_by_library(file: bytes) -> Described | None:
    """Each tensor's dtype and shape as the safetensors library reads this file; None where it refuses to."""
    try:
        return {name: (t["dtype"], tuple(t["shape"])) for name, t in deserialize(file)}
    except SafetensorError:
        return None


@pytest.mark.parametrize("attack", hostile.SHARD_ATTACKS, ids=str)
def test_the_safetensors_library_refuses_the_damaged_shard_too(attack: hostile.Attack, src: Path) -> None:
    assert read_by_library((src / hostile.SHARD).read_bytes()) is not None
    attack.damage(src)
    tensors = read_by_library((src / hostile.SHARD).read_bytes())
    assert (tensors is not None) == (attack.library_reads_it is not None)


SOUND_SHARDS = hostile.base_tensors()
SOUND_TENSORS = {name: t for shard in SOUND_SHARDS.values() for name, t in shard.items()}
SOUND_FILE = hostile.pack(SOUND_TENSORS)
SOUND: Described = {name: (t.dtype, t.shape) for name, t in SOUND_TENSORS.items()}
SOUND_HEADER, SOUND_DATA = hostile.split(SOUND_FILE)

names = st.sampled_from(sorted(SOUND_TENSORS))
experts = st.sampled_from(sorted(name for name in SOUND_TENSORS if name.endswith("up_proj.weight")))
numbers = st.sampled_from([-1, 0, 1, 2, 16, 256, 1 << 31, 1 << 32, 1 << 61, 1 << 63, (1 << 64) - 1, 1 << 64, 10**400])
scalars = st.one_of(numbers, st.sampled_from([None, True, False, 0.0, 8.0, 1e300, "", "8", "BF16"]))
dtypes = st.sampled_from(["BF16", "F16", "F32", "F4", "F8_E4M3", "F8_E8M0", "I64", "BOOL", "bf16", "F15", ""])
steps = st.integers(-3, 3)
edits = st.one_of(
    st.tuples(st.just("set"), names, st.just("dtype"), dtypes | scalars),
    st.tuples(st.just("set"), names, st.just("shape"), st.lists(numbers, max_size=3) | scalars),
    st.tuples(st.just("set"), names, st.just("data_offsets"), st.lists(scalars, max_size=3)),
    st.tuples(st.just("set"), names, st.just("note"), scalars | st.lists(scalars)),
    st.tuples(st.just("drop"), names, st.sampled_from(["dtype", "shape", "data_offsets"])),
    st.tuples(st.just("nudge"), names, steps, steps),
    st.tuples(st.just("swap"), experts, experts),
    st.tuples(st.just("swap"), names, names),
    st.tuples(st.just("metadata"), st.dictionaries(st.text(max_size=3), st.text(max_size=3) | scalars, max_size=3)),
    st.tuples(st.just("last"), names),
)
spots = st.integers(0, len(SOUND_HEADER) - 1)
strokes = st.one_of(
    st.tuples(st.just("insert"), spots, st.sampled_from([bytes([c]) for c in b' \n\t\r{}[],:"0-.e\\u\x00\xff'])),
    st.tuples(st.just("space"), spots),
    st.tuples(st.just("delete"), spots),
    st.tuples(st.just("flip"), spots, st.integers(0, 7)),
)


def edit_header(header: dict[str, Any], edit: tuple[Any, ...]) -> None:
    """Apply one of `edits` to a header, in place."""
    match edit:
        case ("set", name, field, value):
            header[name][field] = value
        case ("drop", name, field):
            header[name].pop(field, None)
        case ("nudge", name, begin, end):
            old = json.loads(SOUND_HEADER)[name]["data_offsets"]
            header[name]["data_offsets"] = [old[0] + begin, old[1] + end]
        case ("swap", one, other):
            a, b = header[one].get("data_offsets"), header[other].get("data_offsets")
            header[one]["data_offsets"], header[other]["data_offsets"] = b, a
        case ("metadata", value):
            header["__metadata__"] = value
        case ("last", name):
            header[name] = header.pop(name)


def edit_text(text: bytes, stroke: tuple[Any, ...]) -> bytes:
    """Apply one of `strokes` to a header's text."""
    match stroke:
        case ("insert", at, char):
            return text[:at] + char + text[at:]
        case ("space", at):  # next to punctuation, where JSON allows it most of the time
            at = max(text.find(b",", at), text.find(b":", at), 0)
            return text[:at] + b" " + text[at:]
        case ("delete", at):
            return text[:at] + text[at + 1 :]
        case ("flip", at, bit):
            at = min(at, len(text) - 1)
            return text[:at] + bytes([text[at] ^ (1 << bit)]) + text[at + 1 :]
    raise AssertionError(stroke)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one file of a single-file checkpoint."""
    return hostile.write_single_file(tmp_path_factory.mktemp("single") / "src")


def same_verdict_as_the_library(single: Path, file: bytes) -> None:
    """Read this file as a model: refuse it where the library does, and accept it where it describes the same model."""
    single.write_bytes(file)
    tensors = read_by_library(file)
    result = invoke("inspect", single.parent)
    if tensors is None:
        assert single.name in error_line(result)
    elif tensors == SOUND and file[8:9] == b"{":  # the library takes blanks before the '{', the format does not
        succeeds(result)
    elif result.exit_code != 0:
        error_line(result)


@settings(max_examples=300, deadline=None)
@given(st.lists(edits, min_size=1, max_size=3))
def test_an_edited_header_is_judged_as_the_safetensors_library_judges_it(
    single: Path, todo: list[tuple[Any, ...]]
) -> None:
    header = json.loads(SOUND_HEADER)
    for edit in todo:
        edit_header(header, edit)
    same_verdict_as_the_library(single, hostile.join(json.dumps(header).encode(), SOUND_DATA))


@settings(max_examples=300, deadline=None)
@given(st.lists(strokes, min_size=1, max_size=3))
def test_a_garbled_header_is_judged_as_the_safetensors_library_judges_it(
    single: Path, todo: list[tuple[Any, ...]]
) -> None:
    text = SOUND_HEADER
    for stroke in todo:
        text = edit_text(text, stroke)
    same_verdict_as_the_library(single, hostile.join(text, SOUND_DATA))


@pytest.mark.parametrize("depth", [1, 124, 125, 126, 127, 900, 3000])
def test_a_deeply_nested_header_is_judged_as_the_safetensors_library_judges_it(single: Path, depth: int) -> None:
    text = SOUND_HEADER.replace(b'"dtype"', b'"more":' + b"[" * depth + b"]" * depth + b',"dtype"', 1)
    assert text != SOUND_HEADER
    same_verdict_as_the_library(single, hostile.join(text, SOUND_DATA))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 63) | st.integers(-20, 20).map(lambda n: n - 100))
def test_a_wrong_length_is_judged_as_the_safetensors_library_judges_it(single: Path, change: int) -> None:
    if change >= 0:  # one bit of the header's length
        number = int.from_bytes(SOUND_FILE[:8], "little") ^ (1 << change)
        file = number.to_bytes(8, "little") + SOUND_FILE[8:]
    else:  # bytes at the end, too few or too many
        file = (SOUND_FILE + bytes(20))[: len(SOUND_FILE) + change + 100]
    same_verdict_as_the_library(single, file)


# ---------------------------------------------------------------------------------------------------------------------
# Where to write to, and how the command is called
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [
        "src",
        "src/",
        "src/.",
        "src/new",
        "src/deep/er",
        "src/../src",
        "src/../src/new",
        "work/../src/new",
        "link",
        "link/new",
        "used",
        "file",
        "file/new",
        ".",
    ],
)
def test_an_output_directory_that_is_not_new_is_refused(where: str, src: Path, work: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(src)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    error_line(invoke("zigzag", "--src", src, "--ep", 2, "--out", f"{tmp_path}/{where}"))
    assert snapshot(tmp_path) == before


def test_the_source_is_recognized_however_it_is_spelled(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(src)
    before = snapshot(tmp_path)
    monkeypatch.chdir(src)
    for source, target in (".", "new"), ("../link", "../src/new"), ("../src", "../link/new"), (".", ".."):
        error_line(invoke("zigzag", "--src", source, "--ep", 2, "--out", target))
    assert snapshot(tmp_path) == before


def test_an_empty_output_directory_is_used(src: Path, work: Path) -> None:
    (work / "out").mkdir()
    succeeds(zigzag(src, work / "out"))
    succeeds(invoke("verify", work / "out"))


@pytest.mark.parametrize("group_limited", [True, False])
def test_an_already_resharded_source_is_refused(group_limited: bool, src: Path, work: Path) -> None:
    if not group_limited:
        hostile.config(n_group=1, topk_group=1)(src)
    succeeds(zigzag(src, work / "out"))
    before = snapshot(work)
    error_line(zigzag(work / "out", work / "again"))
    assert snapshot(work) == before


@pytest.mark.parametrize("contract", [True, False])
def test_a_resharded_source_that_lost_its_manifest_is_refused_by_its_config(
    contract: bool, out: Path, work: Path
) -> None:
    (out / MANIFEST).unlink()
    if not contract:
        hostile.json_file(hostile.CONFIG, lambda config: config.pop("expert_placement"))(out)
    line = error_line(zigzag(out, work / "again"))
    assert "already resharded" in line
    assert hostile.CONFIG in line
    assert not (work / "again").exists()


@pytest.mark.parametrize("layout", ["ranks", "source"])
def test_a_resharded_source_without_groups_that_lost_its_manifest_is_refused_by_its_files(
    layout: str, src: Path, work: Path
) -> None:
    """Nothing told it from an original: resharding it again gave an output whose "original" has other ids."""
    hostile.config(n_group=1, topk_group=1)(src)
    succeeds(zigzag(src, work / "out", "--layout", layout))
    (work / "out" / MANIFEST).unlink()
    line = error_line(zigzag(work / "out", work / "again"))
    assert "already resharded" in line
    assert ".safetensors" in line
    assert not (work / "again").exists()


@pytest.mark.parametrize("ep", [9, 16, 10**30])
def test_more_ranks_than_experts_are_refused(ep: int, src: Path, work: Path) -> None:
    line = error_line(zigzag(src, work / "out", ep=ep))
    assert says(line, str(ep)) and says(line, str(hostile.EXPERTS))
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("ep", [1, 0, -1])
def test_fewer_than_two_ranks_are_refused(ep: int, src: Path, work: Path) -> None:
    result = zigzag(src, work / "out", ep=ep)
    usage_error(result)
    assert says(result.stderr, str(ep))
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("ep", ["two", "2.5", "", "0x2"])
def test_a_rank_count_that_is_no_number_is_a_usage_error(ep: str, src: Path, work: Path) -> None:
    usage_error(zigzag(src, work / "out", ep=ep))
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    "size", ["lots", "5XB", "GB", "-5GB", "", "0", "nan", "inf", "1e999GB", "5", "0.5KB", "1.5.0GB", "5EB", "5i"]
)
def test_a_shard_size_that_is_no_size_is_a_usage_error(size: str, src: Path, work: Path) -> None:
    usage_error(zigzag(src, work / "out", f"--max-shard-size={size}"))
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("missing", ["--src", "--ep", "--out"])
def test_a_missing_option_is_a_usage_error_that_names_it(missing: str, src: Path, work: Path) -> None:
    options = {"--src": src, "--ep": 2, "--out": work / "out"}
    del options[missing]
    result = invoke("zigzag", *(word for option in options.items() for word in option))
    usage_error(result)
    assert missing in result.stderr
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["zagzig"], ["zigzag", "--sideways"], ["inspect"], ["verify"], ["restore"], ["restore", "somewhere"]]
)
def test_a_command_that_is_none_is_a_usage_error(words: list[str]) -> None:
    usage_error(invoke(*words))


# ---------------------------------------------------------------------------------------------------------------------
# verify, restore and inspect on what they cannot use
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["nothing", "work", "src", "src/config.json"])
def test_what_is_no_output_is_neither_verified_nor_restored(where: str, src: Path, work: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    error_line(invoke("verify", tmp_path / where))
    error_line(invoke("restore", tmp_path / where, "--out", work / "restored"))
    assert snapshot(tmp_path) == before


def test_an_output_is_not_verified_against_another_source(src: Path, out: Path, tmp_path: Path) -> None:
    shard = src / hostile.SHARD
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = invoke("verify", out, "--src", src)
    error_line(result)
    assert hostile.SHARD in result.stdout
    error_line(invoke("verify", out, "--src", tmp_path / "nothing"))


@pytest.mark.parametrize("where", ["work/used", "work/out", "work/out/new", "src"])
def test_restore_refuses_a_directory_that_is_not_new(where: str, src: Path, out: Path, work: Path) -> None:
    (work / "used").mkdir()
    (work / "used" / "notes.txt").write_text("mine")
    (src / "notes.txt").write_text("mine")
    before = snapshot(work.parent)
    error_line(invoke("restore", out, "--out", work.parent / where))
    assert snapshot(work.parent) == before


def neither_verified_nor_restored(out: Path) -> None:
    """Insist that both commands refuse this output in one line, and that restore leaves nothing loadable."""
    restored = out.with_name("restored")
    error_line(invoke("verify", out))
    error_line(invoke("restore", out, "--out", restored))
    assert not restored.exists() or loadable(restored) == []
    shutil.rmtree(restored, ignore_errors=True)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"{}", b'"reshard"', b"\xff\xfe", hostile.NESTED.encode(), hostile.DIGITS.encode()],
    ids=["empty", "brace", "array", "null", "object", "string", "binary", "nested", "digits"],
)
def test_a_manifest_that_is_none_is_refused(text: bytes, out: Path) -> None:
    (out / MANIFEST).write_bytes(text)
    neither_verified_nor_restored(out)


def test_a_truncated_manifest_is_refused(out: Path) -> None:
    whole = (out / MANIFEST).read_bytes()
    for keep in (1, len(whole) // 2, len(whole.rstrip()) - 1):
        (out / MANIFEST).write_bytes(whole[:keep])
        neither_verified_nor_restored(out)


def test_a_forged_manifest_that_says_the_same_is_accepted(out: Path, work: Path) -> None:
    forge(out, lambda m: None)
    succeeds(invoke("verify", out))
    succeeds(invoke("restore", out, "--out", work / "restored"))


@pytest.mark.parametrize("version", [999, 0, -1, 1.5, "1", None, [1]])
def test_a_manifest_of_another_version_is_refused(version: object, out: Path) -> None:
    forge(out, lambda m: m.update(version=version))
    neither_verified_nor_restored(out)
    hostile.json_file(MANIFEST, lambda m: m.update(version=version, digest="0" * 64))(out)
    neither_verified_nor_restored(out)


def test_a_manifest_whose_fields_are_gone_or_of_another_type_is_refused(out: Path) -> None:
    whole = (out / MANIFEST).read_text()
    for key, value in json.loads(whole).items():
        other = "five" if isinstance(value, int) else 5
        edits: list[Callable[[Any], object]] = [
            lambda m, key=key, other=other: m.update({key: other}),
            *[lambda m, key=key: m.pop(key)] * (key != "fingerprint"),  # older outputs have none
        ]
        for edit in edits:
            (out / MANIFEST).write_text(whole)
            (hostile.json_file(MANIFEST, edit) if key == "digest" else partial(forge, edit=edit))(out)
            neither_verified_nor_restored(out)


def replace_string(value: Any, old: str, new: str) -> Any:
    """A JSON value with every key and string that equals `old` replaced."""
    if isinstance(value, dict):
        return {replace_string(k, old, new): replace_string(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [replace_string(v, old, new) for v in value]
    return new if value == old else value


@pytest.mark.parametrize("evil", ["../evil.safetensors", "/{}/evil.safetensors", "x/../../evil.safetensors", "", "."])
def test_a_manifest_cannot_make_restore_write_or_read_elsewhere(evil: str, src: Path, out: Path, work: Path) -> None:
    evil = evil.format(str(work).lstrip("/"))
    whole = (out / MANIFEST).read_text()
    names = {path.name for path in (*src.iterdir(), *out.iterdir())}
    recorded = sorted(name for name in names if f'"{name}"' in whole)
    assert {hostile.CONFIG, *hostile.SHARDS} <= set(recorded)
    for name in recorded:
        (out / MANIFEST).write_text(whole)
        forge(out, lambda m, name=name: m.update(replace_string(m, name, evil)))
        neither_verified_nor_restored(out)
    assert list(work.parent.rglob("evil*")) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that the tests of this module share."""
    folder = tmp_path_factory.mktemp("finished")
    hostile.write_base(folder / "src")
    succeeds(zigzag(folder / "src", folder / "out"))
    return folder / "out"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_flipped_bit_in_the_manifest_never_ends_in_a_traceback(finished: Path, data: st.DataObject) -> None:
    whole = (finished / MANIFEST).read_bytes()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    (finished / MANIFEST).write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
    try:
        result = invoke("verify", finished)
    finally:
        (finished / MANIFEST).write_bytes(whole)
    if result.exit_code != 0:
        error_line(result)


# ---------------------------------------------------------------------------------------------------------------------
# What the command prints, and a dry run
# ---------------------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(src: Path, work: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    result = succeeds(zigzag(src, work / "out", "--dry-run"))
    assert result.stdout
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["shard cut in half", "index leaves a tensor out", "config absent", "gate missing"])
def test_a_dry_run_refuses_what_the_run_would_refuse(name: str, src: Path, work: Path) -> None:
    (attack,) = (attack for attack in hostile.ATTACKS if attack.name == name)
    attack.damage(src)
    error_line(zigzag(src, work / "out", "--dry-run"))
    assert list(work.iterdir()) == []


def test_json_output_is_one_document(src: Path, work: Path) -> None:
    for result in (
        invoke("inspect", src, "--json"),
        invoke("inspect", src, "--ep", 2, "--json"),
        zigzag(src, work / "out", "--dry-run", "--json"),
        zigzag(src, work / "out", "--json"),
    ):
        assert isinstance(json.loads(succeeds(result).stdout), dict)


def test_there_is_no_progress_bar_in_a_pipe(src: Path, work: Path) -> None:
    for result in (
        run("zigzag", "--src", src, "--ep", 2, "--out", work / "out"),
        run("verify", work / "out"),
        run("restore", work / "out", "--out", work / "restored"),
    ):
        assert result.returncode == 0, result.stderr
        assert not any(mark in result.stdout + result.stderr for mark in ("\r", "\x1b", "%|"))


# ---------------------------------------------------------------------------------------------------------------------
# Full disks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file system has one block left."""
    real = os.statvfs

    def statvfs(path: Any) -> os.statvfs_result:
        s = real(path)
        return os.statvfs_result(
            (s.f_bsize, s.f_frsize, s.f_blocks, 1, 1, s.f_files, s.f_ffree, s.f_favail, s.f_flag, s.f_namemax)
        )

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(os, "fstatvfs", statvfs)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_noticed_before_the_first_byte(src: Path, work: Path) -> None:
    before = snapshot(work)
    assert "space" in error_line(zigzag(src, work / "out"))
    assert snapshot(work) == before


def test_restore_notices_a_full_disk_before_the_first_byte(
    out: Path, work: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("full_disk")
    before = snapshot(work)
    assert "space" in error_line(invoke("restore", out, "--out", work / "restored"))
    assert snapshot(work) == before


def test_a_file_system_that_really_is_full_is_noticed_before_the_first_byte(src: Path, work: Path) -> None:
    in_namespace = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    mount = 'mount -t tmpfs -o size=4k none "$0"'
    probe = [*in_namespace, f'{mount}; "$@"', work, RESHARD, "--version"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    script = f'{mount}; s=0; "$@" || s=$?; find "$0" -type f; exit $s'
    command = [RESHARD, "zigzag", "--src", src, "--ep", "2", "--out", work / "out"]
    result = subprocess.run([*in_namespace, script, work, *command], capture_output=True, text=True, timeout=60)
    assert "space" in error_line(result)
    assert str(work) not in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 24 MB, in files enough to be interrupted between them."""
    folder = tmp_path_factory.mktemp("big") / "src"
    hostile.write_base(folder, hidden=768, inner=256)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def big_work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty directory that does not outlive its test, for large outputs."""
    folder = tmp_path_factory.mktemp("work")
    yield folder
    shutil.rmtree(folder)


WORKERS = default_workers()
SMALL_FILES = ("--max-shard-size", "1200KB")  # so that some files are complete when the run is interrupted


def interrupt(src: Path, out: Path, how: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Start `reshard zigzag`, and interrupt it once more files are there than threads, so that the journal has one."""
    command = slowly(0.5, "zigzag", "--src", src, "--ep", 2, "--out", out, *SMALL_FILES)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and len(list(out.parent.rglob("model-*.safetensors"))) < WORKERS + 2:
            time.sleep(0.001)
        process.send_signal(how)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode != 0, "finished before it could be interrupted"
    assert "Traceback" not in stderr
    unfinished = [path.name for path in out.rglob("*")]
    assert hostile.CONFIG not in unfinished and hostile.INDEX not in unfinished
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_loadable_and_is_picked_up(
    how: signal.Signals, big: Path, big_work: Path
) -> None:
    out = big_work / "out"
    before = snapshot(big)
    stopped = interrupt(big, out, how)
    if how is signal.SIGINT:
        assert stopped.returncode in (1, 130)
    error_line(invoke("verify", out))
    error_line(zigzag(big, out, *SMALL_FILES, ep=4))
    error_line(zigzag(big, out))
    again = run("zigzag", "--src", big, "--ep", 2, "--out", out, *SMALL_FILES)
    assert again.returncode == 0, again.stderr
    said = (again.stdout + again.stderr).lower()
    assert "resum" in said or "picked up" in said or "picking up" in said
    succeeds(invoke("verify", out, "--src", big))
    assert snapshot(big) == before


@pytest.mark.parametrize("ep", [2, 4])
def test_restart_begins_an_interrupted_run_anew(ep: int, big: Path, big_work: Path) -> None:
    out = big_work / "out"
    interrupt(big, out, signal.SIGINT)
    succeeds(zigzag(big, out, *SMALL_FILES, "--restart", ep=ep))
    succeeds(invoke("verify", out, "--src", big))
    assert [path.name for path in big_work.iterdir()] == ["out"]


def test_restart_does_not_remove_what_is_not_an_unfinished_output(src: Path, out: Path, work: Path) -> None:
    (work / "used").mkdir()
    (work / "used" / "notes.txt").write_text("mine")
    before = snapshot(work)
    error_line(zigzag(src, work / "used", "--restart"))
    error_line(zigzag(src, src, "--restart"))
    assert snapshot(work) == before


def test_a_source_that_changed_since_the_interruption_is_not_mixed_with_the_old_one(big: Path, big_work: Path) -> None:
    out, src = big_work / "out", big_work / "src"
    shutil.copytree(big, src)
    interrupt(src, out, signal.SIGINT)
    with (src / hostile.SHARD).open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    result = zigzag(src, out, *SMALL_FILES)
    if result.exit_code != 0:
        error_line(result)
        result = zigzag(src, out, *SMALL_FILES, "--restart")
    succeeds(result)
    succeeds(invoke("verify", out, "--src", src))


def test_a_broken_download_is_named_as_a_whole(tmp_path: Path) -> None:
    """One run says which files to download again, however many there are."""
    build(Spec("deepseek_v3", files=4), tmp_path / "source")
    files = sorted((tmp_path / "source").glob("*.safetensors"))
    for path in files[1:]:
        path.write_bytes(path.read_bytes()[:-8])
    result = zigzag(tmp_path / "source", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"reshard: error: {files[1]}: the header describes")
    also = f"; 2 more are damaged: {files[2].name}, {files[3].name}\n"
    assert result.stderr.endswith(f"truncated, download it again{also}")
    for path in files[2:]:
        path.unlink()
    result = zigzag(tmp_path / "source", tmp_path / "out")
    assert re.search(
        rf"its file ({files[2].name}|{files[3].name}) is missing; download it again; 1 more is missing: ", result.stderr
    )
