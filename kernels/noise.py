"""Normal numbers as a pure function of (seed, stream): Philox words and the Box-Muller transform.

Nothing depends on the batch, the slot, the order or a global generator, so that a request gives the same
picture anywhere, for ever. The words are exact; the normals agree to the last bit of float32 or its
neighbour between math libraries.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box and Muller, 1958.
"""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray as Array

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
SEED_LIMIT = 2**64


def philox(seed: int, stream: int, blocks: int) -> Array:
    """Words of Philox4x32-10 (blocks, 4) uint32: key = seed, counter = (block, 0, stream, stream >> 32)."""
    return philox_many([seed], [stream], blocks)[0]


def philox_many(seeds: Sequence[int], streams: Sequence[int], blocks: int) -> Array:
    """``philox`` of m pairs of a seed and a stream at once: (m, blocks, 4) uint32."""
    for seed, stream in zip(seeds, streams, strict=True):
        if not (0 <= seed < SEED_LIMIT and 0 <= stream < SEED_LIMIT):
            raise ValueError(f"seed {seed} or stream {stream} is out of range: expected 0 <= value < 2**64")
    stream, seed = (np.array(values, np.uint64)[:, None] for values in (streams, seeds))
    block = np.broadcast_to(np.arange(blocks, dtype=np.uint64), (len(seeds), blocks))
    counter = [block, np.zeros_like(block), stream & LOW, stream >> SHIFT]
    key = [seed & LOW, seed >> SHIFT]
    for _ in range(10):
        first, second = MULTIPLIERS[0] * counter[0], MULTIPLIERS[1] * counter[2]
        counter = [
            (second >> SHIFT) ^ counter[1] ^ key[0],
            second & LOW,
            (first >> SHIFT) ^ counter[3] ^ key[1],
            first & LOW,
        ]
        key = [(k + weyl) & LOW for k, weyl in zip(key, WEYL, strict=True)]
    return np.stack(counter, axis=2).astype(np.uint32)


def normals(seed: int, stream: int, n: int) -> Array:
    """``n`` standard normal numbers, float32. Computed in float64 and rounded once.

    Words (a, b) give sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v) with u = (a + 1/2) / 2^32, v = b / 2^32.
    """
    return normals_many([seed], [stream], n)[0]


def normals_many(seeds: Sequence[int], streams: Sequence[int], n: int) -> Array:
    """``normals`` of m pairs of a seed and a stream at once: (m, n). A row does not depend on the others."""
    blocks = -(-n // 4)
    words = philox_many(seeds, streams, blocks).reshape(len(seeds), 2 * blocks, 2).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((words[..., 0] + 0.5) * 2.0**-32))
    angle = words[..., 1] * (2.0**-31 * np.pi)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
    return pairs.reshape(len(seeds), 4 * blocks)[:, :n].astype(np.float32)
