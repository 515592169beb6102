"""Orthogonal matrices: principal components of a covariance, random, Hadamard-like. All fp64 in, fp32 out."""

from __future__ import annotations

import torch

DAMPING = 0.01  # of the mean diagonal, as the released code adds it before eigh


def pca(covariance: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Eigenvectors of a covariance, [D, D] fp64, as columns in descending order of eigenvalue (paper, section on PCA).

    The sign makes each column's largest entry positive, so that equal statistics give equal bits.
    """
    damped = covariance + damping * covariance.diagonal().mean() * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device)
    vectors = torch.linalg.eigh(damped).eigenvectors.flip(-1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).float()


def variances(covariance: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What lies along each column of q, [D, D], of a covariance, [D, D] fp64: the diagonal of Q^T C Q, [D] fp32."""
    q = orthonormal(q.to(covariance.device))
    return (q * (covariance @ q)).sum(0).clamp_min(0).float()


def orthonormal(q: torch.Tensor) -> torch.Tensor:
    """The fp64 rotation next to an fp32 one, [..., D, D]: a Newton-Schulz step takes |Q^T Q - I| from 1e-7 to 1e-14.

    Plans hold fp32. What folding and un-rotating assume, Q Q^T = I, must hold beyond the rounding of the model's own
    dtype, because Top-K turns any difference at the threshold into a whole channel.
    """
    q = q.double()
    return 1.5 * q - 0.5 * q @ (q.mT @ q)


def random(size: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A rotation drawn from the Haar measure, [size, size] fp32: QR of a Gaussian with R's diagonal made positive."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64).to(device))
    return (q * r.diagonal().sign()).float()


def hadamard(size: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A randomised Hadamard rotation, [size, size] fp32: random signs times H(2^a) x C(m), size = m 2^a, m odd.

    H is Sylvester's matrix. Where size is no power of two its odd part takes the discrete Hartley matrix C, orthogonal
    and dense with entries of similar size, because Hadamard matrices of many even orders are unknown.
    """
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    odd = size // power
    angle = 2 * torch.pi * torch.outer(*[torch.arange(odd, dtype=torch.float64, device=device)] * 2) / odd
    matrix = torch.kron(matrix, angle.cos() + angle.sin()) / size**0.5
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (signs.to(device) * matrix).float()
