"""Which experts a pattern in a config means: a glob or a regular expression, before and after renumbering.

Engines read the same text in different ways, so a pattern has several readings. Each must match an expert's new name
exactly if it matched the old one. Quantizers also write patterns of all experts in the words of another checkpoint
(`mlp.experts.[0-9]+.gate_proj` where this one has `block_sparse_moe` and `w1`): `names_all_elsewhere` knows them.

A checkpoint has 200,000 such names and its config hundreds of patterns, so most names are not tried: a `Reading` knows
the pieces of text that a name must contain, and a layer is tried only if its names can contain them.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .families import FAMILIES
from .layers import MoeLayer

REGEX_PREFIXES = ("re:", "+:", "-:")
_ANY = "\0"  # in a piece: any one character
_GLOB_CLASS = re.compile(r"\[!?\]?[^\]]*\]")
_CLASS = r"\[\^?\]?(?:[^\]\\]|\\.)*\]"
# What a regular expression consists of; an alternative, an inline flag or the code of a character is none of these.
_REGEX_TOKEN = re.compile(
    rf"(?P<repeat>\{{(?:\d+|\d*,\d*)\}}|[*?+])|(?P<group>\((?!\?[a-zA-OQ-Z#-]))|(?P<anchor>[$^]|\\[AbBZ])"
    rf"|(?P<any>\.|{_CLASS}|\\[dDsSwW])|(?P<literal>\\[^a-zA-Z0-9]|[^\\()|\[])",
    re.DOTALL,
)
_INSIDE_GROUP = re.compile(rf"{_CLASS}|\\.|.", re.DOTALL)
_ID = f"0123456789{_ANY}"  # what a piece may have in the place of an expert's id
# How checkpoints and engines call what is before and behind `.experts.<id>`.
_STEMS = ("model.", "model.language_model.", "language_model.model.")
_BLOCKS = tuple(dict.fromkeys(family.block for family in FAMILIES if "*" not in family.block))
_TAILS = ("", ".gate_proj", ".up_proj", ".down_proj", ".gate_up_proj", ".w1", ".w2", ".w3", ".down_proj.weight")
_IDS = re.compile(r"(?P<before>experts(?:\\?\.|\[\.\])\((?:\?:)?)(?P<ids>[0-9]{1,9}(?:\|[0-9]{1,9})+)\)")
# An alternation of names, and one of them: `.*` may stand before and behind it. Then an id with what must follow it.
_ALTERNATION = re.compile(r"(?P<open>(?:re:|[+-]:)?\^?(?:\((?:\?:)?)?)(?P<names>[^()]*)(?P<close>\)?\$?)")
_ALTERNATIVE = re.compile(r"\^?(?:\.\*)?(?:[\w/-]|\\?\.)+(?:\.\*)?\$?")
_WHOLE_ID = re.compile(r"(?<!\w)experts\\?\.(?:0|[1-9][0-9]{0,8})(?:\\\.|\.[A-Za-z_])")
_NO_ID = str.maketrans(dict.fromkeys("0123456789", _ANY))


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


def shorten(text: str, num_experts: int) -> str:
    """The pattern `text` with `[0-9]+` for each alternation over all ids.

    It matches the same names: an id has no leading zeros, so all digits that an id begins with are an id too.
    """

    def short(match: re.Match[str]) -> str:
        ids = match["ids"].split("|")
        return f"{match['before']}[0-9]+)" if set(ids) == set(map(str, range(num_experts))) else match[0]

    return _IDS.sub(short, text)


def map_alternatives(text: str, change: Callable[[str], str], stays: Callable[[str], bool]) -> str | None:
    """The alternation of names `text`, with each name that has an expert's id changed.

    It matches what some alternative matches, so each may be read by itself, however many there are. None if `text` is
    of another form, or if an alternative has no id and does not stay as it is.
    """
    whole = _ALTERNATION.fullmatch(text)
    if whole is None or ("(" in whole["open"]) != (")" in whole["close"]):
        return None
    found = []
    for name in whole["names"].split("|"):
        if not _ALTERNATIVE.fullmatch(name) or name.count("experts") > 1:
            return None
        if _WHOLE_ID.search(name):
            found.append(change(name))
        elif stays(name):
            found.append(name)
        else:
            return None
    return f"{whole['open']}{'|'.join(found)}{whole['close']}"


def names_all_elsewhere(text: str, layers: Iterable[str], num_experts: int) -> bool:
    """Whether the pattern `text` means all experts alike, by names that other checkpoints give those of `layers`.

    False if it means none. Layers differ by their number only, so all ids are tried in one layer that it means.
    """
    found = False
    for reading in readings(text):
        for heads in _heads_elsewhere(layers):
            named = (head for head in heads if any(reading.matches(f"{head}0{tail}") for tail in _TAILS))
            head = next(named, heads[0])
            for tail in _TAILS:
                matched = {bool(reading.matches(f"{head}{expert}{tail}")) for expert in range(num_experts)}
                if len(matched) > 1:
                    return False
                found = found or True in matched
    return found


def _heads_elsewhere(layers: Iterable[str]) -> Iterable[list[str]]:
    """What is before the ids of the experts of `layers`, in each way to write it."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for layer in layers:
        parent, _, block = layer.rpartition(".")
        before, stack, number = (parent if block in _BLOCKS else layer).rpartition("layers.")
        for stem in (before, *_STEMS) if before in _STEMS else (before,):
            for block in _BLOCKS:
                found[stem, block].append(f"{stem}{stack}{number}.{block}.experts.")
    return found.values()


@dataclass(frozen=True, slots=True)
class _Names:
    """A layer's names in the source, and each one's name after renumbering; `closed` if these are the same set."""

    old: tuple[str, ...]
    new: tuple[str, ...]
    closed: bool


class ExpertNames:
    """The names of every expert, of its modules and of its tensors, in the source and after renumbering."""

    def __init__(self, layers: Sequence[MoeLayer], logical_to_physical: Mapping[str, Sequence[int]]) -> None:
        self._layers = {f"{layer.name}.experts.": layer for layer in layers if layer.experts}
        self._tables = logical_to_physical
        self._found: dict[str, _Names] = {}
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
        old_readings = readings(before)
        new_readings = old_readings if after == before else readings(after)
        same, found = bool(old_readings) and len(old_readings) == len(new_readings), False
        for old, new in zip(old_readings, new_readings, strict=False):
            for head in self._layers:
                if self._may_match(old, head) or (new is not old and self._may_match(new, head)):
                    names = self._names(head)
                    matched = [*map(bool, map(old.matches, names.old))]
                    found = found or any(matched)
                    alike = before == after and names.closed and len(set(matched)) == 1
                    same = same and (alike or matched == [*map(bool, map(new.matches, names.new))])
        return same, found

    def _names(self, head: str) -> _Names:
        """All names that begin with `head`."""
        if head not in self._found:
            layer, names = self._layers[head], {}
            for expert, tensors in enumerate(layer.experts):
                old, new = f"{head}{expert}", f"{head}{self._tables[layer.name][expert]}"
                names[old] = new
                for tensor in tensors:
                    tail = tensor.name[len(old) :]
                    module = tail.rpartition(".")[0]
                    names[old + tail], names[old + module] = new + tail, new + module
            closed = names.keys() == set(names.values())
            self._found[head] = _Names(tuple(names.keys()), tuple(names.values()), closed)
        return self._found[head]

    def _may_match(self, reading: Reading, head: str) -> bool:
        """Whether some name that begins with `head` may contain all pieces. Never wrongly False."""
        first, *others = reading.pieces
        return self._may_lie_at(0, first, head) and all(
            any(self._may_lie_at(start, piece, head) for start in range(len(head))) or self._may_lie_behind(piece)
            for piece in others
        )

    def _may_lie_at(self, start: int, piece: str, head: str) -> bool:
        """Whether `piece` may begin at `start` of `head`; what does not fit in there begins with an expert's id."""
        if not _fits(piece, head, start):
            return False
        rest = piece[len(head) - start :]
        return not rest or (rest[0] in _ID and self._may_lie_behind(rest))

    def _may_lie_behind(self, piece: str) -> bool:
        """Whether `piece` may lie behind the head, in an expert's id and what follows it."""
        return all(any(part in tail for tail in self.tails) for part in piece.translate(_NO_ID).split(_ANY))


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
