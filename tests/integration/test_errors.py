"""What a user gets wrong is said in words, before anything is lost."""

import lightning as L
import lightning.fabric.plugins.precision as fabric_precision
import lightning.pytorch.plugins.precision as pl_precision
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_muon as lm
from tests.lightning_runs import AwkwardLightningModule, PoolEnvironment, fabric_fit, fit, trainer
from tests.processes import run_processes
from tests.versions import WEIGHTS_ONLY


def other_optimizer_trainer():
    with pytest.raises(
        TypeError, match=r"MuonZero1Strategy needs lightning_muon\.Muon and got torch\.optim\.adamw\.AdamW"
    ):
        trainer().fit(AwkwardLightningModule(optimizer=torch.optim.AdamW))


def other_optimizer_fabric():
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="muon_zero1", plugins=[PoolEnvironment()])
    fabric.launch()
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"needs lightning_muon\.Muon and got"):
        fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))


def unrouted_parameter():
    module = AwkwardLightningModule()
    module.mystery = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"No rule says how to train 'mystery'"):
        trainer().fit(module)


class Wider(AwkwardLightningModule):
    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(3, 3)


class WiderTranslating(Wider):
    def on_load_checkpoint(self, checkpoint):
        # past Lightning's own check of the weights, so that the optimizer's is what speaks
        checkpoint["state_dict"].update({f"extra.{k}": v for k, v in self.extra.state_dict().items()})


def checkpoint_of_another_model(path):
    fit(3, save_to=path)
    with pytest.raises(ValueError, match=r"of another model.*Trained now and not in it: extra\.bias, extra\.weight"):
        trainer().fit(WiderTranslating(), ckpt_path=path, **WEIGHTS_ONLY)


def nan_in_training():
    class Poisoned(AwkwardLightningModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step == 2 and self.global_rank == 1 else loss

    for options in ({}, {"gradient_clip_val": 1.0}):
        module = Poisoned()
        with pytest.raises(FloatingPointError, match="not finite"):
            trainer(**options).fit(module)
        assert all(param.isfinite().all() for param in module.parameters())


def nan_in_one_parameter_under_clipping():
    class Poisoned(AwkwardLightningModule):
        def on_after_backward(self):
            if self.model.norm.weight.grad[0] != 0:  # where it is owned
                self.model.norm.weight.grad[0] = float("nan")

    with pytest.raises(FloatingPointError) as caught:
        trainer(gradient_clip_val=1.0).fit(Poisoned())
    named = str(caught.value).split(", in ")[1].split(". ")[0]
    assert named in ("model.norm.weight", "parameters of another process")


def raw_backward_in_the_trainer():
    class Raw(AwkwardLightningModule):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.model.loss(self._share(self.batches[0])).backward()
            self.optimizers().step()

    with pytest.raises(RuntimeError, match=r"call self\.manual_backward\(loss\)"):
        trainer().fit(Raw())


class _Unused(AwkwardLightningModule):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Linear(2, 2)


def unused_parameter():
    with pytest.raises(RuntimeError, match="muon_zero1_find_unused_parameters_true"):
        trainer().fit(_Unused())
    module = _Unused()
    trainer(strategy="muon_zero1_find_unused_parameters_true").fit(module)
    assert all(param.isfinite().all() for param in module.parameters())


def float16_without_a_scaler():
    with pytest.raises(ValueError, match="16-mixed"):
        trainer(plugins=[PoolEnvironment(), pl_precision.HalfPrecision("16-true")]).fit(AwkwardLightningModule())
    plugins = [PoolEnvironment(), fabric_precision.HalfPrecision("16-true")]
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="muon_zero1", plugins=plugins)
    fabric.launch()
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="16-mixed"):
        fabric.setup(model, lm.Muon(model))


def weights_of_another_model(path):
    fit(1, save_to=path)
    for load in (
        lambda: trainer(2).fit(Wider(), ckpt_path=path, **WEIGHTS_ONLY),
        lambda: fabric_load_into(torch.nn.Linear(3, 3), path),
    ):
        with pytest.raises(lm.CheckpointError, match=r"weights of another model\. It lacks .*Build the model as"):
            load()


def fabric_load_into(module, path):
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="muon_zero1", plugins=[PoolEnvironment()])
    fabric.launch()
    module, _ = fabric.setup(module, lm.Muon(module))
    fabric.load(path, {"state_dict": module}, **WEIGHTS_ONLY)


class BadDisk(lm.MuonCheckpointIO):
    """Which one process alone finds to be full when it writes, and broken when it reads."""

    def __init__(self, rank):
        self.rank = rank

    def save_checkpoint(self, *args, **kwargs):
        if dist.get_rank() == self.rank:
            raise OSError("no space left on device")

    def load_checkpoint(self, *args, **kwargs):
        if dist.get_rank() == self.rank:
            raise OSError("input/output error")
        return super().load_checkpoint(*args, **kwargs)


def disk_that_is_full_for_one(path):
    for train in (fit, fabric_fit):
        with pytest.raises(OSError, match="no space left"):
            train(1, save_to=path, plugins=[PoolEnvironment(), BadDisk(0)])


def disk_that_is_broken_for_one(path):
    for train in (fit, fabric_fit):
        train(1, save_to=path)
        with pytest.raises(OSError, match="input/output error"):
            train(2, resume_from=path, plugins=[PoolEnvironment(), BadDisk(1)])


@pytest.mark.parametrize("check", [disk_that_is_full_for_one, disk_that_is_broken_for_one, weights_of_another_model])
def test_every_rank_raises_for_checkpoints(check, tmp_path):
    run_processes(2, check, str(tmp_path / "last.ckpt"))


@pytest.mark.parametrize(
    "check",
    [
        other_optimizer_trainer,
        other_optimizer_fabric,
        unrouted_parameter,
        nan_in_training,
        nan_in_one_parameter_under_clipping,
        float16_without_a_scaler,
        raw_backward_in_the_trainer,
        unused_parameter,
    ],
)
def test_every_rank_raises(check):
    run_processes(2, check)


def test_checkpoint_of_another_model_is_refused_on_every_rank(tmp_path):
    run_processes(2, checkpoint_of_another_model, str(tmp_path / "other.ckpt"))


@pytest.mark.parametrize("name", ["muon_zero1", "muon_zero1_spawn"])
def test_the_other_lightning_package_is_told_apart(name):
    import pytorch_lightning

    with pytest.raises(TypeError, match=r"import lightning\.pytorch as pl"):
        pytorch_lightning.Trainer(strategy=name, accelerator="cpu", devices=1)
    with pytest.raises(ValueError, match=r"not of pytorch_lightning\.Trainer"):
        pytorch_lightning.Trainer(strategy=lm.MuonZero1Strategy(), accelerator="cpu", devices=1)


def test_a_second_communication_hook_is_refused():
    with pytest.raises(ValueError, match="no room for another"):
        lm.MuonZero1Strategy(ddp_comm_hook=lambda state, bucket: None)


def test_monitors_need_a_logger_and_muon():
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": 1, "enable_checkpointing": False}
    with pytest.raises(MisconfigurationException, match="needs a logger"):
        L.Trainer(logger=False, callbacks=[lm.UpdateRMSMonitor()], **quiet).fit(AwkwardLightningModule())
    with pytest.raises(ValueError, match="every_n_steps"):
        lm.SpectrumMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match="mode"):
        lm.SpectrumMonitor(mode="verbose")


def test_registration_is_idempotent_and_names_are_known():
    from lightning.fabric.strategies import STRATEGY_REGISTRY
    from lightning.pytorch.strategies import StrategyRegistry

    from lightning_muon._register import register

    register()
    assert isinstance(StrategyRegistry.get("muon_zero1"), lm.MuonZero1Strategy)
    assert isinstance(STRATEGY_REGISTRY.get("muon_zero1"), lm.fabric.MuonZero1Strategy)
