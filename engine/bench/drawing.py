"""Suites with pictures and fresh processes: decode, end to end, cold start, memory."""

import io
from functools import partial
from typing import Any

import numpy as np
from numpy import ndarray as Array

from engine.bench.contest import Answer, Bench, Openers, Run
from engine.bench.probes import cold_start, peak_memory
from engine.bench.problem import GUIDANCE, Problem, ordinary
from engine.bench.solving import examine_solve, setting
from engine.bench.timing import summary
from engine.bundle import Bundle
from engine.pictures import to_image
from engine.runtimes import open_runtime
from engine.sampler import Sampler

# Several pictures in a call are measured up to this side only.
SEVERAL_ROWS, SEVERAL_SIDE = 8, 256
PSNR = 45.0  # dB, against the picture that the original network gave in float32
PROBES, PROBES_QUICK = 5, 1
MEGA = 1e6


def decode(bench: Bench) -> None:
    """w to pictures, judged by the golden picture of the bundle."""
    for bundle in bench.pictured:
        for rows in (1, SEVERAL_ROWS) if bundle.generator.resolution <= SEVERAL_SIDE and not bench.quick else (1,):
            ws = golden_ws(bundle, rows)
            openers: Openers = {name: partial(open_decode, bench, bundle, ws, **settings)
                                for name, settings in bench.ours(pictures=True).items()}
            line = {"suite": "decode", **of_pictures(bundle), "rows": rows}
            bench.contest(line, {**openers, **bench.peers.decoders(bundle, ws)}, partial(examine_picture, bundle))


def of_pictures(bundle: Bundle) -> dict[str, Any]:
    return {"world": bundle.path.stem, "bundle": bundle.hash[:12], "resolution": bundle.generator.resolution}


def golden_ws(bundle: Bundle, rows: int) -> Array:
    """The golden w, again and again: (rows, num_ws, w_dim)."""
    w = np.resize(bundle.golden["mapping.w"], (rows, bundle.generator.w_dim))
    return np.ascontiguousarray(np.repeat(w[:, None], bundle.generator.num_ws, axis=1))


def open_decode(bench: Bench, bundle: Bundle, ws: Array, runtime: str = "auto", precision: str | None = None) -> Run:
    opened = open_runtime(bundle, runtime, threads=bench.threads, precision=precision)
    return lambda: opened.drawing.synthesize(ws)


def examine_picture(bundle: Bundle, images: Array) -> dict[str, Any]:
    """The first picture against the golden one, over the golden one's range."""
    golden = bundle.golden["synthesis.image"][0].astype(float)
    span = max(2.0, float(golden.max() - golden.min()))
    psnr = float(-10 * np.log10(max(np.mean(np.square((images[0] - golden) / span)), 1e-30)))
    return {"psnr": psnr, "check": "passed" if psnr >= PSNR else f"PSNR below {PSNR:g} dB"}


def end_to_end(bench: Bench) -> None:
    """A condition to the bytes of one PNG."""
    for bundle in bench.pictured:
        problem = Problem(bundle, ordinary(bundle, min(3, len(bundle.attributes))), 1)
        openers: Openers = {name: partial(open_picture, bench, problem, **settings)
                            for name, settings in bench.ours(pictures=True).items()}
        line = {**setting("end-to-end", problem), "resolution": bundle.generator.resolution}
        bench.contest(
            line, {**openers, **bench.peers.pictures(bundle, problem)}, partial(examine_solve, bench.judge, problem)
        )


def open_picture(bench: Bench, problem: Problem, **settings) -> Run:
    sampler = Sampler(problem.bundle, threads=bench.threads, guidance=GUIDANCE, **settings)

    def run() -> Answer:
        (sample,) = sampler.sample(problem.requests)
        to_image(sample.image).save(io.BytesIO(), "PNG")
        assert sample.z is not None
        return Answer(sample.z[None], sample.evaluations)

    return run


def cold(bench: Bench) -> None:
    """Import, open and draw the first picture in a fresh process; from its start to the picture."""
    for bundle in bench.pictured:
        line = {"suite": "cold", **of_pictures(bundle), "contestant": "ours"}
        if bench.log.has(line):
            continue
        bench.say(f"cold start of {bundle.path.stem}")
        found = [cold_start(bundle, bench.threads) for _ in range(PROBES_QUICK if bench.quick else PROBES)]
        times = summary([total for total, _ in found])
        parts = {name: float(np.median([part[name] for _, part in found])) for name in found[0][1]}
        bench.log.write([{**line, "unit": "ms", "median": times.median, "q1": times.q1, "q3": times.q3,
                          "repeats": times.repeats, "check": "passed", "details": parts}])


def memory(bench: Bench) -> None:
    """Peak resident memory of a fresh process: opened, sixteen rows solved, one picture drawn."""
    works = [(bench.bundle, 16, False), *((bundle, 1, True) for bundle in bench.pictured)]
    for bundle, rows, draw in works:
        line = {"suite": "memory", "world": bundle.path.stem, "bundle": bundle.hash[:12], "rows": rows,
                "contestant": "ours, with pictures" if draw else "ours"}
        if bench.log.has(line):
            continue
        bench.say(f"memory of {rows} rows of {bundle.path.stem}")
        count = PROBES_QUICK if bench.quick else PROBES
        found = [peak_memory(bundle, bench.threads, rows, draw=draw) / MEGA for _ in range(count)]
        q1, median, q3 = (float(x) for x in np.quantile(found, (0.25, 0.5, 0.75)))
        bench.log.write([{**line, "unit": "MB", "median": median, "q1": q1, "q3": q3, "repeats": count,
                          "check": "passed"}])
