"""What the monitors log, read back from real event files, against a slow computation."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_muon as lm
from lightning_muon.monitoring import Request, collect
from tests.integration.test_lightning import reference
from tests.lightning_runs import AwkwardLightningModule, trainer
from tests.models import awkward_model, token_batches
from tests.processes import run_processes


def train_watched(folder, strategy="muon_zero1", module_options=None, trainer_options=None, **monitor_options):
    module = AwkwardLightningModule(**(module_options or {}))
    monitors = [
        lm.UpdateRMSMonitor(every_n_steps=2, **monitor_options),
        lm.WeightNormMonitor(every_n_steps=2, **monitor_options),
        lm.SpectrumMonitor(every_n_steps=4, **monitor_options),
    ]
    loggers = [TensorBoardLogger(folder, name="tb", version=""), CSVLogger(folder, name="csv", version="")]
    trainer(5, strategy=strategy, logger=loggers, callbacks=monitors, **(trainer_options or {})).fit(module)
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def events(folder):
    accumulator = EventAccumulator(str(folder / "tb"))
    accumulator.Reload()
    scalars = {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()["scalars"]
        if tag.startswith("muon/")
    }
    return scalars, accumulator.Tags()["histograms"]


@pytest.mark.parametrize("world_size", [1, 3])
def test_logged_values_are_those_of_one_process(tmp_path, world_size):
    run_processes(1, train_watched, str(tmp_path / "single"), "auto")
    run_processes(world_size, train_watched, str(tmp_path / "sharded"))
    expected, histograms = events(tmp_path / "single")
    found, found_histograms = events(tmp_path / "sharded")
    assert found.keys() == expected.keys()
    assert found_histograms == histograms
    for tag, values in expected.items():
        assert found[tag].keys() == values.keys()
        assert list(found[tag].values()) == pytest.approx(list(values.values()), rel=1e-4, abs=1e-6), tag
    assert set(expected["muon/update_rms/model.square.weight"]) == {2, 4}
    assert set(expected["muon/weight_svd_entropy/model.square.weight"]) == {4}
    assert (tmp_path / "sharded" / "csv" / "metrics.csv").read_text().count("muon/update_rms/_mean") == 1
    for tag in (
        "muon/weight_rms/model.norm.weight",
        "muon/weight_spectral_norm/model.experts_up.max",
        "muon/weight_stable_rank/_mean",
        "muon/update_rms/_min",
    ):
        assert tag in expected
    assert "muon/weight_svd_entropy/model.norm.weight" not in expected
    assert "muon/weight_singular_values/model.qkv.weight" in histograms


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_values_against_a_slow_computation(algorithm):
    model = awkward_model()
    group = {"params": list(model.named_parameters())}
    options = {"lr": 0.1, "weight_decay": 0.3, "orthogonalization": "exact", "rules": [lm.Rule("conv", "adamw")]}
    if algorithm == "adamw":
        optimizer = lm.Muon([{**group, "algorithm": "adamw"}], lr=0.1, weight_decay=0.3)
    else:
        optimizer = lm.Muon([group], **options)
    for tokens in token_batches(3, 4):
        optimizer.zero_grad()
        model.loss(tokens).backward()
        before = {name: param.detach().double().clone() for name, param in model.named_parameters()}
        optimizer.step()
    values = collect(
        [optimizer], [Request(("update_rms", "weight_rms", "weight_spectral_norm", "weight_svd_entropy"))]
    ).values
    for name, param in model.named_parameters():
        after = param.detach().double()
        update = (before[name] * (1 - 0.1 * 0.3) - after) / 0.1
        assert values[f"muon/update_rms/{name}"] == pytest.approx(update.square().mean().sqrt().item(), rel=1e-4)
        assert values[f"muon/weight_rms/{name}"] == pytest.approx(after.square().mean().sqrt().item(), rel=1e-6)
        if param.ndim == 2 and "qkv" not in name and min(param.shape) > 1:
            sigma = torch.linalg.svdvals(after)
            p = sigma**2 / (sigma**2).sum()
            entropy = -(p * p.log()).sum().item() / math.log(len(sigma))
            assert values[f"muon/weight_spectral_norm/{name}"] == pytest.approx(sigma[0].item(), rel=1e-6)
            assert values[f"muon/weight_svd_entropy/{name}"] == pytest.approx(entropy, rel=1e-6)
    if algorithm == "muon":
        # full-rank exact updates have the RMS that the scale aims at, times √(rank/min) for the rank there is
        assert values["muon/update_rms/wide.weight"] == pytest.approx(0.2, rel=0.05)


def test_heat_maps_and_the_layout_are_in_tensorboard(tmp_path):
    run_processes(2, train_watched, str(tmp_path))
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    tags = accumulator.Tags()
    assert {"muon/pictures/update_rms", "muon/pictures/weight_svd_entropy"} <= set(tags["images"])
    (image,) = accumulator.Images("muon/pictures/update_rms")  # at the end; five steps are too few for one before
    assert image.step == 5
    assert image.width > 300
    assert "custom_scalars__config__" in tags["tensors"]


def test_detailed_mode_and_filters():
    model = awkward_model()
    optimizer = lm.Muon(model, lr=0.1)
    model.loss(token_batches(1, 4)[0]).backward()
    optimizer.step()
    brief = collect([optimizer], [Request(("weight_spectral_norm",), include="experts")]).values
    key = "muon/weight_spectral_norm/experts_up"
    assert {k for k in brief if not k.endswith(("_min", "_mean", "_max"))} == {key, f"{key}.min", f"{key}.max"}
    detailed = collect([optimizer], [Request(("weight_spectral_norm",), include="experts", mode="detailed")]).values
    each = [detailed[f"{key}.{number}"] for number in range(5)]
    expected = [torch.linalg.matrix_norm(w.detach().double(), 2).item() for w in model.experts_up]
    assert each == pytest.approx(expected, rel=1e-6)
    assert (detailed[f"{key}.min"], detailed[f"{key}.max"]) == (min(each), max(each))
    assert not collect([optimizer], [Request(("weight_rms",), include="nowhere")]).values
    without = collect([optimizer], [Request(("weight_rms",), exclude="experts|norm")]).values
    assert not any("experts" in k for k in without)


def test_log_optimizer_writes_what_it_returns(tmp_path):
    model = awkward_model()
    optimizer = lm.Muon(model, lr=0.1)
    model.loss(token_batches(1, 4)[0]).backward()
    optimizer.step()
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    values = lm.log_optimizer(logger, optimizer, step=7)
    logger.finalize("success")
    scalars, _ = events(tmp_path)
    assert {tag: by_step[7] for tag, by_step in scalars.items()} == pytest.approx(values, rel=1e-6)
    with pytest.raises(TypeError, match="log_optimizer needs"):
        lm.log_optimizer(logger, torch.optim.SGD(model.parameters(), lr=0.1), step=8)


def test_the_momentum_monitor_refuses_other_optimizers(tmp_path):
    module = AwkwardLightningModule(optimizer=torch.optim.AdamW)
    callbacks = [lm.MomentumSpectrumMonitor()]
    with pytest.raises(MisconfigurationException, match=r"watches lightning_muon\.Muon"):
        trainer(1, "auto", accelerator="cpu", logger=CSVLogger(tmp_path), callbacks=callbacks).fit(module)


def test_clipping_norm_is_logged(tmp_path):
    options = {"gradient_clip_val": 0.05}
    run_processes(2, train_watched, str(tmp_path), "muon_zero1", None, options)
    logged = events(tmp_path)[0]["muon/grad_norm"]
    _, norms, _ = reference(steps=5, max_norm=0.05)
    assert logged == pytest.approx({2: norms[1], 4: norms[3]}, rel=1e-5)


class TwoOptimizers(AwkwardLightningModule):
    """Manual optimization with an optimizer for each half, built from the halves: their own names collide."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.model = torch.nn.ModuleDict({half: torch.nn.Linear(4, 4) for half in ("first", "second")})

    def training_step(self, batch, batch_idx):
        share = torch.eye(4).repeat(3, 1).chunk(self.trainer.world_size)[self.global_rank]
        x = self.model["second"](torch.tanh(self.model["first"](share)))
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward((x - 1).square().mean())
        for optimizer in self.optimizers():
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()

    def configure_optimizers(self):
        return [lm.Muon(self.model[half], lr=0.05) for half in ("first", "second")]


def train_two_optimizers(folder, strategy):
    module = TwoOptimizers()
    logger = TensorBoardLogger(folder, name="tb", version="")
    trainer(8, strategy=strategy, logger=logger, callbacks=[lm.WeightNormMonitor(every_n_steps=8)]).fit(module)
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def test_two_optimizers_keep_their_names_apart(tmp_path):
    results = run_processes(2, train_two_optimizers, str(tmp_path), "muon_zero1")
    for result in results[1:]:
        assert all(torch.equal(weight, results[0][name]) for name, weight in result.items())
    scalars, _ = events(tmp_path)
    for half in ("first", "second"):
        (logged,) = scalars[f"muon/weight_rms/model.{half}.weight"].values()
        assert logged == pytest.approx(results[0][f"model.{half}.weight"].square().mean().sqrt().item(), rel=1e-5)
