"""Draw predicted against measured gains of steps, as an SVG: python benchmarks/predicted_picture.py OUT.svg FILE…

Each FILE is what `predicted_steps.py --json` wrote. A point is one kind of step under one placement: across, the gain
over BASE that the time model predicts; up, the measured one, with its quartiles. On the thick line both are the same;
between the thin lines they differ by a point at most. Steps in UNSTEADY are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from step_times import BASE, quartiles

UNSTEADY = ("prefill 1024",)  # the CPU takes as long to start the kernels as the GPUs take to run them
PHASES = ("decode", "prefill")
LOW, HIGH = -1, 6  # percent, of both axes
SIDE, LEFT, TOP, GAP = 380, 60, 78, 78  # of a panel, in pixels
WIDTH, HEIGHT = LEFT + 2 * SIDE + GAP + 16, TOP + SIDE + 48
# name: colour on white, on black
COLOURS = {
    "balanced": ("#c2410c", "#fb923c"),
    "by-pairs": ("#7e22ce", "#c084fc"),
    "packing": ("#15803d", "#4ade80"),
    "zigzag": ("#1d4ed8", "#60a5fa"),
}
MODES = {"tp": "tensor parallel", "dp": "data parallel"}


def across(panel: int, percent: float) -> float:
    """Pixels from the left."""
    return LEFT + panel * (SIDE + GAP) + SIDE * (percent - LOW) / (HIGH - LOW)


def up(percent: float) -> float:
    """Pixels from the top."""
    return TOP + SIDE * (HIGH - percent) / (HIGH - LOW)


def gain(ratio: float) -> float:
    """Percent, from BASE's time over a placement's."""
    return 100 * (ratio - 1)


def style() -> str:
    """Colours for light and dark pages."""

    def colours(which: int) -> str:
        return "".join(f".{name}{{color:{both[which]}}}" for name, both in COLOURS.items())

    return (
        "svg{background:#fff;color:#24292f;font:13px system-ui,sans-serif}text{fill:currentColor}"
        ".axis{stroke:#d0d7de;fill:none}"
        ".same{stroke:#57606a;stroke-width:1.5}.point-off{stroke:#8c959f;stroke-dasharray:4 4}"
        f".mark{{stroke:currentColor;stroke-width:1.4;fill:none}}.tp{{fill:currentColor}}{colours(0)}"
        "@media(prefers-color-scheme:dark){svg{background:#0d1117;color:#e6edf3}.axis{stroke:#30363d}"
        f".same{{stroke:#b1bac4}}.point-off{{stroke:#6e7681}}{colours(1)}}}"
    )


def marker(mode: str, x: float, y: float) -> str:
    """A disc for tensor parallelism, a diamond for data parallelism."""
    if mode == "tp":
        return f'<circle class="mark tp" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
    return f'<path class="mark" d="M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z"/>'


def frame(panel: int, phase: str) -> Iterator[str]:
    """A panel without its points."""
    left, right, top, bottom = across(panel, LOW), across(panel, HIGH), up(HIGH), up(LOW)
    yield f'<text x="{left:.0f}" y="{top - 10:.0f}" font-weight="600">{phase}</text>'
    yield f'<clipPath id="{phase}"><rect x="{left:.0f}" y="{top:.0f}" width="{SIDE}" height="{SIDE}"/></clipPath>'
    for percent in range(LOW, HIGH + 1):
        x, y = across(panel, percent), up(percent)
        yield f'<path class="axis" d="M{x:.1f} {top:.1f}V{bottom:.1f}M{left:.1f} {y:.1f}H{right:.1f}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{percent}</text>'
        yield f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>'
    for off, name in ((-1, "point-off"), (0, "same"), (1, "point-off")):
        ends = [(across(panel, percent), up(percent + off)) for percent in (LOW, HIGH)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in ends)
        yield f'<path class="{name}" clip-path="url(#{phase})" d="M{path}"/>'
    yield f'<text x="{(left + right) / 2:.0f}" y="{bottom + 38:.0f}" text-anchor="middle">predicted gain, %</text>'


def points(panel: int, mode: str, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The points of a panel."""
    for one in found:
        if not one["case"].startswith(PHASES[panel]) or one["case"].startswith(UNSTEADY):
            continue
        low, middle, high = map(gain, quartiles(one["measured"]))
        predicted = gain(statistics.median(one["predicted"]))
        x = across(panel, predicted)
        yield (
            f'<g class="{one["placement"]}" clip-path="url(#{PHASES[panel]})">'
            f"<title>{MODES[mode]}, {one['case']}, {one['placement']}: predicted {predicted:.2f} %, "
            f"measured {middle:.2f} % ({low:.2f} to {high:.2f})</title>"
            f'<path class="mark" opacity="0.45" d="M{x:.1f} {up(low):.1f}V{up(high):.1f}"/>'
            f"{marker(mode, x, up(middle))}</g>"
        )


def legend() -> Iterator[str]:
    """What colours and marks stand for."""
    x = LEFT
    for name in COLOURS:
        yield f'<g class="{name}">{marker("tp", x + 6, 40)}</g><text x="{x + 16}" y="44">{name}</text>'
        x += 100
    for mode, name in MODES.items():
        yield f"{marker(mode, x + 6, 40)}" + f'<text x="{x + 16}" y="44">{name}</text>'
        x += 130


def picture(by_mode: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The SVG, from what was predicted in each mode."""
    title = f"How much longer a step takes under {BASE} than under a placement"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title">',
        f'<title id="title">{title}</title><style>{style()}</style>',
        f'<text x="{LEFT}" y="22" font-size="15" font-weight="600">{title}</text>',
        *legend(),
        f'<text x="18" y="{TOP + SIDE / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 18 {TOP + SIDE / 2:.0f})">measured gain, % (median, quartiles)</text>',
    ]
    for panel, phase in enumerate(PHASES):
        parts += frame(panel, phase)
        for mode, found in by_mode.items():
            parts += points(panel, mode, found)
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Write the SVG."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    parser.add_argument(
        "predicted", type=Path, nargs="+", metavar="FILE", help="what `predicted_steps.py --json` wrote"
    )
    options = parser.parse_args()
    records = [json.loads(path.read_text()) for path in options.predicted]
    options.out.write_text(picture({record["mode"]: record["predicted"] for record in records}))


if __name__ == "__main__":
    main()
