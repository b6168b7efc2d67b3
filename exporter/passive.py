"""What reading a checkpoint gives besides numbers, text and plain containers: passive records; and what it may cost."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar

from engine.errors import CheckpointError

T = TypeVar("T")
PRIMITIVES = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, slots=True)
class Global:
    """A name as it lies on the unpickler's stack.

    make      what a call of it gives; None where calls are refused
    storage   the numpy type, for the storages of torch
    foreign   whether it is outside the table
    """

    name: str
    make: Callable[["Budget", tuple[Any, ...]], Any] | None = None
    storage: str | None = None
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Module:
    """A pickled torch module of NVIDIA's persistence scheme: its class name and its ``__dict__``."""

    class_name: str
    state: dict


@dataclass(slots=True)
class Network:
    """A pickled network of NVIDIA's TensorFlow code; ``state`` has static_kwargs, components and variables."""

    state: dict = field(default_factory=dict)


@dataclass(slots=True)
class Namespace:
    """An argparse.Namespace."""

    state: dict = field(default_factory=dict)


@dataclass(slots=True)
class Foreign:
    """An object of a class outside the table, or the result of calling such a name: ``name`` says which.

    ``state`` is what the file would have set on it. Converters may look for tensors there; nothing is ever called.
    """

    name: str
    state: Any = None


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory behind torch tensors. ``data`` is None while only the structure of a file is read."""

    dtype: str
    numel: int
    data: bytes | memoryview | None


@dataclass(slots=True)
class PendingArray:
    """A numpy array between REDUCE and BUILD; the unpickler notes where it was memoised."""

    memo_keys: list[int] = field(default_factory=list)


@dataclass(slots=True)
class PendingDtype:
    """A numpy dtype between REDUCE and BUILD."""

    code: str
    memo_keys: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Budget:
    """What the reading of one file may still cost: a short file must neither fill the memory nor take long.

    memory     bytes that handlers may allocate
    work       steps: opcodes, items that are copied, bytes of streams within the stream
    far_keys   keys of dicts and sets whose hashes somebody may have chosen to collide (see ``is_near``)
    foreign    the names outside the table that the file refers to
    """

    memory: int
    work: int
    far_keys: int = 10_000
    foreign: dict[tuple[str, str], Global] = field(default_factory=dict)

    @classmethod
    def of_file(cls, size: int) -> "Budget":
        """For a file of ``size`` bytes. Generators of 1 MB take up to 1.4 bytes of memory and 1.0 steps a byte."""
        return cls(memory=4 * size + 2**26, work=2 * size + 2**18)

    def charge(self, n: int) -> None:
        self.memory -= n
        if self.memory < 0:
            raise CheckpointError("the checkpoint unpacks to far more data than the file holds; it was refused")

    def spend(self, n: int = 1) -> None:
        self.work -= n
        if self.work < 0:
            raise CheckpointError("the checkpoint takes far more work to read than its size allows; it was refused")

    def admit(self, keys: Iterable[Any]) -> None:
        """Count the keys that may be hashed; long numbers are refused, because Python hashes them again each time."""
        for key in keys:
            if is_a(key, int):
                need(key.bit_length() <= 64, "a key that is a number of too many digits")
            if is_a(key, int, float) and not is_near(key):
                self.far_keys -= 1
        need(self.far_keys >= 0, "more large numbers as keys than any checkpoint has")

    def look_up(self, module: str, name: str) -> Global:
        """The stand-in for a name outside the table."""
        return self.foreign.setdefault((module, name), foreign(f"{module[:200]}.{name[:200]}"))


def is_near(key: float) -> bool:
    """Whole numbers below 2^20 are their own hashes: they cannot be made to collide in great numbers."""
    return is_a(key, int) and -(2**20) < key < 2**20


def foreign(name: str) -> Global:
    return Global(name, lambda budget, args: Foreign(name), foreign=True)


def need(condition: object, what: str) -> None:
    if not condition:
        raise CheckpointError(f"the checkpoint is damaged or was tampered with: {what}; nothing was executed")


def shown(value: Any, width: int = 40) -> str:
    """A value of a file as an error names it. Formats no more than it shows: a container may be anything inside."""
    if is_a(value, str, bytes):
        return repr(value[:width]) + ("..." if len(value) > width else "")
    if is_a(value, bool, float, type(None)) or (is_a(value, int) and value.bit_length() <= 64):
        return repr(value)
    return f"a {value.name[:width]}" if is_a(value, Foreign) else f"a {type(value).__name__}"


def is_a(value: Any, *kinds: type[T]) -> TypeGuard[T]:
    """Exactly one of these types, no subclass."""
    return type(value) in kinds


def is_count(value: Any) -> bool:
    return is_a(value, int) and 0 <= value < 2**48
