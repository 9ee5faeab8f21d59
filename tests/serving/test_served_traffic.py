"""RESHARD_TRACE with real vLLM on the CPU: a trace has the experts that the tokens chose.

The tests recompute the expected experts: Transformers runs each prompt and its answer again and gives the input of
every router, and `choose` picks experts from that as DeepSeek-V3 does. The tests read traces without the package.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import run_well
from harness import BIN, COMPILED, HERE, MAX_TOKENS, PROMPTS, Result, Serving
from test_serving import MTP, TWO_STAGES, assert_answered, assert_close, assert_equal, kimi, uneven_mtp, v3

Choices = list[list[frozenset[int]]]
"""The logical experts that each token chose in each MoE layer: [token, in the order of computation][layer]."""

EXPERTS, GROUPS, CHOSEN_GROUPS, TOP_K = 16, 4, 2, 4  # as in the deepseek_v3 of models.py


def recorded(directory: Path, files: str = "*.trace") -> Choices:
    """The choices in the traces of `directory`; the docstring of `reshard/traffic/trace_file.py` has their format."""
    choices: Choices = []
    for path in sorted(directory.glob(files)):
        line, _, rows = path.read_bytes().partition(b"\n")
        header = json.loads(line)
        layers, top_k, order = len(header["layers"]), header["top_k"], header["physical_to_logical"]
        logical = [order[layer] if isinstance(order, dict) else order for layer in header["layers"]]
        assert header["num_experts"] <= 256
        for first in range(0, len(rows) - layers * top_k + 1, layers * top_k):
            row = rows[first : first + layers * top_k]
            by_layer = [row[at : at + top_k] for at in range(0, len(row), top_k)]
            choices.append(
                [
                    frozenset(map(logical[layer].__getitem__, ids) if logical[layer] else ids)
                    for layer, ids in enumerate(by_layer)
                ]
            )
    return choices


def trace(serving: Serving, name: str, model: Path, **options: Any) -> tuple[Result, Path]:
    """Serve `model` with RESHARD_TRACE; return the answer and the directory of the traces."""
    directory = serving.directory / f"trace-{name}"
    environment = {"RESHARD_TRACE": str(directory), **options.pop("environment", {})}
    answer = serving.generate(model, environment=environment, **options)
    assert_answered(answer)
    return answer, directory


def recomputed(serving: Serving, model: Path, answer: Result, prompts: Sequence[Sequence[int]] = PROMPTS) -> Choices:
    """The choices of all tokens of prompts and answers, except each answer's last token: no step computes it."""
    code = (
        "import json, sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "moe = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, 'gate')]\n"
        "given, found = [[] for _ in moe], []\n"
        "for layer, seen in zip(moe, given):\n"
        "    layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].flatten(0, -2)))\n"
        "with torch.no_grad():\n"
        "    for ids in json.loads(sys.argv[2]):\n"
        "        model(torch.tensor([ids]))\n"
        "    for layer, seen in zip(moe, given):\n"
        "        scores = (torch.cat(seen).double() @ layer.gate.weight.double().T).sigmoid()\n"
        "        found.append([scores.tolist(), layer.gate.e_score_correction_bias.double().tolist()])\n"
        "print(json.dumps(found))\n"
    )
    sequences = [[*prompt, *tokens[:-1]] for prompt, tokens in zip(prompts, answer.tokens, strict=True)]
    ran = serving.python(code, model, json.dumps(sequences))
    assert ran.returncode == 0, ran.stderr
    by_layer = [[choose(scores, bias) for scores in tokens] for tokens, bias in json.loads(ran.stdout.splitlines()[-1])]
    return [list(token) for token in zip(*by_layer, strict=True)]


def choose(scores: list[float], bias: list[float]) -> frozenset[int]:
    """The experts of a token: the highest scores in the best groups, which have the highest sums of two scores."""
    compared = [score + correction for score, correction in zip(scores, bias, strict=True)]
    size = EXPERTS // GROUPS
    by_group = [range(group * size, (group + 1) * size) for group in range(GROUPS)]
    by_group.sort(key=lambda group: sum(sorted(compared[expert] for expert in group)[-2:]))
    allowed = [expert for group in by_group[-CHOSEN_GROUPS:] for expert in group]
    return frozenset(sorted(allowed, key=compared.__getitem__)[-TOP_K:])


def test_a_trace_equals_the_recomputed_routing(serving: Serving) -> None:
    source = v3(serving)
    answer, directory = trace(serving, "v3", source)
    found = recorded(directory)
    assert len(found) == sum(len(prompt) + MAX_TOKENS - 1 for prompt in PROMPTS)
    assert found == recomputed(serving, source, answer)
    assert_equal(answer, serving.generate(source))


def test_the_control_without_groups_the_routing_differs(serving: Serving) -> None:
    source = v3(serving)
    _, directory = trace(serving, "v3", source)
    plain = serving.edited(source, "no-groups", lambda config: {**config, "n_group": 1, "topk_group": 1})
    other, other_directory = trace(serving, "no-groups", plain)
    assert recorded(other_directory) != recorded(directory)
    assert recorded(other_directory) != recomputed(serving, plain, other)


def test_an_output_on_two_ranks_records_each_token_once_with_logical_experts(serving: Serving) -> None:
    source = v3(serving)
    answer, directory = trace(serving, "v3-out", serving.resharded(source, 2), ranks=2)
    found = recorded(directory)
    assert found == recomputed(serving, source, answer)
    _, original = trace(serving, "v3-round-robin", source, ranks=2, placement="round_robin")
    assert found == recorded(original)


def test_different_placements_per_layer_record_logical_experts(serving: Serving) -> None:
    source = v3(serving)
    answer, directory = trace(serving, "v3-placed", serving.placed(source, 2))
    assert recorded(directory) == recomputed(serving, source, answer)


def test_each_pipeline_stage_records_its_layers_with_logical_experts(serving: Serving) -> None:
    source = v3(serving)
    answer, directory = trace(serving, "v3-stages", serving.placed(source, 2), **TWO_STAGES)
    first, second = (recorded(directory, f"*-dp00-pp{stage:02}-*.trace") for stage in (0, 1))
    assert [one + other for one, other in zip(first, second, strict=True)] == recomputed(serving, source, answer)
    described = json.loads(run_well("trace", "info", directory, "--json"))
    assert described["tokens"] == len(first) == len(second)
    layers = [layer for stream in described["streams"] for layer in stream["busiest"]]
    assert sorted(layers) == ["model.layers.1.mlp", "model.layers.2.mlp"]


def test_an_output_without_a_contract_records_logical_experts_too(serving: Serving) -> None:
    source = kimi(serving)
    _, original = trace(serving, "kimi", source)
    _, output = trace(serving, "kimi-out", serving.resharded(source, 2))
    assert recorded(output) == recorded(original) != []


def test_a_model_with_drafts_records_only_its_own_layers(serving: Serving) -> None:
    source = uneven_mtp(serving)
    _, directory = trace(serving, "mtp", serving.resharded(source, 2), ranks=2, speculative_config=MTP)
    (header,) = [json.loads(path.read_bytes().partition(b"\n")[0]) for path in directory.glob("*.trace")]
    assert header["layers"] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    # every draft token is computed, whether it is accepted or not
    assert len(recorded(directory)) > sum(len(prompt) + MAX_TOKENS - 1 for prompt in PROMPTS)


def test_a_compiled_model_records_the_same_and_its_code_is_not_reused_without_recording(
    serving: Serving,
) -> None:
    source, cache = v3(serving), serving.directory / "compiled"
    directory = serving.directory / "trace-compiled"
    recording = {"VLLM_CACHE_ROOT": str(cache), "RESHARD_TRACE": str(directory), **COMPILED}
    answer = serving.generate(source, enforce_eager=False, environment=recording)
    assert_answered(answer)
    assert "saved AOT compiled function" in answer.log
    found = recorded(directory)
    assert found == recomputed(serving, source, answer)
    without = serving.generate(source, enforce_eager=False, environment={"VLLM_CACHE_ROOT": str(cache), **COMPILED})
    assert_equal(without, answer)
    assert "saved AOT compiled function" in without.log
    assert "load failure" not in without.log, "it found the code that was compiled with recording"


def test_a_killed_server_leaves_what_it_recorded(serving: Serving, tmp_path: Path) -> None:
    source = v3(serving)
    request = {"model": str(source), "prompts": [[5]] * 64, "max_tokens": 100, "llm": {}}
    environment = {**serving.environment(), "RESHARD_TRACE": str(tmp_path), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [str(BIN / "python"), str(HERE / "generate.py")]
    with (
        serving.slot(),
        (serving.directory / "killed-log").open("w") as log,
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True) as process,
    ):
        assert process.stdin is not None
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        while not any(path.stat().st_size > 2000 for path in tmp_path.glob("*.trace")):
            assert process.poll() is None, (serving.directory / "killed-log").read_text()[-4000:]
            time.sleep(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    found = recorded(tmp_path)
    assert 100 < len(found) < 64 * 100
    once = found[:100]  # greedy decoding: each of the equal prompts gives the same rows
    assert found == (once * 64)[: len(found)]


def test_a_trace_that_cannot_be_written_is_logged_and_serving_continues(serving: Serving, tmp_path: Path) -> None:
    source, file = v3(serving), tmp_path / "file"
    file.write_text("")
    answer = serving.generate(source, environment={"RESHARD_TRACE": str(file)})
    assert_equal(answer, serving.generate(source))
    assert "RESHARD_TRACE: recording cannot begin" in answer.log
    assert file.read_text() == ""


@pytest.mark.parametrize(("value", "installed"), [("", False), ("somewhere", True)])
def test_the_recorder_is_installed_only_if_a_trace_is_requested(value: str, installed: bool, serving: Serving) -> None:
    code = (
        "import os, sys\n"
        "os.environ['RESHARD_TRACE'] = sys.argv[1]\n"
        "import reshard.vllm\n"
        "reshard.vllm.register()\n"
        "from vllm.v1.worker.gpu_worker import Worker\n"
        "ways = [getattr(way, 'replaced_by_reshard', ()) for way in (Worker.load_model, Worker.execute_model)]\n"
        "print(*[any('recording' in who for who in way) for way in ways])\n"
    )
    ran = serving.python(code, value)
    assert ran.stdout.splitlines()[-1:] == [f"{installed} {installed}"], ran.stderr


def test_a_placement_balanced_for_a_servers_own_traffic_answers_as_the_original(
    serving: Serving, tmp_path: Path
) -> None:
    source, rng = v3(serving), random.Random(0)
    prompts = [[rng.randrange(2, 250) for _ in range(120)] for _ in range(36)]
    _, directory = trace(serving, "much", source, prompts=prompts, max_tokens=2)
    out = tmp_path / "balanced"
    run_well("place", "--src", source, "--ep", 2, "--out", out, "--strategy", "balanced", "--trace", directory)
    run_well("verify", out, "--src", source)
    placed = json.loads((out / "reshard_manifest.json").read_text())["physical_to_logical"]
    assert len({tuple(order) for order in placed.values()}) > 1, "each layer has a placement of its own"
    assert_equal(serving.generate(out), serving.generate(source))
    assert_close(serving.generate(out, ranks=2), serving.generate(source, ranks=2))


def test_trace_info_describes_a_trace(serving: Serving) -> None:
    source = v3(serving)
    _, directory = trace(serving, "v3-out", serving.resharded(source, 2), ranks=2)
    told = json.loads(run_well("trace", "info", directory, "--json"))
    assert told["tokens"] == sum(len(prompt) + MAX_TOKENS - 1 for prompt in PROMPTS)
    assert [stream["by"].split(",")[0] for stream in told["streams"]] == ["vLLM 0.32.0"]
