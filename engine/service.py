"""Continuous batching for many threads: a queue of requests in, futures out.

One thread solves: it keeps the rows of a batch busy and refills them from the queue as they finish. Another decodes
what has finished, a few pictures at a time, while the first goes on. Both sleep when there is nothing to do.
"""

import atexit
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import islice
from queue import SimpleQueue
from threading import TIMEOUT_MAX, Condition, Event, Semaphore, Thread, current_thread

from engine.check import confirm
from engine.drive import Ticket
from engine.errors import BackendError, ClosedError, DeadlineError, QueueFullError, RequestError
from engine.forks import remember
from engine.requests import Request, Sample

QUEUE, DECODE_BATCH = 256, 8
# Seconds between looks through a long queue for what was cancelled or is too late; rows are looked at every step.
SWEEP = 0.02
# Seconds that pictures wait for others to be decoded with them, while requests wait for a row: eight small pictures at
# once take little more than half of the time of eight.
GATHER = 0.02
# Seconds that the interpreter's end waits for steps and pictures that are under way.
LEAVE = 10.0

log = logging.getLogger(__name__)


class Worker(Thread):
    """A thread with an end of its own that can be waited for.

    A ``join`` that an interrupt ends counts its thread as stopped (CPython until 3.12), and Python would then end while
    the thread is inside of a library, which aborts the process.
    """

    def __init__(self, work: Callable[[], None]):
        # Daemons: the interpreter waits for others before it comes to what atexit holds.
        super().__init__(name=f"lace-{work.__name__}", daemon=True)
        self.work, self.has_ended = work, Event()

    def run(self) -> None:
        try:
            self.work()
        finally:
            self.has_ended.set()


class Service:
    """Solves and decodes what threads submit, on a batch of its own.

    begin          a request's ticket, or what is wrong with the request
    run            solves what it takes, a number of rows at a time: ``engine.solving.Flows.run``
    render         samples with their pictures
    capacity       rows in flight at a time
    queue_size     requests that may wait for a row; ``submit`` waits when they are that many
    decode_batch   pictures that are decoded together at most. With more than twice as many waiting to be decoded, that
                   many fewer rows are refilled, so that memory stays flat when decoding is the slower part

    A request becomes a ticket, which lies in exactly one of ``waiting``, ``solving`` and ``decoding``, and is settled
    when it leaves the last of them; one whose picture its check denies goes back to the first. Use it in a ``with``
    block, or call ``close``.
    """

    def __init__(self, begin: Callable[[Request], Ticket],
                 run: Callable[[Callable[[int], Iterable[Ticket]], int], Iterator[list[Ticket]]],
                 render: Callable[[Sequence[Sample]], list[Sample]], *, capacity: int, queue_size: int = QUEUE,
                 decode_batch: int = DECODE_BATCH):
        self.begin, self.run, self.render = begin, run, render
        self.capacity, self.queue_size, self.decode_batch = capacity, queue_size, decode_batch
        self.is_open = self.is_solving = True
        self.reset()
        remember(self)

    def reset(self) -> None:
        """Nothing is under way, and no thread runs."""
        self.waiting: deque[Ticket] = deque()
        self.solving: set[Ticket] = set()
        self.decoding: deque[Ticket] = deque()
        # Guards all of the above and below; notified whenever they change.
        self.changed = Condition()
        self.threads: dict[str, Worker] = {}
        self.next_sweep = 0.0

    def after_fork(self) -> None:
        """A child begins with an empty queue: what was submitted before stays with the parent, and its futures too."""
        self.reset()
        self.is_solving = self.is_open

    def submit(self, request: Request, *, deadline: float | None = None, block: bool = True,
               timeout: float | None = None) -> Future[Sample]:
        """The future of the request's decoded sample.

        deadline         seconds from now. If the sample is not there by then, the future raises DeadlineError, and its
                         row is given to others at the next step; a picture that is being decoded is finished
        block, timeout   whether, and for how many seconds, to wait for room in the queue

        ``cancel`` of the future works until the sample is there, also while its row runs. Callbacks of the future run
        in the service's threads and must not wait. Raises QueueFullError, ClosedError, BackendError if there can be no
        thread, and at once whatever is wrong with the request.
        """
        if not isinstance(request, Request):
            raise TypeError(f"expected a Request, found {type(request).__name__}")
        end = time.monotonic() + seconds("deadline", deadline)
        timeout, future = seconds("timeout", timeout), Future[Sample]()
        ticket = self.begin(request)
        ticket.deadline, ticket.future = end, future
        with self.changed:
            has_room = self.changed.wait_for(
                lambda: not self.is_open or len(self.waiting) < self.queue_size,
                0 if not block else None if timeout == math.inf else min(timeout, TIMEOUT_MAX)
            )
            if not has_room:
                raise QueueFullError(f"the queue is full with {self.queue_size} requests: submit fewer at a time, wait "
                                     "longer, or open the sampler with a larger queue_size")
            if not self.is_open:
                raise ClosedError("this sampler was closed: open another one to submit requests")
            self.start()
            self.waiting.append(ticket)
            self.changed.notify_all()
        return future

    def stream(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Submit all, with a bounded number under way, and yield what has finished. For a service of one's own.

        A thread draws the requests, so that a source that makes its readers wait holds up no finished sample.
        """
        finished: SimpleQueue[Future[Sample] | BaseException | int] = SimpleQueue()
        room, is_left = Semaphore(self.capacity + 2 * self.decode_batch), Event()

        def feed() -> None:
            count = 0
            try:
                for request in requests:
                    self.submit(request).add_done_callback(finished.put)
                    count += 1
                    room.acquire()
                    if is_left.is_set():
                        return
                finished.put(count)
            except BaseException as error:
                finished.put(error)

        Thread(target=feed, name="lace-feed", daemon=True).start()
        yielded, count = 0, None
        try:
            while yielded != count:
                match finished.get():
                    case int(total):
                        count = total
                    case Future() as future:
                        yield future.result()
                        yielded += 1
                        room.release()
                    case error:
                        raise error
        finally:
            is_left.set()
            room.release()

    def close(self, *, cancel: bool = False) -> None:
        """Refuse further requests, finish those that are there or ``cancel`` them, and end the threads. Idempotent."""
        with self.changed:
            self.is_open = False
            tickets = [*self.waiting, *self.solving, *self.decoding] if cancel else []
        for ticket in tickets:
            if ticket.future is not None:
                ticket.future.cancel()
        with self.changed:
            self.changed.notify_all()
        threads = list(self.threads.values())
        if current_thread() not in threads:  # a future's callback may close, and cannot wait for itself
            for thread in threads:
                thread.has_ended.wait()
        atexit.unregister(self.leave)

    def leave(self) -> None:
        """At the interpreter's end: cancel what is there, and give the threads a moment to end what they are at."""
        with self.changed:
            threads = list(self.threads.values())
        closing = Thread(target=self.close, kwargs={"cancel": True}, daemon=True)
        with suppress(RuntimeError):  # no thread can be started so late in some versions of Python
            closing.start()
            for thread in threads:
                thread.has_ended.wait(LEAVE)

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(cancel=kind is not None)

    # --- the solving thread --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads with the first request; those that the system refused are tried again with the next one."""
        for work in (self.solve, self.decode):
            if work.__name__ in self.threads:
                continue
            thread = Worker(work)
            try:
                thread.start()
            except RuntimeError as error:
                raise BackendError(f"no thread could be started for the requests ({error}): raise this process' limit "
                                   "of threads, or end some; the request was not queued") from error
            if not self.threads:
                atexit.register(self.leave)
            self.threads[work.__name__] = thread

    def solve(self) -> None:
        """Solve until the service is closed and nothing waits."""
        while self.is_solving:
            try:
                for tickets in self.run(self.take, self.capacity):
                    self.hand_over(tickets)
            except Exception as error:  # a fault of the runtime: the rows in flight share it, later ones need not
                with self.changed:
                    failed, self.solving = self.solving, set()
                settle(failed, error)
            else:
                with self.changed:
                    self.is_solving = False
                    self.changed.notify_all()

    def take(self, running: int) -> list[Ticket]:
        """Tickets for free rows. While no row runs it waits for some; none then means that the service has ended."""
        while True:
            with self.changed:
                gone = self.swept() if not running or time.monotonic() >= self.next_sweep else []
                taken = [self.waiting.popleft() for _ in range(min(self.room(), len(self.waiting)))]
                self.solving.update(taken)
                has_ended = not self.is_open and not self.waiting and not self.decoding
                if gone or taken:
                    self.changed.notify_all()
                elif not running and not has_ended:
                    self.changed.wait(self.patience())
            settle(gone, late())
            if taken or running or has_ended:
                return taken

    def swept(self) -> list[Ticket]:
        """Take those that nobody wants any more out of the queue."""
        self.next_sweep = time.monotonic() + SWEEP
        gone = [ticket for ticket in self.waiting if ticket.is_gone()]
        for ticket in gone:
            self.waiting.remove(ticket)
        return gone

    def room(self) -> int:
        """Rows that may start now."""
        return self.capacity - len(self.solving) - max(0, len(self.decoding) - 2 * self.decode_batch)

    def patience(self) -> float | None:
        """Seconds to the first deadline in the queue."""
        first = min((ticket.deadline for ticket in self.waiting), default=math.inf)
        return None if first == math.inf else min(max(0.0, first - time.monotonic()), TIMEOUT_MAX)

    def hand_over(self, tickets: list[Ticket]) -> None:
        """Finished rows go to the decoding thread; those that were dropped end here."""
        with self.changed:
            self.solving.difference_update(tickets)
            self.decoding.extend(ticket for ticket in tickets if ticket.sample is not None)
            self.changed.notify_all()
        settle((ticket for ticket in tickets if ticket.sample is None), late())

    # --- the decoding thread -------------------------------------------------------------------------------------

    def decode(self) -> None:
        """Decode until nothing more can come. A ticket stays in ``decoding`` until it is settled."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.decoding or not self.is_solving)
                self.changed.wait_for(lambda: not self.waiting or len(self.decoding) >= self.decode_batch, GATHER)
                tickets = list(islice(self.decoding, self.decode_batch))
            if not tickets:
                return
            again = self.finish(tickets)
            with self.changed:
                for _ in tickets:
                    self.decoding.popleft()
                self.waiting.extendleft(again)
                self.changed.notify_all()

    def finish(self, tickets: list[Ticket]) -> list[Ticket]:
        """Decode together what somebody still wants, and settle all but those that go on to their next candidate."""
        gone = [ticket for ticket in tickets if ticket.is_gone()]
        settle(gone, late())
        wanted = [ticket for ticket in tickets if ticket not in gone]
        try:
            samples = self.render([ticket.sample for ticket in wanted if ticket.sample is not None])
            again = confirm(wanted, samples)
        except Exception as error:
            settle(wanted, error)
            return []
        for ticket in wanted:
            if ticket.sample is not None:
                settle([ticket], ticket.sample)
        return again


def settle(tickets: Iterable[Ticket], end: Sample | Exception) -> None:
    """Give futures their end. Those that were cancelled before keep that, and whoever waits for them hears of it."""
    for ticket in tickets:
        future = ticket.future
        if future is None or not future.set_running_or_notify_cancel():
            continue
        try:
            if isinstance(end, Exception):
                future.set_exception(end)
            else:
                future.set_result(end)
        except BaseException:  # of a callback: SystemExit, say, which is not for this thread
            log.exception("a callback of a future failed")


def seconds(name: str, number: float | None) -> float:
    """How long something may take; None, like infinity, is without end."""
    if number is None:
        return math.inf
    try:
        if not math.isnan(number):
            return float(number)
    except TypeError:
        pass
    raise RequestError(f"{name} is {number!r}: give seconds as a number, or None")


def late() -> DeadlineError:
    return DeadlineError("the deadline passed before the sample was finished: allow more seconds, or submit less")
