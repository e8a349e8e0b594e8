"""Orthogonal matrices that spread every channel over all others: Hadamard matrices where there is one, and products."""

from __future__ import annotations

import torch
from torch import Tensor


def random_rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64 (size, size), whose entries are as equal in size as can be had.

    A Hadamard matrix with random signs, from Sylvester's and Paley's constructions: for all usual widths of models.
    Else the largest power of two in `size` gives a Hadamard factor, and the rest a random orthogonal one.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    even = size & -size  # the largest power of two that divides it
    power = next((p for p in _powers(even) if _paley(size // p) is not None), None)
    if power is not None:
        core = _paley(size // power)
        assert core is not None
        core = core / (size // power) ** 0.5
    else:
        power, rest = even, size // even
        core, upper = torch.linalg.qr(torch.randn(rest, rest, generator=generator, dtype=torch.float64))
        core = (core * upper.diagonal().sign()).contiguous()
    return signs[:, None] * torch.kron(_sylvester(power) / power**0.5, core)


def _powers(largest: int) -> list[int]:
    """1, 2, 4, ... `largest`, the largest first: the smallest core is found first."""
    return [1 << k for k in range(largest.bit_length() - 1, -1, -1)]


def _sylvester(size: int) -> Tensor:
    """The Hadamard matrix of a power of two, entries 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(step, matrix)
    return matrix


def _paley(size: int) -> Tensor | None:
    """A Hadamard matrix, entries 1 and -1, by Paley's constructions over a prime field; None where they give none."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4:
        return None
    if _is_prime(size - 1):  # size - 1 is 3 modulo 4: the bordered residue matrix is skew
        border = _bordered(size - 1)
        border[1:, 0] = -1
        return border + torch.eye(size, dtype=torch.float64)
    half = size // 2
    if half % 4 == 2 and _is_prime(half - 1):  # half - 1 is 1 modulo 4: it is symmetric
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(half - 1), plus) + torch.kron(torch.eye(half, dtype=torch.float64), diagonal)
    return None


def _bordered(prime: int) -> Tensor:
    """Jacobsthal's matrix of quadratic residues modulo a prime with a border of ones and a zero corner."""
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 0] = 0
    matrix[1:, 1:] = character[(index[:, None] - index) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 2 and all(number % d for d in range(2, int(number**0.5) + 1))
