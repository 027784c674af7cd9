"""The largest singular value of large matrices, against LAPACK."""

import pytest
import torch

from lightning_muon.orthogonalize import spectral_norm


def matrix(rows, cols, sigma):
    generator = torch.Generator().manual_seed(3)
    short = min(rows, cols)
    left = torch.linalg.qr(torch.randn(rows, short, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(cols, short, generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(sigma) @ right.mT


SPECTRA = {
    "equal": torch.ones(700),
    "without a gap": torch.linspace(1, 0.5, 700),
    "one direction": torch.tensor([1.0, *[0.0] * 699]),
    "a power law": torch.arange(1, 701) ** -1.0,
    "few directions": torch.tensor([1.0] * 20 + [0.0] * 680),
}


@pytest.mark.parametrize("shape", [(700, 900), (900, 700)])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_of_large_matrices(shape, spectrum, scale):
    x = (matrix(*shape, SPECTRA[spectrum].double()) * scale).float()
    kept = x.clone()
    assert spectral_norm(x).item() == pytest.approx(scale, rel=5e-5)
    assert torch.equal(x, kept)


def test_of_random_matrices_in_16_bits():
    x = torch.randn(600, 800, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.linalg.matrix_norm(x.double(), 2).item()
    assert spectral_norm(x).item() == pytest.approx(expected, rel=1e-5)


def test_equal_matrices_have_equal_norms():
    x = torch.randn(600, 800, generator=torch.Generator().manual_seed(0))
    assert spectral_norm(x).item() == spectral_norm(x.clone()).item()


@pytest.mark.parametrize("size", [8, 600])
def test_of_nothing_and_of_what_is_not_finite(size):
    x = torch.zeros(size, size)
    assert spectral_norm(x).item() == 0
    for value in (torch.nan, torch.inf):
        x[3, 4] = value
        assert spectral_norm(x).isnan()


def test_small_matrices():
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    assert spectral_norm(x).item() == pytest.approx(torch.linalg.matrix_norm(x, 2).item(), rel=1e-6)
