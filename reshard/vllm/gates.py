"""Gives the gates of an output with expert groups their two dimensions again, while a model takes its weights.

In the output's files they have one dimension, as a lock: loaders that know no contract compare shapes and refuse them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..placement.contract import Contract

if TYPE_CHECKING:
    from torch import Tensor


def shape_gates(model: Any, contract: Contract) -> None:
    """Let `load_weights` of `model` take the gates that `contract` calls flattened; others pass as they are."""
    if contract.flattened:
        model.load_weights = _shaping(model.load_weights, contract)


def _shaping(load: Callable[..., Any], contract: Contract) -> Callable[..., Any]:
    num_experts = len(next(iter(contract.physical_to_logical.values())))
    flattened = frozenset(contract.flattened)

    def shaped(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            yield name, tensor.reshape(num_experts, -1) if name in flattened else tensor

    @functools.wraps(load)
    def load_weights(weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        return load(shaped(weights), *args, **kwargs)

    return load_weights
