"""Every iteration in every precision on momentum of a real training, early, when it is nearly of rank one."""

import pytest
import torch

import lightning_muon as lm
from benchmarks.momentum import recorded_momentum
from lightning_muon.orthogonalize import Auto, available_sequences, noise_floor, polynomial_sequence
from lightning_muon.orthogonalize import relative_singular_values as spectrum_of

POLYNOMIALS = [name for name in available_sequences() if name != "exact"]


@pytest.fixture(scope="module")
def momentum():
    recorded = recorded_momentum((10, 25))
    matrices = [matrix for matrices in recorded.values() for _, matrix in matrices]
    peaked = sorted(matrices, key=lambda matrix: -spectrum_of(matrix)[0].item())
    return [*peaked[:12], *matrices[::7]]  # those nearest to rank one, and some of every kind


def test_it_is_the_hard_kind(momentum):
    """Spectral norms near the Frobenius norm, and small singular values far below any sequence's interval."""
    spectra = [spectrum_of(matrix) for matrix in momentum]
    assert len({tuple(matrix.shape) for matrix in momentum}) >= 4
    assert max(sigma[0] for sigma in spectra) > 0.9
    assert min(sigma[len(sigma) // 2] for sigma in spectra) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["frobenius", "schatten4"])
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_every_update_is_finite_in_band_and_descends(momentum, name, norm, dtype):
    how = {"name": name, "norm": norm}
    highest = polynomial_sequence(how).highest()[-1]
    for matrix in momentum:
        update = lm.orthogonalize(matrix, how, dtype=dtype).double()
        assert update.isfinite().all()
        assert torch.linalg.matrix_norm(update, 2) < 1.1 * highest
        assert (update * matrix).sum() > 0
        # what the momentum's own spectrum says, and what rounding may add where it is lifted as well
        sigma = spectrum_of(matrix)
        sequence = polynomial_sequence(how)
        measure = 1.0 if norm == "frobenius" else (sigma**4).sum().item() ** 0.25
        expected = torch.tensor([sequence(s / measure) for s in sigma.tolist()], dtype=torch.float64).norm()
        noise = 2 * noise_floor(*matrix.shape, dtype) * sequence.slope() * len(sigma) ** 0.5
        assert 0.93 * expected <= update.norm() <= 1.05 * expected + noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*POLYNOMIALS, "exact"])
def test_the_layout_does_not_matter(momentum, name, dtype):
    matrix = next(matrix for matrix in momentum if matrix.shape == (128, 128))
    tall = next(matrix for matrix in momentum if matrix.shape[0] != matrix.shape[1])
    tolerance = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}[dtype]
    for x in (matrix, tall):
        straight = lm.orthogonalize(x, name, dtype=dtype)
        padded = torch.zeros(x.shape[0], 2 * x.shape[1])
        padded[:, ::2] = x
        for other in (
            lm.orthogonalize(x.mT, name, dtype=dtype).mT,
            lm.orthogonalize(padded[:, ::2], name, dtype=dtype),
            lm.orthogonalize(torch.stack([x, torch.zeros_like(x), x]), name, dtype=dtype)[2],
        ):
            assert (other - straight).norm() <= tolerance * straight.norm()


def test_auto_is_closer_than_five_steps_everywhere(momentum):
    """In float32, by the cosine to the exact polar factor, of all matrices that have more than noise to lift."""
    auto, worst = Auto(), {"auto": 1.0, "polar_express5": 1.0}
    for matrix in momentum:
        sigma = spectrum_of(matrix)
        steps = auto.steps_for(sigma, tuple(matrix.shape), torch.float32)
        if auto.choose(1e-9, 0.0) == steps:
            continue  # no number of steps in reach would do
        exact = lm.orthogonalize(matrix.double(), "exact")
        sequences = {"auto": {"name": "polar_express", "steps": steps, "lower": auto.reach(steps), "norm": "schatten4"}}
        for name, how in (sequences | {"polar_express5": "polar_express5"}).items():
            update = lm.orthogonalize(matrix, how, dtype=torch.float32).double()
            cosine = (update * exact).sum() / update.norm() / exact.norm()
            worst[name] = min(worst[name], cosine.item())
    assert worst["auto"] > 0.96
    assert worst["polar_express5"] < 0.9
