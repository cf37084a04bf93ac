"""The cosines of the DCT-II, from which attacks in the frequency domain build their patterns; no attack itself."""

import math

import torch
from torch import Tensor


def cosines(size: int) -> Tensor:
    """Float64 (size, size): row k is the k-th vector of the orthonormal DCT-II, so rows @ columns is the identity.

    A coefficient matrix X of an image thus means the pixels cosines(H).T @ X @ cosines(W).

    >>> torch.allclose(cosines(5) @ cosines(5).T, torch.eye(5, dtype=torch.float64))
    True
    """
    place = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    waves[0] *= math.sqrt(0.5)
    return waves
