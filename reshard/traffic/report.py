"""What `reshard analyze` found, in words: for the terminal, and for the page."""

from __future__ import annotations

from collections.abc import Mapping

from .analysis import Analysis
from .effect import Effect

_COLUMNS = 5
_TYPICAL_BATCH = 64
# A copy to each rank or node is what most backends send; DeepEP's low-latency kernels have a row for each expert that a
# token chose (torchtitan pull request 3808), and send as many unless layered (DeepEP pull request 500).
WHERE = (
    ("every rank has every token (tensor parallelism)", "the busiest rank alone: no token is sent"),
    ("all-to-all within a node", "the busiest rank, and ranks a token: to each goes a copy over a fast link"),
    ("all-to-all across nodes", "nodes a token: to each goes a copy over the slow network; then the busiest rank"),
)


def describe_analysis(analysis: Analysis, *, by_layer: bool = False) -> list[str]:
    """The table over all layers and what it means, and where `by_layer` the same table for each layer."""
    means = {candidate.strategy: candidate.mean for candidate in analysis.candidates}
    lines = [*headlines(analysis), "", *_table(analysis, means), "", *_worst(analysis)]
    for name, *phrases in compare(analysis):
        lines += ["", f"{name}:", *(f"  {phrase}" for phrase in phrases)]
    lines += ["", "What counts where, as far as time follows (token, expert) pairs:"]
    lines += [f"  {where:50}{what}" for where, what in WHERE]
    if by_layer:
        for layer in analysis.layers:
            effects = {candidate.strategy: candidate.layers[layer] for candidate in analysis.candidates}
            lines += ["", f"{layer}:", *_table(analysis, effects)]
    return lines


def headlines(analysis: Analysis) -> list[str]:
    """What was looked at, and whose choices these are."""
    groups = f" from {analysis.topk_group} of {analysis.n_group} groups" if analysis.n_group > 1 else ""
    nodes = f" of {analysis.nodes} nodes" if analysis.nodes > 1 else ""
    lines = [
        f"{analysis.path}: {analysis.family}, {len(analysis.layers)} MoE layers of {analysis.num_experts} experts, "
        f"{analysis.top_k} a token{groups}, on {analysis.ep_size} EP ranks{nodes}",
        f"traffic: {analysis.tokens} {analysis.traffic}",
    ]
    lines += [f"left out: {name}: {why}" for name, why in analysis.unfit.items()]
    if analysis.unrecorded:
        lines.append(f"left out, since not recorded: {', '.join(analysis.unrecorded)}")
    return lines


def compare(analysis: Analysis) -> list[tuple[str, ...]]:
    """For each candidate but the first: a heading, and a phrase for each number that it changes."""
    before, *others = analysis.candidates
    number = typical_batch(analysis)
    found = []
    for candidate in others:
        was, now = before.mean, candidate.mean
        phrases = [
            f"{_more(now.imbalance[number])} more time than in perfect balance, not {_more(was.imbalance[number])}, in "
            f"batches of {_tokens(analysis.batch_sizes[number])}: "
            f"{_change(now.imbalance[number], was.imbalance[number])} of the experts' time",
            f"{now.ranks:.2f} ranks a token, not {was.ranks:.2f}: {_change(now.ranks, was.ranks)} to send",
        ]
        if analysis.nodes > 1:
            phrases.append(
                f"{now.nodes:.2f} nodes a token, not {was.nodes:.2f}: {_change(now.nodes, was.nodes)} to send between "
                "nodes"
            )
        found.append((f"{candidate.strategy} instead of {before.strategy}", *phrases))
    return found


def typical_batch(analysis: Analysis) -> int:
    """Which batch size sentences speak of: the position of the one nearest to a decoding step's."""
    sizes = analysis.batch_sizes
    return min(range(len(sizes)), key=lambda number: abs(sizes[number] - _TYPICAL_BATCH))


def _table(analysis: Analysis, effects: Mapping[str, Effect]) -> list[str]:
    """A row for each placement; of many batch sizes every n-th, the last among them."""
    sizes = analysis.batch_sizes
    step = -(-(len(sizes) - 1) // (_COLUMNS - 1)) or 1
    shown = range((len(sizes) - 1) % step, len(sizes), step)
    over_nodes = analysis.nodes > 1
    rows = [
        ("", "".join(f"{sizes[number]:9}" for number in shown), f"{'ranks':>8}" + f"{'nodes':>8}" * over_nodes),
        *(
            (
                name,
                "".join(f"{found.imbalance[number]:9.3f}" for number in shown),
                f"{found.ranks:8.2f}" + f"{found.nodes:8.2f}" * over_nodes,
            )
            for name, found in effects.items()
        ),
    ]
    heading = "busiest rank over mean, in batches of tokens"
    width = max(len(heading), len(rows[0][1]) - 1)
    return [
        f"  {'':14}{heading:>{width}}{'a token is on':>18}",
        *(f"  {name:14}{imbalance:>{width}}{fan_out:>18}" for name, imbalance, fan_out in rows),
    ]


def _worst(analysis: Analysis) -> list[str]:
    number = typical_batch(analysis)
    worst = []
    for candidate in analysis.candidates:
        most, layer = max((found.imbalance[number], layer) for layer, found in candidate.layers.items())
        worst.append(f"{most:.3f} with {candidate.strategy} ({layer})")
    return [f"most uneven layer in batches of {_tokens(analysis.batch_sizes[number])}: {', '.join(worst)}"]


def _tokens(size: int) -> str:
    return f"{size} token{'s' * (size != 1)}"


def _more(ratio: float) -> str:
    return f"{100 * (ratio - 1):.1f} %"


def _change(now: float, was: float) -> str:
    percent = 100 * (now / was - 1)
    return f"{abs(percent):.0f} % {'less' if percent < 0 else 'more'}" if abs(percent) >= 0.5 else "no change"
