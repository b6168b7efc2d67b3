"""The GPU, as it is found: its facts, its clock, and what bounds an evaluation on it."""

import shutil
import subprocess
from collections.abc import Mapping

from engine.cuda.compile import nvrtc_version
from engine.cuda.driver import VERSION, Device
from engine.runtimes.packages import installed

PACKAGES = ("cuda-core", "torch", "jax", "diffrax", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx",
            "cupy-cuda13x")
# Sustained rates of one H100 SXM, from its data sheet and published measurements, not from this engine. Bytes from L2,
# where the weights of a field stay, and operations by the precision of the operands.
L2_BYTES = {(9, 0): 5.5e12}
FLOPS = {(9, 0): {"fp32": 50e12, "tf32": 330e12, "fp16": 750e12}}


def facts(device: Device) -> dict:
    return {
        "gpu": device.name,
        "capability": ".".join(map(str, device.capability)),
        "driver": device.driver_version,
        "processors": device.attribute("MULTIPROCESSOR_COUNT"),
        "l2_megabytes": device.attribute("L2_CACHE_SIZE") / 2**20,
    }


def versions() -> dict[str, str]:
    return {"cuda": VERSION, "nvrtc": ".".join(map(str, nvrtc_version())), **installed(PACKAGES)}


def clock() -> dict[str, float]:
    """The clocks and the power at this moment, by nvidia-smi: MHz and W; nothing where it is not installed."""
    fields = ("clocks.sm", "clocks.mem", "power.draw")
    if shutil.which("nvidia-smi") is None:
        return {}
    asked = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", "0"]
    line = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    try:
        return {name: float(part) for name, part in zip(fields, line.split(","), strict=True)}
    except ValueError:  # a field that this GPU does not tell
        return {}


def floor(device: Device, cost: Mapping[str, float], precision: str) -> float | None:
    """Milliseconds that an evaluation of this ``cost`` (engine.bench.solving) takes at least; None for other GPUs."""
    if device.capability not in FLOPS:
        return None
    size = 0.5 if precision == "fp16" else 1.0
    flops, l2 = FLOPS[device.capability][precision], L2_BYTES[device.capability]
    return 1e3 * max(cost["bytes"] * size / l2, cost["flops"] / flops)
