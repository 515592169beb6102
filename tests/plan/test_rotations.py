"""Rotations: orthogonal at every size, the same ones each time, principal components in order."""

import pytest
import torch

from larosa_fx.plan import rotations

SIZES = [1, 2, 3, 12, 32, 576]
EXACT = 1e-5  # fp32 entries of an fp64 matrix


def covariance(size, scale=1.0):
    """A random one with well separated eigenvalues, 1 to 1000, and its eigenvectors."""
    vectors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    values = torch.logspace(0, 3, size, dtype=torch.float64)
    return scale * (vectors * values) @ vectors.T, values, vectors


def signed(vectors):
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [rotations.random, rotations.hadamard, lambda size, _: rotations.pca(covariance(size)[0])],
                         ids=["random", "hadamard", "pca"])
def test_orthogonal(make, size):
    q = make(size, 7)
    assert q.shape == (size, size) and q.dtype == torch.float32
    assert (q.double().T @ q.double() - torch.eye(size)).abs().max() < EXACT


@pytest.mark.parametrize("size", SIZES)
def test_orthonormal_is_the_double_next_to_it(size):
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    polished = rotations.orthonormal(q.float())
    assert polished.dtype == torch.float64
    assert (polished.T @ polished - torch.eye(size)).abs().max() < 1e-12
    assert (polished - q).abs().max() < EXACT


@pytest.mark.parametrize("make", [rotations.random, rotations.hadamard])
def test_seed_decides(make):
    torch.manual_seed(0)
    first = make(24, 3)
    torch.manual_seed(1)
    assert torch.equal(first, make(24, 3))
    assert not torch.equal(first, make(24, 4))


@pytest.mark.parametrize("size", [2, 32, 128])
def test_hadamard_of_a_power_of_two_is_flat(size):
    assert (rotations.hadamard(size, 0).abs() - size**-0.5).abs().max() < EXACT


@pytest.mark.parametrize("size", [12, 96, 576])
def test_hadamard_of_other_sizes_is_nearly_flat(size):
    assert rotations.hadamard(size, 0).abs().max() <= (2 / size) ** 0.5 + EXACT


def test_pca_finds_the_eigenvectors_in_descending_order():
    cov, values, vectors = covariance(32)
    q = rotations.pca(cov)
    torch.testing.assert_close(q.double(), signed(vectors.flip(-1)), atol=1e-5, rtol=0)
    torch.testing.assert_close((q.double().T @ cov @ q.double()).diagonal(), values.flip(-1), rtol=1e-4, atol=1e-4)


def test_pca_makes_each_columns_largest_entry_positive():
    q = rotations.pca(covariance(48)[0])
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()


def test_pca_does_not_depend_on_scale_or_damping():
    cov = covariance(24)[0]
    q = rotations.pca(cov)
    torch.testing.assert_close(rotations.pca(1e6 * cov), q, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotations.pca(cov, damping=0.5), q, atol=1e-5, rtol=0)


def test_pca_follows_permuted_channels():
    cov, order = covariance(24)[0], torch.randperm(24)
    torch.testing.assert_close(rotations.pca(cov[order][:, order]), rotations.pca(cov)[order], atol=1e-5, rtol=0)


def test_pca_of_statistics_without_full_rank():
    x = torch.randn(4, 32, dtype=torch.float64)
    q = rotations.pca(x.T @ x).double()
    assert (q.T @ q - torch.eye(32)).abs().max() < EXACT
    assert ((x @ q)[:, 4:]).abs().max() < 1e-4 * x.abs().max()  # four rows need four components
