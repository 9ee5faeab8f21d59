"""Which experts a pattern in a config means: a glob or a regular expression, before and after renumbering.

Engines read the same text in different ways, so a pattern has several readings. Each must match an expert's new name
exactly if it matched the old one. A checkpoint has 200,000 such names and its config hundreds of patterns, so most
names are not tried: a `Reading` knows the pieces of text that a name must contain, and a layer is tried only if its
names can contain them.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .layers import MoeLayer

REGEX_PREFIXES = ("re:", "+:", "-:")
_ANY = "\0"  # in a piece: any one character
_GLOB_CLASS = re.compile(r"\[!?\]?[^\]]*\]")
_CLASS = r"\[\^?\]?(?:[^\]\\]|\\.)*\]"
_REGEX_TOKEN = re.compile(
    rf"(?P<repeat>\{{(?:\d+|\d*,\d*)\}}|[*?+])|(?P<group>\((?!\?[a-zA-OQ-Z#-]))|(?P<anchor>[$^]|\\[AbBZ])"
    rf"|(?P<any>\.|{_CLASS}|\\[dDsSwW])|(?P<literal>\\[^a-zA-Z0-9]|[^\\()|\[])",
    re.DOTALL,
)
_INSIDE_GROUP = re.compile(rf"{_CLASS}|\\.|.", re.DOTALL)
_ANY_OR_ID = re.compile(r"[\0\d]+")


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a pattern. A name that `matches` contains all `pieces`, and begins with the first."""

    matches: Callable[[str], object]
    pieces: tuple[str, ...]


def readings(text: str) -> list[Reading]:
    """How engines may read the pattern `text`: as a glob, and as a regular expression if it is a valid one."""
    pattern = text.partition(":")[2] if text.startswith(REGEX_PREFIXES) else text
    found: list[Reading] = []
    if pattern == text:
        found.append(Reading(re.compile(fnmatch.translate(text)).match, _pieces_of_glob(text)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # e.g. [[, whose meaning a later Python may change
            compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return found
    pieces = _pieces_of_regex(pattern)
    return [*found, Reading(compiled.match, pieces), Reading(compiled.search, ("", *pieces))]


class ExpertNames:
    """The names of every expert, of its modules and of its tensors, in the source and after renumbering."""

    def __init__(self, layers: Sequence[MoeLayer], logical_to_physical: Mapping[str, Sequence[int]]) -> None:
        self._layers = {f"{layer.name}.experts.": layer for layer in layers if layer.experts}
        self._tables = logical_to_physical
        self._pairs: dict[str, tuple[tuple[str, str], ...]] = {}
        self.tails = {
            tensor.name[len(head) + len(str(expert)) :]
            for head, layer in self._layers.items()
            for expert, tensors in enumerate(layer.experts)
            for tensor in tensors
        }

    def compare(self, before: str, after: str) -> tuple[bool, bool]:
        """Whether the pattern `after` matches the same experts by new names as `before` by old ones, and whether any.

        True only if every reading does, and there is one.
        """
        old_readings, new_readings = readings(before), readings(after)
        same, found = bool(old_readings) and len(old_readings) == len(new_readings), False
        for old, new in zip(old_readings, new_readings, strict=False):
            for head in self._layers:
                if self._may_match(old, head) or self._may_match(new, head):
                    for old_name, new_name in self._names(head):
                        matched = bool(old.matches(old_name))
                        found = found or matched
                        same = same and matched == bool(new.matches(new_name))
        return same, found

    def _names(self, head: str) -> tuple[tuple[str, str], ...]:
        """(name in the source, name after renumbering) of all that begins with `head`."""
        if head not in self._pairs:
            layer, names = self._layers[head], {}
            for expert, tensors in enumerate(layer.experts):
                old, new = f"{head}{expert}", f"{head}{self._tables[layer.name][expert]}"
                names[old] = new
                for tensor in tensors:
                    tail = tensor.name[len(old) :]
                    module = tail.rpartition(".")[0]
                    names[old + tail], names[old + module] = new + tail, new + module
            self._pairs[head] = tuple(names.items())
        return self._pairs[head]

    def _may_match(self, reading: Reading, head: str) -> bool:
        """Whether some name that begins with `head` may contain all pieces. Never wrongly False."""
        first, *others = reading.pieces
        return _fits(first, head, 0) and all(
            any(_fits(piece, head, start) for start in range(len(head))) or self._in_tail(piece) for piece in others
        )

    def _in_tail(self, piece: str) -> bool:
        """Whether `piece` may lie behind the head, in an expert's id and what follows it."""
        return all(any(part in tail for tail in self.tails) for part in _ANY_OR_ID.split(piece))


def _fits(piece: str, head: str, start: int) -> bool:
    """Whether `piece` agrees with `head` from `start` on, as far as both go."""
    if piece and piece[0] not in (_ANY, head[start]):
        return False
    return all(char in (_ANY, found) for char, found in zip(piece, head[start:], strict=False))


def _pieces_of_glob(text: str) -> tuple[str, ...]:
    """The pieces that a name must contain to match the glob `text`, in order."""
    pieces, position = [""], 0
    while position < len(text):
        char, bracket = text[position], _GLOB_CLASS.match(text, position)
        position = bracket.end() if bracket else position + 1
        if char == "*":
            pieces.append("")
        else:
            pieces[-1] += _ANY if bracket or char == "?" else char
    return tuple(pieces)


def _pieces_of_regex(text: str) -> tuple[str, ...]:
    """The pieces that a name must contain for the regular expression `text` to match at its beginning, in order.

    A group may match anything, and so may the whole expression if it has alternatives, flags or codes of characters.
    """
    pieces, position = [""], 0
    repeatable = False  # whether a repeat would repeat the last character of the last piece
    while position < len(text):
        token = _REGEX_TOKEN.match(text, position)
        if token is None:
            return ("",)
        kind, position = token.lastgroup, token.end()
        if kind == "repeat":
            if repeatable and token[0] != "+":
                pieces[-1] = pieces[-1][:-1]
            pieces.append("")
        elif kind == "group":
            pieces.append("")
            position = _end_of_group(text, position)
        elif kind != "anchor":
            pieces[-1] += token[0][-1] if kind == "literal" else _ANY
        repeatable = kind in ("any", "literal")
    return tuple(pieces)


def _end_of_group(text: str, position: int) -> int:
    """Where the group whose parenthesis is before `position` ends."""
    depth = 1
    while depth and (token := _INSIDE_GROUP.match(text, position)):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        position = token.end()
    return position
