"""Rewrite a MoE checkpoint so that an engine's linear expert placement becomes zigzag placement, answers unchanged.

    from reshard import zigzag, verify, restore, inspect

    zigzag("DeepSeek-R1", 8, "R1-zz")
    assert not verify("R1-zz", "DeepSeek-R1").problems

The modules, in the order that data flows: `source`, `checkpoint` and `header` (what lies on disk, and where), `moe`
with `families` and `expert_names` (which tensor is which expert's) and `router` (what it chooses), `placement` and
`balance` (permutations: of numbers alone, and made for traffic), `strategies` (which of them is asked for) and
`contract` (what an engine must know of them), `plan` with `layouts`, `extents` and `sharing` (what to write, and what
need not be), `copy` with `reading`, `expert_ids`, `syscalls` and `journal` (writing it), `manifest` (the record). Of
traffic: `trace` (its own form on disk), `recordings` (whoever recorded it), `traffic` (what each layer's tokens chose),
`analysis` (what a placement makes of it), `report` and `page` (in words, and drawn).
`resharding`, `stage`, `restore`, `verify` with `compare`, `inspect`, `export`, `analyze` and `trace_info` are what one
can do; `cli` parses and prints.
"""

from ._version import __version__
from .checkpoint.directory import Checkpoint, read_checkpoint
from .commands.analyze import analyze
from .commands.compare import RouterComparison
from .commands.export import Export, export, write_export
from .commands.inspect import Inspection, inspect
from .commands.page import write_page
from .commands.place import place, plan_placement, write_resharding, zigzag
from .commands.resharding import Resharding
from .commands.restore import restore
from .commands.stage import Staging, plan_stage, stage, write_staging
from .commands.verify import Verification, verify
from .errors import CheckpointError, IntegrityError, OutputError, ReshardError, TraceError, UnsupportedError
from .execute.run import Outcome
from .model.layers import MoeLayer, MoeModel, read_model
from .model.routing import Routing
from .placement.contract import Contract
from .placement.strategies import Balanced, FromFile, Linear, NodeZigzag, Placed, Strategy, Zigzag
from .plan.files import Digests
from .record.manifest import Manifest, read_manifest
from .traffic.analysis import Analysis
from .traffic.effect import Coselection, Effect

__all__ = [
    "Analysis",
    "Balanced",
    "Checkpoint",
    "CheckpointError",
    "Contract",
    "Coselection",
    "Digests",
    "Effect",
    "Export",
    "FromFile",
    "Inspection",
    "IntegrityError",
    "Linear",
    "Manifest",
    "MoeLayer",
    "MoeModel",
    "NodeZigzag",
    "Outcome",
    "OutputError",
    "Placed",
    "ReshardError",
    "Resharding",
    "RouterComparison",
    "Routing",
    "Staging",
    "Strategy",
    "TraceError",
    "UnsupportedError",
    "Verification",
    "Zigzag",
    "__version__",
    "analyze",
    "export",
    "inspect",
    "place",
    "plan_placement",
    "plan_stage",
    "read_checkpoint",
    "read_manifest",
    "read_model",
    "restore",
    "stage",
    "verify",
    "write_export",
    "write_page",
    "write_resharding",
    "write_staging",
    "zigzag",
]
