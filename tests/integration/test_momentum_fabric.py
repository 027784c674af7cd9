"""The momentum's figures in a Fabric loop: asked for before the step, logged after it."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

import lightning_muon as lm
from lightning_muon.cli import main
from lightning_muon.logs import ModelDescription
from lightning_muon.monitoring import Request, collect
from tests.lightning_runs import Loss, PoolEnvironment
from tests.models import awkward_model, token_batches
from tests.processes import run_processes

QUANTILES = (10, 25, 50, 75, 90, 95)
FAMILIES = (*(f"momentum_q{percent}" for percent in QUANTILES), "momentum_participation_rank", "momentum_spike")


def test_fabric_loop(tmp_path):
    fabric = L.Fabric(accelerator="cpu", devices=1, loggers=CSVLogger(tmp_path))
    bare = awkward_model()
    model, optimizer = fabric.setup(bare, lm.Muon(bare, lr=0.1))
    model.mark_forward_method("loss")
    families = ("momentum_q50", "ns_fail_frac", "ns_residual", "update_rms")

    def step():
        optimizer.zero_grad()
        fabric.backward(model.loss(token_batches(1, 4)[0]))
        optimizer.step()

    step()
    with pytest.raises(ValueError, match=r"nobody has watched the last step .*watch_next_step\(spectra="):
        lm.log_optimizer(fabric, optimizer, 1, families=families)
    assert lm.log_optimizer(fabric, optimizer, 1)  # of the others there is enough
    optimizer.watch_next_step(spectra=["square.weight"])
    step()
    with pytest.raises(ValueError, match=r"of conv\.weight, experts_up, .* give include= or exclude= here"):
        lm.log_optimizer(fabric, optimizer, 2, families=families)
    values = lm.log_optimizer(fabric, optimizer, 2, families=families, include="square")
    assert {"muon/momentum_q50/square.weight", "muon/ns_fail_frac/square.weight"} < set(values)
    optimizer.watch_next_step(spectra=optimizer.routes)
    step()
    assert "muon/momentum_q50/experts_up.min" in lm.log_optimizer(fabric, optimizer, 3, families=families)
    optimizer.watch_next_step(spectra=optimizer.routes)  # and a gradient scaler leaves out the step
    assert lm.log_optimizer(fabric, optimizer, 4, families=families) == {}


def test_logs_of_a_fabric_loop_are_read_by_advise(tmp_path, capsys):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    fabric = L.Fabric(accelerator="cpu", devices=1, loggers=loggers)
    bare = awkward_model()
    model, optimizer = fabric.setup(bare, lm.Muon(bare, lr=0.1))
    model.mark_forward_method("loss")
    for step in (1, 2):
        optimizer.zero_grad()
        fabric.backward(model.loss(token_batches(1, 4)[0]))
        optimizer.watch_next_step(spectra=optimizer.routes)
        optimizer.step()
        lm.log_optimizer(fabric, optimizer, step, families=lm.MomentumSpectrumMonitor.families)
        described = Path(fabric.logger.log_dir, "muon_model.json")
        assert described.exists() is (step == 1)
        described.unlink(missing_ok=True)  # written once
    loggers[0].finalize("success")
    loggers[1].finalize("success")
    found = ModelDescription.read(loggers[1].log_dir)
    assert found.num_parameters == sum(param.numel() for param in bare.parameters())
    assert main(["advise", loggers[1].log_dir]) == 0
    assert "return build(self" in capsys.readouterr().out


def test_only_the_momentum_s_families_describe_the_model(tmp_path):
    model = awkward_model()
    optimizer, logger = lm.Muon(model, lr=0.1), CSVLogger(tmp_path)
    model.loss(token_batches(1, 4)[0]).backward()
    optimizer.watch_next_step(spectra=["square.weight"])
    optimizer.step()
    lm.log_optimizer(logger, optimizer, 1)
    assert not Path(logger.log_dir, "muon_model.json").exists()
    values = lm.log_optimizer(logger, optimizer, 1, families="momentum_q50", include="^square")  # one, as a str
    assert "muon/momentum_q50/square.weight" in values
    assert {tag.split("/")[1] for tag in values} == {"momentum_q50"}
    assert Path(logger.log_dir, "muon_model.json").exists()


@pytest.mark.parametrize("given", ["square.weight", True, 3])
def test_what_is_no_names_cannot_be_watched(given):
    with pytest.raises(TypeError, match=r"expected names of parameters, \['.+'\] say; optimizer\.routes for all"):
        lm.Muon(awkward_model(), lr=0.1).watch_next_step(spectra=given)


def test_names_of_no_parameter_cannot_be_watched():
    optimizer = lm.Muon(awkward_model(), lr=0.1)
    with pytest.raises(ValueError, match=r"has no parameter model\.square\.weight; optimizer\.routes has"):
        optimizer.watch_next_step(spectra=["model.square.weight", "square.weight"])
    assert optimizer.watch.next is None


def fabric_loop(folder):
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="muon_zero1", plugins=[PoolEnvironment()])
    fabric.launch()
    bare = awkward_model()
    module, optimizer = fabric.setup(Loss(bare), lm.Muon(bare, lr=0.1, orthogonalization_dtype=torch.float32))
    fabric.backward(module(token_batches(1, 4)[0].chunk(2)[fabric.global_rank]))
    optimizer.watch_next_step(spectra=optimizer.routes)
    optimizer.step()
    return lm.log_optimizer(CSVLogger(folder, version=""), optimizer, 1, families=FAMILIES)


def test_fabric_loop_of_two_processes(tmp_path):
    first, second = run_processes(2, fabric_loop, str(tmp_path))
    assert first == second
    model = awkward_model()
    (described,) = tmp_path.rglob("muon_model.json")
    expected = sum(param.numel() for param in model.parameters())
    assert ModelDescription.read(described.parent).num_parameters == expected
    optimizer = lm.Muon(model, lr=0.1)
    model.loss(token_batches(1, 4)[0]).backward()
    optimizer.watch_next_step(spectra=optimizer.routes)
    optimizer.step()
    assert first == pytest.approx(collect([optimizer], [Request(FAMILIES)]).values, rel=1e-3, abs=2e-6)


def test_fabric_loop_that_skips_a_step():
    model = awkward_model()
    optimizer = lm.Muon(model, lr=0.1, nonfinite="skip")
    model.loss(token_batches(1, 4)[0]).backward()
    model.square.weight.grad[0, 0] = torch.inf
    optimizer.watch_next_step(spectra=optimizer.routes)
    optimizer.step()
    logger = DummyLogger()
    assert lm.log_optimizer(logger, optimizer, 1, families=("momentum_q50", "ns_residual")) == {}
