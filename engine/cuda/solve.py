"""A whole solve on the device: tickets go up, one graph runs all rows to their end, results come down.

A plan is the memory, the graph and the structs for one shape of work. The graph is a loop on the device whose condition
the last kernel of a round sets, or, for few fixed steps, the rounds one after the other. Tickets beyond the capacity
wait on the device for a row to become free.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray as Array

from engine.constants import Phase, Queue
from engine.cuda import settings
from engine.cuda.dlpack import DeviceArray
from engine.cuda.driver import Graph, Launch, Pinned
from engine.cuda.evaluation import DOUBLE, INT, REAL, Evaluation, Kernels
from engine.cuda.memory import Region
from engine.cuda.network import Network
from engine.cuda.settings import Steps
from engine.cuda.tables import Reading, Shape, put
from engine.errors import BackendError
from engine.layout import DTYPES
from engine.solvers import compiled
from engine.solvers.compiled import packed
from engine.tape import Tape, by_tape

log = logging.getLogger(__name__)
RESULTS = ("result_z", "result_w", "result_logits", "result_logp", "result_status", "result_counters")
# Rounds between looks at the device in the loop on the host: a look costs as much as a round of a few rows.
LOOK = 4


@dataclass(frozen=True, slots=True, eq=False)
class Tickets:
    """n rows that want to be solved: z, anchor_z (n, width), psi, label, near (n,), anchor_w (n, w_dim), n tapes.

    device_z   (n, width) on the device, in the place of z
    """

    z: Array
    psi: Array
    label: Array
    near: Array
    anchor_z: Array
    anchor_w: Array
    tapes: Sequence[Tape]
    device_z: DeviceArray | None = None

    def __len__(self) -> int:
        return len(self.tapes)


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """What became of n tickets: z (n, width), w (n, w_dim), logits (n, all heads'), logp (n,) float64, status (n,),
    counters (n, 4): steps, evaluations, rejected, forced; and the rounds that the batch took."""

    z: Array
    w: Array
    logits: Array
    logp: Array
    status: Array
    counters: Array
    rounds: int


def plan_size(columns: int) -> int:
    """PLAN of kernels/layout.cuh."""
    return columns * (3 * columns + 5) + 6


def scratch_size(columns: int, nodes: int) -> int:
    """SCRATCH of kernels/layout.cuh."""
    return columns * (3 * columns + 5) + 8 * nodes + 2


class Plan:
    """``run`` solves tickets whose needs ``shape`` covers.

    loops   False: the loop is on the host, which launches every kernel and looks every few rounds
    """

    def __init__(self, network: Network, kernels: Kernels, shape: Shape, solver: Steps, *, loops: bool = True):
        self.network, self.kernels, self.shape, self.solver = network, kernels, shape, solver
        self.device, self.loops = network.device, loops
        self.evaluation = Evaluation(network, kernels, shape)
        self.table = compiled.tableau(solver)
        self.rows = Region(self.device, self.row_fields())
        self.control = Region(self.device, {
            "solve": ((1,), DTYPES["Solve"]), "queue": ((len(Queue),), INT), "tableau": (self.table.shape, DOUBLE),
            "counters": ((shape.capacity, 4), INT),
            **{name: ((shape.capacity,), INT) for name in ("phase", "ticket", "status", "stage")},
            **{name: ((shape.capacity,), DOUBLE) for name in ("clock", "step", "taken", "passes", "error", "reach")},
        }, mirrored=True)
        self.control.host["error"][:], self.control.host["reach"][:] = 1, np.inf
        self.control.host["tableau"][:] = self.table
        self.solve = self.control.host["solve"][0]
        self.memory = Pinned(self.device, len(Queue) * INT.itemsize)
        self.progress = self.memory.bytes.view(INT)  # what comes back of ``queue``
        self.room: tuple[int, ...] = ()
        self.heads: tuple = ()
        self.graph: Graph | None = None
        put(self.solve, **self.constants())

    def row_fields(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        c, r, width = self.shape.capacity, self.shape.columns, self.evaluation.width
        return {
            "logp": ((c,), DOUBLE), "z": ((c, width), REAL), "w": ((c, self.network.bundle.generator.w_dim), REAL),
            "logits": ((c, self.network.outputs), REAL), "gradient": ((c, width), REAL), "rest": ((c, width), REAL),
            "trial_rest": ((c, width), REAL), "jacobian": ((c, r, width), REAL), "plan": ((c, plan_size(r)), DOUBLE),
            "slopes": ((c, self.table.shape[1], width), REAL),
        }

    def constants(self) -> dict[str, Any]:
        """Fields of Solve that do not change from one set of tickets to the next."""
        e, g, network = self.evaluation, self.network.bundle.generator, self.network
        mapped = {"hidden": e.buffers[f"mapped.{len(e.mapping) - 1}"]} if e.mapping else {}
        on_z = not self.shape.space.is_mapped or any(stack.space == "z" for stack in network.heads.values())
        used = ["trial", "moment", "trial_logits", "trial_logp", "weights", "curvature", "unit", "trial_jacobian",
                  "velocity", "psi", *(["state"] if on_z else []),
                  *(["input", "trial_w", "truncated", "cotangent", "pulled"] if self.shape.space.is_mapped else [])]
        return {
            **compiled.numbers(self.solver), "capacity": self.shape.capacity, "width": e.width, "w_dim": g.w_dim,
            "input_stride": e.input_stride, "state_stride": e.state_stride, "w_stride": e.w_stride,
            "outputs": network.outputs, "embedded": network.embedded, "in_w": not self.shape.space.is_mapped,
            "layers": len(e.mapping), "normalised": g.normalise, "average": network.region["average"],
            "head": e.tables.region["heads"], "column": e.tables.region["columns"],
            "embedding": network.region["embedding"] if network.embedded else 0, **mapped,
            **{name: self.control[name] for name in self.control.host if name != "solve"},
            **{name: self.rows[name] for name in self.row_fields()}, **{name: e.buffers[name] for name in used},
        }

    # --- tickets -------------------------------------------------------------------------------------------------

    def admit(self, tickets: Tickets, reading: Reading, places: dict[Any, int]) -> None:
        """Fill the tables and the queue, and send them up."""
        heads = tuple((name, seeds.tobytes()) for name, seeds in reading.heads.items()), reading.slots
        if heads != self.heads:
            self.evaluation.tables.connect(reading)
            self.heads = heads
        n, tapes = len(tickets), tickets.tapes
        self.make_room(n, max(len(t.program) for t in tapes), max(len(t.parameters) for t in tapes))
        host = self.tickets.host
        has_near = bool(np.any(tickets.near > 0))
        if tickets.device_z is None:
            host["start"][:n] = tickets.z
        host["start_psi"][:n], host["label"][:n], host["near"][:n] = tickets.psi, tickets.label, tickets.near
        if has_near:
            host["anchor"][:n], host["anchor_w"][:n] = tickets.anchor_z, tickets.anchor_w
        for tape, rows in by_tape(tapes):
            code, read = packed(tape.program), [places[column] for column in tape.columns]
            host["code"][rows, : len(code)], host["code_length"][rows] = code, len(code)
            host["parameter"][rows, : len(tape.parameters)] = tape.parameters
            host["ticket_columns"][rows, : len(read)], host["column_count"][rows] = read, len(read)
        put(self.solve, columns=self.shape.columns, slots=reading.slots, heads=len(reading.heads), has_near=has_near)
        self.open_queue(n)
        self.tickets.upload(None if has_near else "anchor")
        if tickets.device_z is not None:
            self.device.move(self.tickets["start"], tickets.device_z.address, tickets.device_z.nbytes)

    def open_queue(self, n: int) -> None:
        """The first tickets take the rows, which are as turnover would leave them; the others wait."""
        host, capacity = self.control.host, self.shape.capacity
        rows = min(n, capacity)
        host["phase"][:] = Phase.IDLE
        host["phase"][:rows], host["ticket"][:rows] = Phase.FRESH, np.arange(rows)
        # More than every ticket in turn could need, so that a loop on the device ends in any case.
        limit = min(settings.most_evaluations(self.solver) * n, 2**31 - 1)
        host["queue"][:] = n, rows, rows, 0, limit, 1
        self.control.upload()

    def make_room(self, n: int, nodes: int, parameters: int) -> None:
        """Memory for the tickets and their results, kept for the next ones."""
        room = tuple(1 << (need - 1).bit_length() if need else 1 for need in (n, nodes, parameters))
        if not self.room or any(a < b for a, b in zip(self.room, room, strict=True)):
            self.room = room = tuple(map(max, room, self.room or room))
            count, most_nodes, most_parameters = room
            g, r, width = self.network.bundle.generator, self.shape.columns, self.evaluation.width
            self.tickets = Region(self.device, {
                "start": ((count, width), REAL), "start_psi": ((count,), REAL), "label": ((count,), INT),
                "near": ((count,), DOUBLE), "code": ((count, most_nodes, 4), INT), "code_length": ((count,), INT),
                "parameter": ((count, most_parameters), DOUBLE), "ticket_columns": ((count, r), INT),
                "column_count": ((count,), INT), "anchor": ((count, width), REAL), "anchor_w": ((count, g.w_dim), REAL),
            }, mirrored=True)
            self.results = Region(self.device, {
                "result_z": ((count, width), REAL), "result_w": ((count, g.w_dim), REAL),
                "result_logits": ((count, self.network.outputs), REAL), "result_logp": ((count,), DOUBLE),
                "result_status": ((count,), INT), "result_counters": ((count, 4), INT),
            }, mirrored=True)
            size = self.shape.capacity, scratch_size(r, most_nodes)
            self.scratch = Region(self.device, {"scratch": (size, DOUBLE)})
            put(self.solve, nodes=most_nodes, parameters=most_parameters, scratch=self.scratch["scratch"],
                **{name: self.tickets[name] for name in self.tickets.host},
                **{name: self.results[name] for name in self.results.host})

    # --- the graph -----------------------------------------------------------------------------------------------

    def round(self, *, on_device: bool) -> list[Launch]:
        """The kernels of one round: an evaluation, the solver's decision, finished rows out and waiting ones in."""
        solve, c = self.control["solve"], self.shape.capacity
        turnover = "turnover_while" if on_device else "turnover"
        e = self.evaluation
        return [*e.forward(solve), *e.head_jacobians(), *e.backward(solve),
                self.kernels.launch(settings.kernel(self.solver), (c,), solve),
                self.kernels.launch(turnover, (1,), solve)]

    def build(self) -> Graph:
        rounds = settings.rounds(self.solver)
        if rounds is not None:
            return self.device.capture(lambda: self.launch(self.round(on_device=False) * rounds))

        def body(handle: int) -> None:
            self.solve["conditional"] = handle
            self.launch(self.round(on_device=True))

        try:
            return self.device.capture_loop(body)
        except BackendError as error:
            if not self.kernels.overlaps:
                raise
            log.warning("kernels of a loop may not overlap with this driver (%s): they run one after the other", error)
            self.kernels.overlaps = False
            return self.device.capture_loop(body)

    def launch(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            self.device.launch(launch)

    def run(self, tickets: Tickets, reading: Reading, places: dict[Any, int],
            then: Callable[[Region], None] | None = None) -> Ends:
        """Solve. ``then`` may put work on the stream that reads the results on the device, before the host waits."""
        if self.loops and self.graph is None:
            self.graph = self.build()
        self.admit(tickets, reading, places)
        if self.graph is None:
            self.loop_on_host()
        else:
            # Unrolled rounds serve one row each; later waves take the rows of those before.
            fixed = settings.rounds(self.solver) is not None
            for _ in range(-(-len(tickets) // self.shape.capacity) if fixed else 1):
                self.graph.launch()
        if then is not None:
            then(self.results)
        self.results.download()
        self.look()
        return self.ends(len(tickets))

    def loop_on_host(self) -> None:
        launches = self.round(on_device=False)
        self.progress[Queue.GOES_ON] = 1
        while self.progress[Queue.GOES_ON]:
            for _ in range(LOOK):
                self.launch(launches)
            self.look()

    def look(self) -> None:
        """Wait for the device, and see how far it is."""
        self.device.download(self.progress, self.control["queue"])
        self.device.synchronize()

    def ends(self, n: int) -> Ends:
        queue = self.progress
        rounds, running, waiting = queue[Queue.ITERATIONS], queue[Queue.ROWS_RUNNING], n - queue[Queue.NEXT]
        if running or waiting > 0:
            raise BackendError(f"the solve stopped after {rounds} rounds, with {running} rows running and {waiting} "
                               "waiting: a fault of the kernels, please report it")
        z, w, logits, logp, status, counters = (self.results.host[name][:n].copy() for name in RESULTS)
        return Ends(z, w, logits, logp, status, counters, int(rounds))

    def close(self) -> None:
        if self.graph is not None:
            self.graph.close()
