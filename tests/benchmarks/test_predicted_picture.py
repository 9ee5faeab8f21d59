"""What `benchmarks/predicted_picture.py` draws: a point lies where its gains say, in light and dark."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from predicted_picture import COLOURS, picture

DOCS = Path(__file__).parents[2] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def point(case: str, predicted: float, measured: float) -> dict[str, Any]:
    spread = [measured - 0.01, measured, measured + 0.01]
    return {"case": case, "placement": "zigzag", "measured": spread, "predicted": [predicted]}


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


def test_steps_that_wait_for_the_cpu_are_left_out() -> None:
    kept, left = point("prefill 16384, mixed", 1.0, 1.0), point("prefill 1024, mixed", 1.0, 1.0)
    assert len(discs(picture({"tp": [kept, left]}))) == 1


def test_each_placement_has_a_colour_for_light_and_for_dark() -> None:
    style = next(ET.fromstring(picture({})).iter(f"{SVG}style")).text or ""
    light, dark = style.split("@media(prefers-color-scheme:dark)")
    for name, (on_white, on_black) in COLOURS.items():
        assert f".{name}{{color:{on_white}}}" in light
        assert f".{name}{{color:{on_black}}}" in dark


def test_the_picture_in_the_docs_is_that_of_the_results_beside_it() -> None:
    records = [json.loads((DOCS / "gpu" / f"predicted-steps-{name}.json").read_text()) for name in ("tp4", "dp4")]
    drawn = picture({record["mode"]: record["predicted"] for record in records})
    assert (DOCS / "predicted-steps.svg").read_text() == drawn
