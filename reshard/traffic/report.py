"""Describes in words what `reshard analyze` found, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping

from ..model.memory import UTILIZATION, CopiesMemory, gigabytes
from ..placement.steps import PHASES
from .analysis import Analysis
from .effect import Effect
from .step_time import StepTime

_COLUMNS = 5
_TYPICAL_BATCH = 64
# Most backends send one copy to each rank or node. DeepEP's low-latency kernels have a row for each expert that a token
# chose (torchtitan pull request 3808), and send that many copies unless they are layered (DeepEP pull request 500).
WHAT_COUNTS = (
    ("every rank has every token (tensor parallelism)", "the busiest rank only: no token is sent"),
    ("all-to-all within a node", "the busiest rank, and ranks per token: each gets a copy over a fast link"),
    ("all-to-all across nodes", "nodes per token: each gets a copy over the slow network; then the busiest rank"),
)


def describe_analysis(analysis: Analysis, *, by_layer: bool = False) -> list[str]:
    """The table over all layers and what it means; with `by_layer` also the same table for each layer."""
    means = {candidate.strategy: candidate.mean for candidate in analysis.candidates}
    lines = [
        *headlines(analysis),
        "",
        *_times(analysis),
        *_copies(analysis),
        "",
        *_table(analysis, means),
        "",
        *_worst(analysis),
    ]
    for name, *phrases in compare(analysis):
        lines += ["", f"{name}:", *(f"  {phrase}" for phrase in phrases)]
    lines += ["", "What counts, where sending tokens takes time too:"]
    lines += [f"  {setup:50}{what}" for setup, what in WHAT_COUNTS]
    if by_layer:
        for layer in analysis.layers:
            effects = {candidate.strategy: candidate.layers[layer] for candidate in analysis.candidates}
            lines += ["", f"{layer}:", *_table(analysis, effects)]
    return lines


def recommendation(analysis: Analysis) -> list[str]:
    """The recommendation in a sentence, and what to run."""
    return [f"Recommendation: {analysis.advice.why}", *(f"  {command}" for command in analysis.advice.commands)]


def headlines(analysis: Analysis) -> list[str]:
    """What was analyzed, and where its traffic comes from."""
    groups = f" from {analysis.topk_group} of {analysis.n_group} groups" if analysis.n_group > 1 else ""
    nodes = f" on {analysis.nodes} nodes" if analysis.nodes > 1 else ""
    lines = [
        f"{analysis.path}: {analysis.family}, {len(analysis.layers)} MoE layers of {analysis.num_experts} experts, "
        f"{analysis.top_k} per token{groups}; {analysis.ep_size} EP ranks{nodes}",
        f"traffic: {analysis.tokens} {analysis.traffic}",
    ]
    lines += [f"left out: {name}: {why}" for name, why in analysis.unfit.items()]
    if analysis.unrecorded:
        lines.append(f"left out, since not recorded: {', '.join(analysis.unrecorded)}")
    return lines


def _copies(analysis: Analysis) -> list[str]:
    """The memory that copies take, after the times; nothing without copies."""
    return (
        [] if analysis.copies is None else ["", "Copies:", *(f"  {line}" for line in describe_memory(analysis.copies))]
    )


def describe_memory(memory: CopiesMemory) -> list[str]:
    """What copies take of a GPU's memory, and what is left for the KV cache."""
    lines = [
        f"copies take {gigabytes(memory.copies_size)} of each GPU: {memory.spare_slots} spare slots in each MoE layer "
        f"(drafts left out); EPLB's buffer of one layer takes {gigabytes(memory.buffer_size)} more"
    ]
    if memory.gpu_size:
        left = f"about {gigabytes(memory.kv_size)} are left" if memory.fits else "nothing is left"
        lines.append(
            f"{left} for the KV cache, and {gigabytes(memory.kv_size_without)} without copies: {UTILIZATION} of "
            f"{gigabytes(memory.gpu_size)} (vLLM's rule), less {gigabytes(memory.weights_size)} of weights; an "
            "estimate, from which activations and CUDA graphs still go off"
        )
    return lines


def times_note(analysis: Analysis) -> str:
    """What the times are."""
    choosing = ", with the time to choose copies" if analysis.copies else ""
    return (
        f"predicted for {analysis.ep_size} {analysis.gpu}, from the active experts and the tokens of the slowest rank"
        f"{choosing}; attention and the rest of a step are an estimate"
    )


def _times(analysis: Analysis) -> list[str]:
    """A row for each batch size: milliseconds of the MoE layers under each placement, in decoding and in prefill."""
    names = [candidate.strategy for candidate in analysis.candidates]
    rows: dict[int, dict[str, StepTime]] = {}
    for time in analysis.steps:
        rows.setdefault(time.tokens, {})[time.phase] = time
    width = max(9, *(len(name) + 2 for name in names))
    heads = "".join(f"{name:>{width}}" for name in names)
    lines = [
        f"MoE layers of a step, in ms, and their share of the step under {names[0]}:",
        f"  {times_note(analysis)}",
        f"  {analysis.gpu}: {analysis.gpu_source}",
        "  " + " " * 8 + "".join(f"{phase:>{width * len(names)}}{'share':>8}" for phase in PHASES),
        "  " + f"{'tokens':>8}" + f"{heads}{'':8}" * len(PHASES),
    ]
    for tokens, of_size in sorted(rows.items()):
        cells = ""
        for phase in PHASES:
            if phase not in of_size:
                cells += " " * (width * len(names) + 8)
                continue
            cells += "".join(f"{1e3 * of_size[phase].moe[name]:{width}.3f}" for name in names)
            cells += f"{of_size[phase].share(names[0]):8.0%}"
        lines.append(f"  {tokens:8}{cells}")
    return lines


def compare(analysis: Analysis) -> list[tuple[str, ...]]:
    """Compare each other candidate with the first: a heading, and a phrase for each number."""
    before, *others = analysis.candidates
    number = typical_batch(analysis)
    found = []
    for candidate in others:
        was, now = before.mean, candidate.mean
        phrases = [
            f"at {_tokens(analysis.batch_sizes[number])} the busiest rank has {now.imbalance[number]:.2f}x the mean "
            f"load ({before.strategy}: {was.imbalance[number]:.2f}x): "
            f"{_change(now.imbalance[number], was.imbalance[number], 'load on the busiest rank')}",
            f"a token reaches {now.ranks:.2f} ranks ({before.strategy}: {was.ranks:.2f}): "
            f"{_change(now.ranks, was.ranks, 'data to send')}",
        ]
        if analysis.nodes > 1:
            phrases.append(
                f"a token reaches {now.nodes:.2f} nodes ({before.strategy}: {was.nodes:.2f}): "
                f"{_change(now.nodes, was.nodes, 'data to send between nodes')}"
            )
        found.append((f"{candidate.strategy} instead of {before.strategy}", *phrases))
    return found


def typical_batch(analysis: Analysis) -> int:
    """The index of the batch size that sentences quote: the one nearest to a decoding step's."""
    sizes = analysis.batch_sizes
    return min(range(len(sizes)), key=lambda number: abs(sizes[number] - _TYPICAL_BATCH))


def _table(analysis: Analysis, effects: Mapping[str, Effect]) -> list[str]:
    """A row for each placement. If there are many batch sizes, shows every n-th, the last included."""
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
    heading = "busiest rank over mean, by tokens in a batch"
    width = max(len(heading), len(rows[0][1]) - 1)
    return [
        f"  {'':14}{heading:>{width}}{'a token reaches':>18}",
        *(f"  {name:14}{imbalance:>{width}}{fan_out:>18}" for name, imbalance, fan_out in rows),
    ]


def _worst(analysis: Analysis) -> list[str]:
    number = typical_batch(analysis)
    worst = []
    for candidate in analysis.candidates:
        highest, layer = max((found.imbalance[number], layer) for layer, found in candidate.layers.items())
        worst.append(f"{candidate.strategy} {highest:.2f}x ({layer})")
    return [f"least even layer at {_tokens(analysis.batch_sizes[number])}: {', '.join(worst)}"]


def _tokens(size: int) -> str:
    return f"{size} token{'s' * (size != 1)}"


def _change(now: float, was: float, what: str) -> str:
    percent = 100 * (now / was - 1)
    if abs(percent) < 0.5:
        return f"no change in {what}"
    return f"{abs(percent):.0f} % {'less' if percent < 0 else 'more'} {what}"
