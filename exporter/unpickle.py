"""A restricted unpickler: reads checkpoints without running anything that they contain.

``loads`` is a small stack machine of our own, not a subclass of ``pickle.Unpickler``: every opcode that it knows
is written here, names resolve in the table of ``exporter.vocabulary`` and nowhere else, and only plain containers and
the records of ``exporter.passive`` can be filled. A name outside the table becomes an inert ``Foreign`` record, so
that a generator can be read from a file whose discriminator is somebody else's. The source code that NVIDIA's files
carry is never looked at. One ``Budget`` bounds the work and the memory of a whole file. Needs numpy only.
"""

import io
import pickletools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.errors import CheckpointError
from exporter.passive import (
    PRIMITIVES,
    Budget,
    Foreign,
    Global,
    Module,
    Namespace,
    Network,
    PendingArray,
    PendingDtype,
    Storage,
    is_a,
    is_count,
    need,
    shown,
)
from exporter.vocabulary import TABLE, build_array, build_dtype, items_of_set, itemsize, plain_dict

__all__ = ["Foreign", "Module", "Namespace", "Network", "Storage", "is_legacy_torch", "loads", "loads_legacy_torch"]

MAX_OPCODES = 5_000_000
MAX_DEPTH = 200
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")  # behind PROTO 2
STORAGE_TABLE = {key: value for key, value in TABLE.items() if value.storage}
ADVICE = "nothing was executed. Get the file from its authors again"

Persistent = Callable[[Any], Any]


class Machine:
    """The stack, the memo and the budget of one pickle. ``open_world``: names outside the table become records."""

    def __init__(self, table: Mapping[tuple[str, str], Global], persistent: Persistent | None, budget: Budget, *,
                 open_world: bool = False):
        self.table, self.persistent, self.budget, self.open_world = table, persistent, budget, open_world
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def gather(self, kind: Callable[[list[Any]], Any]) -> None:
        # In two steps: pop_mark replaces the stack that the result belongs on.
        items = self.pop_mark()
        self.stack.append(kind(items))

    def mark(self) -> None:
        need(len(self.marks) < MAX_DEPTH, "too deeply nested")
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def take(self, n: int) -> tuple[Any, ...]:
        need(len(self.stack) >= n, "too little on the stack")
        items = tuple(self.stack[-n:])
        del self.stack[-n:]
        return items

    def look_up(self, module: Any, name: Any) -> None:
        need(is_a(module, str) and is_a(name, str), "a name that is not text")
        found = self.table.get((module, name))
        if found is None and self.open_world:
            found = self.budget.look_up(module, name)
        if found is None:
            raise CheckpointError(
                f"the checkpoint refers to {shown(f'{module}.{name}', 120)}, which is not on the list of things that a "
                f"checkpoint may hold; {ADVICE}"
            )
        self.stack.append(found)

    def reduce(self) -> None:
        target, args = self.take(2)
        need(is_a(args, tuple), "a call without a tuple")
        if is_a(target, Foreign):  # what a foreign call gave is called: still nothing but a name
            self.stack.append(Foreign(target.name))
            return
        need(is_a(target, Global), "a call of something that is not a name")
        make = target.make
        if make is None:
            raise CheckpointError(f"the checkpoint calls {shown(target.name, 60)}; {ADVICE}")
        self.stack.append(make(self.budget, args))

    def reduce_with_keywords(self) -> None:
        target, args, keywords = self.take(3)
        need(is_a(keywords, dict), "a call with keywords that are no dict")
        need(not keywords or (is_a(target, Global) and target.foreign), "a call with keywords")
        self.stack += [target, args]
        self.reduce()

    def build(self) -> None:
        """Fill the top of the stack. Only records of ``passive`` have a state; attributes are never set."""
        target: Any
        target, state = self.take(2)
        result: Any = target
        if is_a(target, Network, Namespace):
            need(is_a(state, dict), "a state that is not a dict")
            self.budget.spend(len(state))
            need(all(is_a(k, str) for k in state), "a state with names that are not text")
            target.state = state
        elif is_a(target, Foreign):
            target.state = state
        elif is_a(target, dict):
            pass  # the attributes of an OrderedDict: torch leaves `_metadata` there, of no use here
        elif is_a(target, PendingArray):
            result = build_array(self.budget, state)
        elif is_a(target, PendingDtype):
            result = build_dtype(target, state)
        else:
            raise CheckpointError(f"the checkpoint gives a state to a {type(target).__name__}; {ADVICE}")
        if is_a(target, PendingArray, PendingDtype):
            # numpy memoises the shell before it is filled. Emptied, so that a second BUILD costs nothing.
            self.memo.update(dict.fromkeys(target.memo_keys, result))
            target.memo_keys = []
        self.stack.append(result)

    def persist(self, identity: Any) -> None:
        if self.persistent is None:
            raise CheckpointError(f"the checkpoint refers to data outside of itself (a persistent id); {ADVICE}")
        self.stack.append(self.persistent(identity))

    def memoise(self, index: int) -> None:
        need(self.stack and is_count(index), "an empty stack has nothing to remember")
        # Every pickler counts upwards. Numbers of the file's own choice could be made to collide.
        need(index <= 2 * len(self.memo) + 1024, "a memo that is not numbered in order")
        value = self.memo[index] = self.stack[-1]
        if is_a(value, PendingArray, PendingDtype):
            value.memo_keys.append(index)

    def recall(self, index: int) -> None:
        need(is_count(index) and index in self.memo, "a reference to something that was never stored")
        self.stack.append(self.memo[index])

    def fill(self, kind: type, change: Callable[[Any], object]) -> None:
        """Change the container on the top of the stack; a foreign one stays as it is."""
        need(self.stack and is_a(self.stack[-1], kind, Foreign), f"a {kind.__name__} was expected on the stack")
        if not is_a(self.stack[-1], Foreign):
            change(self.stack[-1])

    def append(self, items: Sequence[Any]) -> None:
        self.fill(list, lambda target: target.extend(items))

    def set_items(self, items: Sequence[Any]) -> None:
        need(len(items) % 2 == 0, "an odd number of keys and values")
        pairs = zip(items[::2], items[1::2], strict=True)
        self.fill(dict, lambda target: target.update(plain_dict(self.budget, pairs)))

    def add_items(self, items: Sequence[Any]) -> None:
        self.fill(set, lambda target: target.update(items_of_set(self.budget, items)))

    def new_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def global_line(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self.look_up(module, name)


def _push(machine: Machine, arg: Any) -> None:
    machine.stack.append(arg)


def _text(machine: Machine, arg: Any) -> None:
    machine.stack.append(arg if is_a(arg, str) else arg.decode("latin-1"))


LITERALS = [
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
]
OPCODES: dict[str, Callable[[Machine, Any], object]] = {
    **dict.fromkeys(LITERALS, _push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _text),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Machine.memoise),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine.recall),
    "PROTO": lambda m, a: need(0 <= a <= 5, f"pickle protocol {a}"),
    "FRAME": lambda m, a: None,
    "MARK": lambda m, a: m.mark(),
    "POP": lambda m, a: m.pop(),
    "POP_MARK": lambda m, a: m.pop_mark(),
    "DUP": lambda m, a: m.stack.append(m.stack[-1]),
    "NONE": lambda m, a: m.stack.append(None),
    "NEWTRUE": lambda m, a: m.stack.append(True),
    "NEWFALSE": lambda m, a: m.stack.append(False),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "EMPTY_SET": lambda m, a: m.stack.append(set()),
    "LIST": lambda m, a: m.gather(list),
    "TUPLE": lambda m, a: m.gather(tuple),
    "DICT": lambda m, a: m.new_dict(),
    "FROZENSET": lambda m, a: m.gather(lambda items: frozenset(items_of_set(m.budget, items))),
    "TUPLE1": lambda m, a: m.stack.append(m.take(1)),
    "TUPLE2": lambda m, a: m.stack.append(m.take(2)),
    "TUPLE3": lambda m, a: m.stack.append(m.take(3)),
    "APPEND": lambda m, a: m.append(m.take(1)),
    "APPENDS": lambda m, a: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, a: m.add_items(m.pop_mark()),
    "SETITEM": lambda m, a: m.set_items(m.take(2)),
    "SETITEMS": lambda m, a: m.set_items(m.pop_mark()),
    "MEMOIZE": lambda m, a: m.memoise(len(m.memo)),
    "GLOBAL": Machine.global_line,
    "STACK_GLOBAL": lambda m, a: m.look_up(*m.take(2)),
    "REDUCE": lambda m, a: m.reduce(),
    "NEWOBJ": lambda m, a: m.reduce(),
    "NEWOBJ_EX": lambda m, a: m.reduce_with_keywords(),
    "BUILD": lambda m, a: m.build(),
    "PERSID": Machine.persist,
    "BINPERSID": lambda m, a: m.persist(m.take(1)[0]),
}


def run(file: io.BytesIO, machine: Machine) -> Any:
    """One pickle, up to and including its STOP."""
    for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
        need(count < MAX_OPCODES, "an endless pickle")
        machine.budget.spend()
        if opcode.name == "STOP":
            break
        act = OPCODES.get(opcode.name)
        if act is None:
            raise CheckpointError(f"it holds the pickle opcode {opcode.name}, which no checkpoint needs; {ADVICE}")
        act(machine, arg)
    need(len(machine.stack) == 1 and not machine.marks, "an unbalanced pickle")
    check_depth(machine.stack[0])
    return machine.stack[0]


def children(value: Any) -> list[Any]:
    if is_a(value, dict):
        return list(value.values())
    if is_a(value, list, tuple):
        return list(value)
    return [value.state] if is_a(value, Module, Network, Namespace, Foreign) else []


def check_depth(root: Any) -> None:
    """Breadth first and without recursion, so that everything behind may recurse safely over trees."""
    level, seen = [root], set()
    for _ in range(MAX_DEPTH):
        # `level` keeps every object alive, hence ids are unique.
        level = [child for value in level for child in children(value) if not isinstance(child, PRIMITIVES)]
        level = [child for child in level if id(child) not in seen and not seen.add(id(child))]
        if not level:
            return
    raise CheckpointError("the checkpoint is too deeply nested; it was refused")


def guarded(what: str, action: Callable[[], Any]) -> Any:
    """Whatever a damaged or hostile stream provokes becomes one kind of error."""
    try:
        return action()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{what} is damaged or truncated ({type(error).__name__}: {str(error)[:100]}); download it again"
        ) from error


def loads(data: bytes, *, persistent: Persistent | None = None, budget: Budget | None = None) -> Any:
    """The content of one pickle. ``persistent`` turns persistent ids into values; without it they are refused."""
    machine = Machine(FULL_TABLE, persistent, budget or Budget.of_file(len(data)), open_world=True)
    return guarded("the pickle", lambda: run(io.BytesIO(data), machine))


def storage_identity(identity: Any) -> tuple[str, str, int]:
    """(numpy type, key, number of elements) of torch's ('storage', type, key, device, numel[, view])."""
    need(is_a(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage", "an unknown persistent id")
    kind, key, numel = identity[1], identity[2], identity[4]
    dtype = kind.storage if is_a(kind, Global) else None
    need(dtype, "a storage of an unknown type")
    need(is_a(key, str) and is_count(numel), "a storage without a key or a size")
    need(len(identity) == 5 or identity[5] is None, "a view of a storage, as only very old torch wrote it")
    return dtype, key, numel  # type: ignore[return-value]


def is_foreign_storage(identity: Any) -> bool:
    """Whether a storage is of a type that numpy does not have: quantised, complex, or one of no type."""
    return is_a(identity, tuple) and len(identity) in (5, 6) and is_a(identity[1], Global) and identity[1].foreign


def is_legacy_torch(data: bytes) -> bool:
    return data[:1] == b"\x80" and data[2:14] == LEGACY_START


def loads_legacy_torch(data: bytes, *, budget: Budget | None = None) -> Any:
    """What torch.save wrote before 1.6: five pickles (magic, version, system, content, keys), then the storages."""
    budget = budget or Budget.of_file(len(data))
    return guarded("the torch file", lambda: _legacy(data, FULL_TABLE, budget))


def load_from_bytes(budget: Budget, args: tuple) -> Storage:
    """One storage in the same legacy format, nested in a pickle. Its names can only be storage types."""
    need(len(args) == 1 and is_a(args[0], bytes, bytearray), "a storage without bytes")
    budget.spend(len(args[0]))
    storage = _legacy(bytes(args[0]), STORAGE_TABLE, budget)
    need(is_a(storage, Storage), "a nested stream that is not a storage")
    return storage


def _legacy(data: bytes, table: Mapping[tuple[str, str], Global], budget: Budget) -> Any:
    file = io.BytesIO(data)

    def header() -> Any:
        return run(file, Machine({}, None, budget))

    need(header() == LEGACY_MAGIC, "a torch stream with a wrong magic number")
    need(header() == 1001, "a torch stream of an unknown version")
    system = header()
    need(is_a(system, dict) and system.get("little_endian") is True, "a torch stream of a big-endian machine")
    # The content comes before the data that it refers to: read it once for the sizes, and again with the data.
    start, sizes = file.tell(), {}

    def note(identity: Any) -> Storage:
        dtype, key, numel = storage_identity(identity)
        need(sizes.setdefault(key, (dtype, numel)) == (dtype, numel), "two sizes of one storage")
        return Storage(dtype, numel, None)

    is_open = table is FULL_TABLE
    run(file, Machine(table, note, budget, open_world=is_open))
    storages = _read_storages(file, data, header(), sizes)
    file.seek(start)
    machine = Machine(table, lambda identity: storages[storage_identity(identity)[1]], budget, open_world=is_open)
    return run(file, machine)


def _read_storages(file: io.BytesIO, data: bytes, keys: Any, sizes: dict[str, tuple[str, int]]) -> dict[str, Storage]:
    need(is_a(keys, list) and len(keys) == len(sizes) and all(is_a(k, str) for k in keys), "a list of storages")
    need(set(keys) == set(sizes), "storages that are listed but not used, or the reverse")
    position, storages = file.tell(), {}
    for key in keys:
        dtype, numel = sizes[key]
        (stored,) = struct.unpack_from("<q", data, position)
        need(stored == numel, "a storage of another size than announced")
        end = position + 8 + numel * itemsize(dtype)
        need(end <= len(data), "the file ends within a storage (truncated download?)")
        storages[key] = Storage(dtype, numel, memoryview(data)[position + 8 : end])
        position = end
    return storages


FULL_TABLE = {
    **TABLE,
    ("torch.storage", "_load_from_bytes"): Global("torch.storage._load_from_bytes", load_from_bytes),
}
