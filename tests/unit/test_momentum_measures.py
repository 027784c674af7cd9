"""Measures of the momentum's spectrum and of what Newton–Schulz makes of it, against numpy in float64."""

import math

import numpy as np
import pytest
import torch

from lightning_muon.monitoring.measures import (
    cosine,
    descent_kept,
    fail_fraction,
    lifted,
    nuclear_rank,
    orthogonality_error,
    participation_rank,
    promised_residual,
    quantile,
    scaled_quantile,
    spike,
)
from lightning_muon.orthogonalize import (
    PolynomialSequence,
    Probe,
    available_sequences,
    orthogonalize,
    orthogonalize_batch,
    polar_express,
    polynomial_sequence,
    singular_values,
)

SEQUENCES = [polynomial_sequence(name) for name in available_sequences() if name != "exact"]
SEQUENCES.append(polar_express(4, 1e-2, norm="schatten4"))


def matrix(rows, cols, decay=0.8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, dtype=torch.float64, generator=generator)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u * decay ** torch.arange(min(rows, cols)) @ vh


def spectrum(x):
    """By numpy's SVD, descending, and ours."""
    reference = np.linalg.svd(x.numpy(), compute_uv=False)
    return reference / np.linalg.norm(reference), singular_values(x / torch.linalg.matrix_norm(x))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (7, 7), (1, 9)])
def test_quantiles_participation_and_spike(shape):
    reference, sigma = spectrum(matrix(*shape))
    r = len(reference)
    for percent in (10, 25, 50, 75, 90, 95):
        rank = next(k for k in range(1, r + 1) if 100 * k >= percent * r)  # ⌈q·r⌉
        assert quantile(sigma, percent).item() == pytest.approx(reference[rank - 1], rel=1e-4)
    assert participation_rank(sigma).item() == pytest.approx(1 / (reference**4).sum(), rel=1e-4)
    assert spike(sigma).item() == pytest.approx(reference[0] ** 2, rel=1e-4)


def test_quantile_counts_in_whole_numbers():
    sigma = torch.arange(30, 0, -1.0)
    assert quantile(sigma, 10).item() == 28  # rank 3, not the 4 that 0.1 * 30 > 3 would make
    assert quantile(sigma, 100).item() == 1


def test_participation_rank_gives_the_schatten_norm():
    _, sigma = spectrum(matrix(12, 20))
    schatten = np.linalg.norm(sigma.numpy(), 4)
    assert participation_rank(sigma).item() ** -0.25 == pytest.approx(schatten, rel=1e-12)
    assert participation_rank(torch.full((4,), 0.5)).item() == pytest.approx(4)


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: sequence.name)
def test_lifted_is_what_the_sequence_does_to_a_matrix(sequence):
    x = matrix(12, 20)
    _, sigma = spectrum(x)
    output = orthogonalize_batch(x[None], sequence)[0]
    found = lifted(sigma, sequence).sort(descending=True).values
    np.testing.assert_allclose(found.numpy(), np.linalg.svd(output.numpy(), compute_uv=False), rtol=1e-5)


def test_lifted_by_the_exact_factor():
    sigma = torch.tensor([1.0, 1e-3, 1e-9, 0.0], dtype=torch.float64)
    assert lifted(sigma, None, 1e-6).tolist() == [1, 1, 0, 0]
    assert fail_fraction(lifted(sigma, None, 1e-6)).item() == 0.5
    assert lifted(torch.tensor([torch.nan, 1.0]), None).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", available_sequences())
def test_share_that_fails_and_descent_that_is_kept(name):
    x = matrix(30, 40, decay=0.6)  # down to 4e-7
    reference, sigma = spectrum(x)
    sequence = polynomial_sequence(name)
    outputs = lifted(sigma, sequence, 1e-12)
    expected = [1.0 if sequence is None else sequence(float(s)) for s in reference]
    assert fail_fraction(outputs).item() == pytest.approx(np.mean([f < 0.1 for f in expected]), abs=1e-12)
    kept = descent_kept(sigma, outputs).item()
    assert kept == pytest.approx(np.dot(reference, expected) / reference.sum(), rel=1e-4)
    # which is ⟨O, N⟩ in units of the nuclear norm
    inner = (orthogonalize(x, name) * x).sum() / torch.linalg.matrix_norm(x, "nuc")
    assert kept == pytest.approx(inner.item(), rel=1e-4)


@pytest.mark.parametrize("name", available_sequences())
def test_distance_from_orthogonal(name):
    x = matrix(30, 40, decay=0.2)
    _, sigma = spectrum(x)
    factor = orthogonalize(x, name)
    expected = torch.linalg.matrix_norm(factor @ factor.mT - torch.eye(30)).item() / 30**0.5
    found = orthogonality_error(lifted(sigma, polynomial_sequence(name), 1e-12)).item()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_ranks_count_directions():
    equal = torch.full((9,), 0.4, dtype=torch.float64)
    assert nuclear_rank(equal).item() == pytest.approx(9)
    assert scaled_quantile(equal / 1.2, 50).item() == pytest.approx(1)  # 1.2 is its Frobenius norm
    x = matrix(12, 20, decay=0.5)
    nuclear, frobenius = torch.linalg.matrix_norm(x, "nuc"), torch.linalg.matrix_norm(x)
    assert nuclear_rank(spectrum(x)[1]).item() == pytest.approx(((nuclear / frobenius) ** 2).item(), rel=1e-6)


def test_cosine():
    assert cosine(-6.0, 4.0, 9.0) == -1.0
    assert cosine(0.0, 0.0, 9.0) == 0.0


def test_nothing_of_a_zero_matrix_and_nan_of_nan():
    zero, nan = torch.zeros(3, dtype=torch.float64), torch.full((3,), torch.nan)
    assert participation_rank(zero).item() == 0
    assert spike(zero).item() == 0
    assert nuclear_rank(zero).item() == 0
    assert orthogonality_error(zero).item() == 1
    assert descent_kept(zero, zero).item() == 0
    assert lifted(zero, SEQUENCES[-1]).tolist() == [0, 0, 0]
    assert math.isnan(fail_fraction(lifted(nan, SEQUENCES[0])).item())


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: sequence.name)
def test_promise_holds_and_is_not_idle(sequence):
    promise = promised_residual(sequence)
    grid = torch.linspace(1e-4, 1, 2000, dtype=torch.float64)
    before_last = PolynomialSequence("", sequence.steps[:-1], "", None, sequence.safety)
    worst = (lifted(grid, before_last).square() - 1).abs().max().item()
    assert worst <= promise * (1 + 1e-3)
    assert promise == pytest.approx(max(1.0, worst), rel=1e-2)
    probe = Probe()
    orthogonalize_batch(matrix(12, 20)[None], sequence, torch.float32, probe)
    assert 0 < probe.collected()[1].item() <= promise
