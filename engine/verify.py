"""Replay a bundle's golden answers on a runtime and compare.

Golden answers were recorded from the original network when the bundle was exported; lace-export refuses to finish,
and lace-verify fails, if a runtime does not reproduce them within the limits below.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from engine.bundle import Bundle
from engine.errors import BackendError, BundleError, RequestError
from engine.runtimes import Drawing, Linearise, Runtime, open_runtime
from engine.validation import averaged_side

PARTS = ("field", "synthesis")
# What runs the sharp stacks of heads; our kernels for a GPU do not yet.
SHARP = ("native", "onnxruntime", "numpy")
# Rows of 1024 px that one synthesis call decodes here: bounds the memory of the check to a few GB.
PIXELS = 2 * 1024 * 1024

# Limits. Measured values (onnxruntime 1.31 on a CPU, random and trained networks) are in brackets.
# float32 answers to a float64 recording, relative to the largest answer [w 5e-7, logits 2e-6]: sums of 512 products
# in another order. A wrong gain, bias or column is wrong by more than 1e-2; TF32 by about 1e-3.
# Runtimes on a GPU can round all operands to 11 bits (tf32, fp16) [w 9e-4, logits 4e-3: emulated]; bf16 is
# for the rows of Jacobian alone.
FIELD_ERROR = {"fp64": 1e-4, "fp32": 1e-4, "bf16": 1e-4, "tf32": 1e-2, "fp16": 1e-2}
# Gradients are compared by quantiles, because rounding can move a unit across the kink of its leaky ReLU, and one of
# 512 derivatives is then 0.2 instead of 1: a few percent of that gradient, and no fault. The median does not see that
# [4e-7]; TF32 products alone give 8e-3. A runtime that uses bfloat16 there [8e-3] has its own limit, and so have 11
# bits in both directions [5e-2, emulated].
GRADIENT_MEDIAN = {"fp64": 1e-4, "fp32": 1e-4, "bf16": 2e-2, "tf32": 1e-1, "fp16": 1e-1}
# Largest relative error among 99 % of all gradients [1e-6]: room for two or three flipped units; with 11 bits in the
# forward pass many flip [0.27, emulated].
GRADIENT_TAIL = {"fp64": 1e-1, "fp32": 1e-1, "bf16": 1e-1, "tf32": 5e-1, "fp16": 5e-1}
# Pictures: error over their range. float32 differs by summation order alone [2e-6].
IMAGE_FP32 = 1e-4
# float16 and bfloat16 keep 11 and 8 bits, and errors add over two layers per resolution: PSNR in dB against the
# float32 original [fp16 74 to 83, bf16 57]. 8-bit pictures are good to 59 dB; a missing normalisation or an overflow
# falls below 30.
# TF32 keeps as many bits as float16; its limits have not been measured on a GPU yet.
IMAGE_PSNR = {"fp16": 55.0, "tf32": 55.0, "bf16": 40.0}
# No pixel may be off by more than this part of the range, or a local failure hides in the mean [fp16 8e-4, bf16 9e-3].
IMAGE_PEAK = {"fp16": 0.02, "tf32": 0.02, "bf16": 0.1}


class ParityError(BundleError):
    """A bundle does not answer as the original network did."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. ``passed`` is None where the runtime cannot run it; ``note`` then says why.

    error and limit are in the same unit; a name that ends in 'psnr' passes at or above the limit, others at or below.
    """

    name: str
    error: float | None
    limit: float
    passed: bool | None
    note: str = ""


def at_most(name: str, error: float, limit: float) -> Check:
    return Check(name, float(error), limit, bool(error <= limit))  # not-a-number does not pass


def at_least(name: str, value: float, limit: float) -> Check:
    return Check(name, float(value), limit, bool(value >= limit))


def not_checked(name: str, limit: float, reason: str) -> Check:
    return Check(name, None, limit, None, reason)


def small(images: Array) -> Array:
    """Box average down to ``averaged_side`` pixels.  (n, C, R, R) -> (n, C, s, s), float32."""
    n, channels, size, _ = images.shape
    side = averaged_side(size)
    boxes = images.reshape(n, channels, side, size // side, side, size // side)
    return boxes.mean(axis=(3, 5), dtype=np.float64).astype(np.float32)


def gradient_errors(gradient: Array, golden: Array) -> Array:
    """(rows, C, dim) twice -> length of the difference over the length of the golden gradient, (rows * C,)."""
    golden = golden.astype(np.float64)
    difference = np.linalg.norm(gradient - golden, axis=2)
    return (difference / np.maximum(np.linalg.norm(golden, axis=2), 1e-12)).ravel()


def relative(answer: Array, golden: Array) -> float:
    return float(np.max(np.abs(answer - golden.astype(np.float64))) / max(np.max(np.abs(golden)), 1e-12))


def check_field(bundle: Bundle, runtime: Runtime) -> Iterator[Check]:
    """w, every attribute's logits, and their gradients in z: each stack's Jacobian and the pullback together."""
    golden, solving = bundle.golden, runtime.solving
    field, used = solving.field(bundle.spaces["z"]), solving.jacobian
    z, psi = (golden[name].astype(solving.dtype) for name in ("z", "psi"))
    w, _ = field.forward(z, psi, golden.get("label"), {})
    yield at_most("w", relative(w, golden["mapping.w"]), FIELD_ERROR[used])
    for name, stack in bundle.stacks.items():
        head, _, sharp = name.partition(".")
        if sharp and solving.name not in SHARP:
            yield not_checked(f"{name} stack", FIELD_ERROR[used], f"{solving.name} runs the smooth stacks alone")
            continue
        _, found = field.forward(z, psi, golden.get("label"), {name: np.eye(stack.widths[-1], dtype=z.dtype)})
        logits, jacobian = found[name]
        ways = {"": (logits, field.pullback(jacobian) if stack.space == "w" else jacobian)}
        if field.linearise and stack.space == "w" and not sharp:
            ways[" in one call"] = linearise_head(field.linearise, name, jacobian.shape[1], z, psi, golden)
        for way, (logits, gradients) in ways.items():
            for attribute in bundle.attributes.values():
                if attribute.head == head:
                    columns = slice(*attribute.columns)
                    answers = {kind: golden[f"head.{name}.{kind}"][:, columns] for kind in ("logits", "gradient")}
                    label = f"{attribute.name}{way}.sharp" if sharp else f"{attribute.name}{way}"
                    yield from check_attribute(label, logits[:, columns], gradients[:, columns], answers, used)


def check_oneshots(bundle: Bundle, runtime: Runtime) -> Iterator[Check]:
    """The latents that one-pass maps make of the stored noise."""
    golden, solving = bundle.golden, runtime.solving
    for name in bundle.oneshots:
        where, limit = f"oneshot.{name}", FIELD_ERROR[solving.jacobian if solving.jacobian != "bf16" else "fp32"]
        try:
            latent = solving.oneshot(name, golden["z"], golden.get(f"{where}.targets"))
        except RequestError as error:
            yield not_checked(where, limit, str(error))
            continue
        yield at_most(where, relative(latent, golden[f"{where}.latent"]), limit)


def linearise_head(linearise: Linearise, head: str, logits: int, z: Array, psi: Array,
                   golden: Mapping[str, Array]) -> tuple[Array, Array]:
    """A head's logits (rows, C) and their gradients (rows, C, z_dim) by the one call for both."""
    rows, seeds = np.arange(len(z)), np.eye(logits, dtype=z.dtype)
    no_near = rows[:0], golden["mapping.w"][:0].astype(z.dtype)
    pair_row, source = np.repeat(rows, logits), np.arange(len(z) * logits)
    _, found, gradients = linearise(z, psi, golden.get("label"), {head: (rows, seeds)}, pair_row, source, *no_near)
    return found[head], gradients.reshape(len(z), logits, -1)


def check_attribute(name: str, logits: Array, gradients: Array, golden: Mapping[str, Array],
                    used: str) -> Iterator[Check]:
    errors = gradient_errors(gradients, golden["gradient"])
    yield at_most(f"{name}.logits", relative(logits, golden["logits"]), FIELD_ERROR[used])
    yield at_most(f"{name}.gradient median", np.median(errors), GRADIENT_MEDIAN[used])
    yield at_most(f"{name}.gradient 99 %", np.quantile(errors, 0.99, method="lower"), GRADIENT_TAIL[used])


def decode(bundle: Bundle, drawing: Drawing) -> Iterator[Array]:
    """The golden rows' pictures, the last alone and the others together as far as memory allows.

    Two batch sizes from one graph: a batch size that the export has frozen is found here. (The larger comes first: a
    runtime's arena then serves both.)
    """
    g, w = bundle.generator, bundle.golden["mapping.w"]
    step, last = max(1, PIXELS // g.resolution**2), len(w) - 1
    for first in (*range(0, last, step), last):
        past = min(first + step, last) if first < last else len(w)
        ws = np.repeat(w[first:past, None], g.num_ws, axis=1)
        yield drawing.synthesize(np.ascontiguousarray(ws))


def check_synthesis(bundle: Bundle, drawing: Drawing) -> Iterator[Check]:
    """Golden pictures: one at full resolution, all of them box-averaged."""
    if "synthesis" not in bundle.manifest.graphs:
        yield not_checked("images", IMAGE_FP32, "the bundle has no synthesis")
        return
    # The coarser of the graph's own types and the runtime's arithmetic.
    used = (bundle.manifest.graphs["synthesis"].get("precision", "fp32"), drawing.precision)
    precision = min((p for p in used if p in IMAGE_PSNR), key=lambda p: IMAGE_PSNR[p], default="fp32")
    averaged, full = [], None
    try:
        for images in decode(bundle, drawing):
            full = images[:1].copy() if full is None else full
            averaged.append(small(images))
    except BackendError as error:
        yield not_checked("images", IMAGE_FP32, str(error))
        return
    assert full is not None
    yield from compare_images("image", full, bundle.golden["synthesis.image"], precision)
    yield from compare_images("images", np.concatenate(averaged), bundle.golden["synthesis.images"], precision)


def compare_images(name: str, images: Array, golden: Array, precision: str) -> Iterator[Check]:
    """Errors relative to the golden range, which is at least the 2 of a displayed picture."""
    span = max(2.0, float(golden.max()) - float(golden.min()))
    difference = np.abs(images.astype(np.float64) - golden) / span
    if precision in IMAGE_PSNR:
        psnr = -10 * np.log10(max(np.mean(difference**2), 1e-30))
        yield at_least(f"{name} psnr", psnr, IMAGE_PSNR[precision])
        yield at_most(f"{name} peak", np.max(difference), IMAGE_PEAK[precision])
    else:
        yield at_most(name, np.max(difference), IMAGE_FP32)


def check_bundle(bundle: Bundle, runtime: str | Runtime = "auto", *, parts: Sequence[str] = PARTS) -> list[Check]:
    """Replay the golden answers; raises BackendError only if the runtime cannot be opened at all."""
    opened = open_runtime(bundle, runtime) if isinstance(runtime, str) else runtime
    checks: list[Check] = []
    if "field" in parts:
        checks.extend(check_field(bundle, opened))
        checks.extend(check_oneshots(bundle, opened))
    if "synthesis" in parts:
        checks.extend(check_synthesis(bundle, opened.drawing))
    return checks
