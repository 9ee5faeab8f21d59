"""Expert ids in config files: quantization ignore lists, per-module schemes and the like.

A string that names one expert (`model.layers.3.mlp.experts.5.down_proj`) gets that expert's new id. A pattern (a glob
or a regular expression) is tested against the names of this checkpoint's experts. After renumbering it must match the
same experts as before, either unchanged or with its literal ids mapped. If neither does, an error shows the string.
"""

from __future__ import annotations

import fnmatch
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..checkpoint.directory import Checkpoint, refuse_nesting
from ..errors import CheckpointError, UnsupportedError
from ..placement.permutations import Placement, invert
from .layers import MoeModel
from .names import renumber

# Top-level files of a checkpoint in which engines look up modules by name.
CONFIG_FILES = re.compile(r"config\.json|.*quant.*\.json", re.IGNORECASE)
REGEX_PREFIXES = ("re:", "+:", "-:")
MAX_PATTERN = 1000

_EXPERT_ID = re.compile(r"(?<![A-Za-z0-9_])experts(?:\\?\.|\[\.\])(?P<id>0|[1-9][0-9]{0,8})(?![0-9])")
_PLAIN = re.compile(r"[\w.\-/]*")
_MAY_NAME_ONE = re.compile(r"experts\W{0,8}[0-9]")


def map_config_files(checkpoint: Checkpoint, model: MoeModel, placement: Placement) -> dict[str, Any]:
    """The config files of `checkpoint` that name experts by id, parsed and with their ids mapped.

    Returns only files that changed, by name. Raises UnsupportedError if we cannot tell which experts a string means.
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
            if key.rpartition(".")[2] == "experts" and _has_ids(item):
                raise UnsupportedError(
                    f"{where}: {key!r:.200} contains numbers that may be expert ids, in a form that reshard does not "
                    "know; write out the full names of the modules"
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

    def _map_pattern(self, text: str) -> str:
        new_names = self._expert_names()
        matched = _matches(text, new_names)
        expected = [{new_names[name] for name in names} for names in matched]
        if matched and matched == expected and (any(matched) or not _MAY_NAME_ONE.search(text)):
            return text
        mapped = self._mapped_or_none(text)
        if mapped is not None and any(matched) and _matches(mapped, new_names) == expected:
            return mapped
        raise self._unclear(text)

    def _mapped_or_none(self, text: str) -> str | None:
        try:
            return self._map_literal_ids(text)
        except UnsupportedError:
            return None

    def _expert_names(self) -> Mapping[str, str]:
        """The new name of every expert, of its modules and of its tensors, by the name in the source."""
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
            f"{self._where}: {text!r:.200}: cannot tell which experts this means after renumbering; write out their ids"
        )


def _matches(pattern: str, names: Iterable[str]) -> list[set[str]]:
    """The `names` that `pattern` matches, for each way in which engines may read it."""
    return [{name for name in names if matches(name)} for matches in matchers(pattern)]


def matchers(text: str) -> list[Callable[[str], bool]]:
    """How engines may read the pattern `text`: as a glob, and as a regular expression if it is a valid one."""
    pattern = text.partition(":")[2] if text.startswith(REGEX_PREFIXES) else text
    found: list[Callable[[str], bool]] = []
    if pattern == text:
        found.append(lambda name: fnmatch.fnmatchcase(name, text))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # e.g. [[, whose meaning a later Python may change
            compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return found
    return [*found, lambda name: bool(compiled.match(name)), lambda name: bool(compiled.search(name))]
