"""What the time model predicts for the steps that `step_times.py` measured, beside what was measured.

    python benchmarks/predicted_steps.py STEPS.json --choices FILE --placements DIR --gpu H200

For each batch that was measured, and each layer, `reshard.placement.time_model` says when the slowest rank is done
under each placement. The rest of a step is the same under all. So a step under a placement should take the time
that was measured under BASE, less what the layers gain by the model. Printed are the ratios of BASE's time to each
placement's, predicted and measured, and how busy the busiest rank is. `--choices` is what real routers chose
(`step_times.py measure --save-choices`). Tensors carry their shape in their name: B batches, L layers, E experts, T
tokens, K choices, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lifted_model import R1_EXPERT
from reporting import write_json
from safetensors.torch import load_file
from step_times import BASE, Case, batches, orders_of, quartiles, ratios, shown
from torch import Tensor

from reshard.placement.time_model import ExpertShape, GpuProfile, rank_times, read_gpu

FEW = 16  # up to so many tokens of a rank, DeepSeek's gate gives float32 logits


@dataclass(frozen=True)
class Predicted:
    """A case under one placement: ratios of BASE's time to its own, and the busiest rank, means over layers."""

    case: str
    placement: str
    measured: list[float]  # by round
    predicted: list[float]  # by round
    active: float  # experts of the busiest rank
    pairs: float  # of the busiest rank, over the mean

    @property
    def error(self) -> float:
        """Predicted less measured, medians."""
        return statistics.median(self.predicted) - statistics.median(self.measured)

    @property
    def allowed(self) -> float:
        """One point, or the distance to the quartiles where that is more."""
        low, middle, high = quartiles(self.measured)
        return max(0.01, high - middle, middle - low)

    @property
    def is_met(self) -> bool:
        """Whether the prediction is off by no more than is allowed."""
        return abs(self.error) <= self.allowed

    @property
    def is_met_by_none(self) -> bool:
        """Whether the prediction that placements gain nothing would be met too."""
        return abs(statistics.median(self.measured) - 1) <= self.allowed


def counts(ids_BT: Sequence[Sequence[int]], chosen_LVK: Tensor, experts: int) -> Tensor:
    """How many tokens of each batch choose each expert, [B, L, E]."""
    chosen_LBTK = chosen_LVK[:, torch.tensor(ids_BT)].long()
    flat_LBP = chosen_LBTK.flatten(2)
    count_LBE = torch.zeros(*flat_LBP.shape[:2], experts, dtype=torch.long)
    return count_LBE.scatter_add_(2, flat_LBP, torch.ones_like(flat_LBP)).transpose(0, 1)


def layer_times(
    count_BLE: Tensor, order_LE: Tensor, ranks: int, tokens: int, expert: ExpertShape, gpu: GpuProfile
) -> tuple[Tensor, Tensor, Tensor]:
    """Each layer under a placement: milliseconds until the slowest rank is done, its active experts, its pairs; [B, L].

    Parameters:
        count_BLE: see `counts`
        order_LE: physical_to_logical of each layer
        ranks: R, which divides E
        tokens: of each batch; every rank is given all of them
    """
    every = torch.full((len(count_BLE),), tokens)
    times, active, pairs = [], [], []
    for layer, order_E in enumerate(order_LE):
        rank_E = order_E.argsort() // (len(order_E) // ranks)
        count_BE = count_BLE[:, layer]
        times.append(1000 * rank_times(count_BE, rank_E, ranks, every, expert, gpu).amax(dim=1))
        empty_BR = torch.zeros(len(count_BE), ranks, dtype=torch.long)
        active.append(empty_BR.index_add(1, rank_E, (count_BE > 0).long()).amax(dim=1))
        pairs.append(empty_BR.index_add(1, rank_E, count_BE).amax(dim=1))
    return torch.stack(times, dim=1), torch.stack(active, dim=1), torch.stack(pairs, dim=1)


def predict(
    record: Mapping[str, Any],
    chosen: Mapping[str, Tensor],
    orders: Mapping[str, Tensor],
    expert: ExpertShape,
    gpu: GpuProfile,
) -> list[Predicted]:
    """The predictions for all cases and placements of a record of `step_times`.

    Parameters:
        chosen: [L, V, K] by how many tokens the gate has at once, "many" or "few"
        orders: physical_to_logical [L, E] of each placement
    """
    found = []
    for given in record["cases"]:
        case = Case(**given)
        rows = [row for row in record["rows"] if row["case"] == case.name]
        took = {(row["placement"], row["round"]): sum(row["ms"]) for row in rows}
        local = case.tokens // (record["ranks"] if record["mode"] == "dp" else 1)
        chosen_LVK = chosen["few" if local <= FEW else "many"]
        rounds = sorted({row["round"] for row in rows})
        made = [batches(case, turn, record["vocabulary"]) for turn in rounds]
        every = [counts(ids, chosen_LVK, orders[BASE].shape[1]) for ids in made]
        of = {
            name: [layer_times(count, order_LE, record["ranks"], case.tokens, expert, gpu) for count in every]
            for name, order_LE in orders.items()
        }
        for name, measured in ratios(rows).items():
            both = [place for place, turn in enumerate(rounds) if {(BASE, turn), (name, turn)} <= took.keys()]
            gains = {place: (of[BASE][place][0] - of[name][place][0]).sum().item() for place in both}
            predicted = [
                took[BASE, rounds[place]] / (took[BASE, rounds[place]] - gain) for place, gain in gains.items()
            ]
            active = torch.cat([of[name][place][1] for place in both]).double().mean().item()
            pairs = torch.cat([of[name][place][2] for place in both]).double().mean().item()
            mean = case.tokens * chosen_LVK.shape[2] / record["ranks"]
            found.append(Predicted(case.name, name, measured, predicted, active, pairs / mean))
    return found


def table(found: Sequence[Predicted]) -> str:
    """The predictions in Markdown."""
    heads = ["step", "placement", f"{BASE} over it, measured", "predicted", "error", "within", "active", "pairs"]
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' --- |' * (len(heads) - 2)}"]
    for one in found:
        within = "yes" if one.is_met else f"no ({one.allowed:.4f})"
        cells = [one.case, one.placement, shown(one.measured), f"{statistics.median(one.predicted):.4f}"]
        cells += [f"{one.error:+.4f}", within, f"{one.active:.2f}", f"{one.pairs:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *map(summary, (found, *by_phase(found)))])


def by_phase(found: Sequence[Predicted]) -> list[list[Predicted]]:
    """The predictions of decoding, then those of prefill, where there are any."""
    phases = [[one for one in found if one.case.startswith(phase)] for phase in ("decode", "prefill")]
    return [phase for phase in phases if phase]


def summary(found: Sequence[Predicted]) -> str:
    """How many predictions are met, and the mean error; beside those of the prediction that nothing is gained."""
    met, none = sum(one.is_met for one in found), sum(one.is_met_by_none for one in found)
    error = statistics.mean(abs(one.error) for one in found)
    gained = statistics.mean(abs(statistics.median(one.measured) - 1) for one in found)
    phases = " and ".join(sorted({one.case.split()[0] for one in found}))
    return (
        f"- {phases}: {met} of {len(found)} within, mean error {100 * error:.2f} points. "
        f"A prediction of no gain: {none} within, {100 * gained:.2f} points."
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("steps", type=Path, metavar="STEPS.json", help="results of step_times.py")
    parser.add_argument("--choices", type=Path, required=True, help="what real routers chose")
    parser.add_argument("--placements", type=Path, required=True, help="directory of placement files")
    parser.add_argument("--gpu", default="H200", help="a GPU's name, or a JSON (default H200)")
    parser.add_argument("--json", type=Path, help="write the predictions to this file too")
    options = parser.parse_args()
    record = json.loads(options.steps.read_text())
    layers = range(1, 1 + record["layers"])
    orders = {name: orders_of(options.placements / f"{name}.json", layers) for name in record["placements"]}
    found = predict(record, load_file(options.choices), orders, R1_EXPERT, read_gpu(options.gpu))
    print(table(found))
    if options.json:
        about = {"mode": record["mode"], "ranks": record["ranks"], "gpu": options.gpu}
        write_json(options.json, about | {"predicted": [vars(one) for one in found]})


if __name__ == "__main__":
    main()
