"""Expert ids in config files: quantization ignore lists, per-module schemes and the like.

A string that names one expert (`model.layers.3.mlp.experts.5.down_proj`) gets that expert's new id. A pattern, glob or
regular expression, is judged by what it picks of this checkpoint's experts: it, or the same with its literal ids
mapped, must pick exactly the renumbered experts that it picked before. What cannot be told is an error that shows it.
"""

from __future__ import annotations

import fnmatch
import json
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..checkpoint.directory import Checkpoint, refuse_nesting
from ..errors import CheckpointError, UnsupportedError
from ..placement.permutations import Placement, invert
from .layers import MoeModel
from .names import renumber

# The files at the top of a checkpoint in which engines look modules up by name.
CONFIG_FILES = re.compile(r"config\.json|.*quant.*\.json", re.IGNORECASE)
REGEX_PREFIXES = ("re:", "+:", "-:")
MAX_PATTERN = 1000

_EXPERT_ID = re.compile(r"(?<![A-Za-z0-9_])experts(?:\\?\.|\[\.\])(?P<id>0|[1-9][0-9]{0,8})(?![0-9])")
_PLAIN = re.compile(r"[\w.\-/]*")
_MAY_NAME_ONE = re.compile(r"experts\W{0,8}[0-9]")


def map_config_files(checkpoint: Checkpoint, model: MoeModel, placement: Placement) -> dict[str, Any]:
    """The config files of `checkpoint` that name experts by id, parsed and with their ids mapped.

    Returns only files that changed, by name. Raises UnsupportedError for a string whose experts cannot be told.
    """
    changed = {}
    for name in checkpoint.files:
        if not CONFIG_FILES.fullmatch(name):
            continue
        path = checkpoint.root / name
        try:
            text = path.read_bytes()
            refuse_nesting(text, path)
            value = json.loads(text)
            mapped = map_strings(value, _Mapper(model, placement, str(path)), str(path))
        except ValueError:
            continue  # no config that any engine could read; it is copied as it is
        except RecursionError as error:
            raise CheckpointError(f"{path}: nested too deeply to be a config") from error
        if mapped != value:
            changed[name] = mapped
    return changed


def map_strings(value: Any, mapper: Callable[[str], str], where: str) -> Any:
    """JSON `value` with every string in it, keys too, replaced by `mapper`; `where` names the file in errors."""
    if isinstance(value, str):
        return mapper(value)
    if isinstance(value, list):
        return [map_strings(item, mapper, where) for item in value]
    if isinstance(value, dict):
        for key, item in value.items():
            if key.rpartition(".")[2] == "experts" and _has_ids(item):
                raise UnsupportedError(
                    f"{where}: {key!r:.200} has numbers below it that may be expert ids, in a form that reshard "
                    "does not "
                    "know; write the modules' names out"
                )
        return {mapper(key): map_strings(item, mapper, where) for key, item in value.items()}
    return value


def _has_ids(value: Any) -> bool:
    return isinstance(value, (list, dict)) and any(type(item) is int or str(item).isdigit() for item in value)


class _Mapper:
    """Maps the expert ids in one string of the file `where`."""

    def __init__(self, model: MoeModel, placement: Placement, where: str) -> None:
        self._model = model
        self._logical_to_physical = {layer: invert(order) for layer, order in placement.items()}
        self._where = where
        self._names: dict[str, str] | None = None

    def __call__(self, text: str) -> str:
        if _PLAIN.fullmatch(text):
            return self._map_literal_ids(text)
        if len(text) > MAX_PATTERN:
            if "experts" in text:
                raise self._unclear(text)
            return text
        return self._map_pattern(text)

    def _map_literal_ids(self, text: str) -> str:
        def new_id(match: re.Match[str]) -> str:
            table = self._table(text[: match.start()].removesuffix("."), text)
            if int(match["id"]) >= len(table):
                raise UnsupportedError(
                    f"{self._where}: {text!r:.200} names expert {match['id']}, but a layer has {len(table)} experts"
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

    def _map_pattern(self, text: str) -> str:
        picks = [readings(pattern) for pattern in (text, self._mapped_or_none(text)) if pattern is not None]
        names = self._expert_names()
        before = [{name for name in names if pick(name)} for pick in picks[0]]
        after = [{names[name] for name in found} for found in before]
        if before and before == after and (any(before) or not _MAY_NAME_ONE.search(text)):
            return text
        if len(picks) == 2 and any(before):
            mapped = self._map_literal_ids(text)
            if [{name for name in names if pick(name)} for pick in picks[1]] == after:
                return mapped
        raise self._unclear(text)

    def _mapped_or_none(self, text: str) -> str | None:
        try:
            return self._map_literal_ids(text)
        except UnsupportedError:
            return None

    def _expert_names(self) -> Mapping[str, str]:
        """The output's name of every tensor, module and expert below `experts`, by its name in the source."""
        if self._names is None:
            self._names = {}
            for layer in self._model.layers:
                for expert, tensors in enumerate(layer.experts):
                    new = self._logical_to_physical[layer.name][expert]
                    self._names[f"{layer.name}.experts.{expert}"] = f"{layer.name}.experts.{new}"
                    for tensor in tensors:
                        renamed = renumber(tensor.name, self._logical_to_physical)
                        self._names[tensor.name] = renamed
                        self._names[tensor.name.rpartition(".")[0]] = renamed.rpartition(".")[0]
        return self._names

    def _unclear(self, text: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self._where}: {text!r:.200}: cannot tell which experts this means after renumbering; write their ids out"
        )


def readings(text: str) -> list[Callable[[str], bool]]:
    """The ways in which engines read the pattern `text`: as a glob, and as a regular expression where it is one."""
    pattern = text.partition(":")[2] if text.startswith(REGEX_PREFIXES) else text
    ways: list[Callable[[str], bool]] = []
    if pattern == text:
        ways.append(lambda name: fnmatch.fnmatchcase(name, text))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # [[ and the like, which a later Python may read otherwise
            compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return ways
    return [*ways, lambda name: bool(compiled.match(name)), lambda name: bool(compiled.search(name))]
