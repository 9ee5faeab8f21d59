"""Expert ids in config files: quantization ignore lists, per-module schemes and the like.

A string that names one expert (`model.layers.3.mlp.experts.5.down_proj`) gets that expert's new id. One that names all
of them (`*.experts.*`) stays. A regular expression is judged by what it does: it, or the same with its literal ids
mapped, must pick exactly the renumbered experts that it picked before; otherwise it is an error that shows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from .checkpoint import Checkpoint
from .contract import Placement
from .errors import UnsupportedError
from .moe import MoeModel, renumber
from .placement import invert

# These name tokens or files, never modules; and an index of other weights speaks of files that are not renumbered.
NOT_CONFIGS = re.compile(r"(tokenizer|vocab|merges|added_tokens|special_tokens).*|.*\.index\.json")
REGEX_PREFIXES = ("re:", "+:", "-:")

_EXPERTS = re.compile(r"(?<![A-Za-z0-9_])experts(?P<dot>\\?\.)")
_LITERAL_ID = re.compile(r"(0|[1-9][0-9]*)(?=\\?\.|$)")
_ALL_OR_NAMED = re.compile(r"[*A-Za-z_]|$")


def map_config_files(checkpoint: Checkpoint, model: MoeModel, placement: Placement) -> dict[str, Any]:
    """The JSON files at the top of `checkpoint` that name experts by id, parsed and with their ids mapped.

    Returns only files that changed, by name. Raises UnsupportedError for a string whose experts cannot be told.
    """
    changed = {}
    for name in checkpoint.files:
        if "/" in name or not name.endswith(".json") or NOT_CONFIGS.fullmatch(name):
            continue
        data = (checkpoint.root / name).read_bytes()
        if b"experts" not in data and not any(b'"' + prefix.encode() in data for prefix in REGEX_PREFIXES):
            continue
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            continue  # not a config that any engine could read; it is copied as it is
        mapper = _Mapper(model, placement, str(checkpoint.root / name))
        mapped = map_strings(value, mapper)
        if mapped != value:
            changed[name] = mapped
    return changed


def map_strings(value: Any, mapper: Callable[[str], str]) -> Any:
    """JSON `value` with every string in it, keys too, replaced by `mapper`."""
    if isinstance(value, str):
        return mapper(value)
    if isinstance(value, list):
        return [map_strings(item, mapper) for item in value]
    if isinstance(value, dict):
        return {mapper(key): map_strings(item, mapper) for key, item in value.items()}
    return value


class _Mapper:
    """Maps the expert ids in one string of the file `where`."""

    def __init__(self, model: MoeModel, placement: Placement, where: str) -> None:
        self._model = model
        self._logical_to_physical = {layer: invert(order) for layer, order in placement.items()}
        self._where = where
        self._modules: dict[str, str] | None = None

    def __call__(self, text: str) -> str:
        if text.startswith(REGEX_PREFIXES):
            return self._regex(text)
        for match in _EXPERTS.finditer(text):
            rest = text[match.end() :]
            if not _LITERAL_ID.match(rest) and not _ALL_OR_NAMED.match(rest):
                raise self._unclear(text)
        return self._map_literal_ids(text)

    def _map_literal_ids(self, text: str) -> str:
        pieces, position = [], 0
        for match in _EXPERTS.finditer(text):
            number = _LITERAL_ID.match(text, match.end())
            if number is None:
                continue
            table = self._table(text[: match.start()].removesuffix("."), text)
            if int(number[0]) >= len(table):
                raise UnsupportedError(
                    f"{self._where}: {text!r:.200} names expert {number[0]}, but a layer has {len(table)} experts"
                )
            pieces += [text[position : match.end()], str(table[int(number[0])])]
            position = number.end()
        return "".join((*pieces, text[position:]))

    def _table(self, layer: str, text: str) -> tuple[int, ...]:
        if layer in self._logical_to_physical:
            return self._logical_to_physical[layer]
        tables = set(self._logical_to_physical.values())
        if len(tables) > 1:
            raise self._unclear(text)
        return tables.pop()

    def _regex(self, text: str) -> str:
        prefix, _, pattern = text.partition(":")
        try:
            matches = re.compile(pattern).match
        except re.error as error:
            raise self._unclear(text) from error
        modules = self._expert_modules()
        wanted = {physical for logical, physical in modules.items() if matches(logical)}
        for candidate in (pattern, self._map_literal_ids(pattern)):
            if {module for module in modules if re.match(candidate, module)} == wanted:
                return f"{prefix}:{candidate}"
        raise self._unclear(text)

    def _expert_modules(self) -> Mapping[str, str]:
        """The output's name of every module of an expert, by its name in the source."""
        if self._modules is None:
            self._modules = {
                tensor.name.rpartition(".")[0]: renumber(tensor.name, self._logical_to_physical).rpartition(".")[0]
                for layer in self._model.layers
                for tensors in layer.experts
                for tensor in tensors
            }
        return self._modules

    def _unclear(self, text: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self._where}: {text!r:.200}: cannot tell which experts this means after renumbering; write their ids out"
        )
