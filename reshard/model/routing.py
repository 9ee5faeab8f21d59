"""Reads from config.json how a model's router chooses experts."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from ..placement.contract import GROUP_KEYS
from .families import (
    NORMALIZE_KEYS,
    NUM_EXPERTS_KEYS,
    ROUTING_KEYS,
    SCALING_KEYS,
    SCORING_KEYS,
    SCORINGS,
    TEXT_CONFIG_KEYS,
    TOP_K_KEYS,
    TOPK_METHODS,
    Family,
)

_LIMITS_GROUPS = re.compile(
    r"(expert|limited|top_?k|moe|rout).*group|group.*(expert|limited|top_?k|moe|rout)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router chooses `top_k` of E experts for a token."""

    num_experts: int
    top_k: int
    scoring: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int

    @property
    def group_limited(self) -> bool:
        """Whether a token may use only its `topk_group` best groups, each of E / n_group consecutive experts."""
        return self.n_group > 1 and self.topk_group < self.n_group


def why_plugin(routing: Routing) -> str:
    """A sentence that says whether an output of a model that routes like this needs the plugin, and why."""
    if routing.group_limited:
        return (
            f"needed: each token's experts come from {routing.topk_group} of {routing.n_group} groups of "
            f"{routing.num_experts // routing.n_group} consecutive experts, and only the plugin knows the groups "
            "after renumbering"
        )
    return "not needed: the router treats every expert alike, so any engine serves the output as it is"


def config_sections(config: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """`config` itself and the language model's configs inside, each with the keys that lead to it."""
    yield name, config
    for key in TEXT_CONFIG_KEYS:
        if isinstance(config.get(key), dict):
            yield from config_sections(config[key], f"{name}.{key}".removeprefix("."))


def routing_section(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The routing keys of `config`, from its top level and from the language model's config inside.

    Raises CheckpointError if two places disagree, since engines differ in which they read, and UnsupportedError if an
    unknown key may limit which groups of experts a token can reach.
    """
    found: dict[str, Any] = {}
    for _, section in config_sections(config):
        for key in ROUTING_KEYS:
            if section.get(key) is None or (key in GROUP_KEYS and section[key] is False):
                continue
            if found.setdefault(key, section[key]) != section[key]:
                raise CheckpointError(
                    f"{where}: {key} is {found[key]!r:.80} in one place and {section[key]!r:.80} in another"
                )
        for key, value in section.items():
            if _LIMITS_GROUPS.search(key) and key not in GROUP_KEYS and value not in (None, False, 0, 1):
                raise UnsupportedError(
                    f"{where}: {key} = {value!r:.80} may limit which experts a token can reach, in a way that "
                    f"reshard does not know; it knows {' and '.join(GROUP_KEYS)}"
                )
    return found


def read_routing(whole_config: Mapping[str, Any], family: Family, where: str) -> Routing:
    """The routing that a config.json describes; `where` names the file in errors."""
    config = routing_section(whole_config, where)
    limited = config.get("topk_method") == "group_limited_greedy"
    num_experts = _count(config, NUM_EXPERTS_KEYS, where, lists=family.lists)
    top_k = _count(config, TOP_K_KEYS, where, lists=family.lists)
    n_group = _count(config, ("n_group",), where, default=None if family.assumes_groups or limited else 1)
    topk_group = _count(config, ("topk_group",), where, default=n_group if n_group == 1 else None)
    if top_k > num_experts:
        raise CheckpointError(f"{where}: a token chooses {top_k} experts, but a layer has {num_experts}")
    if num_experts % n_group:
        raise CheckpointError(
            f"{where}: n_group = {n_group} does not divide the {num_experts} experts into equal groups"
        )
    if n_group > 1 and family.groups_differ:
        raise UnsupportedError(f"{where}: n_group = {n_group}: {family.groups_differ}; known without groups only")
    if topk_group > n_group:
        raise CheckpointError(f"{where}: topk_group = {topk_group} is more than n_group = {n_group}")
    if top_k > topk_group * (num_experts // n_group):
        raise CheckpointError(
            f"{where}: a token chooses {top_k} experts, but topk_group = {topk_group} groups "
            f"of {num_experts // n_group} hold fewer"
        )
    return Routing(
        num_experts=num_experts,
        top_k=top_k,
        scoring=_scoring(config, family, where),
        norm_topk_prob=bool(_one(config, NORMALIZE_KEYS, where, family.normalizes)),
        routed_scaling_factor=_scaling_factor(config, where),
        n_group=n_group,
        topk_group=topk_group,
    )


def _scoring(config: Mapping[str, Any], family: Family, where: str) -> str:
    names = dict(zip(SCORINGS, SCORINGS, strict=True)) | dict(family.score_names or {})
    for keys, known in ((SCORING_KEYS, tuple(names)), (("topk_method",), TOPK_METHODS)):
        for key in keys:
            if config.get(key) is not None and config[key] not in known:
                raise UnsupportedError(
                    f"{where}: reshard does not know {key} = {config[key]!r:.80} as a way to choose experts; it knows "
                    f"{', '.join(known)}"
                )
    name = _one(config, SCORING_KEYS, where, None)
    return family.scoring if name is None else names[name]


def _scaling_factor(config: Mapping[str, Any], where: str) -> float:
    value = _one(config, SCALING_KEYS, where, 1.0)
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(f"{where}: {' or '.join(SCALING_KEYS)} must be a number, found {str(value)[:80]!r}")
    return float(value)


def _one(config: Mapping[str, Any], keys: Sequence[str], where: str, default: Any) -> Any:
    """The value that `config` has under any of `keys`. Raises CheckpointError if two of them disagree."""
    found = {key: config[key] for key in keys if config.get(key) is not None}
    if any(value != other for value in found.values() for other in found.values()):
        raise CheckpointError(f"{where}: " + " but ".join(f"{key} = {value!r:.80}" for key, value in found.items()))
    return next(iter(found.values()), default)


def _count(
    config: Mapping[str, Any], keys: Sequence[str], where: str, default: int | None = None, *, lists: bool = False
) -> int:
    """A whole number of at least 1; with `lists` also a list of numbers, one for each layer, that are all the same."""
    value = _one(config, keys, where, default)
    if value is None:
        raise CheckpointError(f"{where}: expected a value for {' or '.join(keys)}, found none")
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    if lists and isinstance(value, list) and value:
        if any(item != value[0] for item in value):
            raise UnsupportedError(
                f"{where}: {key} differs by layer, found {value!r:.80}; all MoE layers must have the same number"
            )
        value = value[0]
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}: {key} must be a whole number of at least 1, found {value!r:.80}")
    return value
