"""What `benchmarks/copies_picture.py` draws: every needed expert is served once, and bars are as long as ranks read."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from copies_picture import ACTIVE, BAR, picture

DOCS = Path(__file__).parents[2] / "docs"
SVG = "{http://www.w3.org/2000/svg}"
PANELS = ("linear", "zigzag", "zigzag and copies")


def panels() -> list[ET.Element]:
    return list(ET.fromstring(picture()).iter(f"{SVG}g"))


def served(panel: ET.Element) -> list[tuple[str, float]]:
    """The experts that serve, and how far to the right each stands: a square is followed by its number."""
    elements = list(panel)
    pairs = itertools.pairwise(elements)
    return [
        (text.text or "", float(square.attrib["x"]))
        for square, text in pairs
        if square.attrib.get("class", "").split()[:1] == ["active"]
    ]


def test_every_expert_that_the_batch_needs_serves_once_and_no_other() -> None:
    for panel in panels():
        assert sorted(int(expert) for expert, _ in served(panel)) == sorted(ACTIVE)


def test_bars_and_words_say_how_many_experts_ranks_read() -> None:
    waits = []
    for name, panel in zip(PANELS, panels(), strict=True):
        title, *texts = [text.text or "" for text in panel.iter(f"{SVG}text")]
        assert title == name
        bars = [rect for rect in panel.iter(f"{SVG}rect") if rect.attrib["class"] in ("bar", "busiest")]
        columns = [x for _, x in served(panel)]
        for bar in bars:
            assert float(bar.attrib["height"]) == BAR * columns.count(float(bar.attrib["x"]))
        most = max(columns.count(float(bar.attrib["x"])) for bar in bars)
        assert {bar.attrib["class"] for bar in bars if float(bar.attrib["height"]) == BAR * most} == {"busiest"}
        assert f"the step waits for {most} experts" in texts
        waits.append(most)
    assert waits == [4, 3, 2]


def test_light_and_dark_have_a_colour_for_each_kind() -> None:
    style = next(ET.fromstring(picture()).iter(f"{SVG}style")).text or ""
    light, dark = style.split("@media(prefers-color-scheme:dark)")
    for kind in ("idle", "active", "other", "on", "soft", "bar", "busiest"):
        assert re.search(rf"\.{kind}\{{fill:#", light)
        assert re.search(rf"\.{kind}\{{fill:#", dark)


def test_the_picture_in_the_docs_is_this_one() -> None:
    assert (DOCS / "copies.svg").read_text() == picture()
