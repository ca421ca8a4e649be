"""Random numbers as pure functions of what they are for: (seed, epoch, purpose, key), never of timing or of threads.

A counter-based generator (splitmix64; Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014) on 64-bit hashes, vectorised over samples. No library's distributions are used, so that the same seed gives the
same order and the same crops with every version of every library.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hash_of(*parts: int | str) -> int:
    """64 bits that stand for these parts, in this order."""
    return int.from_bytes(_digest("\0".join(map(str, parts)).encode()), "little")


def sample_hashes(keys: Sequence[str], *parts: int | str) -> Hashes:
    """`hash_of(*parts, key)` for every key, uint64 [n]."""
    prefix = "".join(f"{part}\0" for part in parts)
    return np.frombuffer(b"".join(_digest((prefix + key).encode()) for key in keys), dtype="<u8").astype(np.uint64)


def bits(hashes: Hashes, num: int) -> Hashes:
    """`num` random words for each hash, uint64 [..., num]."""
    counter = np.arange(1, num + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        words = hashes[..., None] + counter * _GOLDEN_GAMMA
        words = (words ^ (words >> np.uint64(30))) * _MIX_1
        words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return np.asarray(words ^ (words >> np.uint64(31)))


def uniforms(hashes: Hashes, num: int) -> NDArray[np.float64]:
    """`num` uniform numbers in [0, 1) for each hash, float64 [..., num]."""
    return np.asarray((bits(hashes, num) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def permutation(hash_: int, num: int) -> NDArray[np.int64]:
    """A random order of 0..num-1."""
    return np.argsort(bits(np.array(hash_, np.uint64), num), kind="stable").astype(np.int64)


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).digest()
