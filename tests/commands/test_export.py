"""`reshard export`: each engine, reading the file as its own code does, gives every rank the experts that it should.

The readers below say in their first line which project's file they follow, and in which version: they take the same
steps, refuse what it refuses, and answer in one form, the experts that each EP rank owns of each layer. What is
expected comes from the spec that the checkpoint was built from, not from the package.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path

import jsonschema
import pytest
import yaml
from checkpoints import Spec, build
from command_line import run, run_well

from reshard import OutputError, export, read_checkpoint, read_model, write_resharding
from reshard.commands.engine_files import FORMAT_NAMES
from reshard.commands.original import read_original
from reshard.commands.resharding import plan_resharding
from reshard.placement.permutations import zigzag
from reshard.placement.strategies import Placed

Owned = dict[int, list[list[int]]]
"""Of each layer, by its number, the logical experts that each EP rank owns, in ascending order."""

# Dense layers first and MTP after the last; experts in all layers; in every second one; MTP called mtp.0, mtp.layers.0
FAMILIES = ("deepseek_v3", "deepseek_v2", "qwen3_moe", "llama4", "deepseek_v4", "qwen3_5_moe", "kimi_k25")


@dataclass(frozen=True)
class Served:
    """What an engine knows of the checkpoint that it serves, by itself: its config, and its EP size."""

    num_experts: int
    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    ep_size: int


def served(spec: Spec, ep_size: int) -> Served:
    """The checkpoint that `spec` describes."""
    moe_layers = tuple(layer for layer in range(spec.layers) if spec.is_moe(layer))
    return Served(spec.experts, spec.layers, moe_layers, (spec.layers,) if spec.line.mtp else (), ep_size)


def in_zigzag(model: Served) -> Owned:
    """What is asked for: rank r owns the experts e with e % N == r."""
    ranks = [[e for e in range(model.num_experts) if e % model.ep_size == rank] for rank in range(model.ep_size)]
    return dict.fromkeys((*model.moe_layers, *model.mtp_layers), ranks)


# ---------------------------------------------------------------------------------------------------------------------
# The engines' readers
# ---------------------------------------------------------------------------------------------------------------------


def sglang(path: Path, model: Served) -> Owned:
    """SGLang 0.5.23, sglang/srt/eplb/expert_location.py and sglang/srt/layers/moe/fused_moe_triton/layer.py.

    `compute_initial_expert_location_metadata` decides by the name's end what the file is, and passes all its keys on to
    `init_by_mapping`, which takes one. An expert's weights go to the physical experts that `logical_to_all_physical`
    finds in the row of its layer; a rank keeps those from `rank * num_physical // ep_size` on. MTP layers are a draft
    worker's, which looks at no map.
    """
    assert path.name.endswith(".json"), "anything else is taken for the JSON itself"
    data = json.loads(path.read_text())
    assert list(data) == ["physical_to_logical_map"]
    rows = data["physical_to_logical_map"]
    # from_model_config: num_layers is num_hidden_layers, dense layers included
    assert [len(row) for row in rows] == [model.num_experts] * model.num_hidden_layers
    assert model.num_experts % model.ep_size == 0
    local = model.num_experts // model.ep_size
    owned: Owned = {}
    for layer in model.moe_layers:
        logical_to_all_physical: list[list[int]] = [[] for _ in range(model.num_experts)]
        for physical, logical in enumerate(rows[layer]):
            logical_to_all_physical[logical].append(physical)
        owned[layer] = [[] for _ in range(model.ep_size)]
        for logical, physicals in enumerate(logical_to_all_physical):
            for physical in physicals:
                owned[layer][physical // local].append(logical)
    return owned


def vllm_ascend(path: Path, model: Served) -> Owned:
    """vLLM Ascend 0.23.0, vllm_ascend/eplb/core/eplb_utils.py: `expert_file_to_tensor` and `init_eplb_config`.

    A layer is asked for by how many MoE layers were built before it, in this process, those of MTP last. One past the
    end is placed by a rule of the engine's own; any further one is an error.
    """
    assert path.name[-5:] == ".json", "ascend_config.py, EplbConfig: the expert_map is not json"
    data = json.loads(path.read_text())
    owned: Owned = {}
    for layer_id, layer in enumerate((*model.moe_layers, *model.mtp_layers)):
        assert layer_id < data["moe_layer_count"]
        devices = [device["device_expert"] for device in data["layer_list"][layer_id]["device_list"]]
        assert len({len(device) for device in devices}) == 1, "they become one tensor"
        assert sum(map(len, devices)) - model.num_experts == 0, "redundant experts"
        # each rank's expert_map: from logical expert to local slot, -1 where it has none
        maps = [[-1] * model.num_experts for _ in range(model.ep_size)]
        for rank in range(model.ep_size):
            for slot, expert in enumerate(devices[rank]):
                maps[rank][expert] = slot
        owned[layer] = [[expert for expert, slot in enumerate(one) if slot != -1] for one in maps]
    return owned


def vllm_ascend_before(path: Path, model: Served) -> Owned:
    """vLLM Ascend before 0.12, vllm_ascend/ops/expert_load_balancer.py at 1427299d2bd936bbaa244b1040bb365c0652478a.

    `ExpertLoadBalancer` makes one tensor of all layers, ranks and experts; the number of ranks is the first layer's.
    """
    data = json.loads(path.read_text())
    ranks_num = data["layer_list"][0]["device_count"]
    tensor = [[device["device_expert"] for device in layer["device_list"]] for layer in data["layer_list"]]
    assert (len(tensor), ranks_num) == (data["moe_layer_count"], model.ep_size)
    assert {(len(layer), *map(len, layer)) for layer in tensor} == {(ranks_num, *[len(tensor[0][0])] * ranks_num)}
    assert len(tensor[0][0]) * ranks_num - model.num_experts == 0, "get_global_redundant_expert_num"
    layers = (*model.moe_layers, *model.mtp_layers)
    return {layer: [sorted(tensor[i][rank]) for rank in range(ranks_num)] for i, layer in enumerate(layers)}


def tensorrt_llm(path: Path, model: Served) -> Owned:
    """TensorRT-LLM, examples/wide_ep/ep_load_balancer/README.md at 2a595f8157669fce7999f2098fbe32d8263981f0: the form.

    And what takes it: `MoeLoadBalancerConfig` of tensorrt_llm/llmapi/llm_args.py, and `MoE._init_load_balancer` of
    tensorrt_llm/_torch/modules/fused_moe/interface.py, as its main branch had them in 2026. The YAML becomes a model
    that has these three fields and whose keys are whole numbers; at fcd3f31682808ae56118ae43c1d7864a3a945e6f it was a
    dataclass, which converts nothing, so they must be numbers in the file. MTP layers are numbered on from
    num_hidden_layers (modeling_speculative.py), and one that is not there is a KeyError.
    """
    config = yaml.safe_load(path.read_text())
    assert set(config) <= {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert config["layer_updates_per_iter"] == 0, "static: else experts are moved"
    num_slots, assignments = config["num_slots"], config["initial_global_assignments"]
    assert num_slots % model.ep_size == 0
    assert all(type(layer) is int for layer in assignments)
    local = num_slots // model.ep_size
    owned: Owned = {}
    for layer_idx in (*model.moe_layers, *model.mtp_layers):
        assigned = assignments[layer_idx]
        assert isinstance(assigned, list)
        assert len(assigned) == num_slots >= model.num_experts
        assert set(assigned) == set(range(model.num_experts))
        owned[layer_idx] = [sorted(assigned[rank * local :][:local]) for rank in range(model.ep_size)]
    return owned


def deepseek_eplb(path: Path, model: Served) -> Owned:
    """DeepSeek's EPLB, eplb.py at 57919718be1fbe2baca80a42a7df4de7119aaa95: what `rebalance_experts` returns.

    `physical_to_logical_map` is [num_moe_layers, num_replicas], `num_replicas` a multiple of `num_gpus`; a GPU has
    `phy_experts_per_gpu` consecutive replicas.
    """
    data = json.loads(path.read_text())
    rows, num_gpus = data["physical_to_logical_map"], data["num_gpus"]
    layers = (*model.moe_layers, *model.mtp_layers)
    assert len(rows) == len(data["layers"]) == len(layers)
    assert all(len(row) % num_gpus == 0 for row in rows)
    owned: Owned = {}
    for layer, row in zip(layers, rows, strict=True):
        phy_experts_per_gpu = len(row) // num_gpus
        gpus: list[list[int]] = [[] for _ in range(num_gpus)]
        for replica, expert in enumerate(row):
            gpus[replica // phy_experts_per_gpu].append(expert)
        owned[layer] = [sorted(gpu) for gpu in gpus]
    return owned


def vllm(path: Path, model: Served) -> Owned:
    """reshard's placement file, by its schema; what the plugin makes of it is in tests/serving.

    Slots are dealt to ranks by vLLM's linear rule: consecutive, and one more for each of the first E % R ranks.
    """
    data = json.loads(path.read_text())
    schema = json.loads((files("reshard.placement") / "placement.schema.json").read_text())
    jsonschema.validate(data, schema)
    assert (data["ep_size"], data["num_experts"]) == (model.ep_size, model.num_experts)
    layers = (*model.moe_layers, *model.mtp_layers)
    assert len(data["layers"]) == len(layers)
    base, more = divmod(model.num_experts, model.ep_size)
    owned: Owned = {}
    for layer, name in zip(layers, data["layers"], strict=True):
        orders = data["physical_to_logical"]
        slots = iter(orders[name] if isinstance(orders, dict) else orders)
        owned[layer] = [sorted(islice(slots, base + (rank < more))) for rank in range(model.ep_size)]
        assert next(slots, None) is None
    return owned


Reader = Callable[[Path, Served], Owned]
READERS: tuple[tuple[str, Reader], ...] = (
    ("vllm", vllm),
    ("sglang", sglang),
    ("vllm-ascend", vllm_ascend),
    ("vllm-ascend", vllm_ascend_before),
    ("trtllm", tensorrt_llm),
    ("eplb", deepseek_eplb),
)
every_reader = pytest.mark.parametrize(("to", "read"), READERS, ids=[read.__name__ for _, read in READERS])
every_format = pytest.mark.parametrize("to", FORMAT_NAMES)


def without_mtp(owned: Owned, model: Served, to: str) -> Owned:
    """What an engine is asked to do: SGLang gives drafts no placement."""
    return {layer: ranks for layer, ranks in owned.items() if to != "sglang" or layer not in model.mtp_layers}


# ---------------------------------------------------------------------------------------------------------------------
# What they read
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, a DeepSeek-V3-like checkpoint, and `output`, made of it for 4 ranks."""
    directory = tmp_path_factory.mktemp("export")
    build(V3, directory / "source")
    run_well("zigzag", "--src", directory / "source", "--ep", 4, "--out", directory / "output")
    return directory


V3 = Spec("deepseek_v3", experts=16, layers=4)


@every_reader
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [2, 8])
def test_read_by_the_engine_each_rank_owns_what_zigzag_says(
    to: str, read: Reader, family: str, ranks: int, tmp_path: Path
) -> None:
    spec = Spec(family, experts=16, layers=4)
    build(spec, tmp_path / "source")
    run_well("export", tmp_path / "source", "--to", to, "--ep", ranks, "--out", tmp_path / "placement.json")
    model = served(spec, ranks)
    assert read(tmp_path / "placement.json", model) == without_mtp(in_zigzag(model), model, to)


@every_reader
def test_layers_that_differ_are_taken_from_the_manifest_each_with_its_own(
    to: str, read: Reader, v3: Path, tmp_path: Path
) -> None:
    model, placement = served(V3, 4), scattered(v3 / "source", seed=1)
    reshard_by(placement, v3 / "source", tmp_path / "output")
    run_well("export", tmp_path / "output", "--to", to, "--out", tmp_path / "placement.json")
    expected = {
        layer: [sorted(placement[f"model.layers.{layer}.mlp"][4 * rank :][:4]) for rank in range(4)]
        for layer in (*model.moe_layers, *model.mtp_layers)
    }
    assert read(tmp_path / "placement.json", model) == without_mtp(expected, model, to)
    assert len({str(ranks) for ranks in expected.values()}) == len(expected) > 2, "layers do not differ"


@every_reader
def test_linear_placement_is_told_apart(to: str, read: Reader, v3: Path, tmp_path: Path) -> None:
    """The control: the readers can say no, of every layer, and of one."""
    model = served(V3, 4)
    wanted = without_mtp(in_zigzag(model), model, to)
    linear = dict.fromkeys(scattered(v3 / "source"), tuple(range(16)))
    for spoilt in (list(linear), ["model.layers.2.mlp"]):
        placement = {layer: linear[layer] if layer in spoilt else zigzag(16, 4) for layer in linear}
        out = tmp_path / f"{len(spoilt)}.json"
        reshard_by(placement, v3 / "source", tmp_path / f"{len(spoilt)}")
        run_well("export", tmp_path / f"{len(spoilt)}", "--to", to, "--out", out)
        owned = read(out, model)
        differing = [layer for layer in wanted if owned[layer] != wanted[layer]]
        assert differing == [layer for layer in wanted if f"model.layers.{layer}.mlp" in spoilt]


@every_format
@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k25", "deepseek_v4"])
def test_a_checkpoint_and_its_output_whole_or_staged_give_the_same_file(to: str, family: str, tmp_path: Path) -> None:
    source, output, staged = (tmp_path / name for name in ("source", "output", "staged"))
    build(Spec(family), source)
    run_well("zigzag", "--src", source, "--ep", 4, "--out", output)
    run_well("stage", output, "--ranks", "1", "--out", staged)
    content = export(source, to, 4).content
    assert content == export(output, to).content == export(output, to, 4).content == export(staged, to).content


def scattered(source: Path, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """A placement of another kind for each MoE layer of `source`."""
    chance, model = random.Random(seed), read_model(read_checkpoint(source))
    return {layer.name: tuple(chance.sample(range(16), 16)) for layer in model.layers}


def reshard_by(placement: dict[str, tuple[int, ...]], source: Path, output: Path) -> None:
    """An output for 4 ranks that places experts by any placement."""
    write_resharding(plan_resharding(read_original(source), "mine", 4, Placed(placement)), output)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@every_format
def test_the_file_goes_to_stdout_and_a_word_to_stderr_that_says_it_is_for_the_original(to: str, v3: Path) -> None:
    for words in ([v3 / "source", "--ep", 4], [v3 / "output"]):
        result = run("export", *words, "--to", to)
        assert result.exit_code == 0, result.output
        assert result.stdout == export(v3 / "source", to, 4).content
        layers = 3 if to == "sglang" else 4  # without that of MTP, which it leaves as it is
        assert result.stderr.startswith(f"zigzag for 4 EP ranks, {layers} MoE layers of 16 experts, for ")
        assert f"serve the original, {v3 / 'source'}, with:  " in result.stderr
        assert result.stderr.count("\n") == 2
        assert run("export", *words, "--to", to, "--quiet").stderr == ""


@every_format
def test_the_line_says_how_the_engine_is_given_the_file(to: str, v3: Path, tmp_path: Path) -> None:
    out = tmp_path / "placement.json"
    result = run("export", v3 / "source", "--to", to, "--ep", 4, "--out", out)
    assert result.stdout == ""
    assert str(out) in result.stderr
    assert out.read_text() == export(v3 / "source", to, 4).content


def test_json_reports_the_file_or_where_it_is(v3: Path, tmp_path: Path) -> None:
    words = ["export", v3 / "source", "--to", "trtllm", "--ep", 4, "--json"]
    report = json.loads(run_well(*words))
    assert report["content"] == export(v3 / "source", "trtllm", 4).content
    assert (report["original"], report["ep_size"], report["num_experts"]) == (str(v3 / "source"), 4, 16)
    report = json.loads(run_well(*words, "--out", tmp_path / "placement.yaml"))
    assert "content" not in report
    assert report["out"] == str(tmp_path / "placement.yaml")


def test_a_format_that_is_none_is_refused_with_those_that_are(v3: Path) -> None:
    result = run("export", v3 / "source", "--to", "orca", "--ep", 4)
    assert result.exit_code == 2
    assert all(name in result.stderr for name in FORMAT_NAMES)
    with pytest.raises(OutputError, match="'orca'; known are vllm, sglang, vllm-ascend, trtllm, eplb"):
        export(v3 / "source", "orca", 4)  # type: ignore[arg-type]


@every_format
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["source"], "give the number of EP ranks with --ep"),
        (["source", "--ep", 17], "--ep must be from 2 to the 16 experts"),
        (["output", "--ep", 2], "an output for 4 EP ranks, not 2; leave --ep out, or export from the original"),
        (["nothing", "--ep", 2], "no such directory"),
        (["source/inference", "--ep", 2], "model.safetensors"),
    ],
)
def test_what_no_engine_could_use_is_refused_in_one_line(
    to: str, words: list[object], said: str, v3: Path, tmp_path: Path
) -> None:
    result = run("export", v3 / str(words[0]), *words[1:], "--to", to, "--out", tmp_path / "placement.json")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1), result.output
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", [to for to in FORMAT_NAMES if to != "vllm"])
def test_ranks_of_different_size_are_refused_by_engines_that_cannot_have_them(
    to: str, v3: Path, tmp_path: Path
) -> None:
    run_well("zigzag", "--src", v3 / "source", "--ep", 3, "--out", tmp_path / "output")
    for arguments in (("export", tmp_path / "output"), ("export", v3 / "source", "--ep", 3)):
        result = run(*arguments, "--to", to)
        assert result.exit_code == 1
        assert "16 experts cannot be dealt evenly to 3 EP ranks" in result.stderr


def test_ranks_may_differ_by_one_expert_in_vllm(v3: Path, tmp_path: Path) -> None:
    run_well("export", v3 / "source", "--to", "vllm", "--ep", 3, "--out", tmp_path / "placement.json")
    model = served(V3, 3)
    assert vllm(tmp_path / "placement.json", model) == in_zigzag(model)


@pytest.mark.parametrize("to", ["sglang", "vllm-ascend"])
def test_a_name_that_the_engine_would_misread_is_refused(to: str, v3: Path, tmp_path: Path) -> None:
    result = run("export", v3 / "output", "--to", to, "--out", tmp_path / "placement.txt")
    assert result.exit_code == 2
    assert "ends in .json" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_left_alone(v3: Path, tmp_path: Path) -> None:
    (tmp_path / "placement.json").write_text("mine")
    result = run("export", v3 / "output", "--to", "eplb", "--out", tmp_path / "placement.json")
    assert result.exit_code == 1
    assert "already exists" in result.stderr
    assert (tmp_path / "placement.json").read_text() == "mine"


@pytest.mark.parametrize("value", [None, 0, -1, True, "4", 4.0, [4], 10**9])
def test_a_number_of_layers_that_is_none_is_refused(value: object, tmp_path: Path) -> None:
    build(V3, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": value}))
    result = run("export", tmp_path / "source", "--to", "sglang", "--ep", 2)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "num_hidden_layers must be a whole number from 1 to 10000" in result.stderr


def test_a_number_of_layers_that_leaves_no_layer_with_experts_is_refused(tmp_path: Path) -> None:
    build(V3, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    result = run("export", tmp_path / "source", "--to", "sglang", "--ep", 2)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "num_hidden_layers is 1, but the first MoE layer is model.layers.1.mlp" in result.stderr
