"""What the time model predicts for the steps that `step_times.py` measured, beside what was measured.

    python benchmarks/predicted_steps.py STEPS.json --choices FILE --placements DIR --gpu H200

For each batch that was measured, and each layer, `reshard.placement.time_model` says when the slowest rank is done
under each placement. The rest of a step is the same under all. So a step under a placement should take the time
that was measured under BASE, less what the layers gain by the model. If experts have copies, these are chosen as they
were in the step, and mapping ids takes longer than under BASE, by as much as was measured of its kernels. Printed are
the ratios of BASE's time to each placement's, predicted and measured, and how busy the busiest rank is. `--choices` is
what real routers chose (`step_times.py measure --save-choices`).

The model's times are means. If ranks scatter around them, and have equally much to do, the slowest is later than the
model says. `--scatter` predicts that: each rank's time is normally distributed, with this share of it as its standard
deviation. Tensors carry their shape in their name: B batches, L
layers, E experts, P slots, T tokens, K choices, V vocabulary, N parts of batches, each routed by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from copies import HASH
from lifted_model import R1_EXPERT
from reporting import write_json
from safetensors.torch import load_file
from step_times import BASE, Case, batches, is_unsteady, num_experts_of, orders_of, quartiles, ratios, shown
from swaps import BY_POSITION, slots_of
from torch import Tensor

from reshard.placement.copy_choice import schedule, serving_slots
from reshard.placement.time_model import ExpertShape, GpuProfile, rank_times, read_gpu
from reshard.traffic.step_time import choice_time

FEW = 16  # up to so many tokens of a rank, DeepSeek's gate gives float32 logits
# Of a layer, beyond the router: one gather, and EPLB's map (docs/gpu/copies-time.json)
GATHER_SECONDS, EPLB_SECONDS = 1.3e-6, 2.0e-6
DRAWS = 64  # of the scatter of ranks
DIGITS = 5  # of the predictions that are written
Way = Literal["without copies", "with copies", "by position"]
WAYS: tuple[Way, ...] = ("without copies", "with copies", "by position")


@dataclass(frozen=True)
class Predicted:
    """A case under one placement: ratios of BASE's time to its own, and the busiest rank, means over layers."""

    case: str
    placement: str
    way: Way
    measured: list[float]  # by round
    predicted: list[float]  # by round
    predicted_at_no_cost: list[float]  # by round, if mapping ids took no longer than under BASE
    cost: float  # by how much it takes longer, over a step's time under BASE
    active: float  # experts of the busiest rank
    base_active: float  # the same under BASE
    mean_active: float  # experts, over ranks: what the busiest rank has at least
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


class Layers(NamedTuple):
    """Each layer of each batch, [B, L]: milliseconds until the slowest rank is done, its active experts, its pairs."""

    times: Tensor
    active: Tensor
    pairs: Tensor


def way_of(name: str, order_LP: Tensor) -> Way:
    """How a placement's copies are chosen, if it has some."""
    if name.endswith(BY_POSITION):
        return "by position"
    return "with copies" if order_LP.shape[1] > num_experts_of(order_LP) else "without copies"


def slot_counts(ids_BTK: Tensor, order_P: Sequence[int], ranks: int, way: Way, parts: int) -> Tensor:
    """How many tokens of each batch each slot computes, [B, P].

    Parameters:
        ids_BTK: the experts that each token chose
        order_P: physical_to_logical
        ranks: R, which divides P
        way: how copies are chosen
        parts: into how many parts a batch is divided, each routed by a rank of its own
    """
    experts, tokens = 1 + max(order_P), ids_BTK.shape[1] // parts
    ids_NTK = ids_BTK.long().reshape(len(ids_BTK) * parts, tokens, -1)
    if way == "by position":
        slot_NP = _by_position(ids_NTK, order_P, experts, ranks).flatten(1)
        count_NP = _count(slot_NP, len(order_P))
    else:
        count_NE = _count(ids_NTK.flatten(1), experts)
        slot_NE = serving_slots(count_NE, schedule(order_P, experts, ranks), tokens, same_tokens=parts == 1)
        count_NP = count_NE.new_zeros(len(count_NE), len(order_P)).scatter_(1, slot_NE, count_NE)
    return count_NP.view(len(ids_BTK), parts, -1).sum(dim=1)


def _count(ids_NI: Tensor, most: int) -> Tensor:
    return ids_NI.new_zeros(len(ids_NI), most).scatter_add_(1, ids_NI, torch.ones_like(ids_NI))


def _by_position(ids_NTK: Tensor, order_P: Sequence[int], experts: int, ranks: int) -> Tensor:
    """The slot of each choice, by vLLM's rule: a hash of a token's position among those that its rank routes."""
    slots_E = slots_of(order_P, experts, ranks, len(order_P) // ranks)
    most = max(map(len, slots_E))
    slot_EC = torch.tensor([[*slots, *[-1] * (most - len(slots))] for slots in slots_E])
    hash_T1 = (torch.arange(ids_NTK.shape[1]) * HASH % 2**32).unsqueeze(1)
    return slot_EC[ids_NTK, hash_T1 % torch.tensor([len(slots) for slots in slots_E])[ids_NTK]]


def layer_times(
    chosen_LBTK: Tensor,
    order_LP: Tensor,
    ranks: int,
    way: Way,
    parts: int,
    expert: ExpertShape,
    gpu: GpuProfile,
    scatter: float = 0.0,
) -> Layers:
    """Each layer under a placement; every rank is given all tokens of a batch.

    The arguments are those above, and `scatter` is the standard deviation of a rank's time, over its mean.
    """
    draws = torch.Generator().manual_seed(0)  # the same for all placements
    every, rank_P = torch.full((chosen_LBTK.shape[1],), chosen_LBTK.shape[2]), _rank_of_slots(order_LP, ranks)
    times, active, pairs = [], [], []
    for ids_BTK, order_P in zip(chosen_LBTK, order_LP.tolist(), strict=True):
        count_BP = slot_counts(ids_BTK, order_P, ranks, way, parts)
        time_BR = 1000 * rank_times(count_BP, rank_P, ranks, every, expert, gpu)
        if scatter:
            drawn_DBR = torch.randn(DRAWS, *time_BR.shape, dtype=torch.float64, generator=draws)
            times.append((time_BR * (1 + scatter * drawn_DBR)).amax(dim=2).mean(dim=0))
        else:
            times.append(time_BR.amax(dim=1))
        empty_BR = count_BP.new_zeros(len(count_BP), ranks)
        active.append(empty_BR.index_add(1, rank_P, (count_BP > 0).long()).amax(dim=1))
        pairs.append(empty_BR.index_add(1, rank_P, count_BP).amax(dim=1))
    return Layers(*(torch.stack(found, dim=1) for found in (times, active, pairs)))


def _rank_of_slots(order_LP: Tensor, ranks: int) -> Tensor:
    return torch.arange(order_LP.shape[1]) // (order_LP.shape[1] // ranks)


def mapping_time(way: Way, tokens: int, parts: int) -> float:
    """Milliseconds of a layer in which ids are mapped after the router; `tokens` are those that a rank routes.

    Without copies the router's kernel maps them. It does not serve a single token: vLLM's router does.
    """
    if way == "without copies":
        return 1000 * GATHER_SECONDS * (tokens == 1)
    return 1000 * (EPLB_SECONDS if way == "by position" else choice_time(tokens, same_tokens=parts == 1))


def predict(
    record: Mapping[str, Any],
    chosen: Mapping[str, Tensor],
    orders: Mapping[str, Tensor],
    expert: ExpertShape,
    gpu: GpuProfile,
    scatter: float = 0.0,
) -> list[Predicted]:
    """The predictions for all cases and placements of a record of `step_times`.

    Parameters:
        chosen: [L, V, K] by how many tokens the gate has at once, "many" or "few"
        orders: physical_to_logical [L, P] of each placement
        scatter: see `layer_times`
    """
    found = []
    ranks, parts = record["ranks"], record["ranks"] if record["mode"] == "dp" else 1
    for given in record["cases"]:
        case = Case(**given)
        rows = [row for row in record["rows"] if row["case"] == case.name]
        took = {(row["placement"], row["round"]): sum(row["ms"]) for row in rows}
        local = case.tokens // parts
        chosen_LVK = chosen["few" if local <= FEW else "many"]
        rounds = sorted({row["round"] for row in rows})
        made = [chosen_LVK[:, torch.tensor(batches(case, turn, record["vocabulary"]))] for turn in rounds]
        distinct = [_count(ids.flatten(0, 1).flatten(1).long(), num_experts_of(orders[BASE])) > 0 for ids in made]
        ways = {name: way_of(name, order_LP) for name, order_LP in orders.items()}
        of = {
            name: [layer_times(ids, order_LP, ranks, ways[name], parts, expert, gpu, scatter) for ids in made]
            for name, order_LP in orders.items()
        }
        for name, measured in ratios(rows).items():
            both = [place for place, turn in enumerate(rounds) if {(BASE, turn), (name, turn)} <= took.keys()]
            base = [took[BASE, rounds[place]] for place in both]
            gains = [(of[BASE][place].times - of[name][place].times).sum().item() for place in both]
            longer = mapping_time(ways[name], local, parts) - mapping_time(ways[BASE], local, parts)
            cost = longer * len(chosen_LVK) * case.batches
            mean = case.tokens * chosen_LVK.shape[2] / ranks
            found.append(
                Predicted(
                    case.name,
                    name,
                    ways[name],
                    measured,
                    predicted=[whole / (whole - gain + cost) for whole, gain in zip(base, gains, strict=True)],
                    predicted_at_no_cost=[whole / (whole - gain) for whole, gain in zip(base, gains, strict=True)],
                    cost=cost / statistics.median(base),
                    active=_mean([of[name][place].active for place in both]),
                    base_active=_mean([of[BASE][place].active for place in both]),
                    mean_active=_mean([distinct[place].sum(dim=1) for place in both]) / ranks,
                    pairs=_mean([of[name][place].pairs for place in both]) / mean,
                )
            )
    return found


def _mean(tensors: Sequence[Tensor]) -> float:
    return torch.cat(list(tensors)).double().mean().item()


def table(found: Sequence[Predicted]) -> str:
    """The predictions in Markdown."""
    heads = ["step", "placement", f"{BASE} over it, measured", "predicted", "error", "within"]
    heads += ["mapping ids", f"active: it, {BASE}, mean", "pairs"]
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' --- |' * (len(heads) - 2)}"]
    for one in found:
        within = "yes" if one.is_met else f"no ({one.allowed:.4f})"
        cells = [one.case, one.placement, shown(one.measured), f"{statistics.median(one.predicted):.4f}"]
        cells += [f"{one.error:+.4f}", within, f"{one.cost:+.4f}"]
        cells += [f"{one.active:.2f}, {one.base_active:.2f}, {one.mean_active:.2f}", f"{one.pairs:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(summary(name, group) for name, group in groups(found).items())])


def groups(found: Sequence[Predicted]) -> dict[str, list[Predicted]]:
    """All predictions, those of decoding and of prefill; without the unsteady steps, and by how copies are chosen."""
    unsteady = unsteady_steps(found)
    made = {"all": list(found)}
    for phase in ("decode", "prefill"):
        made[phase] = [one for one in found if one.case.startswith(phase)]
        steady = [one for one in made[phase] if one.case not in unsteady]
        if len(steady) < len(made[phase]):
            made[f"{phase}, steady"] = steady
        if len({one.way for one in steady}) > 1:
            for way in WAYS:
                made[f"{phase}, {'steady, ' * (len(steady) < len(made[phase]))}{way}"] = [
                    one for one in steady if one.way == way
                ]
    return {name: group for name, group in made.items() if group}


def unsteady_steps(found: Sequence[Predicted]) -> set[str]:
    """The cases whose ratios say little."""
    cases = {one.case: [other.measured for other in found if other.case == one.case] for one in found}
    return {case for case, measured in cases.items() if is_unsteady(case, measured)}


def summary(name: str, found: Sequence[Predicted]) -> str:
    """How many predictions are met, and the mean error; beside those of the prediction that nothing is gained."""
    met, none = sum(one.is_met for one in found), sum(one.is_met_by_none for one in found)
    error = statistics.mean(abs(one.error) for one in found)
    predicted, measured = (
        [statistics.median(ratio) - 1 for ratio in both]
        for both in zip(*((one.predicted, one.measured) for one in found), strict=True)
    )
    square = sum(gain**2 for gain in predicted)
    slope = sum(a * b for a, b in zip(predicted, measured, strict=True)) / square if square else float("nan")
    alike = len(set(predicted)) < 2 or len(set(measured)) < 2
    correlation = float("nan") if alike else statistics.correlation(predicted, measured)
    return (
        f"- {name}: {met} of {len(found)} within, mean error {100 * error:.2f} points; measured gains are "
        f"{slope:.2f} of predicted ones (correlation {correlation:.2f}). "
        f"A prediction of no gain: {none} within, {100 * statistics.mean(map(abs, measured)):.2f} points."
    )


def rounded(value: Any) -> Any:
    """All numbers in it to DIGITS decimal places."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("steps", type=Path, metavar="STEPS.json", help="results of step_times.py")
    parser.add_argument("--choices", type=Path, required=True, help="what real routers chose")
    parser.add_argument("--placements", type=Path, required=True, help="directory of placement files")
    parser.add_argument("--gpu", default="H200", help="a GPU's name, or a JSON (default H200)")
    parser.add_argument("--scatter", type=float, default=0.0, help="of a rank's time, over it (default 0)")
    parser.add_argument("--only", default="", metavar="STEP", help="only steps whose names begin so, as decode")
    parser.add_argument("--json", type=Path, help="write the predictions to this file too")
    options = parser.parse_args()
    record = json.loads(options.steps.read_text())
    record["cases"] = [case for case in record["cases"] if Case(**case).name.startswith(options.only)]
    layers = range(1, 1 + record["layers"])
    orders = {
        name: orders_of(options.placements / f"{name.removesuffix(BY_POSITION)}.json", layers)
        for name in record["placements"]
    }
    found = predict(record, load_file(options.choices), orders, R1_EXPERT, read_gpu(options.gpu), options.scatter)
    print(table(found))
    if options.json:
        about = {"mode": record["mode"], "ranks": record["ranks"], "gpu": options.gpu, "scatter": options.scatter}
        write_json(options.json, about | {"predicted": [rounded(vars(one)) for one in found]})


if __name__ == "__main__":
    main()
