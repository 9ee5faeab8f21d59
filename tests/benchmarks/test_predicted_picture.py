"""What `benchmarks/predicted_picture.py` draws: a point lies where its gains say, in light and dark."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from predicted_picture import COLOURS, class_of, picture

DOCS = Path(__file__).parents[2] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def point(
    case: str, predicted: float, measured: float, placement: str = "zigzag", spread: float = 0.01
) -> dict[str, Any]:
    every = [measured - spread, measured, measured + spread]
    return {"case": case, "placement": placement, "measured": every, "predicted": [predicted]}


def discs(svg: str) -> list[tuple[float, float]]:
    """The centres of the points, those of the legend left out."""
    groups = [group for group in ET.fromstring(svg).iter(f"{SVG}g") if group.get("clip-path")]
    return [
        (float(disc.attrib["cx"]), float(disc.attrib["cy"])) for each in groups for disc in each.iter(f"{SVG}circle")
    ]


def test_a_point_lies_where_its_gains_say() -> None:
    found = [point("decode 8, mixed", ratio, other) for ratio, other in ((1.0, 1.0), (1.02, 1.0), (1.0, 1.02))]
    (x, y), right, above = discs(picture({"tp": found}))
    assert right == pytest.approx((x + 2 * 380 / 7, y), abs=0.11)  # 7 percent are 380 pixels
    assert above == pytest.approx((x, y - 2 * 380 / 7), abs=0.11)
    (prefill,) = discs(picture({"tp": [point("prefill 8192, mixed", 1.0, 1.0)]}))
    assert prefill[0] > right[0] + 380 / 2
    assert prefill[1] == y


def test_axes_are_longer_where_a_point_lies_beyond() -> None:
    """Of its own panel: the other keeps its range, -1 to 6."""
    inside, prefill = point("decode 8, mixed", 1.0, 1.0), point("prefill 8192, mixed", 1.0, 1.0)
    beyond = point("decode 64, mixed", 1.0, 0.875, "copies-8, by position")
    (x, y), other, same = discs(picture({"tp": [inside, beyond, prefill]}))
    assert (x, other[1]) == pytest.approx((60 + 380 * 13 / 19, y + 12.5 * 380 / 19), abs=0.11)
    assert same[1] == pytest.approx(78 + 22 + 380 * 6 / 7, abs=0.11)  # the legend has a second row


def test_placements_with_copies_are_in_the_legend_where_they_are_drawn() -> None:
    without, copies = point("decode 8, mixed", 1.0, 1.0), point("decode 8, mixed", 1.0, 1.0, "eplb-8, by position")
    texts = [
        [text.text for text in ET.fromstring(picture({"dp": found})).iter(f"{SVG}text")]
        for found in ([without], [without, copies])
    ]
    assert "eplb-8, by position" not in texts[0]
    assert "eplb-8, by position" in texts[1]
    assert 'class="eplb-8-by-position"' in picture({"dp": [copies]})


def test_steps_that_spread_too_much_or_wait_for_the_cpu_are_left_out() -> None:
    names = ("zigzag", "packing", "balanced")
    kept = [point("prefill 4096, mixed", 1.0, 1.0, name, 0.2 if name == "zigzag" else 0.01) for name in names]
    left = [point("prefill 4096, one kind", 1.0, 1.0, name, 0.01 if name == "zigzag" else 0.2) for name in names]
    waiting = point("prefill 1024, mixed", 1.0, 1.0)
    assert len(discs(picture({"tp": [*kept, *left, waiting]}))) == 3, "the median over placements counts"


def test_each_placement_has_a_colour_for_light_and_for_dark() -> None:
    drawn = picture({"tp": [point("decode 8, mixed", 1.0, 1.0, name) for name in COLOURS]})
    style = next(ET.fromstring(drawn).iter(f"{SVG}style")).text or ""
    light, dark = style.split("@media(prefers-color-scheme:dark)")
    for name, (on_white, on_black) in COLOURS.items():
        assert f".{class_of(name)}{{color:{on_white}}}" in light
        assert f".{class_of(name)}{{color:{on_black}}}" in dark


@pytest.mark.parametrize(
    ("name", "records"), [("predicted-steps", ("tp4", "dp4")), ("predicted-steps-8", ("tp8", "dp8"))]
)
def test_the_pictures_in_the_docs_are_those_of_the_results_beside_them(name: str, records: tuple[str, str]) -> None:
    found = [json.loads((DOCS / "gpu" / f"predicted-steps-{record}.json").read_text()) for record in records]
    drawn = picture({record["mode"]: record["predicted"] for record in found})
    assert (DOCS / f"{name}.svg").read_text() == drawn
