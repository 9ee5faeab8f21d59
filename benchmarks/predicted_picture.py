"""Draw predicted against measured gains of steps, as an SVG: python benchmarks/predicted_picture.py OUT.svg FILE…

Each FILE is what `predicted_steps.py --json` wrote. A point is one kind of step under one placement: across, the gain
over BASE that the time model predicts; up, the measured one, with its quartiles. On the thick line both are the same;
between the thin lines they differ by a point at most. Unsteady steps (`is_unsteady`) are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from step_times import BASE, is_unsteady, quartiles

PHASES = ("decode", "prefill")
LOW, HIGH = -1, 6  # percent, of both axes; more where a point lies beyond
FINE = 12  # percent; longer axes have a number at every second percent
SIDE, LEFT, TOP, GAP, ROW = 380, 60, 78, 78, 22  # of a panel and of a row of the legend, in pixels
WIDTH = LEFT + 2 * SIDE + GAP + 16
# name: colour on white, on black
COLOURS = {
    "balanced": ("#c2410c", "#fb923c"),
    "by-pairs": ("#7e22ce", "#c084fc"),
    "packing": ("#15803d", "#4ade80"),
    "zigzag": ("#1d4ed8", "#60a5fa"),
    "best-fixed": ("#0e7490", "#22d3ee"),
    "copies-2": ("#be185d", "#f472b6"),
    "copies-4": ("#a16207", "#facc15"),
    "copies-8": ("#4d7c0f", "#a3e635"),
    "eplb-8": ("#111827", "#f3f4f6"),
    "copies-8, by position": ("#b91c1c", "#f87171"),
    "eplb-8, by position": ("#57534e", "#a8a29e"),
}
FIRST = ("balanced", "by-pairs", "packing", "zigzag")  # the legend's first row always has these
MODES = {"tp": "tensor parallel", "dp": "data parallel"}


class Panel:
    """A square with a phase's points; both axes have the same range of percent."""

    def __init__(self, number: int, top: int, found: Sequence[Mapping[str, Any]]) -> None:
        every = [gain(statistics.median(one[what])) for one in found for what in ("measured", "predicted")]
        self.phase, self.left, self.top = PHASES[number], LEFT + number * (SIDE + GAP), top
        self.low, self.high = math.floor(min([LOW, *every])), math.ceil(max([HIGH, *every]))

    def across(self, percent: float) -> float:
        """Pixels from the left."""
        return self.left + SIDE * (percent - self.low) / (self.high - self.low)

    def up(self, percent: float) -> float:
        """Pixels from the top."""
        return self.top + SIDE * (self.high - percent) / (self.high - self.low)


def gain(ratio: float) -> float:
    """Percent, from BASE's time over a placement's."""
    return 100 * (ratio - 1)


def class_of(name: str) -> str:
    """The CSS class of a placement."""
    return name.replace(", ", "-").replace(" ", "-")


def style(names: Sequence[str]) -> str:
    """Colours of these placements for light and dark pages."""

    def colours(which: int) -> str:
        return "".join(f".{class_of(name)}{{color:{COLOURS[name][which]}}}" for name in names)

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


def frame(panel: Panel) -> Iterator[str]:
    """A panel without its points."""
    low, high, phase = panel.low, panel.high, panel.phase
    left, right, top, bottom = panel.across(low), panel.across(high), panel.up(high), panel.up(low)
    yield f'<text x="{left:.0f}" y="{top - 10:.0f}" font-weight="600">{phase}</text>'
    yield f'<clipPath id="{phase}"><rect x="{left:.0f}" y="{top:.0f}" width="{SIDE}" height="{SIDE}"/></clipPath>'
    for percent in range(low, high + 1):
        x, y = panel.across(percent), panel.up(percent)
        yield f'<path class="axis" d="M{x:.1f} {top:.1f}V{bottom:.1f}M{left:.1f} {y:.1f}H{right:.1f}"/>'
        if high - low <= FINE or percent % 2 == 0:
            yield f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{percent}</text>'
            yield f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>'
    for off, name in ((-1, "point-off"), (0, "same"), (1, "point-off")):
        ends = [(panel.across(percent), panel.up(percent + off)) for percent in (low, high)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in ends)
        yield f'<path class="{name}" clip-path="url(#{phase})" d="M{path}"/>'
    yield f'<text x="{(left + right) / 2:.0f}" y="{bottom + 38:.0f}" text-anchor="middle">predicted gain, %</text>'


def points(panel: Panel, mode: str, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The points of a panel."""
    for one in found:
        low, middle, high = map(gain, quartiles(one["measured"]))
        predicted = gain(statistics.median(one["predicted"]))
        x = panel.across(predicted)
        yield (
            f'<g class="{class_of(one["placement"])}" clip-path="url(#{panel.phase})">'
            f"<title>{MODES[mode]}, {one['case']}, {one['placement']}: predicted {predicted:.2f} %, "
            f"measured {middle:.2f} % ({low:.2f} to {high:.2f})</title>"
            f'<path class="mark" opacity="0.45" d="M{x:.1f} {panel.up(low):.1f}V{panel.up(high):.1f}"/>'
            f"{marker(mode, x, panel.up(middle))}</g>"
        )


def steady(found: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """What was predicted of steps whose ratios do not spread too much."""
    for one in found:
        if not is_unsteady(one["case"], [other["measured"] for other in found if other["case"] == one["case"]]):
            yield one


def legend(more: Sequence[str]) -> Iterator[str]:
    """What colours and marks stand for; `more` are placements of further rows."""
    x = LEFT
    for name in FIRST:
        yield f'<g class="{name}">{marker("tp", x + 6, 40)}</g><text x="{x + 16}" y="44">{name}</text>'
        x += 100
    for mode, name in MODES.items():
        yield f"{marker(mode, x + 6, 40)}" + f'<text x="{x + 16}" y="44">{name}</text>'
        x += 130
    x = LEFT
    for name in more:
        y = 40 + ROW
        yield f'<g class="{class_of(name)}">{marker("tp", x + 6, y)}</g><text x="{x + 16}" y="{y + 4}">{name}</text>'
        x += 36 + 7 * len(name)


def picture(by_mode: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The SVG, from what was predicted in each mode."""
    shown = {mode: list(steady(found)) for mode, found in by_mode.items()}
    every = [one for found in shown.values() for one in found]
    more = [name for name in COLOURS if name not in FIRST and any(one["placement"] == name for one in every)]
    top = TOP + ROW * bool(more)
    title = f"How much longer a step takes under {BASE} than under a placement"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + SIDE + 48}" role="img" '
        f'aria-labelledby="title">',
        f'<title id="title">{title}</title><style>{style([*FIRST, *more])}</style>',
        f'<text x="{LEFT}" y="22" font-size="15" font-weight="600">{title}</text>',
        *legend(more),
        f'<text x="18" y="{top + SIDE / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 18 {top + SIDE / 2:.0f})">measured gain, % (median, quartiles)</text>',
    ]
    for number, phase in enumerate(PHASES):
        panel = Panel(number, top, [one for one in every if one["case"].startswith(phase)])
        parts += frame(panel)
        for mode, found in shown.items():
            parts += points(panel, mode, [one for one in found if one["case"].startswith(phase)])
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
