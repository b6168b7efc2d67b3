"""Two devices in step: after each kernel of a round their memories must agree, and go on from the same numbers."""

from collections.abc import Iterator

import numpy as np

from engine.batch import Start
from engine.cuda.engine import Engine
from engine.cuda.memory import Region
from engine.cuda.settings import Steps
from engine.cuda.solve import Plan, Tickets
from engine.spaces import Space


def tickets_of(starts: list[Start]) -> Tickets:
    def column(name: str) -> np.ndarray:
        return np.array([getattr(start, name) for start in starts])

    tapes = [start.tape for start in starts]
    return Tickets(column("z"), column("psi"), column("label"), np.array([tape.near for tape in tapes]),
                   column("anchor_z"), column("anchor_w"), tapes)


def admitted(engine: Engine, tickets: Tickets, solver: Steps, *, space: Space | None = None, capacity: int) -> Plan:
    """A plan whose tickets have been sent up, and that has not run yet."""
    reading, places = engine.read(tickets, linear=hasattr(solver, "steps") and not hasattr(solver, "tableau"))
    plan = engine.plan(engine.shape(tickets, reading, capacity, space or engine.bundle.spaces["z"]), solver)
    plan.admit(tickets, reading, places)
    return plan


def arrays(plan: Plan) -> Iterator[tuple[Region, str]]:
    """What kernels write."""
    for region in (plan.evaluation.buffers, plan.rows, plan.control, plan.results):
        for name, (shape, _) in region.fields.items():
            if name not in ("solve", "tableau") and np.prod(shape):
                yield region, name


def follow(found: Plan, wanted: Plan, rounds: int) -> dict[str, float]:
    """The worst difference that each kernel made, in the largest number of the array that it wrote."""
    worst: dict[str, float] = {}
    for _ in range(rounds):
        for a, b in zip(found.round(on_device=False), wanted.round(on_device=False), strict=True):
            found.device.launch(a)
            wanted.device.launch(b)
            worst[a.name] = max(worst.get(a.name, 0.0), compared(found, wanted))
    return worst


def compared(found: Plan, wanted: Plan) -> float:
    worst = 0.0
    for (here, name), (there, _) in zip(arrays(found), arrays(wanted), strict=True):
        a, b = here.read(name), there.read(name)
        if not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            gap = np.abs(a.astype(float) - b.astype(float))
            scale = np.abs(b[np.isfinite(b)].astype(float)).max(initial=0.0)
            # Steps of an integer, and numbers that are finite on one side only, are never rounding.
            worst = max(worst, 1.0 if b.dtype.kind != "f" or np.isnan(gap).any() else float(gap.max() / (scale or 1.0)))
            here.write(name, b)
    return worst
