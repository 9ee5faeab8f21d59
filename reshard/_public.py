"""The names that `from reshard import …` finds, and where each lives."""

from ._version import __version__
from .checkpoint.directory import Checkpoint, read_checkpoint
from .checkpoint.source import Hub
from .commands.analyze import analyze
from .commands.compare import RouterComparison
from .commands.export import Export, export, write_export
from .commands.inspect import Inspection, inspect
from .commands.on_ray import Ray
from .commands.page import write_page
from .commands.place import place, plan_placement, zigzag
from .commands.resharding import Resharding
from .commands.restore import restore
from .commands.stage import Staging, plan_stage, stage, write_staging
from .commands.trace_info import RecordingInfo, TraceInfo, trace_info
from .commands.upload import Upload, Uploaded, plan_upload, send_upload, upload
from .commands.verify import Verification, verify
from .commands.writing import write_resharding
from .errors import CheckpointError, IntegrityError, OutputError, ReshardError, TraceError, UnsupportedError
from .execute.run import Outcome
from .model.layers import MoeLayer, MoeModel, read_model
from .model.routing import Routing
from .placement.contract import Contract
from .placement.strategies import Balanced, Copies, FromFile, Linear, NodeZigzag, Placed, Strategy, Zigzag
from .plan.files import Digests
from .record.manifest import FileSummary, Manifest, read_manifest
from .traffic.analysis import Analysis
from .traffic.effect import Coselection, Effect

__all__ = [
    "Analysis",
    "Balanced",
    "Checkpoint",
    "CheckpointError",
    "Contract",
    "Copies",
    "Coselection",
    "Digests",
    "Effect",
    "Export",
    "FileSummary",
    "FromFile",
    "Hub",
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
    "Ray",
    "RecordingInfo",
    "ReshardError",
    "Resharding",
    "RouterComparison",
    "Routing",
    "Staging",
    "Strategy",
    "TraceError",
    "TraceInfo",
    "UnsupportedError",
    "Upload",
    "Uploaded",
    "Verification",
    "Zigzag",
    "__version__",
    "analyze",
    "export",
    "inspect",
    "place",
    "plan_placement",
    "plan_stage",
    "plan_upload",
    "read_checkpoint",
    "read_manifest",
    "read_model",
    "restore",
    "send_upload",
    "stage",
    "trace_info",
    "upload",
    "verify",
    "write_export",
    "write_page",
    "write_resharding",
    "write_staging",
    "zigzag",
]
