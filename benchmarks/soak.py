"""Many threads, one sampler, for a long time: is every request answered once, and does memory stay flat?

    python -m benchmarks.soak --minutes 20 [--threads 8] [--bundle demo] > soak.json

Each thread submits random requests: plain ones, ones with a deadline, ones that it cancels, and invalid ones. Every
future must come to exactly one end, the right kind of end, with the sample of its own request; samples are drawn at
random and solved again alone, which must give the same bits. Ends with 1 if anything was lost, doubled or different.
"""

import argparse
import gc
import json
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np

from engine import DeadlineError, LaceError, QueueFullError, Request, Sample, Sampler
from engine.bundle import Attribute
from engine.origin import commit, machine, versions

OUTSTANDING = 24  # futures that a thread keeps at a time: all threads together fill the batch and the queue
CHECKED, KEPT = 0.01, 500  # part of the samples that are solved again, and how many at most: memory is measured
WARM_UP = 0.25  # part of the time after which memory is compared
GROWTH = 0.02


@dataclass
class Ledger:
    """What became of the requests; shared by the threads."""

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def fault(self, text: str) -> None:
        with self.lock:
            self.faults.append(text)


def statement(random: Random, attribute: Attribute) -> str:
    if attribute.kind == "class":
        return f"{'~' * random.randrange(2)}{attribute.name}={random.choice(attribute.classes)}"
    value = round(random.uniform(-0.2, 1.2), 3)  # some out of reach
    return f"{attribute.name}{random.choice('=<>')}{value}"


def condition(random: Random, attributes: list[Attribute]) -> str:
    chosen = random.sample(attributes, random.randint(1, min(6, len(attributes))))
    text = random.choice((" & ", " & ", " | ")).join(statement(random, attribute) for attribute in chosen)
    return f"({text})" + random.choice(("", "", "", " & near(0.04)", " & keep(*, weight=0.01)"))


def request(random: Random, sampler: Sampler) -> Request:
    attributes = list(sampler.bundle.attributes.values())
    start: dict = {"seed": random.randrange(2**40)}
    if random.random() < 0.05:
        start["w"] = np.array([random.gauss(0, 0.5) for _ in range(sampler.bundle.generator.w_dim)], np.float32)
    wanted = None if random.random() < 0.02 else condition(random, attributes)
    return Request(wanted, truncation=random.choice((None, 0.5, 1.0)), **start)


def submit_invalid(random: Random, sampler: Sampler, ledger: Ledger) -> None:
    """A request that must be refused at once."""
    wrong = random.choice((
        lambda: Request("no_such_attribute"),
        lambda: Request("smile &"),
        lambda: Request(None, z=np.zeros(3, np.float32)),
        lambda: Request(None, z=np.full(sampler.bundle.generator.z_dim, np.nan, np.float32)),
        lambda: Request(None, label=10**6),
        lambda: Request(None, seed=-1),
    ))
    try:
        sampler.submit(wrong())
    except (LaceError, ValueError):
        ledger.count("refused")
    else:
        ledger.fault("an invalid request was accepted")


def submit(random: Random, sampler: Sampler, ledger: Ledger) -> tuple[Request, Future, str] | None:
    """A valid request, and how it may end: 'finished' always, 'late' or 'cancelled' too."""
    wanted = request(random, sampler)
    kind = random.choices(("finished", "late", "cancelled"), (70, 15, 15))[0]
    deadline = random.choice((0.0, 0.002, 0.02, 0.1, 60.0)) if kind == "late" else None
    block = random.random() < 0.9
    try:
        future = sampler.submit(wanted, deadline=deadline, block=block, timeout=random.choice((None, 60.0)))
    except QueueFullError:
        ledger.count("turned away")
        return None
    ledger.count("submitted")
    future.add_done_callback(lambda _: ledger.count("ended"))
    return wanted, future, kind


def settle(random: Random, ledger: Ledger, wanted: Request, future: Future, kind: str) -> None:
    """Wait for one future and book its end."""
    try:
        sample = future.result(timeout=120)
    except CancelledError:
        end = "cancelled"
    except DeadlineError:
        end = "late"
    except TimeoutError:
        ledger.fault(f"a request got no answer in 120 s: {wanted.condition}")
        return
    except Exception as error:
        ledger.fault(f"{type(error).__name__}: {error}")
        return
    else:
        end = "finished"
        if sample.request is not wanted or sample.image is None:
            ledger.fault("a future holds the sample of another request, or no picture")
        if random.random() < CHECKED:
            with ledger.lock:
                if len(ledger.samples) < KEPT:
                    ledger.samples.append(replace(sample, image=None))
    if end not in ("finished", kind):
        ledger.fault(f"a request that was to be {kind} is {end}")
    ledger.count(end)


def client(sampler: Sampler, ledger: Ledger, stop: threading.Event, seed: int) -> None:
    random = Random(seed)
    own: deque = deque()
    try:
        while not stop.is_set():
            if random.random() < 0.1:
                submit_invalid(random, sampler, ledger)
            elif (entry := submit(random, sampler, ledger)) is not None:
                own.append(entry)
            for _, future, kind in random.sample(own, min(len(own), 2)):
                if kind == "cancelled":
                    future.cancel()
            while len(own) > OUTSTANDING:
                settle(random, ledger, *own.popleft())
        for entry in own:
            settle(random, ledger, *entry)
    except Exception as error:  # a thread that dies in silence would pass for one with nothing to do
        ledger.fault(f"a client ended with {type(error).__name__}: {error}")


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def differing(sampler: Sampler, samples: list[Sample]) -> int:
    """How many differ in a bit from the solve of the same request alone."""
    return sum(not np.array_equal(sampler.solve(sample.request)[0].w, sample.w) for sample in samples)


def run(sampler: Sampler, *, seconds: float, threads: int, seed: int = 0) -> dict:
    """Soak ``sampler``, close it, and report."""
    ledger, stop, memory = Ledger(), threading.Event(), []
    clients = [threading.Thread(target=client, args=(sampler, ledger, stop, seed + i)) for i in range(threads)]
    begun = time.monotonic()
    for thread in clients:
        thread.start()
    while (elapsed := time.monotonic() - begun) < seconds:
        stop.wait(min(1.0, seconds / 50))
        gc.collect()
        memory.append((elapsed, resident()))
    memory.append((seconds, resident()))
    last = sampler.submit(request(Random(seed), sampler))
    stop.set()
    for thread in clients:
        thread.join()
    sampler.close()
    lost = ledger.counts["submitted"] - ledger.counts["ended"]
    answered = sum(ledger.counts[end] for end in ("finished", "late", "cancelled"))
    warm = [size for at, size in memory if at >= WARM_UP * seconds]
    part = max(1, len(warm) // 10)
    growth = float(np.median(warm[-part:]) / np.median(warm[:part]) - 1)
    checks = {
        "every future came to one end": lost == 0 and answered == ledger.counts["submitted"],
        "close finished what was submitted before": wait([last], timeout=0).done == {last},
        "no fault": not ledger.faults,
        "same bits as a solve alone": differing(sampler, ledger.samples) == 0,
    }
    return {"seconds": time.monotonic() - begun, "threads": threads, "counts": dict(ledger.counts),
            "finished_per_second": ledger.counts["finished"] / seconds, "solved_again": len(ledger.samples),
            "memory": {"warm_mib": float(np.median(warm[:part]) / 2**20),
                       "end_mib": float(np.median(warm[-part:]) / 2**20), "growth": growth},
            "faults": ledger.faults[:10], "checks": checks}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=20.0, metavar="N", help="how long (20)")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="that submit (8)")
    parser.add_argument("--bundle", default="demo", metavar="BUNDLE", help="a bundle (demo)")
    parser.add_argument("--runtime", default="auto", metavar="NAME", help="of the sampler (auto)")
    parser.add_argument("--capacity", type=int, default=64, metavar="N", help="rows in flight (64)")
    parser.add_argument("--queue-size", type=int, default=128, metavar="N", help="requests that may wait (128)")
    return parser


def main() -> int:
    options = build_parser().parse_args()
    sampler = Sampler(options.bundle, runtime=options.runtime, capacity=options.capacity, queue_size=options.queue_size)
    found = run(sampler, seconds=60 * options.minutes, threads=options.threads)
    found["checks"]["memory is flat"] = found["memory"]["growth"] < GROWTH
    body = {"benchmark": "soak", "sampler": repr(sampler), **found, "machine": machine(), "versions": versions(),
            "commit": commit()}
    json.dump(body, sys.stdout, indent=1)
    return 0 if all(found["checks"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
