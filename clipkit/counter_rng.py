"""Random numbers that are a function of where they are used, not of who drew before.

Every random choice in training (order, crop, jitter, dropped patches, dropped words) belongs to one sample. A number
is therefore computed from (seed, sample position, stream, index) instead of being drawn from a generator's state: any
worker, rank or resumed run computes the same ones, and a whole batch is one vectorised call.

The mixing function is the finaliser of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), a bijection of 64-bit words whose every output bit depends on every input bit.
"""

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
MASK = 0xFFFFFFFFFFFFFFFF
SEEDS = 0xD1B54A32D192ED03  # any odd number

UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]


def mix(values: npt.ArrayLike) -> UInt64Array:
    """SplitMix64's finaliser, element by element: uint64[...] -> uint64[...], at least one-dimensional."""
    x = np.atleast_1d(np.array(values, np.uint64))
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def mix_int(value: int) -> int:
    """`mix` of one Python integer, taken modulo 2**64."""
    return int(mix(value & MASK)[0])


def sample_keys(seed: int, positions_B: npt.ArrayLike) -> UInt64Array:
    """One uint64 key for each sample, from the run's seed and the sample's position (samples seen before it).

    Equal positions of two seeds give unrelated keys. Negative seeds are taken modulo 2**64.
    """
    base = np.uint64(mix_int(mix_int(seed) ^ SEEDS))  # twice, so that no small seed meets a small position
    positions = np.atleast_1d(np.asarray(positions_B)).astype(np.uint64)
    return mix(mix(positions * np.uint64(GOLDEN)) ^ base)


def bits(keys_B: npt.ArrayLike, n: int, stream: int) -> UInt64Array:
    """uint64[B, n] of random bits for each key. Each use has a `stream` number of its own, so that uses never share.

    The first columns don't depend on `n`.
    """
    keys = np.atleast_1d(np.asarray(keys_B, np.uint64))
    start = mix(keys ^ np.uint64(mix_int((stream + 1) * GOLDEN)))
    steps = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return mix(start[:, None] + steps)


def uniform(keys_B: npt.ArrayLike, n: int, stream: int) -> Float64Array:
    """float64[B, n], uniform in [0, 1) with 53 random bits. `stream` as in `bits`."""
    return (bits(keys_B, n, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53
