"""`reshard analyze --html`: what the file is, and what a real browser makes of it."""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from checkpoints import Spec, build
from command_line import run, run_well
from hub_server import serving
from playwright.sync_api import Browser, Page, sync_playwright
from scratch import checkpoint

from reshard import analyze
from reshard.commands.page import write_page
from reshard.placement.strategies import Linear, NodeZigzag, Strategy, Zigzag
from reshard.traffic.analysis import Analysis, Candidate
from reshard.traffic.page import render

BROWSER_REQUIRED = "RESHARD_TEST_BROWSER"
PATIENCE = 120_000  # milliseconds: a machine may be busy
RANKS, GROUPS, EXPERTS = 8, 4, 16
MADE = r'"made":"[^"]*"'  # the version, the date and the command
ENVELOPE = ("schema_version", "command")  # what the command adds to the analysis
HOSTILE = "</script><script>window.hit = 1</script><img src='http://127.0.0.1:9/x' onerror='window.hit = 2'><!--"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory, Spec("deepseek_v3", experts=EXPERTS))


@pytest.fixture(scope="module")
def analysis(source: Path) -> Analysis:
    strategies: list[Strategy] = [Linear(RANKS), Zigzag(RANKS), NodeZigzag(RANKS, 2)]
    return analyze(source, strategies, nodes=2, tokens=1024)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Where no browser is installed the test is skipped, or fails if told to."""
    program = shutil.which("chromium")
    if program is None:
        because = "a page is looked at in a browser: install chromium"
        if os.environ.get(BROWSER_REQUIRED):
            pytest.fail(because)
        pytest.skip(because)
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program) as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_page() as found:
        found.set_default_timeout(PATIENCE)
        yield found


@pytest.fixture(scope="module")
def address(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(analysis, tmp_path_factory.mktemp("written"))


def written(analysis: Analysis, directory: Path) -> str:
    out = directory / "page.html"
    write_page(analysis, out)
    return out.as_uri()


def renamed(analysis: Analysis, name: str) -> Analysis:
    """The same, where its directory and each layer is called `name` and something."""

    def layers(of: dict[str, object]) -> dict[str, object]:
        return {f"{name}{number}": value for number, value in enumerate(of.values())}

    return replace(
        analysis,
        path=Path(name.replace("/", "\N{DIVISION SLASH}")),
        traffic=name,
        unrecorded=(name,),
        candidates=tuple(Candidate(one.strategy, one.mean, layers(one.layers)) for one in analysis.candidates),
        together=replace(analysis.together, layers=layers(analysis.together.layers)),
    )


def show(page: Page, address: str, width: int = 1280, *, dark: bool = False) -> None:
    """Load a page, in a window of this width in pixels, and wait until it is drawn."""
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme="dark" if dark else "light")
    page.goto(address)
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def complaints(page: Page) -> list[str]:
    """What the page shown logged as errors or warnings, or threw."""
    logged = [one.text for one in page.console_messages() if one.type in ("error", "warning", "assert")]
    return logged + [str(one) for one in page.page_errors()]


def count(page: Page, selector: str) -> int:
    return page.locator(selector).count()


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def too_wide(page: Page) -> list[str]:
    """What reaches out of the window to the right or left, but for what scrolls in a box of its own."""
    script = """[...document.querySelectorAll("body *")].filter((one) => {
        const box = one.getBoundingClientRect();
        const out = box.right > innerWidth + 0.5 || box.left < -0.5;
        return box.width && out && !one.closest(".scroll, noscript, title");
    }).map((one) => one.tagName + " " + one.textContent.slice(0, 40))"""
    return list(page.evaluate(script))


def overlapping(page: Page) -> list[str]:
    """Labels of one drawing that lie on each other."""
    script = """[...document.querySelectorAll("svg[role=img]")].flatMap((svg) => {
        const all = [...svg.querySelectorAll("text")].map((one) => [one.textContent, one.getBoundingClientRect()]);
        return all.flatMap(([text, a], number) => all.slice(number + 1).filter(([, b]) =>
            a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom
        ).map(([other]) => text + " on " + other));
    })"""
    return list(page.evaluate(script))


def test_the_page_is_the_analysis_and_one_file(source: Path, tmp_path: Path) -> None:
    arguments = ("analyze", source, "--ep", RANKS, "--tokens", 256)
    printed = run_well(*arguments, "--html", tmp_path / "page.html")
    assert f"wrote {tmp_path / 'page.html'}" in printed
    text = (tmp_path / "page.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    found = json.loads(run_well(*arguments, "--json"))
    found = {key: value for key, value in found.items() if key not in ENVELOPE}
    assert json.loads(data)["analysis"] == found
    measured, _, rest = run_well(*arguments, "--layers").strip().partition("\n\nTo serve")
    assert html.escape(measured) in text, "to read where there is no script"
    recommended = rest.partition("Recommendation: ")[2]
    assert "vllm serve" in recommended
    assert text.index(html.escape(recommended)) < text.index(html.escape(measured)), "first what to do"
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import", text)
    again = json.loads(run_well(*arguments, "--json", "--html", tmp_path / "again.html"))
    assert {key: value for key, value in again.items() if key not in ENVELOPE} == found
    assert re.sub(MADE, "", (tmp_path / "again.html").read_text()) == re.sub(MADE, "", text)


@pytest.mark.parametrize("where", ["there", "link", "source", "folder in source"])
def test_a_page_that_would_write_over_something_or_into_the_source_is_refused(
    where: str, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    out = {"source": source / "page.html", "folder in source": source / "new" / "page.html"}.get(
        where, tmp_path / where
    )
    result = run("analyze", source, "--ep", RANKS, "--tokens", 64, "--html", out)
    assert result.exit_code == 1
    assert "choose another --html" in result.output if "source" in where else "already exists" in result.output
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert not (source / "page.html").exists()


def test_a_page_into_a_folder_that_is_not_there_is_refused_in_one_line(source: Path, tmp_path: Path) -> None:
    result = run("analyze", source, "--ep", RANKS, "--tokens", 64, "--html", tmp_path / "no" / "page.html")
    assert result.exit_code == 1
    assert "No such file or directory" in result.output


def test_names_stay_text(analysis: Analysis, page: Page, tmp_path: Path) -> None:
    text = render(renamed(analysis, HOSTILE))
    assert text.count("<script") == render(analysis).count("<script")
    assert "<img" not in text
    show(page, written(renamed(analysis, HOSTILE), tmp_path))
    assert page.evaluate("window.hit") is None
    assert count(page, "img") == 0
    assert texts(page, "#view option")[1] == f"{HOSTILE}0"
    assert page.evaluate("choose(layers[0])") is None
    assert f"{HOSTILE}0" in texts(page, "#numbers-note")
    assert not complaints(page)
    assert len(page.requests()) == 1


def test_the_browser_would_have_told_of_a_name_that_is_no_text(analysis: Analysis, page: Page, tmp_path: Path) -> None:
    """The control: the same page without escaping runs into its content security policy, and without that is had."""
    text = render(analysis).replace("<main>", f"<main>{HOSTILE[9:-4]}")
    (tmp_path / "blocked.html").write_text(text)
    show(page, (tmp_path / "blocked.html").as_uri())
    assert page.evaluate("window.hit") is None
    assert any("Content Security Policy" in complaint for complaint in complaints(page))
    before = len(page.requests())
    (tmp_path / "open.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", text))
    show(page, (tmp_path / "open.html").as_uri())
    page.wait_for_function("window.hit === 2")  # what the script set first, and the picture that is not there after it
    assert len(page.requests()) == before + 2


def test_names_that_are_no_unicode_are_written(analysis: Analysis, page: Page, tmp_path: Path) -> None:
    show(page, written(renamed(analysis, "model\udcff"), tmp_path))
    assert not complaints(page)
    assert "model" in texts(page, "h1")[0]


def test_every_number_is_drawn(analysis: Analysis, address: str, page: Page) -> None:
    show(page, address)
    placements, sizes = len(analysis.candidates), len(analysis.batch_sizes)
    assert sizes == 11
    assert count(page, "#curves .point") == placements * sizes
    assert count(page, "#curves polyline") == placements
    assert count(page, "#loads svg[role=img]") == placements - 1
    assert count(page, "#loads .bar") == (placements - 1) * 2 * RANKS
    assert count(page, "#heat td") == GROUPS * GROUPS
    assert count(page, "#strip .point") == placements * len(analysis.layers)
    assert count(page, "#numbers td") == 1 + placements * (sizes + 2)
    assert count(page, "#view option") == 1 + len(analysis.layers)
    assert not complaints(page)
    assert [one.url for one in page.requests()] == [address]


def test_the_recommendation_comes_first_and_every_time_is_in_a_table(
    analysis: Analysis, address: str, page: Page
) -> None:
    show(page, address)
    assert texts(page, "#page h2")[0] == "Recommendation"
    assert texts(page, "#advice") == [analysis.advice.why]
    assert texts(page, "#commands") == ["\n".join(analysis.advice.commands)]
    names = [candidate.strategy for candidate in analysis.candidates]
    for phase in ("decode", "prefill"):
        steps = [step for step in analysis.steps if step.phase == phase]
        assert [step.tokens for step in steps] == list(analysis.batch_sizes)
        cells = iter(texts(page, f"#times-{phase} td")[1:])
        for step in steps:
            assert [float(next(cells)) for _ in names] == pytest.approx(
                [1e3 * step.moe[name] for name in names], rel=0.006
            )
            assert next(cells) == f"{100 * step.share(names[0]):.0f} %"
        assert list(cells) == []


def test_a_placement_has_its_own_colour_and_marker_whatever_stands_beside_it(
    analysis: Analysis, address: str, page: Page, tmp_path: Path
) -> None:
    def looks() -> dict[str, tuple[str, str]]:
        script = """[...document.querySelectorAll('#legend .name')].map((one) => [one.textContent,
            getComputedStyle(one.querySelector('.point')).fill,
            one.querySelector('.point').getAttribute('d').replace(/[0-9.]+/g, '')])"""
        return {name: (colour, shape) for name, colour, shape in page.evaluate(script)}

    show(page, address)
    every = looks()
    show(page, written(replace(analysis, candidates=analysis.candidates[1:]), tmp_path))
    fewer = looks()
    assert fewer == {name: every[name] for name in ("zigzag", "node-zigzag")}
    assert len(set(every.values())) == 3
    other = replace(analysis.candidates[2], strategy="file")
    (tmp_path / "other").mkdir()
    steps = tuple(replace(step, moe={**step.moe, "file": step.moe["node-zigzag"]}) for step in analysis.steps)
    changed = replace(analysis, candidates=(*analysis.candidates, other), steps=steps)
    show(page, written(changed, tmp_path / "other"))
    assert {name: look for name, look in looks().items() if name != "file"} == every
    assert looks()["file"] not in every.values()


def test_the_highest_line_of_every_drawing_has_a_label_and_nothing_lies_above_it(address: str, page: Page) -> None:
    show(page, address)
    drawn = page.evaluate("""[...document.querySelectorAll('svg[role=img]')].map((svg) => [
        Math.min(...[...svg.querySelectorAll('.axis')].map((one) => one.y1.baseVal.value)),
        Math.min(...[...svg.querySelectorAll('text')].map((one) => one.y.baseVal[0].value)) - 4,
        Math.min(...[...svg.querySelectorAll('polyline')].flatMap((one) => [...one.points].map((at) => at.y)),
                 ...[...svg.querySelectorAll('.bar')].map((one) => one.y.baseVal.value))])""")
    assert len(drawn) == 4
    for line, label, highest in drawn:
        assert line == pytest.approx(label) == pytest.approx(10)
        assert highest >= line - 0.01


def test_the_last_line_says_when_and_by_what_command_without_a_token(source: Path, page: Page, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with serving(tmp_path / "cache") as hub:
        hub.token = "hf_secret"
        hub.add("org/model", source)
        run_well("analyze", "org/model", "--ep", RANKS, "--tokens", 256, "--token", hub.token, "--html", out)
    assert "hf_secret" not in out.read_text()
    show(page, out.as_uri())
    (made,) = texts(page, "#footer")
    assert re.fullmatch(rf"reshard \S+ · {date.today()} · reshard analyze org/model .*--token '…' --html {out}", made)


def test_what_is_drawn_is_what_was_found(analysis: Analysis, address: str, page: Page) -> None:
    show(page, address)
    layer = analysis.layers[1]
    page.evaluate(f"choose({json.dumps(layer)})")
    cells = iter(texts(page, "#numbers td")[1:])
    effects = [candidate.layers[layer] for candidate in analysis.candidates]
    for number in range(len(analysis.batch_sizes)):
        for found in effects:
            shown = float(next(cells).removeprefix("+").removesuffix(" %"))
            assert shown == pytest.approx(100 * (found.imbalance[number] - 1), abs=0.51)
    assert [float(cell) for cell in cells] == pytest.approx(
        [found.ranks for found in effects] + [found.nodes for found in effects], abs=0.006
    )
    together = analysis.together.layers[layer]
    for text, share, expected in zip(
        texts(page, "#heat td"), sum(together.share, ()), sum(together.expected, ()), strict=True
    ):
        if not expected:
            assert text == "–"
        else:
            assert float(text) == pytest.approx(share / expected, abs=0.006 if share < 9 * expected else 0.51)
    heights = page.evaluate(
        "[...document.querySelectorAll('#loads > div')].map((panel) => "
        "[...panel.querySelectorAll('.bar')].map((bar) => bar.height.baseVal.value))"
    )
    for other, panel in enumerate(heights, 1):
        drawn = [effects[index].loads[rank] for rank in range(RANKS) for index in (0, other)]
        unit = max(panel) / max(drawn)
        assert panel == pytest.approx([load * unit for load in drawn], abs=0.1)
    feet = page.evaluate(
        "[...document.querySelectorAll('#loads .bar')].map((bar) => bar.y.baseVal.value + bar.height.baseVal.value)"
    )
    zero = page.evaluate("document.querySelector('#loads text').y.baseVal[0].value - 4")
    assert feet == pytest.approx([zero] * len(feet))
    tops = page.evaluate(
        "[...document.querySelectorAll('#curves polyline')].map((curve) => [...curve.points].map((point) => point.y))"
    )
    ticks = page.evaluate(
        "[...document.querySelectorAll('#curves text')].map((one) => [one.textContent, one.y.baseVal[0].value])"
    )
    at = {text: y - 4 for text, y in ticks}
    unit = at["even"] - at["+100 %"]
    for curve, found in zip(tops, effects, strict=True):
        assert curve == pytest.approx(
            [at["even"] - unit * max(0, ratio - 1) ** 0.5 for ratio in found.imbalance], abs=0.1
        )


def test_choosing_a_layer_by_keyboard_changes_every_figure(address: str, page: Page) -> None:
    show(page, address)
    figures = ("numbers", "curves", "loads", "heat", "strip")
    before = [page.inner_html(f"#{figure}") for figure in figures]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "view"
    page.evaluate("document.activeElement.selectedIndex = 0")
    page.keyboard.press("ArrowDown")
    page.evaluate("new Promise((done) => requestAnimationFrame(done))")
    assert page.evaluate("view === layers[0]")
    after = [page.inner_html(f"#{figure}") for figure in figures]
    assert all(was != now for was, now in zip(before, after, strict=True))
    page.keyboard.press("ArrowUp")
    page.evaluate("new Promise((done) => requestAnimationFrame(done))")
    again = [page.inner_html(f"#{figure}") for figure in figures]
    assert again == before


def test_a_click_on_a_layer_chooses_it_and_another_click_all(analysis: Analysis, address: str, page: Page) -> None:
    show(page, address)
    click = "document.querySelectorAll('#strip .hit')[1].dispatchEvent(new MouseEvent('click'))"
    page.evaluate(click)
    assert page.evaluate("document.getElementById('view').value") == analysis.layers[1]
    page.evaluate(click)
    assert page.evaluate("document.getElementById('view').selectedIndex") == 0


@pytest.mark.parametrize("width", [400, 700, 899, 900, 1400])
def test_nothing_overflows_or_overlaps_at_any_width(width: int, address: str, page: Page) -> None:
    show(page, address, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert too_wide(page) == []
    assert overlapping(page) == []
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every((one) => one.scrollWidth <= one.clientWidth)")
    page.evaluate(
        "document.querySelectorAll('#curves text')[1].setAttribute('y', 1 + +"
        "document.querySelector('#curves text').getAttribute('y'))"
    )
    assert overlapping(page), "the control"
    page.evaluate("document.querySelector('#curves').style.width = '3000px'")
    assert too_wide(page), "the control"


def test_a_page_made_wider_is_drawn_anew(address: str, page: Page) -> None:
    show(page, address, 400)
    page.set_viewport_size({"width": 1300, "height": 900})
    page.wait_for_function(
        "(([svg]) => Math.abs(svg.viewBox.baseVal.width - svg.getBoundingClientRect().width) <= 1 && "
        "svg.getBoundingClientRect().width > 400)(document.querySelectorAll('#curves svg'))"
    )


def contrasts(page: Page) -> list[float]:
    """How each piece of text stands out from what is behind it: WCAG's ratio, 4.5 for ordinary text."""
    script = """(() => {
        const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
        const draw = canvas.getContext("2d", { willReadFrequently: true });
        const light = (color) => {
            draw.fillStyle = color; draw.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...draw.getImageData(0, 0, 1, 1).data].map((value) => {
                const part = value / 255;
                return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const behind = (one) => {
            const color = one ? getComputedStyle(one).backgroundColor : "white";
            return color === "rgba(0, 0, 0, 0)" ? behind(one.parentElement) : color;
        };
        return [...document.querySelectorAll("h1, h2, h3, p, th, td, li, dt, dd, span, text, select, figcaption")]
            .filter((one) => one.textContent.trim() && one.checkVisibility()).map((one) => {
                const style = getComputedStyle(one);
                const [a, b] = [light(one.namespaceURI.endsWith("svg") ? style.fill : style.color), light(behind(one))];
                return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            });
    })()"""
    return list(page.evaluate(script))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_text_can_be_read_in_light_and_dark(width: int, dark: bool, address: str, page: Page) -> None:
    show(page, address, width, dark=dark)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)"
    )
    found = contrasts(page)
    assert len(found) > 100
    assert min(found) >= 4.5
    for hue, amount in itertools.product(("over", "under"), (40, 70, 100)):
        page.evaluate(f"""document.querySelectorAll('#heat td').forEach((cell) => {{
            cell.style.setProperty('--hue', 'var(--{hue})'); cell.style.setProperty('--amount', '{amount}%'); }})""")
        assert min(contrasts(page)) >= 4.5, f"{amount} % {hue}"
    page.evaluate("document.body.style.setProperty('--muted', '#777')")
    assert min(contrasts(page)) < 4.5, "the control"


def test_every_figure_says_what_it_is(address: str, page: Page) -> None:
    show(page, address)
    labels = page.evaluate(
        "[...document.querySelectorAll('svg:not([aria-hidden])')].map((svg) => svg.getAttribute('aria-label'))"
    )
    assert len(labels) == 4
    assert all(len(label) > 30 for label in labels)
    assert page.evaluate("document.title") == "source: placements on 8 EP ranks"
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize(
    ("family", "options", "cells"),
    [
        ("qwen3_moe", {"experts": 128, "top_k": 8}, 32 * 32),
        ("llama4", {"experts": 64, "top_k": 1}, 0),
        ("deepseek_v3", {"experts": 64, "layers": 2, "top_k": 8}, 16),
    ],
)
def test_many_ranks_no_groups_and_one_expert_a_token(
    family: str, options: dict[str, int], cells: int, page: Page, tmp_path: Path
) -> None:
    build(Spec(family, **options), tmp_path / "source")
    out = tmp_path / "page.html"
    run_well("analyze", tmp_path / "source", "--ep", 64, "--tokens", 256, "--html", out, "--batch", 100)
    for width in (400, 1280):
        show(page, out.as_uri(), width)
        assert count(page, "#heat td") == cells
        assert count(page, "#loads .bar") == 2 * 64
        assert too_wide(page) == overlapping(page) == []
        assert not complaints(page)


def test_one_placement_is_drawn_alone(source: Path, page: Page, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    run_well("analyze", source, "--ep", 4, "--tokens", 64, "--html", out, "--placement", "linear")
    show(page, out.as_uri())
    assert count(page, "#loads .bar") == 4
    assert not complaints(page)
