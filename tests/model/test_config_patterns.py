"""Patterns in configs: the shortcut that skips layers must never skip a name that a pattern matches."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import Spec, build
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reshard import read_checkpoint, read_model
from reshard.model.config_patterns import ExpertNames

TABLE = (0, 3, 6, 1, 4, 7, 2, 5)  # logical expert e becomes physical TABLE[e]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> ExpertNames:
    """The names of a model with two MoE layers of eight experts."""
    directory = tmp_path_factory.mktemp("patterns") / "source"
    build(Spec("glm4_moe", experts=8, layers=3), directory)
    model = read_model(read_checkpoint(directory))
    return ExpertNames(model.layers, {layer.name: TABLE for layer in model.layers})


def every_name() -> Iterator[tuple[str, str]]:
    """(name in the source, name after renumbering), spelled out."""
    for layer in (1, 2, 3):
        for expert, new in enumerate(TABLE):
            for tail in ("", *(f".{p}_proj{part}" for p in ("gate", "up", "down") for part in ("", ".weight"))):
                head = f"model.layers.{layer}.mlp.experts."
                yield f"{head}{expert}{tail}", f"{head}{new}{tail}"


def ways(pattern: str) -> list[Callable[[str], object]]:
    """The pattern as a glob and as a regular expression, to be matched and to be searched, without any shortcut."""
    found: list[Callable[[str], object]] = []
    if not pattern.startswith("re:"):
        found.append(lambda name: fnmatch.fnmatchcase(name, pattern))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            regex = re.compile(pattern.removeprefix("re:"))
    except (re.error, OverflowError, RecursionError):
        return found
    return [*found, regex.match, regex.search]


def compared_name_by_name(pattern: str) -> tuple[bool, bool]:
    """What `ExpertNames.compare` must say of a pattern that stays as it is."""
    matched = [[(bool(way(old)), bool(way(new))) for old, new in every_name()] for way in ways(pattern)]
    same = bool(matched) and all(old == new for pairs in matched for old, new in pairs)
    return same, any(old for pairs in matched for old, _ in pairs)


words = st.sampled_from(
    ["model", "layers", "mlp", "experts", "gate", "gate_proj", "down_proj", "weight", "1", "2", "10", "5", "self_attn"]
)
symbols = st.sampled_from(
    [".", "*", ".*", "?", "[0-9]", "[!5]", "[^5]", r"\.", r"\d", "+", "(", ")", "|", "{1}", "(?:"]
)
more = st.sampled_from(["$", "^", "(?i)", "E", "{", "}", "]", "[", r"\x31", r"\b", "(5|1)", "x*", "x?", "s", "p"])
patterns = st.builds(
    str.__add__, st.sampled_from(["", "re:"]), st.lists(words | symbols | more, min_size=1, max_size=9).map("".join)
)


@settings(max_examples=400, deadline=None)
@given(patterns)
@example("model.layers.1*")
@example("*.experts.5.*")
@example("*s.3.down_proj")
@example("*experts.?.down*")
@example("re:.*experts.[67]")
@example(r"re:.*\.5\..*")
@example("re:modelx*.layers.2")
@example("re:(?i)MODEL.*EXPERTS.5")
@example(r"re:.*experts\.\x35\.down_proj")
@example("re:lm_head|.*experts.5.*")
@example("re:ts.5.do")
@example("re:.*(self_attn|experts.5).*")
def test_skipping_layers_changes_no_answer(names: ExpertNames, pattern: str) -> None:
    assert names.compare(pattern, pattern) == compared_name_by_name(pattern)


def test_experts_with_different_tensors_are_compared_one_by_one(tmp_path: Path) -> None:
    """A pattern of all experts stays, although renumbering moves tensors that only some of them have."""
    build(Spec("glm4_moe", experts=8, layers=3, quantization="modelopt", seed=1), tmp_path / "source")
    model = read_model(read_checkpoint(tmp_path / "source"))
    names = ExpertNames(model.layers, {layer.name: TABLE for layer in model.layers})
    assert names.compare("*.experts.*", "*.experts.*") == (True, True)
    assert names.compare("*.experts.5.*", "*.experts.5.*") == (False, True)
    assert names.compare("*.experts.5.*", "*.experts.7.*") == (True, True)
