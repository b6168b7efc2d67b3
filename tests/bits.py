"""What version 0.1 answered on its demo bundle: 12 requests and 4 edits, to the bit.

``python -m tests.bits`` writes the answers of the code that runs it; the file in ``tests/data`` was written by 0.1
(commit 5ca1bed), before the code was moved.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from engine import Request, Sample, Sampler

ANSWERS = Path(__file__).parent / "data" / "answers-0.1.safetensors"

REQUESTS = (
    Request("smile", seed=1),
    Request("~glasses & haircolor=red", seed=2),
    Request("age=0.7", seed=3, truncation=0.5),
    Request("hat | beard", seed=4),
    Request("0.3<age<0.5 & yaw>0.6", seed=5),
    Request("2*hat & smile", seed=6, truncation=1.0),
    Request("smile & near(0.04)", seed=7),
    Request("beard & keep(age, yaw)", seed=8),
    Request("gender=male & keep(*)", seed=9),
    Request(None, seed=10),
    Request("~(smile | hat) & light=0.3", seed=11),
    Request("bald & glasses & pitch=0.6", seed=12),
)
EDITS = ("yaw=0.7", "hat", "age=0.8", "~smile")


def answer() -> list[Sample]:
    """The samples of REQUESTS, and four of them edited, the last one from w."""
    with Sampler("demo", solver="gauss-newton", precision="fp32") as sampler:
        samples = sampler.sample(REQUESTS)
        edited = [sampler.edit(sample, wanted, method="flow")[0]
                  for sample, wanted in zip(samples[:3], EDITS[:3], strict=True)]
        from_w = sampler.sample([Request("smile", w=samples[4].w)])
        return [*samples, *edited, *sampler.edit(from_w, EDITS[3], method="flow")]


def tensors(samples: list[Sample]) -> dict[str, np.ndarray]:
    """latents (16, w_dim) float32, pictures (16, R, R, 3) uint8, evaluations (16,)."""
    return {
        "w": np.stack([sample.w for sample in samples]),
        "image": np.stack([sample.image for sample in samples if sample.image is not None]),
        "evaluations": np.array([sample.evaluations for sample in samples]),
    }


if __name__ == "__main__":
    save_file(tensors(answer()), ANSWERS)
