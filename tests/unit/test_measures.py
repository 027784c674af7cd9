import math

import numpy as np
import pytest
import torch

from lightning_muon.monitoring.measures import stable_rank, svd_entropy
from lightning_muon.orthogonalize import singular_values
from tests.references import matrix_with_spectrum


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
def test_singular_values_of_a_wide_spectrum(shape):
    sigma = np.geomspace(1, 1e-5, min(shape))
    found = singular_values(matrix_with_spectrum(*shape, sigma).float())
    np.testing.assert_allclose(found.numpy(), sigma, rtol=1e-2)  # float32 input holds the smallest to 1e-2
    np.testing.assert_allclose(singular_values(matrix_with_spectrum(*shape, sigma)).numpy(), sigma, rtol=1e-4)


def test_singular_values_are_batched_and_descending():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(singular_values(x), torch.linalg.svdvals(x))


def test_entropy_stable_rank_and_norm_by_hand():
    sigma = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    p = [4 / 6, 1 / 6, 1 / 6]
    expected = -sum(q * math.log(q) for q in p) / math.log(4)
    assert svd_entropy(sigma).item() == pytest.approx(expected, rel=1e-12)
    assert stable_rank(sigma).item() == pytest.approx(6 / 4)
    assert svd_entropy(torch.ones(5)).item() == pytest.approx(1)
    assert svd_entropy(torch.tensor([3.0, 0, 0])).item() == 0
    assert svd_entropy(torch.zeros(3)).item() == 0
    assert stable_rank(torch.zeros(3)).item() == 0
    assert svd_entropy(torch.tensor([1.0])).item() == 0
