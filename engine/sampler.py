"""The sampler: requests in, samples out."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy import ndarray as Array

from engine.batch import Batch, Start, Status
from engine.bundle import Bundle
from engine.check import Check, confirm, open_check
from engine.condition import Condition
from engine.constants import MOST_THREADS
from engine.drive import Ticket
from engine.editing import Editor, FlowSettings
from engine.errors import RequestError, SolveError
from engine.grammar import parse
from engine.prior import prior_of
from engine.reference.evidence import Evidence, evidence
from engine.rendering import render
from engine.requests import Request, Sample, Wanted, as_requests, checked_latent, is_finite
from engine.runtimes import open_runtime
from engine.service import QUEUE, Service
from engine.solvers import Solver, describe, make_solver
from engine.solvers.gauss_newton import GaussNewton
from engine.solvers.posterior import FieldWorld, Posterior
from engine.solving import Flows
from engine.starts import Starts

DEMO = "demo"
# Limits of what is asked for by mistake: more would only fail later, in the middle of the work.
MOST_ROWS, MOST_WAITING = 65_536, 2**31
CHECKED = 64  # pictures that a check looks at together


def find_bundle(bundle: str | os.PathLike | Bundle) -> Bundle:
    """A bundle, the path of one, or 'demo' for the one inside the package."""
    if isinstance(bundle, Bundle):
        return bundle
    if os.fspath(bundle) == DEMO:  # a folder of that name is reached as ./demo
        return Bundle(Path(__file__).parent / "demo.lace")
    return Bundle(bundle)


def choose(solver: str | Solver | None, given: dict, *, logic: str, confidence: float | None,
           guidance: float | None) -> tuple[Solver, Posterior | None]:
    """The solver of the flow, and the posterior if that may serve requests. Raises SolveError."""
    if confidence is not None and guidance is not None:
        raise SolveError("confidence and guidance both say how sure the heads must be: give one of them")
    settings = {name: value for name, value in given.items() if value is not None}
    if solver is None and not settings and logic == "product":
        return GaussNewton(), Posterior(confidence=confidence, guidance=guidance)
    if solver == "posterior":
        posterior = make_solver(solver, confidence=confidence, guidance=guidance, **settings)
        assert isinstance(posterior, Posterior)
        return posterior.flow, posterior
    if confidence is not None:
        raise SolveError("a confidence is the posterior's: leave it out, or leave out solver, logic and the flow's "
                         "settings")
    if isinstance(solver, Posterior):
        make_solver(solver, **settings)  # refuses settings beside a record
        return solver.flow, solver
    return make_solver("gauss-newton" if solver is None else solver, **settings), None


def arrived(samples: list[Sample], strict: bool) -> list[Sample]:
    """The samples; if ``strict``, SolveError for rows that did not arrive."""
    failed = [f"row {i} (seed {s.seed}) {s.status.sentence}" for i, s in enumerate(samples) if s.status != Status.DONE]
    if strict and failed:
        listed = "; ".join(failed[:8])
        raise SolveError(f"{len(failed)} of {len(samples)} rows did not reach the end of the flow: {listed}")
    return samples


class Sampler:
    """Samples a bundle's generator under conditions.

    bundle          a path, an open Bundle, or "demo"
    runtime         "auto", or a name from engine.runtimes; a choice is honoured or refused
    capacity        rows in flight at a time
    solver          None: "posterior" for requests that it can serve (a drawn start, product logic, calibrated sharp
                    heads, no near or keep), else "gauss-newton". Or a name from engine.solvers.SOLVERS, with rtol,
                    atol, steps, max_evaluations and clock as its settings (one of these alone names gauss-newton); or
                    a solver record such as Langevin(rate=0.02)
    confidence      of the posterior: samples are the prior where P(condition) is above it (0.9)
    logic           "product" (De Morgan holds), or "lace" for the paper's constants, with its temperature
    guidance        factor of every condition's log p: more obeys better and moves farther. None: the bundle's, or 1,
                    as in the paper, with "lace". The posterior takes it instead of a confidence, as the power of P
    truncation      psi for requests that name none; None: the bundle's. A plain generator has it in the draw: below 1
                    psi times a normal truncated to [-2, 2]; latents that a request brings are left alone
    threads         of the runtime; 0: its own choice
    precision       of the runtime, where it offers a choice, as openvino does; None: its default
    check           an image classifier (MODEL.onnx, its spec beside it) that looks at the pictures of the posterior:
                    one that it denies sends the row on to its next candidate. ``solve`` draws for it too
    max_decodes     pictures of a row that it looks at, at most (32); then the row ends as DENIED
    queue_size      requests that may wait for ``submit``'s rows

    A row's result does not depend on the other rows of a call. Threads may share a sampler: each call has a batch of
    its own, and what is submitted has one together. Raises BundleError, BackendError, SolveError; calls raise
    ConditionError for conditions that the bundle cannot serve.
    """

    def __init__(self, bundle: str | os.PathLike | Bundle, *, runtime: str = "auto", device: str = "cpu",
                 capacity: int = 64, solver: str | Solver | None = None, rtol: float | None = None,
                 atol: float | None = None, steps: int | None = None, max_evaluations: int | None = None,
                 clock: str | None = None, logic: str = "product", temperature: float = 1.0,
                 guidance: float | None = None, confidence: float | None = None,
                 truncation: float | None = None, threads: int = 0,
                 precision: str | None = None, queue_size: int = QUEUE,
                 check: str | os.PathLike | Check | None = None, max_decodes: int | None = None):
        for name, number, low, high in (("capacity", capacity, 1, MOST_ROWS), ("threads", threads, 0, MOST_THREADS),
                                        ("queue_size", queue_size, 1, MOST_WAITING)):
            if not isinstance(number, Integral) or not low <= number <= high:
                raise SolveError(f"{name} must be an integer from {low} to {high}, not {number!r}")
        if truncation is not None and not is_finite(truncation):
            raise SolveError(f"truncation must be a finite number, not {truncation!r}")
        self.bundle = find_bundle(bundle)
        given = {"rtol": rtol, "atol": atol, "steps": steps, "max_evaluations": max_evaluations, "clock": clock}
        flow, posterior = choose(solver, given, logic=logic, confidence=confidence, guidance=guidance)
        if solver is None and not any(head.sharp and head.sharp.calibrated for head in self.bundle.heads.values()):
            posterior = None
            if confidence is not None:
                raise SolveError(f"{self.bundle.path} has no calibrated sharp heads, which a confidence is of: train "
                                 "them (lace-train heads --bundle B --sharp) or give a guidance")
        g, self.capacity = self.bundle.generator, capacity
        if guidance is None:
            guidance = 1.0 if logic == "lace" else g.guidance
        self.runtime = open_runtime(self.bundle, runtime, device=device, threads=threads, precision=precision)
        self.flows = Flows(self.bundle, self.runtime.solving, flow, prior_of(g), capacity)
        self.starts = Starts(self.bundle, self.flows, logic=logic, temperature=temperature, guidance=guidance,
                             truncation=g.truncation if truncation is None else truncation,
                             posterior=posterior, is_strict=solver is not None and posterior is not None)
        self.editor = Editor(self.starts, self.collect, self.measure)
        self.queue_size = queue_size
        self.check = self.open_check(check, max_decodes)
        self.service = self.new_service()

    def sample(self, wanted: Wanted = None, seeds: Iterable[int] | int | None = None, *,
               oneshot: str | None = None, targets: Mapping[str, float] | None = None, polish: int | None = None,
               strict: bool = False, check: str | os.PathLike | Check | None = None,
               max_decodes: int | None = None) -> list[Sample]:
        """Solve and decode: one condition for many ``seeds``, or a sequence of Requests.

        oneshot, targets, polish   a one-pass map of the bundle in place of the condition, see Request
        strict   raise SolveError, which lists them, if some rows did not reach the end of the flow
        check, max_decodes   instead of the sampler's
        """
        requests = as_requests(wanted, seeds, oneshot=oneshot, targets=targets, polish=polish)
        return self.render(self.confirmed(self.tickets(requests, self.open_check(check, max_decodes) or self.check),
                                          strict))

    def solve(self, wanted: Wanted = None, seeds: Iterable[int] | int | None = None, *,
              oneshot: str | None = None, targets: Mapping[str, float] | None = None, polish: int | None = None,
              strict: bool = False) -> list[Sample]:
        """``sample`` without the pictures."""
        requests = as_requests(wanted, seeds, oneshot=oneshot, targets=targets, polish=polish)
        samples = self.confirmed(self.tickets(requests, self.check), strict)
        return [replace(sample, image=None) for sample in samples] if self.check else samples

    def open_check(self, check: str | os.PathLike | Check | None, max_decodes: int | None) -> Check | None:
        """Raises ClassifierError and SolveError."""
        if check is None:
            if max_decodes is not None:
                raise SolveError("max_decodes is a check's: give check=MODEL.onnx too, or leave it out")
            return None
        if isinstance(check, Check):
            return check if max_decodes is None else replace(check, max_decodes=max_decodes)
        return open_check(check, self.bundle.attributes, max_decodes)

    def tickets(self, requests: Sequence[Request], check: Check | None) -> list[Ticket]:
        """Of requests whose pictures a check looks at, if there is one. Raises RequestError, ClassifierError."""
        pairs = zip(requests, self.starts.all(requests), strict=True)
        return [Ticket(request, start, check=self.check_of(request, start, check)) for request, start in pairs]

    def check_of(self, request: Request, start: Start, check: Check | None) -> Check | None:
        """The check of one request: nothing is checked where nothing is asked."""
        if check is None or request.expression is None:
            return None
        if not isinstance(start.solver, Posterior):
            why = "the sampler takes the flow" if self.starts.posterior is None else self.starts.refusal(request)
            raise RequestError(f"check confirms samples of the posterior, which cannot serve this request, because "
                               f"{why}: leave the check out")
        check.require(request.expression)
        return check

    def stream(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Yield decoded samples as their rows finish; waiting requests take the free slots.

        ``requests`` may be an iterator without end: only as many are drawn as there is room for. A sample's ``request``
        is the very object that was given. Rows are solved and decoded in threads while the caller works.
        """
        with self.new_service() as service:
            yield from service.stream(requests)

    def new_service(self) -> Service:
        return Service(self.begin, self.flows.run, self.render, capacity=self.capacity, queue_size=self.queue_size)

    def begin(self, request: Request) -> Ticket:
        """A request as the service solves it."""
        return self.tickets([request], self.check)[0]

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

    def edit(self, samples: Sample | Sequence[Sample], condition: Condition | str, *, method: str | None = None,
             keep: str | Sequence[str] | None = "*", strict: bool = False,
             **settings: Unpack[FlowSettings]) -> list[Sample]:
        """Sequential editing: from each sample towards ``condition``, holding on to the rest.

        method   "ladder": changes as little else as it can, and says what in ``Sample.changed``. Needs calibrated sharp
                 heads of all that is asked for or kept. "flow": the paper's way, which takes ``settings``; see
                 ``engine.editing.FlowSettings``. None: the ladder where the bundle can serve it, else the flow
        keep     attributes that stay as they are: names, "*" for all that the condition does not mention, None
        Raises RequestError, ConditionError; SolveError if ``strict`` and some rows did not arrive.
        """
        samples = [samples] if isinstance(samples, Sample) else list(samples)
        samples = [replace(sample, request=self.starts.plain(sample.request)) for sample in samples]
        wanted = parse(condition) if isinstance(condition, str) else condition
        names = [keep] if isinstance(keep, str) else keep
        return self.render(arrived(self.editor.edit(samples, wanted, method, names, settings), strict))

    def measure(self, samples: Sequence[Sample]) -> list[dict[str, Array]]:
        """Raw logits (C,) of every attribute of the bundle that can be read there, one dictionary per sample."""
        found: list[dict[str, Array]] = [{} for _ in samples]
        for name, space in self.bundle.spaces.items():
            some = [i for i, sample in enumerate(samples) if sample.space == name]
            if not some:
                continue
            requests = [samples[i].request for i in some]
            latents = np.array([checked_latent(samples[i].latent, space.width, name, finite=False) for i in some])
            labels = [self.starts.label(request) if space.is_mapped else 0 for request in requests]
            _, logits = self.flows.read(space, latents, [self.starts.psi(request) for request in requests], labels)
            for k, i in enumerate(some):
                found[i] = {attribute: values[k] for attribute, values in logits.items()}
        return found

    def evidence(self, condition: Condition | str, *, error: float = 0.1, truncation: float | None = None,
                 label: int | None = None, confidence: float | None = None, guidance: float | None = None) -> Evidence:
        """How rare a wish is: log of the share of plain latents with P(condition) above the confidence, or log E[P^g].

        error   what the logarithm may be wrong by, 19 times in 20; 0.1 takes up to some 100,000 forward evaluations
        Raises RequestError for conditions that the posterior cannot serve.
        """
        request = Request(condition, truncation=truncation, label=label, confidence=confidence, guidance=guidance)
        start = self.starts.start(request)
        if not isinstance(start.solver, Posterior):
            why = "the sampler takes the flow" if self.starts.posterior is None else self.starts.refusal(request)
            raise RequestError(f"there is no evidence for {condition}: {why}")
        batch = Batch(1, start.space.width, self.bundle.generator.w_dim, self.runtime.solving.dtype)
        batch.admit(0, start)
        with self.flows.borrow(start.space) as flow, np.errstate(over="ignore", invalid="ignore"):
            return evidence(FieldWorld(flow, batch, np.arange(1)), start.solver.settings, error=error)

    def render(self, samples: Sequence[Sample]) -> list[Sample]:
        """Decode: the same samples with their ``image``. Those that have one keep it."""
        drawn = iter(render(self.runtime.drawing, self.bundle.generator, [s for s in samples if s.image is None]))
        return [next(drawn) if sample.image is None else sample for sample in samples]

    def confirmed(self, tickets: Sequence[Ticket], strict: bool) -> list[Sample]:
        """Solve all, and draw and look at those that have a check, until none is denied or each was drawn often enough.
        """
        running = tickets
        while running:
            self.run(running)
            checked = [ticket for ticket in running if ticket.check is not None]
            running = []
            for first in range(0, len(checked), CHECKED):
                part = checked[first : first + CHECKED]
                samples = self.render([ticket.sample for ticket in part if ticket.sample is not None])
                running += confirm(part, samples)
        return arrived([ticket.sample for ticket in tickets if ticket.sample is not None], strict)

    def collect(self, tickets: Sequence[Ticket], strict: bool = False) -> list[Sample]:
        """Solve all; their samples in the same order."""
        self.run(tickets)
        return arrived([ticket.sample for ticket in tickets if ticket.sample is not None], strict)

    def run(self, tickets: Sequence[Ticket]) -> None:
        """Solve all."""
        capacity, waiting = min(self.flows.room, len(tickets)), iter(tickets)
        for _ in self.flows.run(lambda running: islice(waiting, capacity - running), capacity):
            pass

    def __reduce__(self):
        raise TypeError("a Sampler holds threads and compiled code and cannot be pickled: hand over the bundle's path, "
                        "and open a Sampler in each process")

    def __repr__(self) -> str:
        r, s = self.runtime, self.starts
        return (f"Sampler({self.bundle.path.name!r}, hash={self.bundle.hash[:12]}, runtime={r.name} {r.version}, "
                f"device={r.device}, precision={r.drawing.precision}, jacobian={r.solving.jacobian}, "
                f"capacity={self.capacity}, solver={describe(s.posterior or self.flows.solver)}, logic={s.logic}, "
                f"temperature={s.temperature}, guidance={s.guidance}, truncation={s.truncation})")
