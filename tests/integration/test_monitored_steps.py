"""Norms, ratios and spectra that the monitors log, against numpy on the weights before and after each step."""

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lightning_muon as lm
from lightning_muon.monitoring import Request, collect, sources
from lightning_muon.names import canonical_name
from tests.integration.test_monitors import events
from tests.lightning_runs import AwkwardLightningModule, trainer, weights
from tests.processes import run_processes

STEPS, EVERY = 4, 2
FAMILIES = (
    "update_rms",
    "update_weight_ratio",
    "weight_rms",
    "weight_spectral_norm",
    "weight_stable_rank",
    "weight_svd_entropy",
)


class Recorded(AwkwardLightningModule):
    """Keeps the weights before and after every step, and the learning rate."""

    def on_fit_start(self):
        self.before, self.after, self.rates = [], [], []

    def on_before_optimizer_step(self, optimizer):
        self.before.append({name: param.detach().double().clone() for name, param in self.named_parameters()})
        self.rates.append(
            [(group["lr"], group["weight_decay"], set(group["params"])) for group in optimizer.param_groups]
        )

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if len(self.after) < self.trainer.global_step:
            self.after.append({name: param.detach().double().clone() for name, param in self.named_parameters()})

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        # a rate that changes at every step: the one of the step counts, and not that of the next
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(folder, strategy="auto", optimizer=None, kind=Recorded, **options):
    module = kind(optimizer=optimizer, **({} if optimizer else {"weight_decay": 0.3}))
    callbacks = [one(every_n_steps=EVERY) for one in (lm.UpdateRMSMonitor, lm.WeightNormMonitor, lm.SpectrumMonitor)]
    logger = TensorBoardLogger(folder, name="tb", version="")
    run = trainer(STEPS, strategy, logger=logger, callbacks=callbacks, **options)
    run.fit(module)
    return module, run.optimizers[0]


def layouts():
    return {name: route.layout for name, route in lm.Muon(AwkwardLightningModule()).routes.items()}


def expected_scalars(module, decays=True):
    """By numpy, from two checkpoints."""
    expected, names = {}, {param: name for name, param in module.named_parameters()}
    for step in range(EVERY, STEPS + 1, EVERY):
        for lr, decay, params in module.rates[step - 1]:
            for name in (names[param] for param in params):
                before, after = module.before[step - 1][name], module.after[step - 1][name]
                update = (before * (1 - lr * (decay if decays else 0)) - after) / lr
                layout = layouts()[name]
                rows = []
                for u, w in zip(*(layout.matrices(x) if layout else [x] for x in (update, after)), strict=True):
                    u, w = u.numpy(), w.numpy()
                    row = {"weight_rms": np.sqrt((w**2).mean()), "update_rms": np.sqrt((u**2).mean())}
                    row |= {"update_weight_ratio": lr * np.linalg.norm(u) / np.linalg.norm(w)}
                    if layout:
                        sigma = np.linalg.svd(w, compute_uv=False)
                        p = sigma**2 / (sigma**2).sum()
                        entropy = -(p * np.log(p)).sum() / np.log(len(p)) if len(p) > 1 else 0.0
                        row |= {
                            "weight_spectral_norm": sigma[0],
                            "weight_stable_rank": (sigma**2).sum() / sigma[0] ** 2,
                        }
                        row |= {"weight_svd_entropy": entropy}
                    rows.append(row)
                whole = {"weight_rms": np.sqrt((after.numpy() ** 2).mean())}
                whole |= {"update_rms": np.sqrt((update.numpy() ** 2).mean())}
                whole |= {"update_weight_ratio": lr * np.linalg.norm(update) / np.linalg.norm(after)}
                for family in rows[0]:
                    values = sorted(row[family] for row in rows)
                    summary = {"": whole.get(family, values[(len(values) - 1) // 2])}
                    if len(values) > 1:
                        summary |= {".min": values[0], ".max": values[-1]}
                    for suffix, value in summary.items():
                        expected.setdefault(f"muon/{family}/{name}{suffix}", {})[step] = float(value)
    return expected


def check(folder, expected):
    scalars, _ = events(folder)
    found = {tag for tag in scalars if tag.split("/")[1] in FAMILIES and not tag.split("/")[2].startswith("_")}
    assert found == expected.keys()
    for tag, by_step in expected.items():
        assert scalars[tag] == pytest.approx(by_step, rel=1e-4, abs=1e-6), tag


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    module, _ = train(folder, accelerator="cpu")
    return expected_scalars(module), folder


def test_one_process(expected):
    check(expected[1], expected[0])


@pytest.mark.parametrize("strategy", ["muon_zero1", "muon_fsdp", "ddp"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes(tmp_path, expected, strategy, world_size):
    run_processes(world_size, _train, str(tmp_path), strategy)
    check(tmp_path, expected[0])


def test_replicas_of_shards(tmp_path, expected):
    run_processes(4, _train, str(tmp_path), lm.MuonFSDPStrategy(num_replicas=2))
    check(tmp_path, expected[0])


class Compiled(Recorded):
    """Its submodule is compiled, so that its parameters' names have ``_orig_mod`` in them."""

    def configure_model(self):
        if not hasattr(self.model, "_orig_mod"):
            self.model = torch.compile(self.model, backend="eager")

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.before[-1] = {canonical_name(name): value for name, value in self.before[-1].items()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.after[-1] = {canonical_name(name): value for name, value in self.after[-1].items()}


def test_compiled_modules_keep_their_names(tmp_path, expected):
    train(tmp_path, accelerator="cpu", kind=Compiled)
    check(tmp_path, expected[0])


class Scheduled(Recorded):
    """The rates without the records, which are of whole weights."""

    on_fit_start = on_before_optimizer_step = on_train_batch_end = lambda self, *args: None


def _train(folder, strategy, optimizer=None):
    train(folder, strategy, optimizer, kind=Scheduled)


def adamw(params, lr):
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.3)


def sgd(params, lr):
    return torch.optim.SGD(params, lr=lr, weight_decay=0.3, momentum=0.9)


@pytest.mark.parametrize(("optimizer", "decays"), [(adamw, True), (sgd, False)])
def test_other_optimizers(tmp_path, optimizer, decays):
    module, _ = train(tmp_path / "one", optimizer=optimizer, accelerator="cpu")
    expected = expected_scalars(module, decays)
    check(tmp_path / "one", expected)
    run_processes(2, _train, str(tmp_path / "two"), "ddp", optimizer)
    check(tmp_path / "two", expected)


def test_other_optimizers_on_shards_are_refused(tmp_path):
    def on_shards(params, lr):
        params = list(params)
        params[0].to_local = lambda: params[0]  # as a DTensor has it
        return adamw(params, lr)

    with pytest.raises(MisconfigurationException, match=r"DTensor.*'algorithm': 'adamw'"):
        train(tmp_path, optimizer=on_shards, accelerator="cpu", kind=AwkwardLightningModule)


class Broken(CSVLogger):
    """Cannot write what the monitors give it."""

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("muon/") for key in metrics):
            raise OSError("No space left on device")
        super().log_metrics(metrics, step)


def train_with_a_broken_logger(folder):
    module = AwkwardLightningModule()
    loggers = [Broken(folder, name="broken"), TensorBoardLogger(folder, name="tb", version="")]
    trainer(STEPS, logger=loggers, callbacks=[lm.UpdateRMSMonitor(every_n_steps=1)]).fit(module)
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def test_a_logger_that_fails_ends_nobody(tmp_path):
    results = run_processes(2, train_with_a_broken_logger, str(tmp_path))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert set(events(tmp_path)[0]["muon/update_rms/_mean"]) == {1, 2, 3, 4}  # the other logger has everything


def final_weights(folder, strategy, optimizer=None, is_watched=True):
    monitors = (lm.UpdateRMSMonitor, lm.WeightNormMonitor, lm.SpectrumMonitor)
    monitors += () if optimizer else (lm.MomentumSpectrumMonitor,)
    module = AwkwardLightningModule(optimizer=optimizer)
    callbacks = [one(every_n_steps=2) for one in monitors] if is_watched else []
    trainer(STEPS, strategy, logger=CSVLogger(folder), callbacks=callbacks).fit(module)
    return weights(module)


@pytest.mark.parametrize(("strategy", "optimizer"), [("muon_zero1", None), ("muon_fsdp", None), ("ddp", adamw)])
def test_training_is_bitwise_the_same(tmp_path, strategy, optimizer):
    watched = run_processes(2, final_weights, str(tmp_path), strategy, optimizer, True)
    unwatched = run_processes(2, final_weights, str(tmp_path), strategy, optimizer, False)
    for one, other in zip(watched, unwatched, strict=True):
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("monitor", [lm.UpdateRMSMonitor, lm.MomentumSpectrumMonitor])
def test_filters_that_leave_nothing_are_an_error(tmp_path, monitor):
    with pytest.raises(ValueError, match=r"include='\(' is no regular expression"):
        monitor(include="(")
    with pytest.raises(ValueError, match="every_n_steps='5' must be a whole number"):
        monitor(every_n_steps="5")
    options = {"accelerator": "cpu", "logger": CSVLogger(tmp_path), "callbacks": [monitor(include="nowhere")]}
    with pytest.raises(MisconfigurationException, match="leaves none of the"):
        trainer(1, "auto", **options).fit(AwkwardLightningModule())


def test_a_trainer_that_logs_nothing_measures_nothing(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    options = {"accelerator": "cpu", "logger": logger, "callbacks": [lm.UpdateRMSMonitor()], "log_every_n_steps": 0}
    trainer(3, "auto", **options).fit(AwkwardLightningModule())
    assert not events(tmp_path)[0]


class TwoSteps(AwkwardLightningModule):
    """Manual optimization, two steps of AdamW in a batch; a parameter never has a gradient."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("used", "unused")})
        self.updates = []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward((self.model["used"](torch.eye(4)) - batch_idx).square().mean())
            before = self.model["used"].weight.detach().clone()
            optimizer.step()
            update = (before * (1 - 0.1 * 0.5) - self.model["used"].weight.detach()) / 0.1
            self.updates.append(update.square().mean().sqrt().item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


def test_an_update_is_one_step_of_what_has_moved(tmp_path):
    module, monitor = TwoSteps(), lm.UpdateRMSMonitor(every_n_steps=3)
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    trainer(12, "auto", accelerator="cpu", logger=logger, callbacks=[monitor]).fit(module)
    scalars, _ = events(tmp_path)
    logged = scalars["muon/update_rms/model.used.weight"]
    assert logged == pytest.approx({step: module.updates[step - 1] for step in (6, 12)}, rel=1e-4)
    assert not [tag for tag in scalars if "unused" in tag]
    assert not monitor._subjects


def test_of_a_skipped_step_there_is_no_update():
    model = torch.nn.Linear(4, 4)
    optimizer = lm.Muon(model, nonfinite="skip")
    families = ("update_rms", "update_weight_ratio")
    for value in (1.0, torch.nan):
        optimizer.zero_grad()
        (model(torch.eye(4)).square().sum() * value).backward()
        optimizer.step()
        values = collect([optimizer], [Request(families)]).values
        assert bool(values) == (value == 1.0)
    assert optimizer.skipped_steps == 1


def test_an_eigensolver_that_does_not_converge_ends_nobody(monkeypatch):
    def fails(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(sources, "singular_values", fails)
    model = torch.nn.Linear(4, 4)
    optimizer = lm.Muon(model)
    model(torch.eye(4)).sum().backward()
    optimizer.step()
    values = collect([optimizer], [Request(("weight_svd_entropy",))]).values
    assert np.isnan(values["muon/weight_svd_entropy/weight"])
