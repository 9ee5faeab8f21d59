"""What callers may pass: URLs are no paths, and a wrong value from Python is refused before the first byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
from command_line import run, run_well

from reshard import (
    Digests,
    FromFile,
    NodeZigzag,
    ReshardError,
    Zigzag,
    analyze,
    export,
    inspect,
    place,
    plan_placement,
    plan_stage,
    read_checkpoint,
    read_manifest,
    restore,
    stage,
    verify,
    write_export,
    write_page,
    write_resharding,
    write_staging,
    zigzag,
)
from reshard.traffic.trace_file import Header, TraceWriter

URLS = ("s3://bucket/R1", "hf://org/R1", "file:///tmp/R1")
NEVER_SOURCES = ("https://host/R1", "file:///tmp/R1")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a source and an output; commands run in it."""
    hostile.write_base(tmp_path / "src")
    monkeypatch.chdir(tmp_path)
    run_well("zigzag", "--src", "src", "--ep", 2, "--out", "output")
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a directory, with the content of files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "command",
    [
        "zigzag --src src --ep 2 --out URL",
        "zigzag --src src --ep 2 --out URL --dry-run",
        "place --strategy zigzag --src src --ep 2 --out URL",
        "place --strategy file --map URL --src src --ep 2 --out out",
        "place --strategy balanced --trace URL --src src --ep 2 --out out",
        "restore output --out URL",
        "stage output --ranks 0 --out URL",
        "stage URL --ranks 0 --out out",
        "verify URL",
        "analyze src --ep 2 --tokens 16 --html URL.html",
        "trace info URL",
        "export src --to vllm --ep 2 --out URL.json",
    ],
)
def test_a_url_is_refused_and_nothing_is_written(command: str, url: str, work: Path) -> None:
    refuse_url(command, url, work)


@pytest.mark.parametrize("url", NEVER_SOURCES)
@pytest.mark.parametrize(
    "command",
    [
        "zigzag --src URL --ep 2 --out out",
        "restore URL --out out",
        "verify output --src URL",
        "inspect URL",
        "export URL --to vllm --ep 2",
    ],
)
def test_a_source_is_at_no_url_that_no_store_has(command: str, url: str, work: Path) -> None:
    """Those of the Hub and of object stores are in tests/remote."""
    refuse_url(command, url, work)


def refuse_url(command: str, url: str, work: Path) -> None:
    """The command fails with a line about the URL's scheme, and writes nothing."""
    before = snapshot(work)
    result = run(*command.replace("URL", url).split())
    assert result.exit_code == 1
    scheme = url.partition(":")[0]
    assert f"{scheme}:// is not supported" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert snapshot(work) == before


@pytest.mark.parametrize("url", URLS)
def test_a_url_from_python_is_refused_and_nothing_is_written(url: str, work: Path) -> None:
    before = snapshot(work)
    exported = export("src", "vllm", 2)
    analysis = analyze("src", [Zigzag(2)], tokens=16)
    calls: tuple[Callable[[], object], ...] = (
        lambda: zigzag("src", url, 2),
        lambda: zigzag(url.replace("s3", "ftp").replace("hf", "https"), "out", 2),
        lambda: stage("output", url, [0]),
        lambda: restore("output", url),
        lambda: verify(url),
        lambda: write_export(exported, Path(f"{url}.json")),
        lambda: write_page(analysis, Path(f"{url}.html")),
        lambda: TraceWriter(
            Path(url), Header(reshard_trace=1, engine="", model="", layers=("layer",), num_experts=8, top_k=2)
        ),
    )
    for call in calls:
        with pytest.raises(ReshardError, match=":// is not supported"):
            call()
    assert snapshot(work) == before


def test_a_folder_whose_name_looks_like_a_scheme_can_be_named(work: Path) -> None:
    """The control: a local path is no URL, whatever it contains."""
    run_well("zigzag", "--src", "src", "--ep", 2, "--out", work / "s3:" / "R1")
    run_well("verify", work / "s3:" / "R1", "--src", "src")


@pytest.mark.parametrize(
    "call",
    [
        *(
            lambda options=options: zigzag("src", "out", 2, **options)
            for options in (
                {"layout": "rank"},
                {"layout": None},
                {"digests": "copied"},
                {"digests": "none"},
                {"reflink": "yes"},
                {"max_shard_size": "5 apples"},
                {"max_shard_size": "5"},
                {"max_shard_size": 1e9},
                {"max_shard_size": True},
                {"max_shard_size": 0},
                {"max_shard_size": 999},
                {"workers": 0},
                {"workers": -1},
                {"workers": 2.5},
                {"workers": "2"},
            )
        ),
        *(lambda ep=ep: zigzag("src", "out", ep) for ep in (2.0, "2", True, None, 1, 9)),
        *(lambda nodes=nodes: place("src", "out", NodeZigzag(2, nodes)) for nodes in (0, "2", 2.0)),
        lambda: zigzag("src", 2, "out"),  # type: ignore[arg-type]  # an order that earlier versions had
        lambda: stage("output", [0], "out"),  # type: ignore[arg-type]
        lambda: restore("output", None),  # type: ignore[arg-type]
        lambda: place("src", "out", "zigzag"),  # type: ignore[arg-type]
        *(lambda ranks=ranks: stage("output", "out", ranks) for ranks in ([0.0], [True], ["0"], "0", [], [-1])),
        lambda: stage("output", "out", [0], workers=0),
        lambda: restore("output", "out", workers=-1),
        lambda: verify("output", workers=0),
        lambda: inspect("src", 2.0),  # type: ignore[arg-type]
        *(
            lambda options=options: analyze("src", [Zigzag(2)], **options)
            for options in ({"tokens": "x"}, {"tokens": -1}, {"nodes": "1"}, {"batch_sizes": ["1"]})
        ),
        lambda: analyze("src", []),
        lambda: analyze("src", [Zigzag(2), Zigzag(4)]),
    ],
)
def test_a_wrong_value_from_python_is_refused_before_the_first_byte(call: Callable[[], Any], work: Path) -> None:
    before = snapshot(work)
    with pytest.raises(ReshardError, match=r"must be|expected|no ranks to stage"):
        call()
    assert snapshot(work) == before


def test_right_values_from_python_are_accepted(work: Path) -> None:
    """The control."""
    zigzag("src", "out", 2, layout="source", digests=Digests.COPIED, reflink="never", max_shard_size=1000, workers=1)
    assert verify("out", "src", workers=1).ok
    stage("output", "staged", (0,), workers=1)
    restore("output", "back", workers=1)


@pytest.mark.parametrize(("text", "size"), [("0.5GB", 5 * 10**8), ("5G", 5 * 10**9), (Path("5G"), None)])
def test_a_size_is_a_text_or_a_number_of_bytes(text: Any, size: int | None, work: Path) -> None:
    if size is None:
        with pytest.raises(ReshardError, match="must be a size such as"):
            plan_placement("src", "out", Zigzag(2), max_shard_size=text)
        return
    texts, numbers = (plan_placement("src", "out", Zigzag(2), max_shard_size=one).plan for one in (text, size))
    assert texts.files == numbers.files


def test_paths_are_texts_or_paths_everywhere(work: Path) -> None:
    """What each function takes, it takes as both; `write_resharding` and `write_staging` took paths only."""
    for kind in (str, Path):
        made = work / kind.__name__
        made.mkdir()
        resharding = plan_placement(kind("src"), kind(made / "out"), Zigzag(2))
        write_resharding(resharding, kind(made / "out"))
        assert read_checkpoint(kind("src")).config["n_group"] > 1
        assert read_manifest(kind(made / "out")).ep_size == 2
        write_staging(plan_stage(kind(made / "out"), kind(made / "staged"), [0]), kind(made / "staged"))
        write_export(export(kind("src"), "vllm", 2), kind(made / "map.json"))
        place(kind("src"), kind(made / "placed"), FromFile(2, kind(made / "map.json")))
        write_page(analyze(kind("src"), [Zigzag(2)], tokens=16), kind(made / "page.html"))
        restore(kind(made / "out"), kind(made / "back"))
        assert verify(kind(made / "placed"), kind("src")).ok
        assert inspect(kind(made / "staged")).staged_ranks == (0,)
