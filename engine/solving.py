"""The flows of a bundle on a runtime, and the loop that takes rows along them."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch, Start, Status
from engine.bundle import Attribute, Bundle
from engine.drive import Lane, Ticket, drive
from engine.flow import Flow
from engine.prior import Prior, TruncatedNormal
from engine.requests import Sample
from engine.runtimes import Solving
from engine.solvers import Solver
from engine.solvers.posterior import Posterior
from engine.spaces import Space

log = logging.getLogger(__name__)


class Flows:
    """Threads may share it: each call borrows a flow of its own.

    solving    the runtime's part that solves
    capacity   rows in flight at a time
    """

    def __init__(self, bundle: Bundle, solving: Solving, solver: Solver, prior: Prior, capacity: int):
        self.bundle, self.solving, self.solver, self.prior, self.capacity = bundle, solving, solver, prior, capacity
        self.idle: dict[Space, list[Flow]] = defaultdict(list)
        self.has_warned = False

    @property
    def room(self) -> int:
        """Rows that a batch may have; some runtimes let more than ``capacity`` wait where the others run."""
        return self.solving.room(self.solver, self.capacity)

    def stepper(self, solver: Solver | None = None) -> Solver:
        """A solver, or the default one, as it runs on the runtime."""
        solver = solver or self.solver
        if isinstance(solver, Posterior):
            flow, nearer = (self.solving.solver(own, self.capacity) for own in (solver.flow, solver.nearer))
            solver = replace(solver, flow=flow, nearer=nearer)
        return self.solving.solver(solver, self.capacity)

    @contextmanager
    def borrow(self, space: Space) -> Iterator[Flow]:
        """A flow for one call: threads must not share what it keeps between ``forward`` and ``pullback``."""
        idle = self.idle[space]
        try:
            flow = idle.pop()
        except IndexError:
            flow = self.new_flow(space)
        try:
            yield flow
        finally:
            idle.append(flow)

    def new_flow(self, space: Space | None = None) -> Flow:
        space = self.bundle.spaces["z"] if space is None else space
        return Flow(self.solving.field(space), self.bundle, space, self.prior)

    def readable(self, space: Space) -> Mapping[str, Attribute]:
        """The attributes that can be read in a space: from w there is no way back to a z that was mapped."""
        spaces, heads = self.bundle.spaces, self.bundle.heads
        lost = {name for name, other in spaces.items() if other.is_mapped} - {space.name}
        return {name: a for name, a in self.bundle.attributes.items() if heads[a.head].space not in lost}

    def read(self, space: Space, latents: Array, psi: Sequence[float],
             label: Sequence[int]) -> tuple[Array, dict[str, Array]]:
        """w (n, w_dim), and the logits (n, C) of every readable attribute, at latents (n, width)."""
        attributes, dtype = self.readable(space), self.solving.dtype
        heads = {a.head: np.zeros((0, self.bundle.heads[a.head].widths[-1]), dtype) for a in attributes.values()}
        with self.borrow(space) as flow, np.errstate(over="ignore", invalid="ignore"):
            labels = np.array(label, np.int64) if flow.labels else None
            w, found = flow.field.forward(np.asarray(latents, dtype), np.array(psi, dtype)[:, None], labels, heads)
        return w, {name: found[a.head][0][:, slice(*a.columns)] for name, a in attributes.items()}

    def run(self, take: Callable[[int], Iterable[Ticket]], capacity: int) -> Iterator[list[Ticket]]:
        """Solve what ``take`` gives, see ``drive``; yields the tickets that ended together, each with its sample."""
        w_dim, dtype = self.bundle.generator.w_dim, self.solving.dtype
        with ExitStack() as borrowed:

            def open_lane(start: Start) -> Lane:
                batch = Batch(capacity, start.space.width, w_dim, dtype)
                return Lane(self.stepper(start.solver), borrowed.enter_context(self.borrow(start.space)), batch)

            for lane, rows in drive(open_lane, take):
                tickets = [lane.tickets[row] for row in rows]
                wanted = [not ticket.is_gone() for ticket in tickets]
                if any(wanted):
                    retire(lane, rows[wanted])
                    self.warn_of_strays(lane, rows[wanted])
                yield tickets

    def warn_of_strays(self, lane: Lane, rows: Array) -> None:
        """Say once if the flow takes rows out of the prior: no mapping keeps the length of a plain latent."""
        if self.has_warned or not isinstance(self.prior, TruncatedNormal) or lane.flow.space.name != "z":
            return
        batch = lane.batch
        length, start = (np.linalg.norm(z[rows], axis=1) for z in (batch.z, batch.origin))
        limit = self.prior.farthest(batch.truncation[rows])
        if len(strays := np.flatnonzero((length > limit) & (length > start))):
            self.has_warned, worst = True, strays[np.argmax(length[strays])]
            log.warning("a row ended where this generator's prior hardly reaches (|z| is %.1f; expected at most %.1f), "
                        "so that its picture may be worse; others may too, and are not reported. Lower the guidance, "
                        "or train sharp heads (lace-train heads --sharp), whose samples stay in the prior",
                        length[worst], limit[worst])


def retire(lane: Lane, rows: Array) -> None:
    """Give the tickets of finished rows their samples; rows that their solver did not measure are measured now."""
    batch, flow = lane.batch, lane.flow
    if len(unknown := rows[~batch.is_measured[rows]]):
        flow.measure(batch, unknown)
    # Solvers that end a row without a look at its end leave it to this one; and no picture comes of an infinite w.
    is_whole = np.isfinite(batch.logp[rows]) & np.isfinite(batch.w[rows]).all(axis=1)
    batch.status[rows[~is_whole & (batch.status[rows] == Status.DONE)]] = Status.NONFINITE
    ends = zip(rows.tolist(), batch.logp[rows].tolist(), batch.status[rows].tolist(),
               batch.counters[rows].tolist(), strict=True)
    for row, logp, status, (steps, evaluations, rejected, forced) in ends:
        ticket = lane.tickets[row]
        exact, candidates, corrections, accepted = batch.walks[row].tolist()
        ticket.sample = Sample(
            request=ticket.request, z=batch.z[row].copy() if flow.space.name == "z" else None, w=batch.w[row].copy(),
            logits=flow.named(batch.logits[row].copy(), batch.tapes[row]), energy=0.0 - logp,
            status=Status(status), steps=steps, evaluations=evaluations, rejected=rejected, forced=forced,
            exact=bool(exact), candidates=candidates, corrections=corrections,
            acceptance=accepted / corrections if corrections else None, candidate=batch.candidates[row],
        )
