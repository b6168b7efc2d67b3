"""Latents and pictures that stay on the device: tensors of torch or cupy in, tensors out, by DLPack."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray as Array

from engine.batch import Start
from engine.condition import Condition
from engine.cuda.dlpack import DeviceArray, borrow, empty
from engine.cuda.driver import Launch
from engine.cuda.field import OnDevice
from engine.cuda.memory import Region
from engine.cuda.solve import Tickets
from engine.errors import RequestError
from engine.requests import Request
from engine.runtimes.decoding import Pictures, noise_sides
from engine.sampler import Sampler
from engine.spaces import Space

Conditions = Condition | str | Sequence[Condition | str]


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """n rows: z (n, z_dim), or None where the flow ran in W, and w (n, w_dim), both on the device; the rest is numpy.

    energy (n,) -log p, status (n,), and evaluations (n,)
    """

    z: DeviceArray | None
    w: DeviceArray
    energy: Array
    status: Array
    evaluations: Array


def solve_tensors(sampler: Sampler, conditions: Conditions, *, z: Any = None, w: Any = None,
                  label: int | None = None) -> Solved:
    """Solve from latents on the device, z (n, z_dim) or w (n, w_dim), float32 in C order; their owner keeps them.

    conditions   one for all rows, or one for each

    Take the results with ``torch.from_dlpack(solved.w)``. Raises RequestError if the sampler does not run on the
    device, if a tensor does not fit, or for ``near`` and ``keep``, whose anchors are on the host: see Sampler.edit.
    """
    return solved(sampler, conditions, z, w, label, lambda w: None)


def sample_tensors(sampler: Sampler, conditions: Conditions, *, z: Any = None, w: Any = None,
                   label: int | None = None) -> tuple[Solved, DeviceArray]:
    """``solve_tensors`` and the pictures (n, H, W, C) uint8, all on the device: the host waits once, at the end.

    Noise inputs of the synthesis, where a bundle has them, are zero.
    """
    stepper, pictures, g = on_device(sampler), sampler.runtime.drawing.on_device(), sampler.bundle.generator
    pixels: list[DeviceArray] = []

    def draw(latents: DeviceArray) -> None:
        shape = len(latents), g.resolution, g.resolution, g.img_channels
        pixels.append(empty(stepper.engine.device, shape, np.uint8))
        pictures.device.follow(stepper.engine.device)
        enqueue(pictures, latents, pixels[0], g.num_ws)

    with pictures.lock:
        found = solved(sampler, conditions, z, w, label, draw)
        pictures.device.synchronize()
    return found, pixels[0]


def enqueue(pictures: Pictures, latents: DeviceArray, pixels: DeviceArray, num_ws: int) -> None:
    """Decode w (n, w_dim) into pixels on the decoder's stream."""
    assert pictures.kernel is not None
    device, decoder, (_, height, width, channels) = pictures.device, pictures.decoder, pixels.shape
    row = latents.shape[1] * latents.dtype.itemsize
    first, count = 0, len(latents)
    for name, side in noise_sides(pictures.bundle).items():
        device.fill(decoder.addresses[name], 4 * decoder.rows[0] * side**2)
    while first < count:
        # A decoder of one fixed size also decodes rows that nobody asked for.
        rows = next((n for n in decoder.rows if n <= count - first), decoder.rows[-1])
        wanted = min(rows, count - first)
        for i in range(num_ws):
            target, source = decoder.addresses["ws"] + i * row, latents.address + first * row
            device.spread(target, num_ws * row, source, row, wanted)
        decoder.enqueue(rows)
        images, out = decoder.addresses["image"], pixels.address + first * height * width * channels
        arguments = (ctypes.c_void_p(images), ctypes.c_void_p(out), ctypes.c_int(wanted), ctypes.c_int(channels),
                     ctypes.c_int(height * width))
        kernel, threads = pictures.kernel
        device.launch(Launch("pixels_f32", kernel, (-(-wanted * height * width // threads),), threads, arguments))
        first += wanted


def on_device(sampler: Sampler) -> OnDevice:
    return sampler.runtime.solving.on_device(sampler.flows.solver, sampler.capacity)


def solved(sampler: Sampler, conditions: Conditions, z: Any, w: Any, label: int | None,
           then: Callable[[DeviceArray], None]) -> Solved:
    """``then`` is given w when the solve has been started, to put more work behind it."""
    stepper = on_device(sampler)
    if (z is None) == (w is None):
        raise RequestError("give z or w, and not both")
    engine, g = stepper.engine, sampler.bundle.generator
    space = sampler.starts.space("z" if w is None else "w")
    latents = borrow(engine.device, z if w is None else w, space.width, space.name)
    n, width = latents.shape
    several = [conditions] * n if isinstance(conditions, Condition | str) else list(conditions)
    if len(several) != n:
        raise RequestError(f"there are {len(several)} conditions for {n} rows: give one, or one for each row")
    starts = begin(sampler, several, space, label)
    found = {"result_w": empty(engine.device, (n, g.w_dim), np.float32)}
    if space.name == "z":
        found["result_z"] = empty(engine.device, (n, width), np.float32)

    def keep(results: Region) -> None:
        for name, array in found.items():
            engine.device.move(array.address, results[name], array.nbytes)
        then(found["result_w"])

    zeros = np.zeros((n, width), np.float32)
    psi, labels = (np.array([getattr(start, name) for start in starts]) for name in ("psi", "label"))
    tickets = Tickets(zeros, psi, labels, np.zeros(n), zeros, zeros, [start.tape for start in starts], latents)
    ends = engine.solve(tickets, stepper.solver, space=space, capacity=stepper.capacity, then=keep)
    return Solved(found.get("result_z"), found["result_w"], 0 - ends.logp, ends.status, ends.counters[:, 1])


def begin(sampler: Sampler, conditions: Sequence[Condition | str], space: Space, label: int | None) -> list[Start]:
    """A start for each row, of which all but the latent counts; rows with the same condition share one."""
    one_of, here = {}, np.zeros(space.width, np.float32)
    for text in dict.fromkeys(conditions):
        request = Request(text, z=here, label=label) if space.name == "z" else Request(text, w=here, label=label)
        tape = sampler.starts.lower(request.expression, space)
        if tape.near or tape.anchors:
            raise RequestError(f"{request.expression} holds on to an anchor, which is on the host: use Sampler.edit")
        one_of[text] = sampler.starts.start(request)
    return [one_of[text] for text in conditions]
