"""Makes outputs of the earlier versions of the routing contract, each of which lacks a part of the lock.

In version 2, gates have two dimensions in the files. In version 1, group counts stay in config.json, too, and the files
have no mark. It shares no code with the package: config and shapes come from the source, the placement from the oracle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forgery import forge, record
from oracle import zigzag

MARKS = ("reshard", "reshard_numbering")


def with_shaped_gates(source: Path, output: Path, marks: tuple[str, ...] = MARKS) -> list[str]:
    """Give every gate of `output` the shape that it has in `source`, and keep only `marks` of its files' marks.

    No other file changes, not even if it is the same by a hard link. Returns the names of the changed files.
    """
    gates = {
        name: entry["shape"]
        for path in source.glob("*.safetensors")
        for name, entry in header_of(path).items()
        if name.endswith("gate.weight")
    }
    changed = []
    for path in sorted(output.glob("*.safetensors")):
        header, data = header_of(path), path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        for name in gates.keys() & header.keys():
            header[name]["shape"] = gates[name]
        header["__metadata__"] = {
            key: value for key, value in header["__metadata__"].items() if key not in MARKS or key in marks
        }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path.unlink()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
        changed.append(path.name)
    return changed


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file."""
    with path.open("rb") as file:
        found: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return found


def to_version_2(source: Path, output: Path) -> None:
    """Turn `output`, which `reshard zigzag` made of `source`, into what version 2 of the contract was."""
    for name in with_shaped_gates(source, output, MARKS[:1]):
        record(output, name)
    config: dict[str, Any] = json.loads((output / "config.json").read_bytes())
    contract = config["expert_placement"]
    contract["version"] = 2
    del contract["flattened"]
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    forge(output, lambda manifest: manifest.update(contract=contract))
    record(output, "config.json")


def to_version_1(source: Path, output: Path) -> None:
    """Turn `output`, which `reshard zigzag` made of `source`, into what version 1 of the contract was."""
    for name in with_shaped_gates(source, output, ()):
        record(output, name)
    config: dict[str, Any] = json.loads((source / "config.json").read_bytes())
    manifest = json.loads((output / "reshard_manifest.json").read_bytes())
    text = config.get("text_config", config)
    experts = manifest["moe_layers"][0]["num_experts"]
    locked = {key: config.pop(key) for key in ("model_type", "architectures", "auto_map") if key in config}
    contract = {
        "version": 1,
        "strategy": "zigzag",
        "ep_size": manifest["ep_size"],
        "n_group": text["n_group"],
        "topk_group": text["topk_group"],
        "physical_to_logical": zigzag(experts, manifest["ep_size"]),
        "layers": [layer["name"] for layer in manifest["moe_layers"]],
        "original": locked,
    }
    config["model_type"] = f"reshard_{locked['model_type']}"
    config["architectures"] = [f"Reshard{name}" for name in locked["architectures"]]
    config["expert_placement"] = contract
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    forge(output, lambda manifest: manifest.update(contract=contract))
    record(output, "config.json")
