"""Whether an output shares disk blocks with its source (reflinks, on XFS and Btrfs). Only data; `execute` finds out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Reflink = Literal["auto", "always", "never"]
REFLINK: tuple[Reflink, ...] = get_args(Reflink)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Whether blocks are shared: `block_size` is their size in bytes, or None if not, and then `why_not` says why.

    If sharing is `required`, a run that cannot share what the plan says ends in an error; otherwise it copies.
    """

    block_size: int | None
    why_not: str = ""
    required: bool = False


NOTHING_SHARED = Sharing(None, "not asked for")
