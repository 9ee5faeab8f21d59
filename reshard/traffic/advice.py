"""One recommendation from an analysis: which placement to serve with, or none, and why. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..model.memory import CopiesMemory, gigabytes
from ..placement.steps import PHASES, Step, describe_mix
from ..placement.strategies import Copies
from .step_time import StepTime, mean_time

WORTH = 0.01  # of a step's time: the time model's own error is about as large
ALIKE = 0.005  # of a step's time: of placements that differ by less, the simpler one is recommended


@dataclass(frozen=True, slots=True)
class Advice:
    """What to serve with.

    `strategy` is the placement recommended, None if there was no trace to know it from. `why` is the recommendation in
    a sentence. `saved` has the part of a step's time that each other placement saves, on average over `mix`; it is
    negative for one that costs time. `commands` are what to run.
    """

    strategy: str | None
    why: str
    mix: str
    saved: dict[str, float]
    commands: tuple[str, ...]


def advise(
    times: Sequence[StepTime],
    mix: Sequence[Step],
    commands: Mapping[str, Sequence[str]],
    *,
    recorded: bool,
    nodes: int,
    record: str,
    copies: CopiesMemory | None = None,
) -> Advice:
    """Recommend one of the placements in `times`.

    Parameters:
        times: of all steps that were predicted; the first strategy of each is what others are compared with
        mix: the steps that count, of those in `times`
        commands: what serves each placement
        recorded: whether `times` are of recorded traffic
        nodes: the nodes that the ranks are spread over
        record: the command that records traffic
        copies: the memory that copies take, if a placement has some. Since they take memory, they must save WORTH more
            than any other placement

    """
    counted = [time for time in times if Step(time.phase, time.tokens) in mix]
    base, *others = counted[0].moe
    saved = {name: 1 - mean_time(counted, name, base) for name in others}
    described = describe_mix([Step(time.phase, time.tokens) for time in counted])
    if not recorded:
        why = (
            "without a trace nobody can know what a placement gains: these times are of random tokens, and recorded "
            "traffic of the same model can turn a gain into a loss. Record a trace of the traffic that you serve, and "
            "analyze it."
        )
        return Advice(None, why, described, saved, (record,))
    fixed = {name: value for name, value in saved.items() if copies is None or name != Copies.name}
    by_copies = saved.get(Copies.name, 0.0) if copies else 0.0
    if copies and copies.fits and by_copies >= max([0.0, *fixed.values()]) + WORTH:
        strategy = Copies.name
        why = (
            f"serve with copies, {copies.spare_slots} spare slots on each rank: {_saves(counted, strategy, base)}"
            f"{_where(saved, strategy)}. {_costs(copies)}"
        )
    else:
        strategy, why = _of_fixed(counted, fixed, base)
        if copies and not copies.fits:
            why += f" Copies do not fit: they take {gigabytes(copies.taken)} of each GPU."
        elif copies and Copies.name in saved:
            why += f" Copies save {_percent(by_copies)}, and take {gigabytes(copies.taken)} of each GPU."
    if nodes > 1:
        why += " Sending tokens between nodes is not in these times: see the nodes that a token reaches."
    elif strategy != base:
        why += " All-to-all kernels such as DeepEP's send tokens, which is not in these times: measure there first."
    return Advice(strategy, why, described, saved, tuple(commands[strategy]))


def _of_fixed(counted: Sequence[StepTime], saved: Mapping[str, float], base: str) -> tuple[str, str]:
    """The best of the placements without copies, and the recommendation in a sentence."""
    most = max(saved.values(), default=0.0)
    if most >= WORTH:
        strategy = next(name for name, value in saved.items() if value >= most - ALIKE)
        return strategy, f"serve placed {strategy}: {_saves(counted, strategy, base)}{_where(saved, strategy)}."
    if saved and min(saved.values()) <= -WORTH:
        worst = min(saved, key=lambda name: saved[name])
        why = f"serve {base}: no placement saves 1 % of a step's time, and {worst} adds {_percent(-saved[worst])}."
    elif saved:
        best = max(saved, key=lambda name: saved[name])
        why = f"do not bother, serve {base}: the best placement, {best}, saves {_percent(most)} of a step's time."
    else:
        why = f"serve {base}: there is nothing else to compare it with."
    return base, why


def _where(saved: Mapping[str, float], strategy: str) -> str:
    """What the other placements save."""
    others = [f"{name} {_percent(saved[name])}" for name in saved if name != strategy]
    return f"; on average {_percent(saved[strategy])}, where {' and '.join(others)}" if others else ""


def _costs(copies: CopiesMemory) -> str:
    """What copies take of a GPU, and what they leave for the KV cache."""
    left = f" and leave about {gigabytes(copies.kv_size)} of {gigabytes(copies.kv_size_without)} for the KV cache"
    return f"Copies take {gigabytes(copies.taken)} of each GPU{left if copies.gpu_size else ''}."


def _saves(counted: Sequence[StepTime], strategy: str, base: str) -> str:
    """What `strategy` saves of a step, for each phase, with the reason."""
    reasons = {
        "decode": "its busiest rank has fewer active experts to read",
        "prefill": "its busiest rank has fewer tokens to compute",
    }
    phrases = []
    for phase in PHASES:
        mine = [1 - time.total(strategy) / time.total(base) for time in counted if time.phase == phase]
        if mine:
            low, high = min(mine), max(mine)
            amount = _percent(high) if f"{low:.1%}" == f"{high:.1%}" else f"{100 * low:.1f} to {_percent(high)}"
            because = f" ({reasons[phase]})" if high >= WORTH else ""
            phrases.append(f"{amount} of a {phase} step's time{because}")
    return f"it saves {' and '.join(phrases)}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
