"""Small layers with known mathematics, for the tests of grids and solve."""

import torch
from torch import Tensor

from leangrid.grids import Grid, NonuniformGrid, fit_affine, fit_minmax, fit_offset
from leangrid.solve.factor import Factor, factorize


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(tokens: int, cols: int, seed: int = 0) -> Tensor:
    """Correlated inputs with a spread of scales, as activations have."""
    random = generator(seed)
    mix = torch.eye(cols) + 0.7 * torch.randn(cols, cols, generator=random) / cols**0.5
    return (
        torch.randn(tokens, cols, generator=random)
        @ mix
        * torch.logspace(-1, 0.5, cols)[torch.randperm(cols, generator=random)]
    )


def hessian(cols: int, seed: int = 0, tokens: int | None = None) -> Tensor:
    x = inputs(tokens or 4 * cols + 8, cols, seed)
    return 2 / len(x) * x.T @ x


def spd(cols: int, condition: float, seed: int = 0) -> Tensor:
    """A float32 covariance with eigenvalues from 1 down to 1/condition."""
    basis = torch.linalg.qr(torch.randn(cols, cols, generator=generator(seed), dtype=torch.float64)).Q
    matrix = (basis * torch.logspace(0, -torch.tensor(condition).log10().item(), cols, dtype=torch.float64)) @ basis.T
    return ((matrix + matrix.T) / 2).float()


def weight(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Heavy-tailed weights."""
    random = generator(seed + 1000)
    w = torch.randn(rows, cols, generator=random) * 0.02
    return w * (1 + 4 * (torch.rand(rows, cols, generator=random) < 0.02))


def grid(kind: str, w: Tensor, bits: int, group_size: int | None = None) -> Grid:
    """ "minmax", "affine", "offset" (unweighted, coarse) or "levels" (quantiles of each row)."""
    if kind == "minmax":
        return fit_minmax(w, bits, group_size)
    if kind == "affine":
        return fit_affine(w, torch.ones(w.shape[1], dtype=torch.float64), bits, 64, group_size)
    if kind == "offset":
        return fit_offset(w, torch.ones(w.shape[1], dtype=torch.float64), bits, 64, group_size)
    points = (torch.arange(2**bits) + 0.5) / 2**bits
    return NonuniformGrid(torch.quantile(w, points, dim=1).T.contiguous() * 1.2)


def layer(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor, Factor]:
    """Weights, Hessian and its factor."""
    matrix = hessian(cols, seed)
    return weight(rows, cols, seed), matrix, factorize(matrix)


def losses(weight_hat: Tensor, w: Tensor, matrix: Tensor) -> Tensor:
    """(E H E^T)_ii / 2 in float64, literally."""
    error = (weight_hat - w).double()
    return torch.einsum("ri,ij,rj->r", error, matrix.double(), error) / 2
