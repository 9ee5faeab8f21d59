"""Draws README's picture: 256 experts in 8 groups on 8 GPUs, under linear placement and under zigzag.

    python tools/placement_picture.py > docs/placement.svg

The eight chosen experts are an example: one token of DeepSeek-R1 chooses eight experts of four groups at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

EXPERTS, GPUS, GROUP = 256, 8, 32
CHOSEN = (35, 44, 50, 70, 85, 163, 181, 209)
COLOURS = ("#4c9be8", "#e8a33d", "#5bbd72", "#d8697b", "#9a7fd1", "#3fb8af", "#c9b037", "#8f9aa8")
CELL, TOP, LEFT, WIDTH = 13, 58, 62, 560

STYLE = """
  svg { background: #ffffff; font-family: system-ui, sans-serif; }
  text { fill: #34435c; font-size: 13px; }
  .title { fill: #14233b; font-size: 16px; font-weight: 600; }
  .cell { opacity: 0.45; }
  .chosen { opacity: 1; stroke: #14233b; stroke-width: 2.5; }
  .busiest { fill: #14233b; font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    svg { background: #0d1117; }
    text { fill: #b8c7dc; }
    .title, .busiest { fill: #e6edf6; }
    .chosen { stroke: #ffffff; }
  }
"""


def panel(title: str, gpu_of: Callable[[int], int], left: int) -> list[str]:
    """A row of cells for each GPU: its experts in order, coloured by group, and how many of the chosen ones it has."""
    parts = [f'<text class="title" x="{left + LEFT}" y="24">{title}</text>']
    work = Counter(gpu_of(expert) for expert in CHOSEN)
    for gpu in range(GPUS):
        y = TOP + gpu * 24
        parts.append(f'<text x="{left}" y="{y + 14}">GPU {gpu}</text>')
        for column, expert in enumerate(e for e in range(EXPERTS) if gpu_of(e) == gpu):
            kind = "chosen" if expert in CHOSEN else "cell"
            x = left + LEFT + column * CELL
            colour = COLOURS[expert // GROUP]
            parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL - 2}" height="18" fill="{colour}"/>')
        busiest = "busiest" if work[gpu] == max(work.values()) else ""
        shown = work[gpu] or "waits"
        parts.append(f'<text class="{busiest}" x="{left + LEFT + 32 * CELL + 10}" y="{y + 14}">{shown}</text>')
    return parts


def picture() -> str:
    """The whole picture as SVG."""
    below = TOP + GPUS * 24 + 22
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="t" '
        f'viewBox="0 0 {2 * WIDTH + 10} {below + 34}">',
        '<title id="t">Under linear placement a token\'s experts lie on four GPUs, under zigzag on six.</title>',
        f"<style>{STYLE}</style>",
        *panel("linear, vLLM's default: a group on each GPU", lambda expert: expert // GROUP, 10),
        *panel("zigzag: a part of each group on every GPU", lambda expert: expert % GPUS, 10 + WIDTH),
        f'<text x="{10 + LEFT}" y="46">experts 0 to 31 on GPU 0, 32 to 63 on GPU 1, …</text>',
        f'<text x="{10 + WIDTH + LEFT}" y="46">experts 0, 8, 16, … on GPU 0, experts 1, 9, 17, … on GPU 1, …</text>',
        f'<text x="{10 + LEFT}" y="{below}">A colour is one of the router\'s 8 groups. Outlined: the 8 experts that '
        "one token chose, in 4 groups. The number says how many each GPU computes.</text>",
        f'<text x="{10 + LEFT}" y="{below + 20}">All GPUs wait for the busiest: 3 experts under linear placement, '
        "2 under zigzag.</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(picture(), end="")
