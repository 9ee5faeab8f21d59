"""Predict the steps that were measured on eight H200 from routing that the time model was not fitted on.

    python benchmarks/predict_steps.py choices.safetensors > table.md

`choices.safetensors` has, for each kind of text, the experts that its tokens chose, uint8 [layers, T, K]. Placements
are made from the first 2,048 tokens of each kind, and judged on the next 2,048, as the measurement did. Decoding takes
random tokens, prefill runs of 1,024. MEASURED is the table of the measurement: 30 MoE layers of R1, TP 8 and EP 8, and
how much longer linear took than zigzag, EPLB's packing, and `balanced` as it was then.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor

from reshard.model.sizes import ModelSizes
from reshard.placement.balance import balanced, packed
from reshard.placement.permutations import rank_of_each, zigzag
from reshard.placement.steps import DEFAULT_MIX, Step
from reshard.placement.swaps import Aim
from reshard.placement.time_model import ExpertShape, rank_times, read_gpu
from reshard.traffic.step_time import rest_time

EXPERTS, RANKS, LAYERS, TOKENS, RUN = 256, 8, 30, 2048, 1024
EXPERT = ExpertShape(7168, 2048, 8, 44_050_944, "fp8")
# Beside experts: one dense layer, in each layer MLA (187 M parameters) and the shared expert, a head of 12,288 words.
_REST = 31 * 187_107_328 + 30 * 44_040_192 + 396_361_728
SIZES = ModelSizes(EXPERT, 31, 30, _REST + 2 * 88_080_384, _REST + 88_080_384, "fp8", 1152, 1)
GPU = read_gpu("H200")
ONE_KIND = 1
BATCHES = {"decode": 60, "prefill": 24}
Row = tuple[str, int, str, float, tuple[tuple[float, float, float], ...]]
# phase, tokens, kind of text; linear in ms; linear over each other placement: median, first and third quartile
MEASURED: tuple[Row, ...] = (
    ("decode", 8, "mixed", 8.68, ((1.038, 1.026, 1.060), (1.030, 1.010, 1.050), (1.039, 1.032, 1.084))),
    ("decode", 8, "one kind", 8.45, ((1.024, 1.011, 1.044), (1.024, 1.017, 1.034), (1.040, 1.034, 1.056))),
    ("decode", 32, "mixed", 13.34, ((0.995, 0.991, 1.000), (1.001, 0.997, 1.017), (1.005, 0.996, 1.027))),
    ("decode", 32, "one kind", 13.20, ((1.036, 1.010, 1.041), (1.035, 1.016, 1.037), (1.025, 1.013, 1.037))),
    ("decode", 64, "mixed", 17.43, ((0.998, 0.997, 1.006), (0.999, 0.999, 1.006), (1.008, 1.000, 1.010))),
    ("decode", 64, "one kind", 17.15, ((1.015, 1.011, 1.015), (1.007, 1.005, 1.010), (1.013, 1.009, 1.013))),
    ("decode", 128, "mixed", 19.60, ((0.999, 0.997, 1.000), (0.999, 0.998, 1.002), (0.999, 0.998, 0.999))),
    ("decode", 128, "one kind", 19.25, ((1.007, 1.003, 1.009), (1.007, 1.006, 1.010), (1.008, 1.003, 1.010))),
    ("decode", 256, "mixed", 22.82, ((1.000, 1.000, 1.001), (1.001, 1.001, 1.002), (1.002, 1.001, 1.002))),
    ("prefill", 8192, "mixed", 179.1, ((1.010, 1.009, 1.013), (1.007, 1.004, 1.011), (1.014, 1.013, 1.015))),
    ("prefill", 8192, "one kind", 181.0, ((1.016, 1.015, 1.017), (1.006, 1.006, 1.007), (1.021, 1.021, 1.022))),
)
OTHERS = ("zigzag", "packing", "balanced")


def rank_lists(ids_TK: Tensor) -> dict[str, Tensor]:
    """rank_E of each placement, made for these tokens."""
    made = {
        "linear": tuple(range(EXPERTS)),
        "zigzag": zigzag(EXPERTS, RANKS),
        "packing": packed(ids_TK.flatten().bincount(minlength=EXPERTS).tolist(), RANKS),
        "balanced": balanced(ids_TK, EXPERTS, RANKS, Aim(DEFAULT_MIX, EXPERT, GPU)),
    }
    return {name: torch.tensor(rank_of_each(placement, RANKS)) for name, placement in made.items()}


def drawn(step: Step, kinds: int, generator: torch.Generator) -> Tensor:
    """The numbers of a batch's tokens, among TOKENS of each kind."""
    if step.phase == "decode":
        return torch.randint(kinds * TOKENS, (step.tokens,), generator=generator)
    kind_S1 = torch.randint(kinds, (step.tokens // RUN, 1), generator=generator)
    start_S1 = torch.randint(TOKENS, (step.tokens // RUN, 1), generator=generator)
    return (kind_S1 * TOKENS + (start_S1 + torch.arange(RUN)) % TOKENS).flatten()


def predict(
    step: Step, ids_GTK: Tensor, ranks: Sequence[dict[str, Tensor]], generator: torch.Generator
) -> tuple[float, list[float]]:
    """Milliseconds of a step under linear, and linear over each of OTHERS: medians over batches.

    `ids_GTK` has G layers, which take turns in a model of LAYERS.
    """
    rest = rest_time(step, RANKS, SIZES, GPU)  # prefill was measured without attention, and this leaves it out as well
    times: dict[str, list[float]] = {name: [] for name in ranks[0]}
    for _ in range(BATCHES[step.phase]):
        number_N = drawn(step, ids_GTK.shape[1] // TOKENS, generator)
        for name, of_name in times.items():
            of_name.append(rest)
            for layer in range(LAYERS):
                ids_NK = ids_GTK[layer % len(ids_GTK), number_N]
                count_BE = ids_NK.flatten().bincount(minlength=EXPERTS).unsqueeze(0)
                rank_E = ranks[layer % len(ids_GTK)][name]
                tokens_B = torch.tensor([step.tokens])
                of_name[-1] += float(rank_times(count_BE, rank_E, RANKS, tokens_B, EXPERT, GPU).max())
    ratios = [statistics.median(a / b for a, b in zip(times["linear"], times[name], strict=True)) for name in OTHERS]
    return 1e3 * statistics.median(times["linear"]), ratios


def main() -> None:
    """Print the table, and how many gains are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("choices", help="safetensors file")
    choices = load_file(parser.parse_args().choices)
    texts_GTK = [choices[kind].long() for kind in sorted(choices)]
    made_from = torch.cat([text_GTK[:, :TOKENS] for text_GTK in texts_GTK], dim=1)
    judged = [text_GTK[:, TOKENS : 2 * TOKENS] for text_GTK in texts_GTK]
    ranks = [rank_lists(ids_TK) for ids_TK in made_from]
    generator = torch.Generator().manual_seed(0)
    print("| step | linear, ms: predicted (measured) | " + " | ".join(f"linear / {name}" for name in OTHERS) + " |")
    print("| --- | --- | --- | --- | --- |")
    met = total = 0
    for phase, tokens, kind, linear, gains in MEASURED:
        ids_GTK = torch.cat(judged, dim=1) if kind == "mixed" else judged[ONE_KIND]
        step = Step("decode" if phase == "decode" else "prefill", tokens)
        predicted, ratios = predict(step, ids_GTK, ranks, generator)
        cells = []
        for ratio, (median, low, high) in zip(ratios, gains, strict=True):
            within = abs(ratio - median) <= 0.01 or low <= ratio <= high
            met, total = met + within, total + 1
            cells.append(f"{ratio:.3f} ({median:.3f}, {low:.3f} to {high:.3f})" + " **off**" * (not within))
        print(f"| {phase} {tokens}, {kind} | {predicted:.2f} ({linear:.2f}) | {' | '.join(cells)} |", flush=True)
    print(f"\n{met} of {total} gains within one point of what was measured, or within its quartiles.")


if __name__ == "__main__":
    main()
