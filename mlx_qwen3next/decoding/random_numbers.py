"""Random numbers that belong to a key and a position in the sequence.

They are MLX's: those that ``mx.random`` gives after a seed made of key and position.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_WORD = 2**32
_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def seed(key: int, position: int) -> None:
    """Seeds the global random state."""
    mx.random.seed(key << 32 | position)


def uniform(key: int, position: int) -> float:
    """The first number that ``mx.random.uniform`` draws after :func:`seed`.

    It is computed on the host, in 20 µs, so that a draw queues no launch for it.
    """
    seeded = key, position
    drawn = _threefry(seeded, (0, 2))[1], _threefry(seeded, (1, 3))[1]  # mx.random.split's second
    number = np.float32(_threefry(drawn, (0, 0))[0]) / np.float32(_WORD)
    return float(min(number, _BELOW_ONE))


def _threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3")."""
    keys = *key, key[0] ^ key[1] ^ 0x1BD11BDA
    a, b = (counter[0] + keys[0]) % _WORD, (counter[1] + keys[1]) % _WORD
    for i in range(5):
        for bits in _ROTATIONS[i % 2]:
            a = (a + b) % _WORD
            b = (b << bits | b >> (32 - bits)) % _WORD ^ a
        a, b = (a + keys[(i + 1) % 3]) % _WORD, (b + keys[(i + 2) % 3] + i + 1) % _WORD
    return a, b
