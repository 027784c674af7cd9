import numpy as np
import pytest
import torch

import lightning_muon as lm
from lightning_muon.orthogonalize import (
    available_sequences,
    orthogonalization_flops,
    polynomial_sequence,
)
from tests.references import matrix_with_spectrum, newton_schulz, polar_factor, relative_error

POLYNOMIALS = [name for name in available_sequences() if name != "exact"]
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (63, 63), (17, 40), (40, 17)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_equals_the_printed_equations(name, shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    sequence = polynomial_sequence(name)
    expected = newton_schulz(x, sequence.steps, sequence.safety)
    assert relative_error(lm.orthogonalize(x, name, dtype=torch.float64), expected) < 1e-6
    assert (
        relative_error(lm.orthogonalize(x, name, dtype=torch.float32), expected) < 1e-4
    )  # near σ = 1 the composition is steep
    # a rank-1 matrix sits at σ = 1, where Polar Express' first step turns one bf16 rounding into the most
    assert relative_error(lm.orthogonalize(x, name, dtype=torch.bfloat16), expected) < 0.3


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_maps_singular_values_by_its_polynomial(name):
    sigma = np.array([0.9, 0.4, 0.15, 0.05, 1e-2, 1e-3])
    sigma /= np.linalg.norm(sigma)
    out = lm.orthogonalize(matrix_with_spectrum(12, 20, sigma), name)
    found = torch.linalg.svdvals(out)
    expected = sorted((polynomial_sequence(name)(s) for s in sigma), reverse=True)
    np.testing.assert_allclose(found.numpy()[:6], expected, atol=1e-9)


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_guarantee_holds(name):
    sequence = polynomial_sequence(name)
    smallest, low, high = sequence.guarantee
    outputs = [sequence(s) for s in np.geomspace(smallest, 1.0, 20001)]
    assert min(outputs) >= low
    assert max(outputs) <= high


@pytest.mark.parametrize(("name", "threshold"), [("keller5", 2.07e-4), ("you5", 2.03e-4), ("deepseek_v4", 1.26e-6)])
def test_failure_threshold_is_the_published_one(name, threshold):
    """Where f(σ) reaches 0.1: "Spectral Scaling Laws of Muon", recomputed."""
    sequence = polynomial_sequence(name)
    assert sequence(threshold * 0.98) < 0.1 < sequence(threshold * 1.02)


def test_keller5_is_torchs_set():
    from torch.optim import _muon

    torch_steps = ((_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C),) * _muon.DEFAULT_NS_STEPS
    assert polynomial_sequence("keller5").steps == torch_steps


def test_exact_is_the_polar_factor():
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    for matrix, out in zip(x, lm.orthogonalize(x, "exact"), strict=True):
        torch.testing.assert_close(out, polar_factor(matrix))


def test_exact_leaves_missing_directions_out():
    x = matrix_with_spectrum(8, 6, [3.0, 1.0])
    out = lm.orthogonalize(x, "exact")
    sigma = torch.linalg.svdvals(out)
    torch.testing.assert_close(sigma, torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64), atol=1e-9, rtol=0)
    assert (out * x).sum() > 0


@pytest.mark.parametrize("name", available_sequences())
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1e6, 1e30])
def test_scale_does_not_matter(name, scale):
    x = torch.randn(2, 6, 10)
    reference = lm.orthogonalize(x, name)
    assert relative_error(lm.orthogonalize(x * scale, name), reference) < 1e-4


@pytest.mark.parametrize("name", available_sequences())
def test_zero_gives_zero_also_within_a_batch(name):
    x = torch.randn(3, 4, 6)
    x[1] = 0
    out = lm.orthogonalize(x, name)
    assert torch.equal(out[1], torch.zeros(4, 6))
    torch.testing.assert_close(out[0], lm.orthogonalize(x[0], name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", available_sequences())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_fault_stays_visible_and_in_its_matrix(name, bad):
    x = torch.randn(2, 4, 6)
    x[0, 1, 2] = bad
    out = lm.orthogonalize(x, name)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_input_is_neither_changed_nor_aliased(dtype):
    x = torch.randn(5, 5).to(dtype)
    before = x.clone()
    out = lm.orthogonalize(x)
    assert torch.equal(x, before)
    assert out.dtype == dtype
    assert out.data_ptr() != x.data_ptr()
    assert out.is_contiguous()


def test_batches_transposes_and_strides():
    x = torch.randn(2, 3, 8, 5)
    out = lm.orthogonalize(x)
    assert out.shape == x.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(out[i, j], lm.orthogonalize(x[i, j]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lm.orthogonalize(x.mT), out.mT, atol=1e-6, rtol=1e-6)
    assert lm.orthogonalize(torch.empty(0, 4, 3)).shape == (0, 4, 3)


def test_own_coefficients():
    steps = [(1.5, -0.5, 0.0)] * 20
    x = torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(lm.orthogonalize(x, steps), polar_factor(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("wrong", ["keller", [], [(1.0, 2.0)], [(1.0, 2.0, float("nan"))]])
def test_unknown_sequences_are_refused(wrong):
    with pytest.raises(ValueError, match=r"Choose one of|at least one|three finite"):
        lm.orthogonalize(torch.eye(3), wrong)


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(3, 3, dtype=torch.int64)])
def test_what_is_no_matrix_is_refused(wrong):
    with pytest.raises(ValueError, match="floating-point matrices"):
        lm.orthogonalize(wrong)


def test_flops_count_the_products():
    rows, cols = 4, 7
    products = [(4, 7, 4), (4, 4, 4), (4, 4, 7)]  # XXᵀ, A², BX
    expected = 5 * sum(2 * m * k * n for m, k, n in products)
    assert orthogonalization_flops(rows, cols, polynomial_sequence("keller5")) == expected
    assert orthogonalization_flops(cols, rows, polynomial_sequence("keller5")) == expected
    cubic = 5 * sum(2 * m * k * n for m, k, n in (products[0], products[2]))
    assert orthogonalization_flops(rows, cols, polynomial_sequence("cubic5")) == cubic


@pytest.mark.parametrize("shape", [(64, 1024), (256, 256)])
def test_rms_of_the_scaled_update_is_what_lemma_1_says(shape):
    """Moonlight's Lemma 1: an orthogonal matrix has RMS 1/√max(rows, cols)."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    rms = {
        name: (lm.orthogonalize(x, name).square().mean().sqrt() * max(shape) ** 0.5).item()
        for name in available_sequences()
    }
    assert rms["exact"] == pytest.approx(1, abs=1e-5)
    assert rms["deepseek_v4"] == pytest.approx(1, abs=2e-3)
    assert 0.7 < rms["keller5"] < 1.0
