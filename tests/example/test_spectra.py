"""Quantiles read back from TensorBoard's histograms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from examples.moe_lm.spectra import QUANTILES, draw_spectra, read_spectra


def test_quantiles_survive_the_event_file(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    values = {1: np.geomspace(0.01, 2.0, 500), 2: np.linspace(0.5, 1.5, 500)}
    with SummaryWriter(tmp_path) as writer:
        for step, sigma in values.items():
            writer.add_histogram(f"muon/weight_singular_values/{name}", sigma, step)
    spectra = read_spectra(tmp_path)
    for step, found in spectra[name]:
        assert found == pytest.approx(np.quantile(values[step], QUANTILES), rel=0.1)
    picture = draw_spectra(spectra, tmp_path / "spectra.png", "test")
    assert picture.stat().st_size > 10_000
