"""lace-engine: controllable image generation from pre-trained GANs, without torch at run time."""

from engine.batch import Status
from engine.bundle import Bundle
from engine.condition import Condition, attr, keep, near
from engine.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    ClosedError,
    ConditionError,
    DeadlineError,
    LaceError,
    QueueFullError,
    RequestError,
    SolveError,
)
from engine.grammar import parse
from engine.requests import Request, Sample
from engine.sampler import Sampler

__version__ = "0.1.0"
__all__ = [
    "BackendError", "Bundle", "BundleError", "CheckpointError", "ClosedError", "Condition", "ConditionError",
    "DeadlineError", "LaceError", "QueueFullError", "Request", "RequestError", "Sample", "Sampler", "SolveError",
    "Status", "attr", "keep", "near", "parse",
]
