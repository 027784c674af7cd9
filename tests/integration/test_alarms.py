"""Each alarm, provoked; and a healthy training, which hears none of rounding."""

import warnings

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_muon as lm
from lightning_muon.monitoring import Request, Session
from tests.integration.test_monitors import events
from tests.lightning_runs import AwkwardLightningModule, trainer


class Stack(torch.nn.Module):
    def __init__(self, scale=1.0, size=8):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.experts = torch.nn.Parameter(scale * torch.randn(3, size, size, generator=generator))


def step(optimizer, gradient):
    optimizer.param_groups[0]["params"][0].grad = gradient.clone()
    optimizer.watch_next_step(spectra=optimizer.routes)
    optimizer.step()


def said(session, optimizer, *families):
    sighting = session.look([optimizer], [Request(families)])
    return sighting.warnings, sighting.collection.values


def gradients(rank=8, seed=1, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, size, rank, generator=generator) @ torch.randn(3, rank, size, generator=generator)


def test_an_update_of_low_rank_is_said_after_three_measurements():
    optimizer, session = lm.Muon(Stack(size=20), orthogonalization="exact", momentum=0.0), Session()
    counts = []
    for _ in range(4):
        step(optimizer, gradients(rank=1, size=20))
        texts, values = said(session, optimizer, "update_rms")
        counts.append((len(texts), values["muon/alarms/update_below_band"], values["muon/alarms/update_above_band"]))
    assert counts == [(0, 0, 0), (0, 0, 0), (1, 1, 0), (0, 1, 0)]
    assert said(session, optimizer, "update_rms")[0] == []


def test_a_sixteenth_of_the_directions_is_the_threshold():
    for size, is_trouble in ((15, False), (17, True)):
        optimizer, session = lm.Muon(Stack(size=size), orthogonalization="exact", momentum=0.0), Session()
        for _ in range(3):
            step(optimizer, gradients(rank=1, size=size))
            texts, _ = said(session, optimizer, "update_rms")
        assert bool(texts) == is_trouble


def test_the_text_of_a_small_update_says_how_small():
    optimizer, session = lm.Muon(Stack(size=20), orthogonalization="exact", momentum=0.0), Session()
    for _ in range(3):
        step(optimizer, gradients(rank=1, size=20))
        texts, values = said(session, optimizer, "update_rms")
    # one direction of twenty: √(1/20) of 0.2
    assert values["muon/update_rms/experts"] == pytest.approx(0.2 * 20**-0.5, rel=1e-4)
    (text,) = texts
    assert "RMS is 0.04472, 22% of that of an orthogonal matrix, and has been that small for 3 measurements" in text


def test_an_update_above_its_band_is_said_at_once():
    optimizer, session = lm.Muon(Stack(), orthogonalization="keller5"), Session()
    step(optimizer, gradients())
    highest = optimizer.update_records[0].sequence.highest()[-1]
    optimizer.update_records[0].square_sums[1] = 64 * (1.12 * highest * 0.2) ** 2
    (text,), values = said(session, optimizer, "update_rms")
    assert values["muon/alarms/update_above_band"] == 1
    assert text.startswith("experts: matrix 1 of 3: the update's RMS is")
    assert f"allows {highest:.3g} times" in text


def test_a_median_in_the_failure_zone():
    spectrum = torch.diag(torch.tensor([1.0, 0.5, 0.2, *[1e-4] * 5]))
    optimizer, session = lm.Muon(Stack(), orthogonalization="keller5", momentum=0.0), Session()
    texts = []
    for _ in range(3):
        step(optimizer, spectrum.expand(3, 8, 8))
        texts, values = said(session, optimizer, "ns_fail_frac")
    assert values["muon/ns_fail_frac/experts"] == 5 / 8
    assert values["muon/alarms/failure_zone"] == 1
    assert "62% of the momentum's singular values end below 0.1" in texts[0]


def test_a_gradient_without_more_directions_is_no_failure():
    spectrum = torch.diag(torch.tensor([1.0, 0.5, 0.2, *[1e-9] * 5]))
    optimizer, session = lm.Muon(Stack(), orthogonalization="keller5", momentum=0.0), Session()
    for _ in range(3):
        step(optimizer, spectrum.expand(3, 8, 8))
        texts, values = said(session, optimizer, "ns_fail_frac")
    assert values["muon/ns_fail_frac/experts"] == 5 / 8
    assert (texts, values["muon/alarms/failure_zone"]) == ([], 0)


def test_fewer_than_half_in_the_failure_zone_is_no_alarm():
    spectrum = torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.3, 0.4, *[1e-5] * 3]))
    optimizer, session = lm.Muon(Stack(), orthogonalization="keller5", momentum=0.0), Session()
    for _ in range(3):
        step(optimizer, spectrum.expand(3, 8, 8))
        texts, values = said(session, optimizer, "ns_fail_frac")
        assert (texts, values["muon/alarms/failure_zone"]) == ([], 0)


@pytest.mark.parametrize(("idle", "is_trouble"), [("update", True), ("skip", False)])
def test_a_starved_expert_that_still_moves(idle, is_trouble):
    optimizer, session = lm.Muon(Stack(), idle_matrices=idle), Session()
    step(optimizer, gradients())
    assert said(session, optimizer, "update_gradient_cosine")[0] == []
    starved = gradients(seed=2)
    starved[1] = 0
    step(optimizer, starved)
    texts, values = said(session, optimizer, "update_gradient_cosine")
    assert values["muon/alarms/moves_without_gradient"] == is_trouble
    if is_trouble:
        assert texts[0].startswith("experts: matrices 1 of 3 got a gradient of zeros and moved all the same")


def test_weights_above_their_bound():
    model = Stack(scale=0.01)
    optimizer, session = lm.Muon(model, lr=0.1, weight_decay=0.5), Session()
    step(optimizer, gradients())
    assert said(session, optimizer, "weight_spectral_norm")[0] == []
    highest = optimizer.update_records[0].sequence.highest()[-1]
    bound = highest * 0.2 * 8**0.5 / 0.5
    model.experts.data[2] *= 1.01 * bound / torch.linalg.matrix_norm(model.experts.data[2], 2)
    assert said(session, optimizer, "weight_spectral_norm")[0] == []  # within what rounding may add
    model.experts.data[2] *= 1.02
    (text,), values = said(session, optimizer, "weight_spectral_norm")
    assert values["muon/alarms/weight_norm"] == 1
    assert text.startswith("experts: matrix 2 of 3: the weight's largest singular value is")
    assert f"above the {bound:.4g} that" in text


def test_weights_that_begin_above_the_bound_may_stay_there():
    model = Stack(scale=100.0)
    optimizer, session = lm.Muon(model, lr=0.1, weight_decay=0.5), Session()
    for number in range(3):
        step(optimizer, gradients(seed=number))
        assert said(session, optimizer, "weight_spectral_norm")[0] == []


def test_without_decay_there_is_no_bound():
    model = Stack(scale=0.01)
    optimizer, session = lm.Muon(model, weight_decay=0.0), Session()
    step(optimizer, gradients())
    said(session, optimizer, "weight_spectral_norm")
    model.experts.data *= 1e6
    assert said(session, optimizer, "weight_spectral_norm")[0] == []


@pytest.mark.parametrize("orthogonalization", ["polar_express5", "keller5", "deepseek_v4", "exact", "auto"])
def test_a_healthy_training_hears_none_of_rounding(tmp_path, orthogonalization):
    monitors = (lm.UpdateRMSMonitor, lm.WeightNormMonitor, lm.MomentumSpectrumMonitor)
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    options = {"logger": logger, "callbacks": [one(every_n_steps=1) for one in monitors], "accelerator": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(20, "auto", **options).fit(AwkwardLightningModule(orthogonalization=orthogonalization, lr=0.1))
    heard = {tag: max(by_step.values()) for tag, by_step in events(tmp_path)[0].items() if "/alarms/" in tag}
    # The others are about few directions, and twelve short texts in a batch have hardly any.
    for kind in ("moves_without_gradient", "update_above_band", "weight_norm"):
        assert heard[f"muon/alarms/{kind}"] == 0
    assert heard.get("muon/alarms/ns_residual", 0) == 0  # the exact factor has none
