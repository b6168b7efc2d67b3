"""Every error that the engine raises on purpose. A bad call is an exception; a bad row is a status."""


class LaceError(Exception):
    """Base class: what happened, what was expected, what to do."""


class BundleError(LaceError):
    """A bundle is missing, damaged, of an unknown version, or cannot be written."""


class CheckpointError(LaceError):
    """A checkpoint is unsafe, damaged or of an unknown kind."""


class ClassifierError(LaceError):
    """An image classifier or its spec is missing, unsafe, or does not fit."""


class ConditionError(LaceError):
    """A condition cannot be parsed, or does not fit the bundle's attributes."""


class RequestError(LaceError, ValueError):
    """A request's latent or label does not fit the bundle's generator."""


class BackendError(LaceError):
    """A runtime or device was asked for that is not there, or it failed."""


class WriteError(LaceError, OSError):
    """A file or folder cannot be written; ``errno`` is the operating system's."""


class SolveError(LaceError):
    """Rows did not reach the end of the flow and the caller asked for strictness."""


class QueueFullError(LaceError):
    """A service's queue had no room for a request."""


class DeadlineError(LaceError, TimeoutError):
    """A request was not finished by its deadline."""


class ClosedError(LaceError):
    """A request was submitted to a service that is closed."""
