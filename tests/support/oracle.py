"""An independent judge of resharded checkpoints: says what an output must be from the source alone.

It shares no code with the package: its own header reader, its own zigzag arithmetic, its own rules for names.
Every file is read whole, which is right for test data and for nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from blake3 import blake3
from safetensors import safe_open

Placement = Callable[[int, int], list[int]] | dict[str, list[int]]  # by experts and ranks, or by MoE module

INDEX = "model.safetensors.index.json"
MANIFEST = "reshard_manifest.json"
CONFIGS = ("config.json", "hf_quant_config.json", "quant_model_description.json")
DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
EXPERT = re.compile(r"(?P<module>.*)\.experts\.(?P<id>\d+)\.(?P<rest>.+)")
FUSED = re.compile(r"(?P<module>.*)\.experts\.[a-z_]+")
FUSED_BESIDE_ROUTER = re.compile(  # Granite's and Step's
    r"(?P<module>.*\.block_sparse_moe)\.(?:input|output)_linear\.weight"
    r"|(?P<step>.*\.moe)\.(?:gate|up|down)_proj\.weight"
)
ROWS_BY_EXPERT = {  # names below the module that holds the experts
    *("gate.weight", "gate.bias", "gate.bias_vl", "gate.e_score_correction_bias", "gate.expert_bias", "gate.wg.weight"),
    *("router.weight", "router.bias", "router.gate.weight", "router.layer.weight", "router.proj.weight"),
    *("router.per_expert_scale", "e_score_correction_bias", "expert_bias", "router_bias"),
    "moe_statics.e_score_correction_bias",
}
EXPERT_IDS = "gate.tid2eid"
OF_HIDDEN_SIZE = "router.scale"
KEPT = "talker."  # Qwen3-Omni's second model, which routes by another config
OUTPUT_FILE = re.compile(
    r"(?P<series>model-(?:shared|ep(?P<rank>\d{2,})-of-(?P<ranks>\d{2,})))"
    r"-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors"
)


@dataclass(frozen=True)
class Located:
    """A tensor and where its bytes lie in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    data: bytes


Files = dict[str, tuple[dict[str, str], dict[str, Located]]]  # by file name: metadata, tensors


@dataclass(frozen=True)
class Wanted:
    """A tensor that the output must hold; `rank` is None where every rank needs it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    rank: int | None


def zigzag(experts: int, ranks: int) -> list[int]:
    """physical_to_logical [experts]: rank after rank, each the experts that it is dealt in turn."""
    return [expert for rank in range(ranks) for expert in range(rank, experts, ranks)]


def linear(experts: int, ranks: int) -> list[int]:
    """physical_to_logical [experts] of a checkpoint that nobody has touched."""
    del ranks
    return list(range(experts))


def owner(physical: int, experts: int, ranks: int) -> int:
    """The rank that vLLM's linear rule gives a physical expert to."""
    owners = [rank for rank in range(ranks) for _ in range(experts // ranks + (rank < experts % ranks))]
    return owners[physical]


def assert_resharded(
    source: Path,
    output: Path,
    ranks: int,
    placement: Placement = zigzag,
    *,
    strategy: str = "zigzag",
    by_rank: bool = True,
    undigested: int = 0,
) -> None:
    """Raise AssertionError that says where `output` is not `source` dealt to `ranks` EP ranks.

    Its files are those of the ranks, or with `by_rank` false those of the source. `undigested` says how many of its
    tensors may lack a digest, and do.
    """
    wanted, placements = _wanted_tensors(source, ranks, placement)
    if _group_limited(json.loads((source / "config.json").read_bytes())):
        wanted = {
            name: replace(tensor, shape=(prod(tensor.shape),)) if _is_gate(name) else tensor
            for name, tensor in wanted.items()
        }
    files = {path.name: read_safetensors(path) for path in sorted(output.glob("*.safetensors"))}
    if by_rank:
        _check_file_names(files.keys(), ranks)
    else:
        _check_same_files(source, files, placements)
    _check_tensors(wanted, files, ranks if by_rank else None)
    _check_layout(source, output, files, by_rank, placements)
    _check_index(output, files)
    contract = _check_configs(source, output, placements)
    if contract is not None:
        _check_contract(contract, source, ranks, placements)
    _check_other_files(source, output)
    _check_manifest(output, files, ranks, placements, strategy, undigested)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Located]]:
    """A file's `__metadata__` and its tensors; any overlap, hole or size that does not fit is an error."""
    raw = path.read_bytes()
    assert len(raw) >= 8, f"{path.name} is too short for a safetensors file"
    (length,) = struct.unpack("<Q", raw[:8])
    pairs = json.loads(raw[8 : 8 + length], object_pairs_hook=list)
    names = [name for name, _ in pairs]
    assert len(names) == len(set(names)), f"{path.name} names a tensor twice"
    metadata: dict[str, str] = {}
    tensors = {}
    for name, entry in pairs:
        if name == "__metadata__":
            metadata = dict(entry)
            continue
        fields = dict(entry)
        start, end = fields["data_offsets"]
        size = prod(fields["shape"]) * DTYPE_BYTES[fields["dtype"]]
        assert end - start == size, f"{path.name}: {name} has {end - start} bytes, its shape says {size}"
        start, end = 8 + length + start, 8 + length + end
        tensors[name] = Located(fields["dtype"], tuple(fields["shape"]), start, raw[start:end])
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        assert tensor.start == position, f"{path.name}: {name} starts at {tensor.start}, not at {position}"
        position += len(tensor.data)
    assert position == len(raw), f"{path.name} ends at {len(raw)}, its tensors end at {position}"
    return metadata, tensors


def tree(directory: Path) -> dict[str, str]:
    """Every path below `directory`: a file's SHA-256, or "dir"."""
    return {
        path.relative_to(directory).as_posix(): "dir"
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
    }


def assert_identical_trees(expected: Path, actual: Path) -> None:
    """Raise AssertionError that lists what is missing, extra or different in `actual`."""
    _compare_trees(tree(expected), tree(actual))


def _compare_trees(expected: dict[str, str], actual: dict[str, str]) -> None:
    missing = sorted(expected.keys() - actual.keys())
    extra = sorted(actual.keys() - expected.keys())
    different = sorted(name for name in expected.keys() & actual.keys() if expected[name] != actual[name])
    assert not (missing or extra or different), f"missing {missing}, extra {extra}, different {different}"


def _wanted_tensors(source: Path, ranks: int, placement: Placement) -> tuple[dict[str, Wanted], dict[str, list[int]]]:
    """All tensors of the output by name, and each MoE module's physical_to_logical."""
    tensors: dict[str, Located] = {}
    for path in source.glob("*.safetensors"):
        tensors |= read_safetensors(path)[1]
    counts: dict[str, int] = defaultdict(int)
    for name, tensor in tensors.items():
        if name.startswith(KEPT):
            continue
        if match := EXPERT.fullmatch(name):
            counts[match["module"]] = max(counts[match["module"]], int(match["id"]) + 1)
        elif module := _fused_module(name):
            counts[module] = tensor.shape[0]
    placements = {
        module: placement[module] if isinstance(placement, dict) else placement(count, ranks)
        for module, count in counts.items()
    }
    wanted = {}
    for name, tensor in tensors.items():
        new_name, data, rank = name, tensor.data, None
        if name.startswith(KEPT):
            pass
        elif match := EXPERT.fullmatch(name):
            module = match["module"]
            physical = placements[module].index(int(match["id"]))
            new_name = f"{module}.experts.{physical}.{match['rest']}"
            rank = owner(physical, counts[module], ranks)
        elif module := _fused_module(name):
            data = _permuted(data, placements[module])
        elif below := _below_module(name, placements):
            module, rest = below
            if rest == EXPERT_IDS:
                data = _mapped_ids(tensor, placements[module])
            elif rest in ROWS_BY_EXPERT:
                data = _permuted(data, placements[module])
            else:
                router = rest.split(".")[0] in ("gate", "router")
                assert not router or rest == OF_HIDDEN_SIZE, f"no rule for {name}"
        wanted[new_name] = Wanted(tensor.dtype, tensor.shape, data, rank)
    return wanted, placements


def _fused_module(name: str) -> str | None:
    """The module whose experts the tensor `name` holds, all of them."""
    if match := FUSED.fullmatch(name):
        return match["module"]
    match = FUSED_BESIDE_ROUTER.fullmatch(name)
    return match and (match["module"] or match["step"])


def _below_module(name: str, modules: Iterable[str]) -> tuple[str, str] | None:
    """The one of `modules` that the tensor `name` is in, and its name below that."""
    return next(((module, name[len(module) + 1 :]) for module in modules if name.startswith(f"{module}.")), None)


def _permuted(data: bytes, physical_to_logical: list[int]) -> bytes:
    """new[p] = old[physical_to_logical[p]] for rows of equal size."""
    size = len(data) // len(physical_to_logical)
    return b"".join(data[e * size : (e + 1) * size] for e in physical_to_logical)


def _mapped_ids(tensor: Located, physical_to_logical: list[int]) -> bytes:
    """new = logical_to_physical[old] for every id of a token table."""
    code = {"I64": "q", "I32": "i"}[tensor.dtype]
    layout = f"<{prod(tensor.shape)}{code}"
    ids = struct.unpack(layout, tensor.data)
    return struct.pack(layout, *(physical_to_logical.index(e) for e in ids))


def _check_file_names(names: Iterable[str], ranks: int) -> None:
    """model-shared-… and model-epRR-of-NN-…, numbered 1..n of n each."""
    numbers: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name in names:
        match = OUTPUT_FILE.fullmatch(name)
        assert match, f"{name} is no output file's name"
        if match["rank"] is not None:
            rank, of = int(match["rank"]), int(match["ranks"])
            assert of == ranks and rank < ranks, f"{name} belongs to no rank of {ranks}"
        numbers[match["series"]].append((int(match["number"]), int(match["count"])))
    for series, found in numbers.items():
        expected = [(number, len(found)) for number in range(1, len(found) + 1)]
        assert sorted(found) == expected, f"{series}: numbers {sorted(found)}, expected {expected}"


def _check_same_files(source: Path, files: Files, placements: dict[str, list[int]]) -> None:
    """The source's names, and in each file the same tensors in the same order, as far into a page as they were."""
    sources = {path.name: read_safetensors(path)[1] for path in source.glob("*.safetensors")}
    assert sources.keys() == files.keys(), f"files {sorted(files)}, the source has {sorted(sources)}"
    for name, tensors in sources.items():
        expected = [(tensor.start % 4096, _mapped_name(key, placements)) for key, tensor in _in_order(tensors)]
        found = [(tensor.start % 4096, key) for key, tensor in _in_order(files[name][1])]
        assert found == expected, f"{name} holds {found}, expected {expected}"


def _in_order(tensors: dict[str, Located]) -> list[tuple[str, Located]]:
    return sorted(tensors.items(), key=lambda item: (item[1].start, len(item[1].data)))


def _check_tensors(wanted: dict[str, Wanted], files: Files, ranks: int | None) -> None:
    """Every tensor once, as it should be, and unless `ranks` is None in a file of its rank."""
    copies = Counter(name for _, tensors in files.values() for name in tensors)
    assert max(copies.values()) == 1, f"more than once: {[name for name, n in copies.items() if n > 1]}"
    missing, extra = sorted(wanted.keys() - copies.keys()), sorted(copies.keys() - wanted.keys())
    assert not (missing or extra), f"tensors missing {missing}, extra {extra}"
    for file, (_, tensors) in files.items():
        match = OUTPUT_FILE.fullmatch(file)
        rank = int(match["rank"]) if match and match["rank"] is not None else None
        for name, tensor in tensors.items():
            want = wanted[name]
            assert (tensor.dtype, tensor.shape) == (want.dtype, want.shape), (
                f"{name} is {tensor.dtype} {tensor.shape}, expected {want.dtype} {want.shape}"
            )
            assert tensor.data == want.data, f"{name} in {file} has other bytes than it should"
            if ranks is not None:
                assert rank == want.rank, f"{name} is in {file}, but belongs to rank {want.rank} of {ranks}"


def _is_gate(name: str) -> bool:
    """Whether a tensor of a model with expert groups turns hidden states into the logits of a router."""
    return name.endswith(".gate.weight")


def _check_layout(source: Path, output: Path, files: Files, aligned: bool, placements: dict[str, list[int]]) -> None:
    """Aligned tensors, metadata kept and marked, and the usual library can load every tensor."""
    orders = json.dumps(placements, sort_keys=True).encode()
    mark = {"reshard": "experts are renumbered", "reshard_numbering": hashlib.sha256(orders).hexdigest()}
    sources = [read_safetensors(path)[0].items() for path in source.glob("*.safetensors")]
    common = dict(set.intersection(*map(set, sources)))
    for file, (metadata, tensors) in files.items():
        assert common.items() <= metadata.items(), f"{file} lost metadata: {metadata}, source has {common}"
        assert metadata.items() >= mark.items(), f"{file} is marked {metadata}, expected {mark}"
        begin = min(tensor.start for tensor in tensors.values())
        assert begin % 8 == 0 or not aligned, f"{file}: the data starts at {begin}, which is not a multiple of 8"
        for name, tensor in tensors.items() if aligned else ():
            offset = tensor.start - begin
            assert offset % DTYPE_BYTES[tensor.dtype] == 0, f"{file}: {name} ({tensor.dtype}) at {offset}"
        with safe_open(output / file, framework="pt") as opened:
            assert set(opened.keys()) == tensors.keys(), f"safetensors sees other names in {file}"
            for name, tensor in tensors.items():
                shape = tuple(opened.get_tensor(name).shape)
                assert shape == tensor.shape, f"safetensors loads {name} as {shape}"


def _check_index(output: Path, files: Files) -> None:
    index = json.loads((output / INDEX).read_bytes())
    weight_map = {name: file for file, (_, tensors) in files.items() for name in tensors}
    wrong = sorted(set(index["weight_map"].items()) ^ set(weight_map.items()))
    assert not wrong, f"the index does not list what lies in the files: {wrong}"
    total = sum(len(tensor.data) for _, tensors in files.values() for tensor in tensors.values())
    size = index["metadata"]["total_size"]
    assert size == total, f"the index says {size} bytes in total, the tensors have {total}"


def _group_limited(config: dict[str, Any]) -> bool:
    text = config.get("text_config", config)
    return (text.get("n_group") or 1) > 1 and text["topk_group"] < text["n_group"]


def _check_configs(source: Path, output: Path, placements: dict[str, list[int]]) -> Any:
    """Compare the configs, expert ids mapped; the routing contract comes back, None where none is due."""
    contract = None
    for file in CONFIGS:
        if not (source / file).exists():
            continue
        old = json.loads((source / file).read_bytes())
        expected = _with_mapped_ids(old, placements)
        actual = json.loads((output / file).read_bytes())
        if file == "config.json" and _group_limited(old):
            assert "expert_placement" in actual, "a group-limited output without a contract in config.json"
            contract = actual.pop("expert_placement")
            expected.pop("auto_map", None)
            expected["model_type"] = f"reshard_{old['model_type']}"
            expected["architectures"] = [f"Reshard{name}" for name in old["architectures"]]
            expected = with_locked_groups(expected)
        for key in sorted(expected.keys() | actual.keys()):
            absent = "(absent)"
            want, got = expected.get(key, absent), actual.get(key, absent)
            assert want == got, f"{file}: {key} is {got}, expected {want}"
    return contract


def with_locked_groups(value: Any) -> Any:
    """A config with a text in the place of every group count."""
    if not isinstance(value, dict):
        return value
    lock = "resharded: needs the reshard plugin"
    return {key: lock if key in ("n_group", "topk_group") else with_locked_groups(one) for key, one in value.items()}


def _with_mapped_ids(value: Any, placements: dict[str, list[int]]) -> Any:
    """A JSON value with the expert ids in module names mapped, in keys as well as in values."""
    if isinstance(value, dict):
        return {_mapped_name(key, placements): _with_mapped_ids(item, placements) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_mapped_ids(item, placements) for item in value]
    return _mapped_name(value, placements) if isinstance(value, str) else value


def _mapped_name(name: str, placements: dict[str, list[int]]) -> str:
    match = EXPERT.fullmatch(name)
    if not match or match["module"] not in placements:
        return name
    physical = placements[match["module"]].index(int(match["id"]))
    return f"{match['module']}.experts.{physical}.{match['rest']}"


def _check_contract(contract: Any, source: Path, ranks: int, placements: dict[str, list[int]]) -> None:
    config = json.loads((source / "config.json").read_bytes())
    values = list(_values(contract))
    for key in ("model_type", "architectures", "auto_map"):
        assert key not in config or config[key] in values, f"the contract does not keep {key}: {contract}"
    assert contract.get("version") == 3, f"the contract's version is not 3: {contract}"
    gates = {name for path in source.glob("*.safetensors") for name in read_safetensors(path)[1] if _is_gate(name)}
    assert gates and set(contract.get("flattened")) == gates, f"the contract's gates are not {gates}: {contract}"
    text = config.get("text_config", config)
    for key in ("n_group", "topk_group"):
        assert contract.get(key) == text[key], f"the contract's {key} is not {text[key]}: {contract}"
    assert contract.get("ep_size") == ranks, f"the contract's ep_size is not {ranks}: {contract}"
    _check_placement(contract.get("physical_to_logical"), placements, "the contract")


def _values(value: Any) -> Iterator[Any]:
    """A JSON value and all values inside it."""
    yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _values(item)


def _check_placement(actual: Any, placements: dict[str, list[int]], where: str) -> None:
    """One list for all layers where they agree, else one for each."""
    assert actual, f"{where} has no physical_to_logical"
    expected: Any = placements
    if len({tuple(placement) for placement in placements.values()}) == 1:
        expected = next(iter(placements.values()))
    assert actual == expected, f"{where} has physical_to_logical {actual}, expected {expected}"


def _check_other_files(source: Path, output: Path) -> None:
    """Everything that is neither tensors nor named above is there as it was, and nothing else is."""
    limited = _group_limited(json.loads((source / "config.json").read_bytes()))
    withheld = {"params.json"} if limited else set()
    assert not any((output / name).exists() for name in withheld), "params.json opens the lock"

    def others(directory: Path) -> dict[str, str]:
        special = {INDEX, MANIFEST, *CONFIGS, *withheld}
        return {
            name: digest
            for name, digest in tree(directory).items()
            if name not in special
            and not ("/" not in name and name.endswith((".safetensors", ".safetensors.index.json")))
        }

    _compare_trees(others(source), others(output))


def _check_manifest(
    output: Path,
    files: Files,
    ranks: int,
    placements: dict[str, list[int]],
    strategy: str,
    undigested: int,
) -> None:
    manifest = json.loads((output / MANIFEST).read_bytes())
    lacking = 0
    assert "version" in manifest, "the manifest has no version"
    assert manifest["ep_size"] == ranks, f"the manifest's ep_size is {manifest['ep_size']}, not {ranks}"
    assert manifest["strategy"] == strategy, f"the manifest's strategy is {manifest['strategy']}, not {strategy}"
    _check_placement(manifest["physical_to_logical"], placements, "the manifest")
    listed = sorted(entry["name"] for entry in manifest["files"])
    present = sorted(name for name, kind in tree(output).items() if kind != "dir" and name != MANIFEST)
    assert listed == present, f"the manifest lists {listed}, the directory holds {present}"
    for entry in manifest["files"]:
        name = entry["name"]
        data = (output / name).read_bytes()
        match = OUTPUT_FILE.fullmatch(name)
        rank = int(match["rank"]) if match and match["rank"] is not None else None
        assert entry["size"] == len(data), f"the manifest says {name} has {entry['size']} bytes, not {len(data)}"
        assert entry["rank"] == rank, f"the manifest says {name} is of rank {entry['rank']}, not {rank}"
        tensors = files[name][1] if name in files else {}
        digests = {tensor: blake3(located.data).hexdigest() for tensor, located in tensors.items()}
        found = entry.get("tensors") or {}
        lacks = {tensor for tensor, digest in found.items() if digest is None}
        lacking += len(lacks)
        expected = None if lacks else blake3(data).hexdigest()
        assert entry["digest"] == expected, f"the manifest has a wrong digest for {name}"
        assert found == digests | dict.fromkeys(lacks), f"the manifest has wrong tensor digests for {name}"
        if tensors:
            header = data[: 8 + int.from_bytes(data[:8], "little")]
            assert entry["header"] == blake3(header).hexdigest(), f"the manifest has a wrong header digest for {name}"
    assert lacking == undigested, f"{lacking} tensors have no digest, expected {undigested}"
