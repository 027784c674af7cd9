"""What ``MomentumSpectrumMonitor`` logs, read back from real event files, against numpy on recorded gradients."""

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision

import lightning_muon as lm
from lightning_muon.logs import ModelDescription
from lightning_muon.monitoring import Request, Session, collect, iteration
from lightning_muon.orthogonalize import polynomial_sequence
from tests.integration.test_monitors import TwoOptimizers, events
from tests.lightning_runs import AwkwardLightningModule, PoolEnvironment, trainer, weights
from tests.models import awkward_model, token_batches
from tests.processes import run_processes

STEPS, EVERY, MU = 6, 3, 0.95
QUANTILES = (10, 25, 50, 75, 90, 95)
OPTIONS = {"orthogonalization": {"name": "keller5", "norm": "schatten4"}}


class Recorded(AwkwardLightningModule):
    """Keeps what is orthogonalised in each step, computed from the gradients."""

    def on_fit_start(self):
        self.momentum, self.fed = {}, []

    def on_before_optimizer_step(self, optimizer):
        fed = {}
        for name, param in self.named_parameters():
            gradient = param.grad.detach().double()
            momentum = self.momentum.get(name, torch.zeros_like(gradient))
            self.momentum[name] = MU * momentum + (1 - MU) * gradient
            fed[name] = gradient, self.momentum[name], (1 - MU) * gradient + MU * self.momentum[name]
        self.fed.append(fed)


def train(folder, strategy="auto", recorded=False, watched=True, module_options=None, **options):
    module = (Recorded if recorded else AwkwardLightningModule)(**(module_options or OPTIONS))
    callbacks = [lm.WeightNormMonitor(every_n_steps=EVERY)]
    callbacks += [lm.MomentumSpectrumMonitor(every_n_steps=EVERY)] if watched else []
    loggers = [TensorBoardLogger(folder, name="tb", version=""), CSVLogger(folder, name="csv", version="")]
    run = trainer(STEPS, strategy=strategy, logger=loggers, callbacks=callbacks, **options)
    run.fit(module)
    if recorded:
        return expected_scalars(module.fed, run.optimizers[0].routes)
    return weights(module)


def expected_scalars(fed, routes):
    """By numpy's SVD, for the steps that are due."""
    sequence = polynomial_sequence(OPTIONS["orthogonalization"])
    expected = {}
    for step in range(EVERY, STEPS + 1, EVERY):
        for name, tensors in fed[step - 1].items():
            route = routes[name]
            if route.algorithm != "muon":
                continue
            rows = []
            for matrices in zip(*map(route.layout.matrices, tensors), strict=True):
                gradient, momentum, one = (matrix.numpy() for matrix in matrices)
                left, sigma, right = np.linalg.svd(one, full_matrices=False)
                sigma /= np.linalg.norm(sigma)
                outputs = np.array([sequence(float(s)) for s in sigma / np.linalg.norm(sigma, 4)])
                update = left @ np.diag(outputs) @ right
                quantiles = {p: sigma[int(np.ceil(p * len(sigma) / 100)) - 1] for p in QUANTILES}
                row = {f"momentum_q{p}": value for p, value in quantiles.items()}
                row |= {f"momentum_scaled_q{p}": v * len(sigma) ** 0.5 for p, v in quantiles.items() if p != 95}
                row |= {"momentum_participation_rank": 1 / (sigma**4).sum(), "momentum_spike": sigma[0] ** 2}
                row |= {"momentum_nuclear_rank": sigma.sum() ** 2}
                row |= {"ns_fail_frac": np.mean([f < 0.1 for f in outputs])}
                row |= {"ns_descent_kept": np.dot(sigma, outputs) / sigma.sum(), "ns_steps": 5}
                error = update @ update.T - np.eye(len(update)) if len(update) <= len(update.T) else None
                error = update.T @ update - np.eye(len(update.T)) if error is None else error
                row |= {"ns_orthogonality_error": np.linalg.norm(error) / len(sigma) ** 0.5}
                row |= {"gradient_momentum_cosine": cosine(gradient, momentum)}
                row |= {"update_gradient_cosine": cosine(update, gradient)}
                rows.append(row)
            for family in rows[0]:
                values = sorted(row[family] for row in rows)
                summary = {"": values[(len(values) - 1) // 2]}
                if len(values) > 1:
                    summary |= {".min": values[0], ".max": values[-1]}
                for suffix, value in summary.items():
                    expected.setdefault(f"muon/{family}/{name}{suffix}", {})[step] = float(value)
    return expected


def cosine(a, b):
    return (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = train(folder, recorded=True, accelerator="cpu")
    return found, folder


def check(folder, expected):
    scalars, histograms = events(folder)
    families = {tag: tag.split("/")[1] for tag in scalars if not tag.rpartition("/")[2].startswith("_")}
    wanted = {tag for tag, family in families.items() if not family.startswith(("weight", "alarms"))}
    assert wanted - expected.keys() == {tag for tag in wanted if "ns_residual" in tag}
    for tag, by_step in expected.items():
        assert scalars[tag] == pytest.approx(by_step, rel=1e-4, abs=2e-6), tag
    for name in ("model.qkv.weight", "model.experts_up"):
        assert f"muon/momentum_singular_values/{name}" in histograms
        assert set(scalars[f"muon/ns_residual/{name}"]) == {EVERY, 2 * EVERY}
    medians = [
        by_step[EVERY]
        for tag, by_step in expected.items()
        if "/momentum_q50/" in tag and not tag.endswith((".min", ".max"))
    ]
    aggregates = {which: scalars[f"muon/momentum_q50/_{which}"][EVERY] for which in ("min", "mean", "max")}
    assert aggregates == pytest.approx(
        {"min": min(medians), "mean": np.mean(medians), "max": max(medians)}, rel=1e-3, abs=2e-6
    )


def test_values_of_one_process_are_numpys(expected):
    check(expected[1], expected[0])


@pytest.mark.parametrize(
    ("strategy", "world_size"), [("muon_zero1", 2), ("muon_zero1", 3), ("muon_fsdp", 2), ("muon_fsdp", 3)]
)
def test_values_of_several_processes(tmp_path, expected, strategy, world_size):
    run_processes(world_size, train, str(tmp_path), strategy)
    check(tmp_path, expected[0])
    one, several = ModelDescription.read(expected[1] / "tb"), ModelDescription.read(tmp_path / "csv")
    assert several == one


def test_replicas_of_shards(tmp_path, expected):
    run_processes(4, _replicas, str(tmp_path))
    check(tmp_path, expected[0])


def _replicas(folder):
    train(folder, lm.MuonFSDPStrategy(num_replicas=2))


def test_accumulated_gradients(tmp_path, expected):
    run_processes(2, _accumulate, str(tmp_path))
    check(tmp_path, expected[0])


def _accumulate(folder):
    return train(folder, "muon_zero1", accumulate_grad_batches=2)


@pytest.mark.parametrize("orthogonalization", ["polar_express5", {"name": "auto", "every": 2}])
def test_training_is_bitwise_the_same(tmp_path, orthogonalization):
    options = {"orthogonalization": orthogonalization}
    watched = run_processes(2, train, str(tmp_path / "a"), "muon_zero1", False, True, options)
    unwatched = run_processes(2, train, str(tmp_path / "b"), "muon_zero1", False, False, options)
    for one, other in zip(watched, unwatched, strict=True):
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def train_auto(folder):
    module = AwkwardLightningModule(orthogonalization={"name": "auto", "every": 2})
    monitor = lm.MomentumSpectrumMonitor(every_n_steps=4, mode="detailed")
    run = trainer(4, logger=TensorBoardLogger(folder, name="tb", version=""), callbacks=[monitor])
    run.fit(module)
    return dict(run.optimizers[0].step_counts)


def test_steps_that_auto_chose(tmp_path):
    counts, _ = run_processes(2, train_auto, str(tmp_path))
    scalars, _ = events(tmp_path)
    assert len({count for by_matrix in counts.values() for count in by_matrix}) > 1
    for name, by_matrix in counts.items():
        found = (
            [scalars[f"muon/ns_steps/{name}.{number}"][4] for number in range(len(by_matrix))]
            if (len(by_matrix) > 1)
            else [scalars[f"muon/ns_steps/{name}"][4]]
        )
        assert found == by_matrix


def test_include_exclude_and_one_look_for_all(tmp_path, monkeypatch):
    asked = []
    watch = lm.Muon.watch_next_step
    monkeypatch.setattr(
        lm.Muon,
        "watch_next_step",
        lambda self, spectra, alignments: (asked.append(set(spectra)), watch(self, spectra, alignments=alignments)),
    )
    callbacks = [
        lm.UpdateRMSMonitor(every_n_steps=1),
        lm.MomentumSpectrumMonitor(every_n_steps=2, include="experts|qkv", exclude="qkv"),
        lm.MomentumSpectrumMonitor(every_n_steps=4, include="square", mode="detailed"),
    ]
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    trainer(4, "auto", accelerator="cpu", logger=logger, callbacks=callbacks).fit(AwkwardLightningModule())
    experts, square = "model.experts_up", "model.square.weight"
    assert asked == [set(), {experts}, set(), {experts, square}]
    scalars, histograms = events(tmp_path)
    found = {tag.split("/")[2]: set(steps) for tag, steps in scalars.items() if "/momentum_q50/" in tag}
    assert {name: steps for name, steps in found.items() if not name.startswith("_")} == {
        experts: {2, 4},
        f"{experts}.min": {2, 4},
        f"{experts}.max": {2, 4},
        square: {4},
    }
    assert set(scalars["muon/ns_residual/model.tall.weight"]) == {1, 2, 3, 4}
    assert set(histograms) == {f"muon/momentum_singular_values/{name}" for name in (experts, square)}


def train_two_optimizers(folder):
    logger = TensorBoardLogger(folder, name="tb", version="")
    trainer(8, logger=logger, callbacks=[lm.MomentumSpectrumMonitor(every_n_steps=4)]).fit(TwoOptimizers())


def test_two_optimizers(tmp_path):
    run_processes(2, train_two_optimizers, str(tmp_path))
    scalars, _ = events(tmp_path)
    for half in ("first", "second"):
        assert set(scalars[f"muon/momentum_q50/model.{half}.weight"]) == {4, 8}


class Overflowing(AwkwardLightningModule):
    def on_before_optimizer_step(self, optimizer):
        if self.global_step == 1:
            next(self.parameters()).grad.fill_(torch.inf)


def test_a_skipped_step_logs_nothing_of_the_momentum(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    callbacks = [lm.MomentumSpectrumMonitor(every_n_steps=1), lm.WeightNormMonitor(every_n_steps=1)]
    module = Overflowing(nonfinite="skip", num_steps=3)
    run = trainer(3, "auto", accelerator="cpu", logger=logger, callbacks=callbacks)
    run.fit(module)
    assert run.optimizers[0].skipped_steps == 1
    scalars, _ = events(tmp_path)
    assert set(scalars["muon/weight_rms/_mean"]) == {1, 2, 3}
    assert {frozenset(steps) for tag, steps in scalars.items() if "momentum" in tag or "/ns_" in tag} == {
        frozenset({1, 3})
    }


def test_experts_that_rest_are_left_out():
    model = awkward_model()
    optimizer = lm.Muon(model, lr=0.1)
    model.loss(token_batches(1, 4)[0]).backward()
    model.experts_up.grad[2] = 0
    optimizer.watch_next_step(spectra=["experts_up"])
    optimizer.step()
    request = Request(("momentum_q50", "ns_steps", "ns_residual"), include="experts", mode="detailed")
    values = collect([optimizer], [request]).values
    numbers = {tag.rpartition(".")[2] for tag in values if "q50/experts_up." in tag} - {"min", "max"}
    assert numbers == {"0", "1", "3", "4"}
    assert values["muon/momentum_q50/experts_up.min"] > 0


def test_model_description_beside_the_logs(tmp_path):
    options = {"orthogonalization": ((2.0, -1.5, 0.5),), "orthogonalization_dtype": torch.float64}
    for _ in range(2):  # a run that goes on in the same folder
        train(tmp_path, module_options=options, accelerator="cpu")
        found = ModelDescription.read(tmp_path / "tb")
        assert found == ModelDescription.read(tmp_path / "csv")
    model = AwkwardLightningModule()
    assert found.num_parameters == sum(param.numel() for param in model.parameters())
    assert found.parameters["model.experts_up"].matrices == ((11, 6, 5),)
    assert found.parameters["model.qkv.weight"].matrices == ((13, 13, 3),)
    assert found.parameters["model.qkv.weight"].dtype == "float64"
    assert found.parameters["model.qkv.weight"].orthogonalization == ((2.0, -1.5, 0.5),)
    assert "model.lm_head.weight" not in found.parameters


class Folderless(DummyLogger):
    log_dir = None


def test_model_description_without_a_log_folder(tmp_path):
    options = {"logger": Folderless(), "default_root_dir": tmp_path, "callbacks": [lm.MomentumSpectrumMonitor()]}
    trainer(1, "auto", accelerator="cpu", **options).fit(AwkwardLightningModule())
    assert ModelDescription.read(tmp_path).parameters["model.square.weight"].dtype == "float32"


def test_alarm_once_for_each_parameter(tmp_path, monkeypatch):
    monkeypatch.setattr(iteration, "promised_residual", lambda sequence: 1e-3)
    callbacks = [lm.UpdateRMSMonitor(every_n_steps=1), lm.MomentumSpectrumMonitor(every_n_steps=1)]
    run = trainer(2, "auto", accelerator="cpu", logger=CSVLogger(tmp_path), callbacks=callbacks)
    with pytest.warns(UserWarning, match="allows 0.001 at most") as caught:
        run.fit(AwkwardLightningModule())
    texts = [text for text in (str(warning.message) for warning in caught) if "ns_residual" in text or "‖XXᵀ" in text]
    assert len(texts) == 4  # three in full, and one about the rest
    for name in ("conv", "square", "wide"):
        assert sum(f"model.{name}.weight" in text for text in texts) == 1
    assert "orthogonalization_dtype=torch.float32" in texts[0]
    assert "'safety': 1.05" in texts[0]


def test_no_alarm_where_nothing_is_wrong(tmp_path):
    callbacks = [lm.UpdateRMSMonitor(every_n_steps=1)]
    module = AwkwardLightningModule(orthogonalization_dtype=torch.bfloat16, num_steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(4, "auto", accelerator="cpu", logger=CSVLogger(tmp_path), callbacks=callbacks).fit(module)
    assert not [warning for warning in caught if "Newton–Schulz" in str(warning.message)]


def test_a_residual_that_is_not_finite_is_an_alarm():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    optimizer = lm.Muon(model, nonfinite="propagate", idle_matrices="update")
    model(torch.eye(4)).sum().backward()
    model[0].weight.grad[0, 0] = torch.nan
    optimizer.watch_next_step()
    optimizer.step()
    sighting = Session().look([optimizer], [Request(("ns_residual",))])
    assert np.isnan(sighting.collection.values["muon/ns_residual/0.weight"])
    assert sighting.collection.values["muon/alarms/not_finite"] == 1
    (warning,) = sighting.warnings
    assert warning.startswith("0.weight: its weight, its update or what Newton–Schulz made of it is NaN or infinite.")


class Scaled(AwkwardLightningModule):
    """The gradient of the second step does not fit into float16."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 1e30 if batch_idx == 1 else loss


def train_float16(folder):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
    callbacks = [lm.MomentumSpectrumMonitor(every_n_steps=1), lm.WeightNormMonitor(every_n_steps=1)]
    logger = TensorBoardLogger(folder, name="tb", version="")
    plugins = [PoolEnvironment(), plugin]
    trainer(3, logger=logger, callbacks=callbacks, plugins=plugins).fit(Scaled(num_steps=3))


def test_a_step_that_the_gradient_scaler_leaves_out_logs_nothing_of_the_momentum(tmp_path):
    run_processes(2, train_float16, str(tmp_path))
    scalars, _ = events(tmp_path)
    assert set(scalars["muon/weight_rms/_mean"]) == {1, 2, 3}
    for family in ("momentum_q50", "ns_residual", "ns_steps", "ns_fail_frac"):
        assert set(scalars[f"muon/{family}/_mean"]) == {1, 3}
