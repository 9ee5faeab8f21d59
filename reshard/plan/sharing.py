"""Whether an output shares disk blocks with its source (reflinks on XFS and Btrfs). Data only: `execute` finds out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Reflink = Literal["auto", "always", "never"]
REFLINK: tuple[Reflink, ...] = get_args(Reflink)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Whether blocks are shared: in units of `block_size` bytes, or not at all, and then `why_not` says why.

    If sharing is `required`, a run that cannot share what its plan says ends in an error; otherwise it copies.
    """

    block_size: int | None
    why_not: str = ""
    required: bool = False


NOTHING_SHARED = Sharing(None, "not asked for")
