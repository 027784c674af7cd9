import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lightning_muon as lm
from lightning_muon.orthogonalize import (
    Probe,
    available_sequences,
    default_dtype,
    dispatch,
    noise_floor,
    orthogonalization_flops,
    orthogonalize_batch,
    polynomial_sequence,
)
from lightning_muon.orthogonalize.gram import gram_newton_schulz, gram_newton_schulz_flops, restarts
from lightning_muon.orthogonalize.newton_schulz import newton_schulz as standard_newton_schulz
from lightning_muon.orthogonalize.newton_schulz import newton_schulz_flops
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


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(3, 3, dtype=torch.int64)])
def test_what_is_no_matrix_is_refused(wrong):
    with pytest.raises(ValueError, match="floating-point matrices"):
        lm.orthogonalize(wrong)


def test_flops_count_the_products():
    rows, cols = 4, 5
    products = [(4, 5, 4), (4, 4, 4), (4, 4, 5)]  # XXᵀ, A², BX
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


# ---------------------------------------------------------------------- every way of computing the same map


def spectra(rank):
    """Prescribed singular values, descending, by name."""
    ones = np.ones(rank)
    made = {f"to 1e-{p}": np.geomspace(1, 10.0**-p, rank) for p in range(1, 7)}
    made |= {f"power {p}": np.arange(1, rank + 1) ** -float(p) for p in (0.5, 1, 2)}
    made |= {f"rank {r}": np.where(np.arange(rank) < r, ones, 0) for r in (1, 2, 8)}
    tail = np.sqrt(0.05 / (rank - 1)) * ones
    tail[0] = 1  # Σσ²/σ₁² = 1.05
    return made | {"stable rank 1.05": tail}


def singular_maps(name, shape, dtype, norm="frobenius"):
    """For every spectrum what the σ became, and what the polynomial makes of them."""
    sequence = polynomial_sequence({"name": name, "norm": norm})
    for number, (which, sigma) in enumerate(spectra(min(shape)).items()):
        u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=seeded(number), dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=seeded(99), dtype=torch.float64))
        x = (u * torch.from_numpy(sigma)) @ v.T
        out = orthogonalize_batch(x.to(dtype)[None], sequence, dtype)[0].double()
        measure = np.linalg.norm(sigma) if norm == "frobenius" else (sigma**4).sum() ** 0.25
        mapped = u.T @ out @ v
        expected = np.array([sequence(s) for s in sigma / measure])
        yield which, mapped.numpy(), expected


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# α = 1.1 goes the standard way, 4 the Gram way
@pytest.mark.parametrize("norm", ["frobenius", "schatten4"])
@pytest.mark.parametrize("shape", [(40, 44), (40, 160)])
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_maps_every_spectrum_by_its_polynomial(name, shape, norm):
    # deepseek_v4 lifts what is small 79,000-fold, and with it the input's own rounding, 2e-8 of the largest
    tolerance = max(1e-4, 2e-8 * polynomial_sequence(name).slope())
    for which, found, expected in singular_maps(name, shape, torch.float64, norm):
        np.testing.assert_allclose(found, np.diag(expected), atol=1e-5, err_msg=which)
    for which, found, expected in singular_maps(name, shape, torch.float32, norm):
        np.testing.assert_allclose(found, np.diag(expected), atol=tolerance, err_msg=which)


def test_both_ways_were_tried_above():
    for dtype in (torch.float32, torch.float64):
        for name in POLYNOMIALS:
            assert not dispatch.uses_gram(40, 44, polynomial_sequence(name), dtype)
            assert dispatch.uses_gram(40, 160, polynomial_sequence(name), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["frobenius", "schatten4"])
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_no_precision_lets_a_direction_explode(name, norm, dtype):
    """Wherever the largest singular value sits: in some places the steps magnify their rounding most."""
    sequence = polynomial_sequence({"name": name, "norm": norm})
    count, rows, cols = 120, 16, 64
    sigma = torch.rand(count, rows, generator=seeded(0), dtype=torch.float64).pow(3)
    sigma[:, 0] = 0
    largest = torch.linspace(0.25, 0.999, count, dtype=torch.float64)
    sigma *= ((1 - largest**2).sqrt() / torch.linalg.vector_norm(sigma, dim=1))[:, None]
    sigma[:, 0] = largest
    u, _ = torch.linalg.qr(torch.randn(count, rows, rows, generator=seeded(1), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(count, cols, rows, generator=seeded(2), dtype=torch.float64))
    x = ((u * sigma[:, None]) @ v.mT).float()
    out = orthogonalize_batch(x, sequence, dtype).double()
    highest = sequence.highest()[-1]
    assert out.isfinite().all()
    assert torch.linalg.matrix_norm(out, 2).max() < 1.1 * highest
    assert ((out * x).sum(dim=(1, 2)) > 0).all()


def test_polar_express_in_bfloat16_never_takes_the_gram_way():
    """With any restarts, some of its matrices explode there; float16's rounding is an eighth."""
    for name in ("polar_express5", "polar_express8"):
        assert not dispatch.uses_gram(64, 4096, polynomial_sequence(name), torch.bfloat16)
    assert dispatch.uses_gram(64, 4096, polynomial_sequence("polar_express5"), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_gram_equals_standard(name, dtype):
    sequence = polynomial_sequence(name)
    x = torch.randn(3, 24, 96, generator=seeded(0), dtype=torch.float64)
    x /= torch.linalg.matrix_norm(x, keepdim=True) * sequence.safety
    expected = standard_newton_schulz(x, x @ x.mT, sequence.steps)
    low = x.to(dtype)
    found = gram_newton_schulz(low, low @ low.mT, sequence.steps, restarts(sequence, dtype))
    assert relative_error(found, expected) < {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 0.05}[dtype]
    assert torch.equal(low, x.to(dtype))


@pytest.mark.parametrize("restart_at", [(), (2,), (1, 3), (1, 2, 3, 4)])
@pytest.mark.parametrize("name", ["polar_express5", "cubic5"])
def test_flops_are_those_of_the_products(name, restart_at):
    sequence = polynomial_sequence(name)
    x = torch.randn(1, 8, 24)
    with FlopCounterMode(display=False) as standard:
        standard_newton_schulz(x, x @ x.mT, sequence.steps)
    with FlopCounterMode(display=False) as gram:
        gram_newton_schulz(x, x @ x.mT, sequence.steps, restart_at)
    assert standard.get_total_flops() == newton_schulz_flops(8, 24, sequence.steps)
    assert gram.get_total_flops() == gram_newton_schulz_flops(8, 24, sequence.steps, restart_at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 26), (24, 96), (96, 24), (1, 50)])
@pytest.mark.parametrize("name", [*POLYNOMIALS, "exact"])
def test_flops_of_the_call(name, shape, dtype):
    sequence = polynomial_sequence(name)
    with FlopCounterMode(display=False) as counter:
        lm.orthogonalize(torch.randn(shape), name, dtype=dtype)
    if sequence is not None:
        assert counter.get_total_flops() == orthogonalization_flops(*shape, sequence, dtype)


def test_restarts_are_where_others_have_found_them():
    express = polynomial_sequence("polar_express5")
    assert restarts(express, torch.float16) == (2,)
    assert restarts(express, torch.float32) == (2,)
    assert restarts(polynomial_sequence("keller5"), torch.bfloat16) == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 26), (24, 96), (130, 140)])
def test_a_matrix_does_not_depend_on_its_company(shape, dtype):
    x = torch.randn(5, *shape, generator=seeded(0))
    together = lm.orthogonalize(x, dtype=dtype)
    alone = torch.stack([lm.orthogonalize(matrix, dtype=dtype) for matrix in x])
    assert relative_error(together, alone) < {torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
    if dispatch._runs_alone(x.to(dtype)):
        assert torch.equal(together, alone)


def test_schatten4_lifts_higher_and_never_beyond_one():
    x = torch.randn(4, 20, 60, generator=seeded(0), dtype=torch.float64)
    x[0] = x[0, :, :1] @ x[0, :1]  # rank 1: both norms are σ₁
    out = {norm: lm.orthogonalize(x, {"name": "keller5", "norm": norm}) for norm in ("frobenius", "schatten4")}
    torch.testing.assert_close(out["frobenius"][0], out["schatten4"][0])
    sigma = torch.linalg.svdvals(x)
    sigma = sigma / sigma.pow(4).sum(-1, keepdim=True) ** 0.25
    assert (sigma <= 1 + 1e-12).all()
    expected = [[polynomial_sequence("keller5")(s) for s in row] for row in sigma.tolist()]
    found = torch.linalg.svdvals(out["schatten4"])
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64).sort(descending=True).values, atol=1e-6, rtol=1e-6
    )


# ---------------------------------------------------------------------- what else the iteration says and decides


@pytest.mark.parametrize("shape", [(20, 22), (20, 80)])
@pytest.mark.parametrize("name", ["keller5", "polar_express5"])
def test_telemetry_equals_its_definition(name, shape):
    sequence = polynomial_sequence(name)
    x = torch.randn(3, *shape, generator=seeded(0))
    x[1] *= torch.linspace(0, 1, shape[1]) ** 4
    x[2] = 0
    probe = Probe()
    orthogonalize_batch(x, sequence, torch.float32, probe)
    participation_ranks, residuals = probe.collected()
    sigma = torch.linalg.svdvals(x[:2].double())
    expected = sigma.square().sum(-1).square() / sigma.pow(4).sum(-1)
    torch.testing.assert_close(participation_ranks[:2].double(), expected, rtol=1e-5, atol=0)
    assert participation_ranks[2] == 0
    sigma = torch.linalg.svdvals(x.double())
    sigma = sigma / torch.linalg.vector_norm(sigma, dim=-1, keepdim=True).clamp_min(1e-300)
    before = [[list(sequence.path(s))[-2] ** 2 - 1 for s in row] for row in sigma.tolist()]
    expected = torch.tensor(before, dtype=torch.float64).square().mean(-1).sqrt()
    torch.testing.assert_close(residuals.double(), expected, rtol=1e-4, atol=0)


def test_precision_where_none_is_asked_for(monkeypatch):
    small, large = torch.empty(127, 500), torch.empty(128, 500)
    monkeypatch.setattr(dispatch, "_has_fast_bfloat16", lambda: False)
    assert default_dtype(small) == default_dtype(large) == torch.float32
    monkeypatch.setattr(dispatch, "_has_fast_bfloat16", lambda: True)
    assert default_dtype(small) == torch.float32
    assert default_dtype(large) == torch.bfloat16
    assert default_dtype(large.half()) == torch.bfloat16  # float16 is as slow as float32 there
    assert default_dtype(large.double()) == torch.float64
    assert default_dtype(torch.empty(64, 64, device="meta")) == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 256), (200, 220)])
def test_noise_floor_is_what_rounding_does(shape, dtype):
    x = torch.randn(shape, generator=seeded(0), dtype=torch.float64)
    x /= x.norm()
    noise = torch.linalg.matrix_norm(x.to(dtype).double() - x, 2).item()
    assert noise == pytest.approx(noise_floor(*shape, dtype), rel=0.15)


def test_exact_in_float32_is_as_exact_as_float32_allows():
    x = matrix_with_spectrum(20, 50, np.geomspace(1, 1e-4, 20)).float()
    assert relative_error(lm.orthogonalize(x, "exact"), polar_factor(x)) < 1e-6


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (np.eye(3), None),
        ([[1.0]], None),
        (torch.eye(3).to_sparse(), None),
        (torch.eye(3), torch.int32),
        (torch.eye(3), "bfloat16"),
    ],
)
def test_what_is_no_tensor_or_no_precision_is_refused(x, dtype):
    with pytest.raises(TypeError, match=r"dense torch\.Tensor|floating-point torch\.dtype"):
        lm.orthogonalize(x, dtype=dtype)


@pytest.mark.parametrize("norm", ["frobenius", "schatten4"])
def test_autocast_does_not_reach_the_iteration(norm):
    x = torch.randn(4, 16, 64, generator=seeded(0))
    how = {"name": "polar_express5", "norm": norm}
    expected = lm.orthogonalize(x, how)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lm.orthogonalize(x, how), expected)
        assert torch.is_autocast_enabled("cpu")


def test_nor_does_a_permission_for_coarser_products(monkeypatch):
    seen = []
    run = dispatch._run

    def watch(*arguments):
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return run(*arguments)

    monkeypatch.setattr(dispatch, "_run", watch)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        lm.orthogonalize(torch.eye(3))
        assert seen == [("ieee", "ieee")]
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_float16_of_a_large_matrix_is_not_drowned_in_subnormal_numbers():
    x = torch.randn(256, 512, generator=seeded(0), dtype=torch.float64)
    sequence = polynomial_sequence({"name": "polar_express5", "norm": "schatten4"})
    expected = orthogonalize_batch(x[None], sequence, torch.float64)
    found = orthogonalize_batch(x[None].float(), sequence, torch.float16)
    assert relative_error(found, expected) < 5e-3
