"""Stand-ins for parts of vLLM's MoE layers: of classes that vLLM defines, and of another package's."""

from __future__ import annotations

from types import SimpleNamespace


class vllms_own(SimpleNamespace):  # noqa: N801 - used as a function
    """An object of one of vLLM's own classes."""

    __module__ = "vllm.stand_in"


class another_packages(SimpleNamespace):  # noqa: N801 - used as a function
    """An object of a class that another package put in the place of vLLM's."""

    __module__ = "other.stand_in"
