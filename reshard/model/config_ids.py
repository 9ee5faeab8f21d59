"""Expert ids in config files: quantization ignore lists, per-module schemes and the like.

A string that names one expert (`model.layers.3.mlp.experts.5.down_proj`) gets that expert's new id. A pattern (a glob
or a regular expression) is tested against the names of this checkpoint's experts. After renumbering it must match the
same experts as before, either unchanged or with its literal ids mapped. If it matches none, it must treat all alike by
the names that other checkpoints would give them. If nothing of this is so, an error shows the string. Prose is no
pattern: no name has a space, or a hyphen behind `experts`.

Numbers under a key that speaks of experts are refused, unless the key is known to count something.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

from ..checkpoint.directory import Checkpoint, refuse_nesting
from ..errors import CheckpointError, UnsupportedError
from ..placement.permutations import Placement, invert
from .config_patterns import ExpertNames, map_alternatives, names_all_elsewhere, shorten
from .layers import MoeModel

# Top-level files of a checkpoint in which engines look up modules by name.
CONFIG_FILES = re.compile(r"config\.json|.*quant.*\.json", re.IGNORECASE)
MAX_PATTERN = 1000

_EXPERT_ID = re.compile(r"(?<![A-Za-z0-9_])experts(?:\\?\.|\[\.\])(?P<id>0|[1-9][0-9]{0,8})(?!\w)")
_PLAIN = re.compile(r"[\w.\-/]*")
_MAY_NAME_ONE = re.compile(r"experts(?!-)[^\w\s]{0,8}[0-9]+(?!\w)")
_PROSE_KEYS = re.compile(r"(.*_)?(name_or_path|description|notes?|comments?)")
# Some engines look for a text anywhere in a name (AWQ in vLLM), and then `experts.1` is also 10 to 19.
_ENDS_IN_ID = re.compile(r"experts\.([0-9]{1,9})$")
_BEGINS_BEFORE_ID = re.compile(r"(?:x?p?e?r?t?s?\.)?[0-9]+(?P<tail>\.[A-Za-z_].*)")
# Keys with these words count experts, or say of what kind and size something is. Other numbers may be expert ids.
_COUNTS = re.compile(r"(^|_)(n|num|number)_|per_tok", re.IGNORECASE)
_SIZES = re.compile(r"(size|shape|structure|dim|axis|bits|dtype|version)s?$", re.IGNORECASE)
_LAYER = re.compile(r"layer|(^|\.)[0-9]+(\.|$)", re.IGNORECASE)
_ONE_EXPERT = re.compile(r"expert(_?(id|idx|index))?$", re.IGNORECASE)
_NUMBERS = re.compile(r"[0-9][0-9\s,;:-]*")


def map_config_files(checkpoint: Checkpoint, model: MoeModel, placement: Placement) -> dict[str, Any]:
    """The config files of `checkpoint` that name experts by id, parsed and with their ids mapped.

    Returns only files that changed, by name. Raises UnsupportedError if we cannot tell which experts a string means.
    """
    changed = {}
    for name in checkpoint.files:
        if not CONFIG_FILES.fullmatch(name) or name in checkpoint.indices:
            continue
        path = checkpoint.root / name
        try:
            text = checkpoint.source.read(name)
            refuse_nesting(text, path)
            value = json.loads(text)
            mapped = map_strings(value, _Mapper(model, placement, str(path)), str(path))
        except ValueError:
            continue  # no engine can read this as a config; it is copied as it is
        except RecursionError as error:
            raise CheckpointError(f"{path}: nested too deeply to be a config") from error
        if mapped != value:
            changed[name] = mapped
    return changed


def map_strings(value: Any, mapper: Callable[[str], str], where: str) -> Any:
    """The JSON `value` with `mapper` applied to every string, keys included; `where` names the file in errors."""
    if isinstance(value, str):
        return mapper(value)
    if isinstance(value, list):
        return [map_strings(item, mapper, where) for item in value]
    if isinstance(value, dict):
        for key, item in value.items():
            if "expert" in key.lower() and not _COUNTS.search(key) and _may_be_ids(item, bool(_ONE_EXPERT.search(key))):
                raise UnsupportedError(
                    f"{where}: {key!r:.200} contains numbers that may be expert ids, in a form that reshard does not "
                    "know; write out the full names of the modules, or remove what no engine reads"
                )
        return {
            mapper(key): item
            if _PROSE_KEYS.fullmatch(key) and isinstance(item, str)
            else map_strings(item, mapper, where)
            for key, item in value.items()
        }
    return value


def _may_be_ids(value: Any, single: bool) -> bool:
    """Whether `value`, or something in it, is a list or a text of numbers; with `single`, also whether it is one."""
    if isinstance(value, dict):
        return any(
            key.isdigit() or (not _SIZES.search(key) and _may_be_ids(item, bool(_LAYER.search(key))))
            for key, item in value.items()
        )
    if isinstance(value, list):
        return any(_may_be_ids(item, True) for item in value)
    return (single and type(value) is int) or (isinstance(value, str) and bool(_NUMBERS.fullmatch(value)))


class _Mapper:
    """Maps the expert ids in one string of the file `where`."""

    def __init__(self, model: MoeModel, placement: Placement, where: str) -> None:
        self._layers = model.layers
        self._num_experts = model.routing.num_experts
        self._logical_to_physical = {layer: invert(order) for layer, order in placement.items()}
        self._apart = model.family.apart
        self._where = where

    def __call__(self, text: str) -> str:
        if text.startswith(self._apart):
            return text
        mapped = self._map(text)
        if self._apart and mapped != text and text.partition(".experts.")[0] not in self._logical_to_physical:
            raise self._unclear(text)  # it may mean experts that keep their ids, too
        return mapped

    def _map(self, text: str) -> str:
        if _PLAIN.fullmatch(text):
            mapped = self._map_literal_ids(text)
            if self._means_more_as_a_part(text) or self._means_more_as_a_part(mapped):
                raise UnsupportedError(
                    f"{self._where}: {text!r:.200}: engines differ in which experts this means: some look for it "
                    "anywhere in a name; write out the full names of the modules, with what follows the expert's id"
                )
            return mapped
        short = shorten(text, self._num_experts)
        if len(short) > MAX_PATTERN:
            is_prose = any(map(str.isspace, text)) and not _MAY_NAME_ONE.search(text)
            if "experts" not in text or is_prose:
                return text
            alternation = map_alternatives(text, self._map_literal_ids, cache(self._stays))
            if alternation is None:
                raise self._unclear(text)
            return alternation
        return self._map_pattern(text, short)

    def _means_more_as_a_part(self, text: str) -> bool:
        """Whether `text`, found anywhere in an expert's name, means other experts than as a name of its own."""
        if ends := _ENDS_IN_ID.search(text):
            return 0 < 10 * int(ends[1]) < self._num_experts
        cut = _BEGINS_BEFORE_ID.fullmatch(text)
        return cut is not None and any(tail.startswith(cut["tail"]) for tail in self._names.tails)

    def _map_literal_ids(self, text: str) -> str:
        def new_id(match: re.Match[str]) -> str:
            table = self._table(text[: match.start()].replace("\\.", ".").lstrip("^").removesuffix("."), text)
            if int(match["id"]) >= len(table):
                raise UnsupportedError(
                    f"{self._where}: {text!r:.200} names expert {match['id']}, but its layer has {len(table)} experts"
                )
            return text[match.start() : match.start("id")] + str(table[int(match["id"])])

        mapped = _EXPERT_ID.sub(new_id, text)
        if mapped == text and _MAY_NAME_ONE.search(text) and not _EXPERT_ID.search(text):
            raise self._unclear(text)
        return mapped

    def _table(self, layer: str, text: str) -> tuple[int, ...]:
        if layer in self._logical_to_physical:
            return self._logical_to_physical[layer]
        tables = set(self._logical_to_physical.values())
        if len(tables) > 1:
            raise self._unclear(text)
        return tables.pop()

    def _stays(self, text: str) -> bool:
        """Whether the pattern `text` names no expert by id, and means the same after renumbering."""
        return not _MAY_NAME_ONE.search(text) and self._names.compare(text, text)[0]

    def _map_pattern(self, text: str, short: str) -> str:
        unchanged, any_matched = self._names.compare(short, short)
        if unchanged and (any_matched or not _MAY_NAME_ONE.search(text)):
            return text
        if (
            unchanged
            and not _EXPERT_ID.search(text)
            and names_all_elsewhere(short, self._logical_to_physical, self._num_experts)
        ):
            return text
        mapped = self._mapped_or_none(text)
        if mapped is not None and any_matched and self._names.compare(text, mapped)[0]:
            return mapped
        raise self._unclear(text)

    def _mapped_or_none(self, text: str) -> str | None:
        try:
            return self._map_literal_ids(text)
        except UnsupportedError:
            return None

    @cached_property
    def _names(self) -> ExpertNames:
        return ExpertNames(self._layers, self._logical_to_physical)

    def _unclear(self, text: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self._where}: {text!r:.200}: cannot tell which experts this means after renumbering; write out their ids"
        )
