"""What a group-limited output says to an engine without the plugin, in each version of the contract.

Since version 2, a text stands in the place of the group counts. What published remote code computes with them is
followed here; Transformers' and vLLM's own routers are tried in tests/serving, as are the gates of version 3.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, Spec, build
from command_line import run, run_well
from earlier_contracts import header_of, to_version_1, to_version_2, with_shaped_gates
from forgery import forge, record
from oracle import assert_identical_trees
from torch import Tensor

from reshard.record.manifest import pack

GROUP_LIMITED = [name for name, family in FAMILIES.items() if family.group_limited]


@pytest.fixture(scope="module", params=GROUP_LIMITED)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a `source`, its `output`, and `old` and `older`, the same with contracts of versions 2 and 1."""
    directory = tmp_path_factory.mktemp(request.param)
    build(Spec(request.param, experts=8, layers=2), directory / "source")
    run_well("zigzag", "--src", directory / "source", "--ep", 2, "--out", directory / "output")
    for name, change in (("old", to_version_2), ("older", to_version_1)):
        shutil.copytree(directory / "output", directory / name)
        change(directory / "source", directory / name)
    return directory


def config_of(directory: Path) -> dict[str, Any]:
    """The language model's part of config.json."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
    return config.get("text_config", config)  # type: ignore[no-any-return]


def published_v2(config: dict[str, Any], scores: Tensor) -> Tensor:
    """The experts that `modeling_deepseek.py` of DeepSeek-V2 chooses."""
    n, n_group, experts = len(scores), config["n_group"], scores.shape[1]
    group_scores = scores.view(n, n_group, -1).max(dim=-1).values
    return _within_best_groups(scores, group_scores, experts, config)


def published_v3(config: dict[str, Any], scores: Tensor) -> Tensor:
    """The experts that `modeling_deepseek.py` of V3 to V3.2 and `modeling_bailing_moe_v2.py` of Ling 2.0 choose."""
    n, n_group, experts = len(scores), config["n_group"], scores.shape[1]
    group_scores = scores.view(n, n_group, -1).topk(2, dim=-1)[0].sum(dim=-1)
    return _within_best_groups(scores, group_scores, experts, config)


def _within_best_groups(scores: Tensor, group_scores: Tensor, experts: int, config: dict[str, Any]) -> Tensor:
    n, n_group = len(scores), config["n_group"]
    group_idx = torch.topk(group_scores, k=config["topk_group"], dim=-1, sorted=False)[1]
    group_mask = torch.zeros_like(group_scores).scatter_(1, group_idx, 1)
    score_mask = group_mask.unsqueeze(-1).expand(n, n_group, experts // n_group).reshape(n, -1)
    masked = scores.masked_fill(~score_mask.bool(), 0.0)
    return torch.topk(masked, k=config["num_experts_per_tok"], dim=-1)[1]


@pytest.mark.parametrize("choose", [published_v2, published_v3])
def test_published_code_raises_for_an_output_and_did_not_for_one_of_version_1(
    choose: Callable[[dict[str, Any], Tensor], Tensor], made: Path
) -> None:
    scores = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    for name in ("source", "older"):
        assert choose(config_of(made / name), scores).shape[0] == 5
    with pytest.raises(TypeError):
        choose(config_of(made / "output"), scores)
    half_open = {**config_of(made / "output"), "n_group": config_of(made / "source")["n_group"]}
    with pytest.raises(TypeError):
        choose(half_open, scores)


@pytest.mark.parametrize("name", ["old", "older"])
def test_an_output_of_an_earlier_version_is_read_verified_staged_and_restored(
    name: str, made: Path, tmp_path: Path
) -> None:
    source, old = made / "source", made / name
    assert (config_of(old)["n_group"] == config_of(source)["n_group"]) == (name == "older")
    found, expected = (json.loads(run_well("inspect", one, "--json")) for one in (old, made / "output"))
    for inspection in (found, expected):
        for file in inspection["files"]:
            del file["size"]  # the headers' marks differ
        del inspection["path"]
    assert found == expected
    run_well("export", old, "--to", "vllm", "--out", tmp_path / "placement.json")
    run_well("verify", old)
    run_well("verify", old, "--src", source)
    run_well("stage", old, "--ranks", "0", "--out", tmp_path / "staged")
    run_well("verify", tmp_path / "staged")
    run_well("restore", old, "--out", tmp_path / "restored")
    assert_identical_trees(source, tmp_path / "restored")


def opened(config: dict[str, Any]) -> None:
    config["n_group"] = 4


def emptied(config: dict[str, Any]) -> None:
    config["topk_group"] = None


@pytest.mark.parametrize("edit", [opened, emptied])
def test_verify_finds_a_lock_that_was_opened_by_hand(edit: Callable[[dict[str, Any]], None], made: Path) -> None:
    output = made / edit.__name__
    shutil.copytree(made / "output", output)
    config = json.loads((output / "config.json").read_bytes())
    edit(config)
    (output / "config.json").write_text(json.dumps(config))
    record(output, "config.json")
    result = run("verify", output)
    assert result.exit_code == 1
    assert "group is" in result.output
    assert "expected 'resharded: needs the reshard plugin'" in result.output


def test_verify_finds_a_contract_that_would_put_back_other_groups(made: Path) -> None:
    output = shutil.copytree(made / "output", made / "other groups")
    config = json.loads((output / "config.json").read_bytes())
    config["expert_placement"]["original"]["n_group"] = 2
    (output / "config.json").write_text(json.dumps(config))
    forge(output, lambda manifest: manifest.update(contract=config["expert_placement"]))
    record(output, "config.json")
    result = run("verify", output)
    assert result.exit_code == 1
    assert "expert_placement.original makes n_group 2, but the contract has 4" in result.output


@pytest.mark.parametrize(
    ("edit", "in_contract"),
    [
        (lambda config: config.update(rms_norm_eps=0.5), False),
        (lambda config: config.update(hidden_act="relu"), False),
        (lambda config: config["expert_placement"]["original"].update(model_type="other"), True),
        (lambda config: config["expert_placement"]["original"].update(auto_map={"AutoConfig": "x.Y"}), True),
    ],
)
def test_verify_with_the_source_finds_a_config_that_was_changed_together_with_its_digests(
    edit: Callable[[dict[str, Any]], object], in_contract: bool, made: Path
) -> None:
    """The routers' part of it was compared, and no other."""
    output = made / "forged config"
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(made / "output", output)
    config = json.loads((output / "config.json").read_bytes())
    edit(config)
    (output / "config.json").write_text(json.dumps(config))
    if in_contract:
        forge(output, lambda manifest: manifest.update(contract=config["expert_placement"]))
    record(output, "config.json")
    run_well("verify", made / "output", "--src", made / "source")
    result = run("verify", output, "--src", made / "source")
    assert result.exit_code == 1
    assert "differs from the source's in more than" in " ".join(result.output.split())


def test_verify_with_the_source_finds_a_file_that_the_manifest_calls_rewritten(made: Path) -> None:
    output = shutil.copytree(made / "output", made / "forged file")
    name = next(path.name for path in output.glob("*.json") if path.name.startswith("generation"))
    original = pack((output / name).read_bytes())

    def call_rewritten(manifest: dict[str, Any]) -> None:
        (entry,) = (entry for entry in manifest["source"]["files"] if entry["name"] == name)
        entry["content"] = original

    (output / name).write_text('{"temperature": 9}')
    record(output, name)
    result = run("verify", output, "--src", made / "source")
    assert name in result.output, "the control: a file that was copied"
    forge(output, call_rewritten)
    result = run("verify", output, "--src", made / "source")
    assert result.exit_code == 1
    assert "differs from the source's in more than" in " ".join(result.output.split())


def test_verify_with_the_source_finds_a_file_that_the_source_does_not_have(made: Path) -> None:
    """An engine reads it, and the manifest vouched for it."""
    output = shutil.copytree(made / "output", made / "one more file")
    (output / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')

    def vouch(manifest: dict[str, Any]) -> None:
        like = next(entry for entry in manifest["files"] if entry["name"] == "config.json")
        manifest["files"].append({**like, "name": "hf_quant_config.json"})

    forge(output, vouch)
    record(output, "hf_quant_config.json")
    result = run("verify", output, "--src", made / "source")
    assert result.exit_code == 1
    assert "hf_quant_config.json: the source has no such file" in " ".join(result.output.split())


def test_a_gate_lies_in_one_dimension_and_verify_finds_one_that_does_not(made: Path) -> None:
    """Whatever is given the original's config would route with it."""
    tensors = {
        name: entry for path in (made / "output").glob("*.safetensors") for name, entry in header_of(path).items()
    }
    gates = {name: entry["shape"] for name, entry in tensors.items() if name.endswith(".gate.weight")}
    assert gates
    assert all(len(shape) == 1 for shape in gates.values())
    output = shutil.copytree(made / "output", made / "gates")
    for name in with_shaped_gates(made / "source", output):
        record(output, name)
    result = run("verify", output)
    assert result.exit_code == 1
    assert "expected one dimension" in result.output
    assert all(name in result.output for name in gates)


@pytest.mark.parametrize(
    ("flattened", "fault"),
    [([], "names no gate of"), (["lm_head.weight"], "lm_head.weight, which is no router tensor")],
)
def test_verify_finds_a_contract_that_does_not_name_the_gates(flattened: list[str], fault: str, made: Path) -> None:
    output = shutil.copytree(made / "output", made / f"flattened {len(flattened)}")
    config = json.loads((output / "config.json").read_bytes())
    config["expert_placement"]["flattened"] = flattened
    (output / "config.json").write_text(json.dumps(config))
    forge(output, lambda manifest: manifest.update(contract=config["expert_placement"]))
    record(output, "config.json")
    result = run("verify", output)
    assert result.exit_code == 1
    assert fault in " ".join(result.output.split())


def test_a_config_in_mistrals_form_is_no_part_of_an_output_and_is_brought_back(made: Path) -> None:
    """It was copied with its group counts, and vLLM reads it with --config-format mistral."""
    source = shutil.copytree(made / "source", made / "with params")
    (source / "params.json").write_text('{"moe": {"num_expert_groups": 4, "num_expert_groups_per_tok": 2}}')
    (source / "original").mkdir()
    shutil.copy(source / "params.json", source / "original")
    output, restored = made / "without params", made / "restored params"
    said = run("zigzag", "--src", source, "--ep", 2, "--out", output)
    assert "params.json is not in the output: it has the original's expert groups" in " ".join(said.output.split())
    assert not (output / "params.json").exists()
    assert (output / "original" / "params.json").exists(), "an engine reads none there"
    run_well("verify", output)
    run_well("verify", output, "--src", source)
    run_well("restore", output, "--out", restored)
    assert_identical_trees(source, restored)
