"""Draw how copies of experts shorten a step, as an SVG: python benchmarks/copies_picture.py OUT.svg

Four ranks hold sixteen experts, and a batch needs the experts in ACTIVE. Each panel is a placement. Its columns are
ranks, a square is a slot with an expert, and the bar below says how many experts the rank reads for the batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reshard.placement.copy_choice import choose_copies, schedule
from reshard.placement.permutations import zigzag
from reshard.placement.spare import evenly_copied

EXPERTS, RANKS, SPARE = 16, 4, 1
ACTIVE = (0, 1, 8, 9, 10, 11, 13, 15)
SQUARE, GAP, BAR = 34, 8, 15  # pixels: a slot's side, between columns, of a bar for each active expert
LEFT, TOP, BETWEEN = 24, 84, 56
PANEL = RANKS * (SQUARE + GAP) - GAP
ROWS = EXPERTS // RANKS + SPARE
FLOOR = TOP + ROWS * (SQUARE + 4) + 28  # where bars begin
WIDTH, HEIGHT = LEFT + 3 * (PANEL + BETWEEN), FLOOR + 4 * BAR + 64
STYLE = (
    "svg{background:#fff;color:#24292f;font:13px system-ui,sans-serif}text{fill:currentColor}"
    ".idle{fill:#f0f2f5;stroke:#c9d1d9}.active{fill:#1d4ed8;stroke:#1d4ed8}.other{fill:#fff;stroke:#1d4ed8}"
    ".copy{stroke-dasharray:4 3;stroke-width:1.6}.on{fill:#fff}.soft{fill:#57606a}"
    ".bar{fill:#8fb0f5}.busiest{fill:#c2410c}"
    "@media(prefers-color-scheme:dark){svg{background:#0d1117;color:#e6edf3}"
    ".idle{fill:#1c2128;stroke:#3d444d}.active{fill:#60a5fa;stroke:#60a5fa}.other{fill:#0d1117;stroke:#60a5fa}"
    ".on{fill:#0d1117}.soft{fill:#9aa4af}.bar{fill:#2f5597}.busiest{fill:#fb923c}}"
)


@dataclass(frozen=True)
class Slot:
    """A slot of a rank: its expert, whether that is a copy, and whether it serves the batch."""

    expert: int
    copy: bool
    serves: bool


def ranks_of(order: Sequence[int]) -> list[list[Slot]]:
    """The slots of each rank of a placement, its copies last, if the batch needs ACTIVE."""
    weight = torch.zeros(1, EXPERTS, dtype=torch.long)
    weight[0, list(ACTIVE)] = 1
    chosen = choose_copies(weight, schedule(order, EXPERTS, RANKS))[0].tolist()
    each = len(order) // RANKS
    found = []
    for rank in range(RANKS):
        slots = [
            Slot(
                order[number],
                copy=each > EXPERTS // RANKS and order[number] % RANKS != rank,
                serves=order[number] in ACTIVE and chosen[order[number]] == number,
            )
            for number in range(rank * each, (rank + 1) * each)
        ]
        found.append(sorted(slots, key=lambda slot: slot.copy))
    return found


def read_by(rank: Sequence[Slot]) -> int:
    """How many experts the rank reads."""
    return sum(slot.serves for slot in rank)


def panel(left: int, name: str, order: Sequence[int]) -> Iterator[str]:
    """A placement."""
    ranks = ranks_of(order)
    most = max(map(read_by, ranks))
    yield f'<g><text x="{left}" y="{TOP - 24}" font-size="15" font-weight="600">{name}</text>'
    for number, rank in enumerate(ranks):
        x = left + number * (SQUARE + GAP)
        yield f'<text class="soft" x="{x + SQUARE / 2:.0f}" y="{TOP - 6}" text-anchor="middle">{number}</text>'
        for row, slot in enumerate(rank):
            y = TOP + row * (SQUARE + 4)
            kind = "active" if slot.serves else "other" if slot.expert in ACTIVE else "idle"
            yield (
                f'<rect class="{kind}{" copy" * slot.copy}" x="{x}" y="{y}" width="{SQUARE}" height="{SQUARE}" rx="5"/>'
                f'<text class="{"on" if slot.serves else "soft"}" x="{x + SQUARE / 2:.0f}" y="{y + 22}" '
                f'text-anchor="middle">{slot.expert}</text>'
            )
        bars = read_by(rank)
        yield (
            f'<rect class="{"busiest" if bars == most else "bar"}" x="{x}" y="{FLOOR}" width="{SQUARE}" '
            f'height="{bars * BAR}" rx="3"><title>rank {number} reads {bars} experts</title></rect>'
        )
    yield f'<text x="{left}" y="{FLOOR - 8}" class="soft">experts read</text>'
    yield f'<text x="{left}" y="{FLOOR + most * BAR + 20}">the step waits for {most} experts</text></g>'


def legend() -> Iterator[str]:
    """What squares stand for."""
    x = LEFT
    for kind, words, width in (
        ("active", "serves the batch", 150),
        ("other", "needed, but another copy serves", 268),
        ("idle", "not needed", 112),
        ("idle copy", "copy", 60),
    ):
        yield f'<rect class="{kind}" x="{x}" y="{HEIGHT - 24}" width="14" height="14" rx="3"/>'
        yield f'<text x="{x + 20}" y="{HEIGHT - 12}">{words}</text>'
        x += width


def picture() -> str:
    """The SVG."""
    title = f"A batch needs {len(ACTIVE)} of {EXPERTS} experts on {RANKS} ranks: the step waits for the busiest rank"
    placements = {
        "linear": tuple(range(EXPERTS)),
        "zigzag": zigzag(EXPERTS, RANKS),
        "zigzag and copies": evenly_copied(EXPERTS, RANKS, SPARE),
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title">',
        f'<title id="title">{title}</title><style>{STYLE}</style>',
        f'<text x="{LEFT}" y="26" font-size="15">{title}</text>',
    ]
    for number, (name, order) in enumerate(placements.items()):
        parts += panel(LEFT + number * (PANEL + BETWEEN), name, order)
    return "\n".join([*parts, *legend(), "</svg>", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    parser.parse_args().out.write_text(picture())
