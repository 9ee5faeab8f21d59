"""What `reshard analyze` finds: each placement's effect on recorded or random traffic. Data only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoint.location import Location
from ..model.memory import CopiesMemory
from .advice import Advice
from .effect import Coselection, Effect
from .step_time import StepTime


@dataclass(frozen=True, slots=True)
class Candidate:
    """One placement's effect: the mean over layers, and each MoE layer's by name."""

    strategy: str
    mean: Effect
    layers: dict[str, Effect]


@dataclass(frozen=True, slots=True)
class Together:
    """Which experts tokens choose together, whatever the placement: the mean over layers, and each layer's by name.

    `ranges` has the first and last expert of each range that is counted. The ranges are the model's groups if
    `are_groups`; otherwise there is one for each EP rank.
    """

    ranges: tuple[tuple[int, int], ...]
    are_groups: bool
    mean: Coselection
    layers: dict[str, Coselection]


@dataclass(frozen=True, slots=True)
class Analysis:
    """What was measured. `traffic` says in words where the choices come from.

    The other candidates are compared with the first. `recorded` is false for random traffic, which cannot tell what a
    placement gains. `unrecorded` names the MoE layers that the trace lacks; they are not measured. `unfit` has each
    strategy that does not fit the model, the ranks or the trace, and why. `steps` has the times of steps on R GPUs of
    the kind `gpu`, whose figures come from `gpu_source`. `serve` has the commands that serve by each candidate.
    `copies` is the memory that copies take, if one of the candidates has some.
    """

    path: Location
    family: str
    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    ep_size: int
    nodes: int
    tokens: int
    traffic: str
    recorded: bool
    unrecorded: tuple[str, ...]
    unfit: dict[str, str]
    batch_sizes: tuple[int, ...]
    gpu: str
    gpu_source: str
    steps: tuple[StepTime, ...]
    advice: Advice
    serve: dict[str, tuple[str, ...]]
    candidates: tuple[Candidate, ...]
    together: Together
    copies: CopiesMemory | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The MoE layers that were measured, in order."""
        return tuple(self.together.layers)

    @property
    def values(self) -> dict[str, Any]:
        """All fields as plain values; `copies` only if there are some."""
        found = asdict(self)
        if self.copies is None:
            del found["copies"]
        return found
