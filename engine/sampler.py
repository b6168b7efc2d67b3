"""The sampler: requests in, samples out."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch, Start, Status
from engine.bundle import Bundle
from engine.condition import Condition
from engine.drive import Lane, Ticket, drive
from engine.editing import Anchor, conjunction, holding, kept_terms
from engine.errors import ConditionError, RequestError, SolveError
from engine.flow import Flow
from engine.grammar import parse
from engine.reference.noise import normals_many
from engine.requests import Request, Sample, Wanted, as_requests, checked_latent, to_pixels
from engine.runtimes import open_runtime
from engine.service import QUEUE, Service
from engine.solvers import Solver, described, make_solver
from engine.tape import Tape, lower

DEMO = "demo"
# Tapes that are kept for conditions that come again.
TAPES = 256
# Streams of a seed: 0 is z, the next ones the solvers' noise, and from here on the noise inputs of the synthesis.
NOISE_STREAM = 2**63


def find_bundle(bundle: str | os.PathLike | Bundle) -> Bundle:
    """A bundle, the path of one, or 'demo' for the one inside the package."""
    if isinstance(bundle, Bundle):
        return bundle
    if os.fspath(bundle) == DEMO:  # a folder of that name is reached as ./demo
        return Bundle(Path(__file__).parent / "demo.lace")
    return Bundle(bundle)


# A request, its condition with what holds on to the anchor, and the anchor where it is not the request's own start.
Work = tuple[Request, Condition | None, Anchor | None]


class Sampler:
    """Samples a bundle's generator under conditions.

    bundle          a path, an open Bundle, or "demo"
    runtime         "auto", or a name from engine.runtimes; a choice is honoured or refused
    capacity        rows in flight at a time
    solver          a name from engine.solvers.SOLVERS, with rtol, atol, steps, max_evaluations and clock as its
                    settings (None: its own default); or a solver record such as Langevin(rate=0.02)
    logic           "product" (De Morgan holds), or "lace" for the paper's constants, with its temperature
    guidance        factor of every condition's log p: more obeys better and moves farther. None: the bundle's, or 1,
                    as in the paper, with "lace"
    truncation      psi for requests that name none; None: the bundle's
    threads         of the runtime; 0: its own choice
    precision       of the runtime, where it offers a choice, as openvino does; None: its default
    queue_size      requests that may wait for ``submit``'s rows

    A row's result does not depend on the other rows of a call. Threads may share a sampler: each call has a batch of
    its own, and what is submitted has one together. Raises BundleError, BackendError, SolveError; calls raise
    ConditionError for conditions that the bundle cannot serve.
    """

    def __init__(self, bundle: str | os.PathLike | Bundle, *, runtime: str = "auto", device: str = "cpu",
                 capacity: int = 64, solver: str | Solver = "gauss-newton", rtol: float | None = None,
                 atol: float | None = None, steps: int | None = None, max_evaluations: int | None = None,
                 clock: str | None = None, logic: str = "product", temperature: float = 1.0,
                 guidance: float | None = None, truncation: float | None = None, threads: int = 0,
                 precision: str | None = None, queue_size: int = QUEUE):
        for name, number in (("capacity", capacity), ("queue_size", queue_size)):
            if not isinstance(number, int) or number < 1:
                raise SolveError(f"{name} must be an integer of at least 1, not {number!r}")
        if truncation is not None and not np.isfinite(truncation):
            raise SolveError(f"truncation must be a finite number, not {truncation!r}")
        self.bundle = find_bundle(bundle)
        given = {"rtol": rtol, "atol": atol, "steps": steps, "max_evaluations": max_evaluations, "clock": clock}
        self.solver = make_solver(solver, **given)
        self.logic, self.temperature, self.capacity = logic, temperature, capacity
        usual = 1.0 if logic == "lace" else self.bundle.generator.guidance
        self.guidance = usual if guidance is None else guidance
        self.truncation = self.bundle.generator.truncation if truncation is None else truncation
        self.runtime = open_runtime(self.bundle, runtime, device=device, threads=threads, precision=precision)
        # A runtime may have its own way to run a solver, with room for rows that wait where the others run.
        own = getattr(self.runtime, "solver", None)
        self.stepper: Solver = self.solver if own is None else own(self.solver, capacity)
        self.room: int = getattr(self.stepper, "room", capacity)
        self.flows: dict[bool, list[Flow]] = {False: [], True: []}
        self.tapes: dict[tuple[Condition | None, bool], Tape] = {}
        self.service = Service(self, queue_size=queue_size)
        self.lowered(None)  # refuse a bad logic at once

    def sample(self, wanted: Wanted = None, seeds: Iterable[int] | int | None = None, *,
               strict: bool = False) -> list[Sample]:
        """Solve and decode: one condition for many ``seeds``, or a sequence of Requests.

        strict   raise SolveError, which lists them, if some rows did not reach the end of the flow
        """
        return self.render(self.solve(wanted, seeds, strict=strict))

    def solve(self, wanted: Wanted = None, seeds: Iterable[int] | int | None = None, *,
              strict: bool = False) -> list[Sample]:
        """``sample`` without the pictures."""
        requests = as_requests(wanted, seeds)
        return self.collect([(request, request.expression, None) for request in requests], strict)

    def stream(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Yield decoded samples as their rows finish; waiting requests take the free slots.

        ``requests`` may be an iterator without end: only as many are drawn as there is room for. A sample's ``request``
        is the very object that was given. Rows are solved and decoded in threads while the caller works.
        """
        with Service(self) as service:
            yield from service.stream(requests)

    def submit(self, request: Request, *, deadline: float | None = None, block: bool = True,
               timeout: float | None = None) -> Future[Sample]:
        """Queue a request and return at once: see ``engine.service.Service.submit``. Ends with ``close``."""
        return self.service.submit(request, deadline=deadline, block=block, timeout=timeout)

    def close(self, *, cancel: bool = False) -> None:
        """Refuse further ``submit``s and finish, or ``cancel``, those that were. All else goes on working."""
        self.service.close(cancel=cancel)

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(cancel=kind is not None)

    def edit(self, samples: Sample | Sequence[Sample], condition: Condition | str, *,
             keep: str | Sequence[str] | None = "*", keep_weight: float = 0.01, near: float | None = 0.04,
             hold: bool = True, strict: bool = False) -> list[Sample]:
        """Sequential editing: from each sample's latent, towards ``condition``, holding on to the rest.

        keep   attributes whose logits stay near the sample's: names, "*" for all that are not mentioned, None
        near   weight of the distance to the sample in z and w; None leaves it out. The weights are the paper's
        hold   keep the sample's former targets too, unless the new condition mentions their attributes

        Nie, Vahdat, Anandkumar, NeurIPS 2021, section on sequential editing.
        """
        samples = [samples] if isinstance(samples, Sample) else list(samples)
        wanted = parse(condition) if isinstance(condition, str) else condition
        holders = holding([keep] if isinstance(keep, str) else keep, keep_weight, near)
        work = []
        for sample, logits in zip(samples, self.measure(samples), strict=True):
            target = conjunction([wanted, *(kept_terms(sample.condition, wanted) if hold else [])])
            request = replace(sample.request, condition=target, z=sample.z, w=sample.w if sample.z is None else None)
            z = sample.w if sample.z is None else sample.z
            work.append((request, conjunction([target, *holders]), Anchor(z, sample.w, logits)))
        return self.render(self.collect(work, strict))

    @np.errstate(over="ignore", invalid="ignore")  # samples that ended as NONFINITE are measured too
    def measure(self, samples: Sequence[Sample]) -> list[dict[str, Array]]:
        """Raw logits of every attribute of the bundle, one dictionary per sample."""
        found: list[dict[str, Array]] = [{} for _ in samples]
        for in_w in (False, True):
            part = [i for i, sample in enumerate(samples) if (sample.z is None) == in_w]
            if not part:
                continue
            heads = {n: np.zeros((0, h.widths[-1]), self.runtime.dtype) for n, h in self.bundle.heads.items()
                     if not (in_w and h.space == "z")}
            g, name = self.bundle.generator, "w" if in_w else "z"
            z = np.array([checked_latent(getattr(samples[i], name), g.w_dim if in_w else g.z_dim, name, finite=False)
                          for i in part], self.runtime.dtype)
            psi = np.array([[self.psi(samples[i].request)] for i in part], self.runtime.dtype)
            label = np.array([0 if in_w else self.label(samples[i].request) for i in part], np.int64)
            with self.flow(in_w) as flow:
                _, values = flow.field.forward(z, psi, label if flow.labels else None, heads)
            for k, i in enumerate(part):
                found[i] = {name: values[a.head][0][k, slice(*a.columns)]
                            for name, a in self.bundle.attributes.items() if a.head in heads}
        return found

    def render(self, samples: Sequence[Sample]) -> list[Sample]:
        """Decode: the same samples with their ``image``."""
        samples = list(samples)
        if not samples:
            return samples
        num_ws, w_dim = self.bundle.generator.num_ws, self.bundle.generator.w_dim
        ws = np.stack([np.broadcast_to(checked_latent(s.w, w_dim, "w", finite=False), (num_ws, w_dim))
                       if s.ws is None else checked_latent(s.ws, (num_ws, w_dim), "ws", finite=False) for s in samples])
        draw = getattr(self.runtime, "pixels", None) or (lambda *given: to_pixels(self.runtime.synthesize(*given)))
        images = draw(np.ascontiguousarray(ws, np.float32), self.noises(samples))
        # A copy each: who keeps one picture shall not keep those that were decoded with it.
        return [replace(sample, image=image.copy()) for sample, image in zip(samples, images, strict=True)]

    def noises(self, samples: Sequence[Sample]) -> dict[str, Array]:
        """Noise inputs (rows, 1, r, r), where the bundle has them: a function of each sample's seed."""
        seeds = [sample.seed for sample in samples]
        return {
            name: normals_many(seeds, [NOISE_STREAM + i] * len(seeds), side**2).reshape(-1, 1, side, side)
            for i, (name, side) in enumerate(self.runtime.noise_inputs().items())
        }

    def psi(self, request: Request) -> float:
        return self.truncation if request.truncation is None else request.truncation

    def collect(self, work: Sequence[Work], strict: bool) -> list[Sample]:
        """All samples, in the order of the requests."""
        # A bad request is refused before the first is solved.
        starts = self.draw([entry[0] for entry in work])
        tickets = [Ticket(entry[0], self.start(*entry, z)) for entry, z in zip(work, starts, strict=True)]
        capacity, waiting = min(self.room, len(work)), iter(tickets)
        for _ in self.run(lambda running: islice(waiting, capacity - running), capacity):
            pass
        samples = [ticket.sample for ticket in tickets if ticket.sample is not None]
        failed = [
            f"row {i} (seed {s.seed}) {s.status.sentence}" for i, s in enumerate(samples) if s.status != Status.DONE
        ]
        if strict and failed:
            listed = "; ".join(failed[:8])
            raise SolveError(f"{len(failed)} of {len(samples)} rows did not reach the end of the flow: {listed}")
        return samples

    def run(self, take: Callable[[int], Iterable[Ticket]], capacity: int) -> Iterator[list[Ticket]]:
        """Solve what ``take`` gives, see ``drive``; yields the tickets that ended together, each with its sample."""
        g, dtype = self.bundle.generator, self.runtime.dtype
        with ExitStack() as borrowed:

            def open_lane(in_w: bool) -> Lane:
                batch = Batch(capacity, g.w_dim if in_w else g.z_dim, g.w_dim, dtype)
                return Lane(self.stepper, borrowed.enter_context(self.flow(in_w)), batch)

            for lane, rows in drive(open_lane, take):
                tickets = [lane.tickets[row] for row in rows]
                wanted = [not ticket.is_gone() for ticket in tickets]
                if any(wanted):
                    self.retire(lane, rows[wanted])
                yield tickets

    def retire(self, lane: Lane, rows: Array) -> None:
        """Give the tickets of finished rows their samples; rows that their solver did not measure are measured now."""
        batch, flow = lane.batch, lane.flow
        if len(unknown := rows[~batch.is_measured[rows]]):
            flow.measure(batch, unknown)
        # Solvers that end a row without a look at its end leave it to this one; and no picture comes of infinite w.
        is_whole = np.isfinite(batch.logp[rows]) & np.isfinite(batch.w[rows]).all(axis=1)
        batch.status[rows[~is_whole & (batch.status[rows] == Status.DONE)]] = Status.NONFINITE
        ends = zip(rows.tolist(), batch.logp[rows].tolist(), batch.status[rows].tolist(),
                   batch.counters[rows].tolist(), strict=True)
        for row, logp, status, (steps, evaluations, rejected, forced) in ends:
            ticket = lane.tickets[row]
            ticket.sample = Sample(
                request=ticket.request, z=None if ticket.in_w else batch.z[row].copy(), w=batch.w[row].copy(),
                logits=flow.named(batch.logits[row].copy(), batch.tapes[row]), energy=0.0 - logp,
                status=Status(status), steps=steps, evaluations=evaluations, rejected=rejected, forced=forced,
            )

    def draw(self, requests: Sequence[Request]) -> list[Array]:
        """Where requests begin: the latent they bring, else that of their seed."""
        g = self.bundle.generator
        seeds = [r.seed for r in requests if r.w is None and r.z is None]
        drawn = iter(normals_many(seeds, [0] * len(seeds), g.z_dim))
        return [checked_latent(r.w, g.w_dim, "w") if r.w is not None else
                checked_latent(r.z, g.z_dim, "z") if r.z is not None else next(drawn)
                for r in requests]

    def start(self, request: Request, condition: Condition | None, anchor: Anchor | None,
              z: Array | None = None) -> Start:
        """Where a request begins: its latent, which ``draw`` found already or finds now; its tape with its anchors."""
        g = self.bundle.generator
        (z,) = self.draw([request]) if z is None else (z,)
        tape = self.lowered(condition, in_w=request.w is not None)
        if anchor is None and (tape.near or tape.anchors):
            anchor = self.anchor_at(request, z)
        if anchor is not None:
            tape = tape.anchored(anchor.logits)
        return Start(z=z, tape=tape, psi=self.psi(request), label=self.label(request), seed=int(request.seed),
                     anchor_z=z if anchor is None else anchor.z,
                     anchor_w=np.zeros(g.w_dim, np.float32) if anchor is None else anchor.w)

    def anchor_at(self, request: Request, z: Array) -> Anchor:
        """``near`` and ``keep`` in a plain request hold on to the request's own start, as in the paper."""
        in_w = request.w is not None
        here = replace(request, condition=None, z=None if in_w else z, w=z if in_w else None)
        sample = self.solve([here])[0]
        return Anchor(z, sample.w, self.measure([sample])[0])

    def label(self, request: Request) -> int:
        labels = self.bundle.generator.labels
        if request.label is None:
            if labels and request.w is None:
                raise RequestError(f"this generator is conditional: give each Request a label in 0..{labels - 1}")
            return 0
        if not labels:
            raise RequestError(f"label {request.label} was given, but this generator is unconditional")
        if not 0 <= request.label < labels:
            raise RequestError(f"label {request.label} is out of range: expected 0..{labels - 1}")
        return int(request.label)

    def lowered(self, condition: Condition | None, *, in_w: bool = False) -> Tape:
        """The condition's tape. In W there is no z: heads on z are refused, and the * of keep leaves them out."""
        if known := self.tapes.get((condition, in_w)):
            return known
        attributes = self.bundle.attributes
        if in_w:
            on_z = {name for name, a in attributes.items() if self.bundle.heads[a.head].space == "z"}
            for name in condition.attributes() if condition is not None else ():
                if name in on_z:
                    raise ConditionError(f"attribute {name!r} is read from z, which a request that starts from w "
                                         "does not have: start from z, or leave the attribute out")
            attributes = {name: a for name, a in attributes.items() if name not in on_z}
        if len(self.tapes) >= TAPES:
            self.tapes.clear()
        tape = lower(condition, attributes, logic=self.logic, temperature=self.temperature, guidance=self.guidance)
        return self.tapes.setdefault((condition, in_w), tape)

    @contextmanager
    def flow(self, in_w: bool) -> Iterator[Flow]:
        """A flow for one call: threads must not share what it keeps between ``forward`` and ``pullback``."""
        idle = self.flows[in_w]
        try:
            flow = idle.pop()
        except IndexError:
            flow = self.new_flow(in_w)
        try:
            yield flow
        finally:
            idle.append(flow)

    def new_flow(self, in_w: bool = False) -> Flow:
        return Flow(self.runtime.field("w" if in_w else "z"), self.bundle, in_w=in_w)

    def __repr__(self) -> str:
        r = self.runtime
        return (f"Sampler({self.bundle.path.name!r}, hash={self.bundle.hash[:12]}, runtime={r.name} {r.version}, "
                f"device={r.device}, precision={r.precision}, slopes={r.slopes}, capacity={self.capacity}, "
                f"solver={described(self.solver)}, logic={self.logic}, temperature={self.temperature}, "
                f"guidance={self.guidance}, truncation={self.truncation})")
