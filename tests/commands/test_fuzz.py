"""Random damage to what the commands read: a safetensors header, the index, the config, the manifest.

A sound checkpoint, or a sound output of one, is copied and one of its files damaged: as bytes, and as JSON, where
values are replaced by what nobody expects there, keys renamed, gone, or there twice. Then the commands are run on it,
in bounded memory and time. Whatever they read, they end with exit status 0, or 1 and one line; nothing outside `--out`
is touched; what they accept comes back byte for byte. The controls plant faults, and see them found.
"""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Spec, build
from click.testing import Result
from command_line import run, run_well, time_limit
from forgery import MANIFEST, record, sign
from hypothesis import HealthCheck, Phase, currently_in_test_context, example, given, note, reject, settings
from hypothesis import strategies as st
from oracle import assert_identical_trees
from scratch import memory_disk

import reshard.cli.outputs

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
LAYOUTS = ("ranks", "source")
MODELS = {
    "deepseek_v3": Spec("deepseek_v3", experts=8, layers=2),
    "deepseek_v3 in one file": Spec("deepseek_v3", experts=8, layers=2, files=1),
    "deepseek_v4 in one file": Spec("deepseek_v4", layers=2, files=1),
    "gpt_oss in one file": Spec("gpt_oss", layers=2, files=1),
    "qwen3_5_moe": Spec("qwen3_5_moe", layers=2, files=2),
    "qwen3_moe": Spec("qwen3_moe", layers=2, quantization="compressed-tensors"),
}
INDEXED = [name for name, spec in MODELS.items() if spec.files > 1]
LONG = bool(os.environ.get("RESHARD_LONG_TESTS"))
SECONDS = 30
MEMORY = 1 << 30  # bytes, beyond what the process has


def examples(short: int, long: int) -> settings:
    """As many examples as there is time for."""
    return settings(
        max_examples=long if LONG else short,
        deadline=None,
        phases=set(Phase) - {Phase.explain},  # which takes minutes
        derandomize=not LONG,  # the long form looks for what is new, the short one for what comes back
        suppress_health_check=[HealthCheck.too_slow],
    )


# ---------------------------------------------------------------------------------------------------------------------
# JSON taken apart
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """A value and, in an object, its key. A key, and what is neither array nor object, is its own text."""

    value: str | Items
    key: str | None = None


class Items(list[Item]):
    """An array, or an object, whose keys may stand in it twice."""

    def __init__(self, items: list[Item], brackets: str) -> None:
        super().__init__(items)
        self.brackets = brackets


def take_apart(text: bytes) -> Items:
    """The one value of a JSON text, as the only item of an array."""

    def items(value: Any) -> str | Items:
        if isinstance(value, dict):
            return Items([Item(items(value[key]), quoted(key)) for key in value], "{}")
        if isinstance(value, list):
            return Items([Item(items(element)) for element in value], "[]")
        return quoted(value)

    return Items([Item(items(json.loads(text)))], "[]")


def put_together(value: str | Items) -> str:
    """The JSON text of a value."""
    if isinstance(value, str):
        return value
    texts = (
        put_together(item.value) if item.key is None else f"{item.key}:{put_together(item.value)}" for item in value
    )
    return f"{value.brackets[0]}{','.join(texts)}{value.brackets[1]}"


def quoted(value: Any) -> str:
    """The JSON text of a scalar; what UTF-8 cannot hold is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if re.search("[\ud800-\udfff]", text) else text


# ---------------------------------------------------------------------------------------------------------------------
# Damage: data, which means something for every file
# ---------------------------------------------------------------------------------------------------------------------

ROOT = "@root@"  # stands for the directory in which nothing but --out may be touched


@dataclass(frozen=True)
class Deep:
    """A value nested in arrays or objects until there are but `spare` calls to the recursion limit."""

    brackets: str
    spare: int

    def text(self) -> str:
        """The JSON text."""
        frame, used = sys._getframe(), 0
        while frame.f_back:
            frame, used = frame.f_back, used + 1
        depth = sys.getrecursionlimit() - used - self.spare
        return ("[" if self.brackets == "[]" else '{"a":') * depth + "0" + self.brackets[1] * depth


@dataclass(frozen=True)
class Edit:
    """A change to JSON. `where` leads to an item: the number of a child, of a child of that, and so on, modulo; `other`
    leads to another one, or with `near` to one of its siblings.
    """

    kind: str
    where: tuple[int, ...]
    other: tuple[int, ...]
    near: bool
    value: str | Deep

    def apply(self, root: Items) -> None:
        """Change the value in `root`."""
        siblings, at = place(root, self.where)
        strangers, there = (siblings, self.other[0] % len(siblings)) if self.near else place(root, self.other)
        item, other = siblings[at], strangers[there]
        value = self.value.text() if isinstance(self.value, Deep) else self.value
        match self.kind:
            case "replace":
                item.value = value
            case "replace by its like":
                item.value = self.like(item.value)
            case "delete" if siblings is not root:
                del siblings[at]
            case "repeat":
                siblings.insert(at, Item(value if self.other[0] % 2 else copy.deepcopy(item.value), item.key))
            case "move":
                siblings.insert(0, siblings.pop(at))
            case "swap":
                item.value, other.value = copy.deepcopy(other.value), copy.deepcopy(item.value)
            case "copy":
                item.value = copy.deepcopy(other.value)
            case "swap keys" if item.key and other.key:
                item.key, other.key = other.key, item.key
            case "add" if isinstance(item.value, Items):
                key = NAMES[self.other[0] % len(NAMES)] if item.value.brackets == "{}" else None
                item.value.append(Item(value, key))
            case "rename" if item.key:
                item.key = value if value.startswith('"') else quoted(value[:80])
            case "part of key" if item.key:
                item.key = self.with_another_part(item.key, value)
            case "part of value" if isinstance(item.value, str):
                item.value = self.with_another_part(item.value, value)
            case "nudge" if isinstance(item.value, str) and re.fullmatch("[0-9]{1,20}", item.value):
                item.value = str(int(item.value) + self.other[0] % 9 - 4)

    def like(self, value: str | Items) -> str | Items:
        """Another value of the same type."""
        if isinstance(value, Items):
            return Items(value[: self.other[0] % (len(value) + 1)], value.brackets)
        likes = STRINGS if value.startswith('"') else COUNTS if value.isdigit() else ["true", "false", "null", "0.5"]
        return likes[self.other[0] % len(likes)]

    def with_another_part(self, text: str, value: str) -> str:
        """The string `text` cut short, or one of the parts between its dots replaced."""
        if not (text.startswith('"') and value.startswith('"')):
            return text
        way, at = self.other[0] % 4, self.other[0] // 4
        parts = json.loads(text).split(".")
        at %= len(parts)
        if way < 2:
            parts[at] = json.loads(value) if way else ""
            return quoted(".".join(parts))
        return quoted(".".join(parts[:at]) + "." * (way - 2))


def place(root: Items, where: tuple[int, ...]) -> tuple[Items, int]:
    """The item that `where` leads to: its siblings, and which of them it is."""
    siblings, at = root, 0
    for step in where:
        children = siblings[at].value
        if isinstance(children, str) or not children:
            break
        siblings, at = children, step % len(children)
    return siblings, at


@dataclass(frozen=True)
class Stroke:
    """A change to bytes; positions are modulo."""

    kind: str
    at: int
    size: int
    new: bytes

    def apply(self, data: bytes) -> bytes:
        """The bytes, changed."""
        at = self.at % (len(data) or 1)
        before, piece, after = data[:at], data[at : at + self.size], data[at + self.size :]
        match self.kind:
            case "flip":
                return before + bytes(byte ^ 1 << self.at % 8 for byte in data[at : at + 1]) + data[at + 1 :]
            case "insert":
                return before + self.new + data[at:]
            case "replace":
                return before + self.new + after
            case "delete":
                return before + after
            case "repeat":
                return before + piece + piece + after
        return before


COUNTS = [
    *map(str, (0, 1, 2, 3, 4, 7, 8, 9, 100, 1_000_000)),
    *(str((1 << bits) + more) for bits in (31, 32, 53, 63, 64) for more in (-1, 0)),
]
NUMBERS = [
    *("-1", "-0", "0.5", "8.0", "1e2", "1e308", "1e999", "-1e-400", "NaN", "-Infinity"),
    *("9" * digits for digits in (20, 400, 4300, 5000)),
]
NAMES = [
    *map(quoted, ("", ".", "3", "07", "99", "experts", "a.experts.", "model.layers.1.mlp.experts.", "digest")),
    *map(quoted, ("__metadata__", "dtype", "shape", "data_offsets", "weight_map", "metadata", "model_type")),
    *map(quoted, ("text_config", "expert_placement", "n_group", "topk_group", "num_experts", "topk_method")),
    *map(quoted, ("quantization_config", "architectures", "auto_map", "routed_scaling_factor", "staged_ranks")),
]
STRINGS = [
    *map(quoted, ("../x", "../x.safetensors", "../x/y", "../source/config.json", "a/../../x", "a/../x", "..", "/")),
    *map(quoted, (f"{ROOT}/x", f"{ROOT}/x.safetensors", f"{ROOT}/source/config.json", "./x", "a//x", "a/", "~/x")),
    *map(quoted, ("a/b", "figures", "a\0b", "a\nb", "a\rb", "\x1b[2J", "\ud800", "\udfff.safetensors", "\ufffe")),
    *map(
        quoted, ("\u202e", "%s {0}", "\U0001f600", "É", "١", "null", "BF16", "F4", "U8", "I64", "x" * 5000, "é" * 5000)
    ),
    *map(
        quoted, (CONFIG, INDEX, MANIFEST, f"{CONFIG}.partial", ".reshard-journal", "model.safetensors", "x.safetensors")
    ),
    *map(quoted, ("model-shared-00001-of-00001.safetensors", "model-ep00-of-02-00001-of-00001.safetensors")),
    *map(quoted, ("deepseek_v3", "qwen3_moe", "greedy", "softmax", "sigmoid", "sqrtsoftplus", "ranks", "source")),
    *map(quoted, ("model.layers.1.mlp.experts.3", r"re:.*experts\.3\..*", "re:[[a-z]", "re:(?i", "*.experts.[12].*")),
    *map(quoted, ("0" * 64, "eJwDAAAAAAE=", "eJw=", "!")),
]
OTHERS = [
    *("null", "true", "false", "[]", "{}", "[[]]", "[{}]", "[0]", "[1,0]", "[0,0]", "[8,0]", "[null]", '[""]'),
    *('{"":{}}', '{"a":1,"a":2}', '{"experts":[1]}', '{"n_group":3}', "nul", "", ",", "[" * 50_000),
]
KINDS = (
    *("replace", "replace by its like", "replace by its like", "delete", "repeat", "move", "swap", "copy", "swap keys"),
    *("add", "rename", "part of key", "part of key", "part of value", "part of value", "nudge"),
)

ways = st.lists(st.integers(0, 999), min_size=1, max_size=6).map(tuple)
values = st.one_of(
    *(st.sampled_from(texts) for texts in (COUNTS, NUMBERS, NAMES, STRINGS, OTHERS)),
    st.builds(Deep, st.sampled_from(["[]", "{}"]), st.integers(0, 80)),
)
edits = st.lists(st.builds(Edit, st.sampled_from(KINDS), ways, ways, st.booleans(), values), min_size=1, max_size=3)
strokes = st.lists(
    st.builds(
        Stroke,
        st.sampled_from(["flip", "insert", "replace", "delete", "repeat", "truncate"]),
        st.integers(0, 1 << 16),
        st.integers(0, 4) | st.integers(0, 1 << 12),
        st.binary(max_size=3) | st.sampled_from([c.encode() for c in '"{}[],:0-\\'] + [b"\\u0000", b"\\ud800", b"../"]),
    ),
    min_size=1,
    max_size=3,
)
damages = edits | edits | strokes
names = st.lists(  # the children of a header are its tensors
    st.builds(
        Edit,
        st.sampled_from(["part of key", "part of key", "swap keys", "rename"]),
        st.tuples(st.integers(0, 999)),
        st.tuples(st.integers(0, 999)),
        st.booleans(),
        st.sampled_from([*NAMES, *STRINGS]),
    ),
    min_size=1,
    max_size=3,
)
Damage = list[Edit] | list[Stroke]


def damaged_text(text: bytes, damage: Damage, root: Path) -> bytes:
    """A JSON text after `damage`."""
    if isinstance(damage[0], Stroke):
        return damaged_bytes(text, damage)
    value = take_apart(text)
    for edit in damage:
        edit.apply(value)
    written = "".join(put_together(item.value) for item in value)
    return written.replace(ROOT, str(root)).encode()


def damaged_bytes(data: bytes, damage: Damage) -> bytes:
    """Bytes after `damage`, which is strokes."""
    for stroke in damage:
        assert isinstance(stroke, Stroke)
        data = stroke.apply(data)
    return data


def damaged_shard(data: bytes, damage: Damage, root: Path, length_follows: bool) -> bytes:
    """A safetensors file after `damage` to its header, whose length may or may not follow."""
    end = 8 + int.from_bytes(data[:8], "little")
    if isinstance(damage[0], Stroke) and not length_follows:
        return damaged_bytes(data[:end], damage) + data[end:]
    text = damaged_text(data[8:end], damage, root)
    return (len(text).to_bytes(8, "little") if length_follows else data[:8]) + text + data[end:]


# ---------------------------------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def bounds() -> Iterator[None]:
    """Bounded time and memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with time_limit(SECONDS):
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def contents(root: Path) -> dict[str, tuple[bytes, int] | None]:
    """Bytes and time of every file below `root`, None for a directory, by path."""
    found: dict[str, tuple[bytes, int] | None] = {}
    for folder, names, files in os.walk(root):
        found |= dict.fromkeys(f"{folder}/{name}" for name in names)
        for path in (f"{folder}/{name}" for name in files):
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123  a thousand times a second
                found[path] = file.readall(), os.fstat(file.fileno()).st_mtime_ns
    return found


class Judge:
    """Runs commands on what is below `root`, and insists on what holds whatever they read."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen = contents(root)

    def __call__(self, *arguments: object, out: Path | None = None) -> Result:
        """The result of a command that may touch `out` only."""
        with bounds():
            result = run(*arguments, *(("--out", out) if out else ()))
        command = f"reshard {' '.join(map(str, arguments))}"
        before, self._seen = self._seen, contents(self._root)
        touched = {name for name in before.keys() | self._seen.keys() if before.get(name, 0) != self._seen.get(name, 0)}
        outside = sorted(name for name in touched if out is None or not Path(name).is_relative_to(out))
        assert not outside, f"{command} touched {outside}"
        assert result.exit_code in (0, 1), f"{command}: exit status {result.exit_code}: {result.output}"
        if result.exit_code == 0:
            assert result.stderr == "", f"{command}: {result.stderr}"
        else:
            line, end, more = result.stderr.partition("\n")
            assert line.startswith("reshard: error: ") and end and not more, f"{command}: {result.stderr}"
            assert line.isprintable() and len(line) < 2000, f"{command}: {line}"
        return result

    def well(self, *arguments: object, out: Path | None = None) -> None:
        """Run a command that must end well."""
        assert_done(self(*arguments, out=out))


def assert_done(result: Result) -> None:
    """Insist on exit status 0."""
    assert result.exit_code == 0, result.output


def judge_source(root: Path) -> None:
    """Run what takes a source on `root`/source: what zigzag accepts is verified, and restored byte for byte."""
    judge, source = Judge(root), root / "source"
    inspected = judge("inspect", source)
    judge("inspect", source, "--ep", 2)
    judge("verify", root / "output", "--src", source)
    for layout in LAYOUTS:
        out, restored = root / f"output-{layout}", root / f"restored-{layout}"
        command = ("zigzag", "--src", source, "--ep", 2, "--layout", layout)
        planned = judge(*command, "--dry-run", "--out", out)
        if judge(*command, out=out).exit_code == 0:
            assert_done(inspected)
            assert_done(planned)
            judge.well("verify", out)
            judge.well("verify", out, "--src", source)
            judge.well("restore", out, out=restored)
            assert_identical_trees(source, restored)
        else:
            assert not [name for name in (CONFIG, INDEX, MANIFEST) if (out / name).exists()], "an engine would load it"


def judge_output(root: Path, forged: bool) -> None:
    """Run what takes an output on `root`/output, damaged: unless its manifest was forged to agree, that is found."""
    judge, output, restored, staged = Judge(root), root / "output", root / "restored", root / "staged"
    judge("inspect", output)
    quick = judge("verify", output, "--quick")
    verified = judge("verify", output)
    judge("verify", output, "--src", root / "source")
    was_restored = judge("restore", output, out=restored).exit_code == 0
    was_staged = judge("stage", output, "--ranks", 0, out=staged).exit_code == 0
    if verified.exit_code == 0:
        assert_done(quick)
    if not forged:
        assert verified.exit_code == 1, "damage was not found"
        if was_restored:
            assert_identical_trees(root / "source", restored)
        if was_staged:
            judge.well("verify", staged)


# ---------------------------------------------------------------------------------------------------------------------
# The tests
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each of the models its `source`, and an output in each of the layouts."""
    root = tmp_path_factory.mktemp("sound")
    for name, spec in MODELS.items():
        build(spec, root / name / "source")
        for layout in LAYOUTS:
            out = root / name / f"output-{layout}"
            run_well("zigzag", "--src", root / name / "source", "--ep", 2, "--out", out, "--layout", layout)
        run_well("verify", out, "--src", root / name / "source")  # what this imports takes address space
    return root


@contextmanager
def copied(sound: Path, model: str, layout: str = "ranks") -> Iterator[Path]:
    """A directory with copies of the model's `source` and of its `output`, to damage."""
    with tempfile.TemporaryDirectory(dir=memory_disk()) as folder:
        root = Path(folder)
        shutil.copytree(sound / model / "source", root / "source")
        shutil.copytree(sound / model / f"output-{layout}", root / "output")
        yield root


def shard_of(directory: Path, which: int) -> Path:
    """One of the safetensors files in `directory`."""
    shards = sorted(directory.glob("*.safetensors"))
    return shards[which % len(shards)]


def note_change(path: Path, was: bytes, now: bytes) -> None:
    """Tell what the damage came to."""
    least = min(len(was), len(now))
    begin = next((at for at in range(least) if was[at] != now[at]), least)
    end = next((at for at in range(least - begin) if was[-1 - at] != now[-1 - at]), least - begin)
    old, new = was[max(0, begin - 60) : len(was) - end + 20], now[max(0, begin - 60) : len(now) - end + 20]
    note(f"{path.name}, from byte {begin} on: was {old[:300]!r}, is {new[:300]!r}")


def judge_damaged(path: Path, now: bytes, judge_all: Callable[[], None]) -> None:
    """Write `now` to the file, and judge all that can be done with it."""
    was = path.read_bytes()
    if was == now:
        reject()
    path.write_bytes(now)
    try:
        judge_all()
    except BaseException:
        if currently_in_test_context():
            note_change(path, was, now)
        raise


def damage_source_header(sound: Path, model: str, damage: Damage, which: int, length_follows: bool) -> None:
    """Judge what the commands make of a source with a damaged header."""
    with copied(sound, model) as root:
        shard = shard_of(root / "source", which)
        now = damaged_shard(shard.read_bytes(), damage, root, length_follows)
        judge_damaged(shard, now, lambda: judge_source(root))


def damage_source_file(sound: Path, model: str, name: str, damage: Damage) -> None:
    """Judge what the commands make of a source whose file `name` is damaged."""
    with copied(sound, model) as root:
        path = root / "source" / name
        judge_damaged(path, damaged_text(path.read_bytes(), damage, root), lambda: judge_source(root))


def damage_manifest(sound: Path, model: str, layout: str, damage: Damage, forged: bool) -> None:
    """Judge what the commands make of an output whose manifest is damaged, and may be `forged` to look sound."""
    with copied(sound, model, layout) as root:
        path = root / "output" / MANIFEST
        now = damaged_text(path.read_bytes(), damage, root)
        judge_damaged(path, sign(now) if forged else now, lambda: judge_output(root, forged))


def damage_output_file(
    sound: Path, model: str, layout: str, name: str, which: int, damage: Damage, forged: bool
) -> None:
    """Judge what the commands make of an output with another damaged file, of which the manifest may know."""
    with copied(sound, model, layout) as root:
        output = root / "output"
        path = output / name if name else shard_of(output, which)
        was = path.read_bytes()
        now = damaged_text(was, damage, root) if name else damaged_shard(was, damage, root, length_follows=True)

        def judge_all() -> None:
            if forged:
                record(output, path.name)
            judge_output(root, forged)

        judge_damaged(path, now, judge_all)


models = st.sampled_from(sorted(MODELS))
layouts = st.sampled_from(LAYOUTS)


def of_header(damage: Edit, model: str = "deepseek_v3") -> Callable[[Any], Any]:
    """An example of a source whose first header is damaged."""
    return example(model=model, damage=[damage], which=0, length_follows=True)


@examples(90, 4000)
@of_header(Edit("replace", (0,), (0,), False, "0"))
@of_header(Edit("part of key", (3,), (164,), False, '""'), model="gpt_oss in one file")
@of_header(Edit("add", (1,), (0,), False, Deep("[]", 32)))
@of_header(Edit("add", (1,), (0,), False, Deep("[]", 30)))
@given(
    model=models,
    damage=damages | names,
    which=st.integers(0, 2),
    length_follows=st.sampled_from([True, True, True, False]),
)
def test_a_damaged_header_is_refused_in_one_line_or_resharded_and_restored(
    sound: Path, model: str, damage: Damage, which: int, length_follows: bool
) -> None:
    damage_source_header(sound, model, damage, which, length_follows)


@examples(60, 2000)
@given(model=st.sampled_from(INDEXED), damage=damages)
def test_a_damaged_index_is_refused_in_one_line_or_resharded_and_restored(
    sound: Path, model: str, damage: Damage
) -> None:
    damage_source_file(sound, model, INDEX, damage)


@examples(90, 4000)
@example(model="deepseek_v3", damage=[Edit("replace", (0,), (0,), False, '"re:[[a-z]"')])
@example(model="deepseek_v3", damage=[Stroke("insert", 133, 0, b"\\ud800")])
@example(model="deepseek_v3", damage=[Edit("repeat", (0,), (1,), False, Deep("[]", 27))])
@example(model="qwen3_5_moe", damage=[Edit("replace by its like", (1,), (224,), False, "0")])
@given(model=models, damage=damages)
def test_a_damaged_config_is_refused_in_one_line_or_resharded_and_restored(
    sound: Path, model: str, damage: Damage
) -> None:
    damage_source_file(sound, model, CONFIG, damage)


@examples(90, 6000)
@example(
    model="deepseek_v3",
    layout="ranks",
    damage=[Edit("replace by its like", (184,), (10,), False, "0")],
    forged=True,
)
@example(model="deepseek_v3", layout="ranks", damage=[Edit("add", (729, 6), (0,), False, "[]")], forged=True)
@example(model="deepseek_v3", layout="ranks", damage=[Edit("replace", (24,), (0,), False, Deep("{}", 20))], forged=True)
@given(model=models, layout=layouts, damage=damages, forged=st.sampled_from([True, True, False]))
def test_a_damaged_manifest_is_refused_in_one_line_and_never_makes_a_command_write_elsewhere(
    sound: Path, model: str, layout: str, damage: Damage, forged: bool
) -> None:
    damage_manifest(sound, model, layout, damage, forged)


def of_config(*damage: Edit, model: str = "deepseek_v3") -> Callable[[Any], Any]:
    """An example of an output whose config.json is damaged, its manifest forged to agree."""
    return example(model=model, layout="ranks", name=CONFIG, which=0, damage=list(damage), forged=True)


@examples(60, 3000)
@of_config(Edit("delete", (1,), (0,), False, "0"))
@of_config(Edit("replace by its like", (294,), (19,), False, "0"))
@of_config(Edit("replace by its like", (294,), (11,), False, "0"))
@of_config(Edit("replace by its like", (294,), (4,), False, "0"))
@of_config(
    Edit("delete", (0,), (0,), False, "0"),
    Edit("replace by its like", (567,), (443,), False, "0"),
    model="qwen3_moe",
)
@given(
    model=models,
    layout=layouts,
    name=st.sampled_from([CONFIG, INDEX, ""]),
    which=st.integers(0, 4),
    damage=damages,
    forged=st.booleans(),
)
def test_another_damaged_file_of_an_output_is_found_in_one_line(
    sound: Path, model: str, layout: str, name: str, which: int, damage: Damage, forged: bool
) -> None:
    damage_output_file(sound, model, layout, name, which, damage, forged)


def shout(*arguments: object, **options: object) -> None:
    """A command that ends as no command should."""
    raise ValueError("a fault that no user should see")


def test_a_traceback_a_touched_file_and_a_lost_byte_would_be_noticed(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controls of the tests above: each plants a fault, and sees it found."""
    replace = [Edit("replace", (0,), (0,), False, "0")]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no user should see"):
        patch.setattr("reshard.cli.outputs.plan_placement", shout)
        damage_source_file(sound, "qwen3_moe", CONFIG, replace)
    plan_placement = reshard.cli.outputs.plan_placement

    def careless(src: str, *arguments: Any, **options: Any) -> Any:
        (Path(src) / "litter").touch()
        return plan_placement(src, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match=r"touched .*litter"):
        patch.setattr("reshard.cli.outputs.plan_placement", careless)
        damage_source_file(sound, "qwen3_moe", CONFIG, replace)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="damage was not found"):
        patch.setattr(sys.modules["reshard.commands.verify"], "_check_file", lambda *arguments: iter(()))
        with copied(sound, "qwen3_moe") as root:
            path = shard_of(root / "output", 0)
            judge_damaged(path, path.read_bytes()[:-1] + b"?", lambda: judge_output(root, forged=False))
