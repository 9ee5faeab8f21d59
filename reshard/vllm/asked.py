"""What the user asks for: a placement, by a variable or in vLLM's additional_config.

A request that is misspelt is an error: nothing else would notice it, and the model would be served linear.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import UnsupportedError
from .served import KEY, ServedPlacement

VARIABLE = "RESHARD_PLACEMENT"
MISTAKES = 2  # letters that are too many or absent; a wrong one counts as both


def asked_for(environment: Mapping[str, str], more: Any) -> str | None:
    """The placement that the user requests, None if there is none; UnsupportedError for a malformed request.

    `more` is vLLM's additional_config.
    """
    variable = environment.get(VARIABLE) or None
    keys = more if isinstance(more, Mapping) else {}
    if wrong := _misspelt(keys.keys() - {KEY}, KEY, VARIABLE):
        raise UnsupportedError(
            f"additional_config has {wrong!r:.80}, which nothing reads; was {KEY!r} meant? Correct or remove it"
        )
    if not variable and (wrong := _misspelt(environment.keys() - {VARIABLE}, VARIABLE)):
        raise UnsupportedError(f"{wrong} is set, which nothing reads; was {VARIABLE} meant? Correct or unset it")
    request = keys.get(KEY)
    if KEY not in keys:
        if variable and more is not None and not isinstance(more, Mapping):
            raise UnsupportedError(
                f"{VARIABLE}={variable}: additional_config is a {type(more).__name__}; expected a dictionary, which "
                "carries the placement to every process"
            )
        return variable
    asked = request.get("placement", variable) if isinstance(request, Mapping) else None
    if not isinstance(request, Mapping) or not isinstance(asked, str) or not asked:
        raise UnsupportedError(
            f'additional_config.{KEY} is {request!r:.80}; expected {{"placement": "zigzag"}}, or node-zigzag:M, or a '
            "placement file"
        )
    if unknown := sorted(set(map(str, request)) - {"placement", "rearrange"}):
        raise UnsupportedError(
            f"additional_config.{KEY}: unknown key {unknown[0]!r:.80}; expected placement, and rearrange if you like"
        )
    if variable and variable != asked:
        raise UnsupportedError(
            f"{VARIABLE} is {variable}, but additional_config.{KEY}.placement is {asked}: give only one, or the same "
            "for both"
        )
    return asked


def asked_to_rearrange(more: Any) -> bool | None:
    """Whether the user wants vLLM's EPLB to move experts; None if they did not say. `more`: as for `asked_for`."""
    request = more.get(KEY) if isinstance(more, Mapping) else None
    found = request.get("rearrange") if isinstance(request, Mapping) else None
    if found is not None and not isinstance(found, bool):
        raise UnsupportedError(f"additional_config.{KEY}.rearrange is {found!r:.80}; expected true or false")
    return found


def refuse_another(resolved: ServedPlacement, environment: Mapping[str, str]) -> None:
    """UnsupportedError if the environment asks for another placement than a configuration carries already."""
    variable = environment.get(VARIABLE)
    if variable and variable != resolved.asked:
        raise UnsupportedError(
            f"{VARIABLE} is {variable}, but the configuration carries {resolved.asked}, resolved for an earlier one or "
            "by another process: give all the same, or make additional_config anew"
        )


def _misspelt(names: Iterable[object], *meant: str) -> str | None:
    """The first of `names` that is one of `meant` but for few mistakes, capitals and signs; None if there is none."""
    return next((str(name) for name in names if any(_is_near(str(name), one) for one in meant)), None)


def _is_near(name: str, meant: str) -> bool:
    one, other = (re.sub(r"[^a-z]", "", text.casefold()) for text in (name, meant))
    if abs(len(one) - len(other)) > MISTAKES:
        return False
    blocks = difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    return len(one) + len(other) - 2 * sum(block.size for block in blocks) <= MISTAKES
