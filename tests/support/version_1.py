"""Makes outputs of contract version 1, which earlier versions of reshard wrote: group counts stay in config.json.

It shares no code with the package: the config comes from the source's, the placement from the oracle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forgery import forge, record
from oracle import zigzag


def to_version_1(source: Path, output: Path) -> None:
    """Turn `output`, which `reshard zigzag` made of `source`, into what version 1 of the contract was."""
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
