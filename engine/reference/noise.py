"""Normal numbers as a pure function of (seed, stream): Philox words and the Box-Muller transform.

Nothing depends on the batch, the slot, the order or a global generator, so that a request gives the same
picture on every machine and in every version. The words are exact; between math libraries the normals agree to the
last bit of float32 or its neighbour.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box and Muller, 1958.
"""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray as Array

# Of words 2 and 0, which become words 0 and 2; and of the key's words 0 and 1.
MULTIPLIERS = np.array([0xCD9E8D57, 0xD2511F53], np.uint64).reshape(2, 1, 1)
WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64).reshape(2, 1, 1)
LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
SEED_LIMIT = 2**64
# Numbers that are drawn together: so many words and their halves stay in a processor's second cache.
IN_CACHE = 8192


def philox(seed: int, stream: int, blocks: int) -> Array:
    """Words of Philox4x32-10 (blocks, 4) uint32: key = seed, counter = (block, 0, stream, stream >> 32)."""
    return philox_many([seed], [stream], blocks)[0]


def philox_many(seeds: Sequence[int], streams: Sequence[int], blocks: int) -> Array:
    """``philox`` of m pairs of a seed and a stream at once: (m, blocks, 4) uint32."""
    for seed, stream in zip(seeds, streams, strict=True):
        if not (0 <= seed < SEED_LIMIT and 0 <= stream < SEED_LIMIT):
            raise ValueError(f"seed {seed} or stream {stream} is out of range: expected 0 <= value < 2**64")
    stream, seed = (np.array(values, np.uint64)[:, None] for values in (streams, seeds))
    # The counter's words 0 and 2, and 1 and 3: a round does the same to both of a pair.
    even, odd = np.zeros((2, 2, len(seeds), blocks), np.uint64)
    even[0], even[1], odd[1] = np.arange(blocks, dtype=np.uint64), stream & LOW, stream >> SHIFT
    key = np.stack([seed & LOW, seed >> SHIFT])
    for _ in range(10):
        product = MULTIPLIERS * even[::-1]
        even, odd = product >> SHIFT ^ odd ^ key, product & LOW
        key = key + WEYL & LOW
    return np.stack([even[0], odd[0], even[1], odd[1]], axis=2).astype(np.uint32)


def normals(seed: int, stream: int, n: int) -> Array:
    """``n`` standard normal numbers, float32. Computed in float64 and rounded once.

    Words (a, b) give sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v) with u = (a + 1/2) / 2^32, v = b / 2^32.
    """
    return normals_many([seed], [stream], n)[0]


def normals_many(seeds: Sequence[int], streams: Sequence[int], n: int) -> Array:
    """``normals`` of m pairs of a seed and a stream at once: (m, n). A row does not depend on the others."""
    most = max(1, IN_CACHE // max(n, 1))
    if len(seeds) > most:
        parts = (slice(first, first + most) for first in range(0, len(seeds), most))
        return np.concatenate([normals_many(seeds[part], streams[part], n) for part in parts])
    blocks = -(-n // 4)
    words = philox_many(seeds, streams, blocks).reshape(len(seeds), 2 * blocks, 2).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((words[..., 0] + 0.5) * 2.0**-32))
    angle = words[..., 1] * (2.0**-31 * np.pi)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
    return pairs.reshape(len(seeds), 4 * blocks)[:, :n].astype(np.float32)
