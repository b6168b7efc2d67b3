"""The field and the default solver by our own kernels for the CPU (kernels/cpu), pictures by ONNX Runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine import __version__
from engine.batch import RUNNING, Batch
from engine.bundle import Bundle
from engine.constants import Walk
from engine.errors import BackendError
from engine.flow import Flow
from engine.native.library import CpuField, CpuNetwork, NotBuilt
from engine.native.posterior import CpuPosterior, Walks
from engine.native.rows import SLOTS, Columns, CpuRows
from engine.prior import StandardNormal
from engine.reference.posterior import Ends, Settings
from engine.routing import Inputs
from engine.runtimes import ALL, Linearise, MissingRuntime, Runtime, Solving
from engine.runtimes.onnxruntime import Graphs, OnnxDrawing, run_oneshot
from engine.solvers import Solver
from engine.solvers.compiled import numbers, packed
from engine.solvers.gauss_newton import GaussNewton
from engine.solvers.posterior import Posterior, run_alone, stack_names
from engine.spaces import Space
from engine.tape import by_tape

# By precision: whether cotangents are bfloat16.
PRECISIONS = {"fp32": False, "bf16-jacobian": True}
# Rounds a call, times rows, of rows that nobody watches: more than most take, and an interrupt waits for no more.
ROUNDS = 2048


class NativeField:
    """See engine.runtimes.Field."""

    def __init__(self, network: CpuNetwork, space: Space):
        self.field, self.space = CpuField(network), space
        self.linearise: Linearise | None = self.run_linearise if space.is_mapped else None
        # Of the solver and the batch that came last.
        self.solver: GaussNewton | None = None
        self.batch: Batch | None = None
        self.rows: CpuRows | None = None
        # Of the settings that came last.
        self.settings: Settings | None = None
        self.posterior: CpuPosterior | None = None

    def run_linearise(self, z: Array, psi: Array, label: Array | None, heads: Mapping[str, tuple[Array, Array]],
                      pair_row: Array, source: Array, near_row: Array, near_anchor: Array):
        """See engine.runtimes.Linearise."""
        pairs = pair_row, source, near_row, near_anchor
        w, found, jacobian = self.field.forward(z, psi, label, heads, pairs=pairs)
        return w, {name: logits for name, (logits, _) in found.items()}, jacobian

    def forward(self, z: Array, psi: Array, label: Array | None, heads: Mapping[str, Array],
                some: Mapping[str, Array] = ALL):
        wanted = {name: (some.get(name), seeds) for name, seeds in heads.items()}
        w, found, _ = self.field.forward(z, psi, label, wanted, is_w=not self.space.is_mapped, slopes=True)
        return w, found

    def pullback(self, cotangent: Array, rows: Array | None = None) -> Array:
        if not self.space.is_mapped:
            return cotangent
        n, r, width = cotangent.shape
        pair_row = np.repeat(np.arange(n) if rows is None else rows, r)
        return self.field.back(cotangent.reshape(n * r, width), pair_row).reshape(n, r, -1)

    def rows_of(self, batch: Batch, solver: GaussNewton, inputs: Inputs) -> CpuRows:
        """What takes the batch's rows along the flow."""
        if self.rows is None or self.solver != solver:
            columns = columns_of(inputs, list(inputs.combinations))
            self.rows = CpuRows(self.field, columns, numbers(solver), is_w=not self.space.is_mapped)
            self.solver, self.batch = solver, None
        if self.batch is not batch:
            batch.hold_logits(inputs.count)
            self.rows.hold(**{name: getattr(batch, name) for name in SLOTS})
            self.batch = batch
        return self.rows


    def posterior_of(self, flow: Flow, settings: Settings) -> CpuPosterior:
        """What draws rows of the posterior, by the stacks that give probabilities."""
        if self.posterior is None or self.settings != settings:
            sharp = stack_names(flow.bundle)
            columns = columns_of(flow.inputs, [sharp[name] for name in flow.inputs.combinations])
            self.posterior, self.settings = CpuPosterior(self.field, columns, settings), settings
        return self.posterior


def columns_of(inputs: Inputs, stacks: Sequence[str]) -> Columns:
    """``stacks`` that give the logits of the heads, in the heads' order."""
    first = np.array([span.start for span in inputs.spans.values()])
    minus = np.where(inputs.minus == inputs.count, -1, inputs.minus)
    return Columns(stacks, first, inputs.count, inputs.head, inputs.plus, minus)


@dataclass(frozen=True, slots=True)
class NativeSteps:
    """The default solver with its steps in C++. engine.solvers.gauss_newton is the twin, and says what they do."""

    solver: GaussNewton

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        compiled = self.rows_of(flow, batch)
        for tape, some in by_tape([batch.tapes[row] for row in rows]):
            compiled.admit(rows[some].tolist(), flow.inputs.numbers(tape), packed(tape.program), tape.parameters)

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        self.rows_of(flow, batch).advance(rows, 1 if batch.is_watched else max(1, ROUNDS // len(rows)))
        batch.is_measured[rows[batch.status[rows] != RUNNING]] = True

    def rows_of(self, flow: Flow, batch: Batch) -> CpuRows:
        assert isinstance(flow.field, NativeField)
        return flow.field.rows_of(batch, self.solver, flow.inputs)


@dataclass(frozen=True, slots=True)
class NativePosterior:
    """The posterior with its candidates and walks in C++. engine.reference.posterior is the twin."""

    solver: Posterior

    def begin(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """Nothing: a row is drawn in the step that ends it."""

    def step(self, flow: Flow, batch: Batch, rows: Array) -> None:
        """Take all rows to their end."""
        # A standard normal's noise is the latent; and a row that a check sent on begins with a later candidate.
        if not isinstance(flow.prior, StandardNormal) or any(batch.candidates[row] for row in rows.tolist()):
            return self.solver.step(flow, batch, rows)
        walks = self.walk(flow, batch, rows)
        exact, candidates, corrections, accepted, _ = walks.spent.T
        entered = walks.phase == Walk.ENTERED
        ends = Ends(walks.x, walks.crisp, exact > 0, entered, candidates, corrections, accepted)
        return self.solver.end(flow, batch, rows, ends, walks.w, walks.logits)

    def walk(self, flow: Flow, batch: Batch, rows: Array) -> Walks:
        assert isinstance(flow.field, NativeField)
        compiled, kinds = flow.field.posterior_of(flow, self.solver.settings), by_tape([batch.wishes[i] for i in rows])
        wish = np.empty(len(rows), np.int64)
        for i, (_, some) in enumerate(kinds):
            wish[some] = i
        tapes = [(flow.inputs.numbers(tape), packed(tape.program), tape.parameters) for tape, _ in kinds]
        walks = compiled.begin([batch.seeds[i] for i in rows], wish, tapes, batch.psi[rows], batch.label[rows])
        while walks.is_running():
            compiled.advance(walks, max(1, ROUNDS // len(rows)))
            if not walks.is_running() and len(far := walks.far):
                walks.bring(far, run_alone(self.solver.nearer, flow, batch, rows[far], walks.x[far]).z)
        return walks


class NativeSolving(Solving):
    name, device = "native", "cpu"
    dtype = np.dtype(np.float32)
    # Each element of a product is summed in the same order whatever the number of rows; the tests check it.
    row_independent = True

    def __init__(self, bundle: Bundle, threads: int, precision: str):
        g, half = bundle.generator, PRECISIONS[precision]
        heads = {name: stack.space == "z" for name, stack in bundle.stacks.items()}
        try:
            self.network = CpuNetwork(bundle.field, heads, g.z_dim, g.w_dim, threads=threads, half=half,
                                      normalise=g.normalise)
        except NotBuilt as error:
            raise MissingRuntime(f"runtime 'native' is not there: {error}") from error
        except ValueError as error:
            raise BackendError(f"runtime 'native', precision {precision!r}: {error}") from error
        self.graphs = Graphs(bundle, threads)
        self.jacobian = "bf16" if half else "fp32"
        self.version = f"{__version__} ({self.network.variant})"

    def solver(self, solver: Solver, capacity: int) -> Solver:
        """Gauss-Newton and the posterior as they run here; the others step by step."""
        if isinstance(solver, Posterior):
            return NativePosterior(solver)
        return NativeSteps(solver) if type(solver) is GaussNewton else solver

    def field(self, space: Space) -> NativeField:
        return NativeField(self.network, space)

    def oneshot(self, name: str, noise: Array, targets: Array | None) -> Array:
        return run_oneshot(self.graphs, name, noise, targets)


def open_bundle(bundle: Bundle, *, name: str, device: str, threads: int, precision: str | None) -> Runtime:
    return Runtime(name, NativeSolving(bundle, threads, precision or "fp32"), OnnxDrawing(bundle, threads))
