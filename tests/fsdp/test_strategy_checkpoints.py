"""Checkpoints through the strategies: what is refused, on every rank and untouched; what the Trainer and Fabric add."""

import shutil

import lightning as L
import pytest
import torch
import torch.distributed as dist

import lightning_muon as lm
from lightning_muon.fabric import MuonFSDPStrategy as FabricFSDP
from tests.fsdp.resume_matrix import BLOCKS, SAVED_AT, Layout, distance, run
from tests.lightning_runs import AwkwardLightningModule, PoolEnvironment, fabric_fit, trainer, weights
from tests.models import awkward_model
from tests.processes import run_processes

FILE, FOLDER = Layout("fsdp, 2", 2), Layout("fsdp, 2, folder", 2, folder=True)


@pytest.fixture(scope="module", params=[FILE, FOLDER], ids=["file", "folder"])
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.ckpt"
    run(request.param, save_to=str(path))
    return path


def copy_of(path, folder):
    """A copy to be spoilt."""
    target = folder / path.name
    (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    return target


def resume(path, strategy="muon_fsdp", module_options=None):
    """The error of resuming, and whether the weights are those from before."""
    module = AwkwardLightningModule(**(module_options or {}))
    before = {}

    class Watch(L.Callback):
        def setup(self, trainer, pl_module, stage):
            before.update(weights(pl_module))

    try:
        trainer(SAVED_AT + 1, strategy=strategy, callbacks=[Watch()]).fit(module, ckpt_path=str(path))
    except Exception as error:
        return type(error).__name__, str(error), distance(weights(module), before)
    return None, "", None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def largest(path):
    return max(path.glob("*.distcp"), key=lambda file: file.stat().st_size) if path.is_dir() else path


def truncated(path):
    file = largest(path)
    file.write_bytes(file.read_bytes()[:-100])


def altered(path):
    flip(largest(path))


def gone(path):
    largest(path).unlink()


def unsafe(path):
    if path.is_dir():
        file = path / ".metadata"
        file.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    else:
        checkpoint = torch.load(path, weights_only=True)
        torch.save({**checkpoint, "hook": print}, path)


@pytest.mark.parametrize("spoil", [truncated, altered, gone, unsafe])
def test_what_is_broken_is_refused(saved, tmp_path, spoil):
    path = copy_of(saved, tmp_path)
    spoil(path)
    for kind, text, moved in run_processes(2, resume, path):
        assert kind == "CheckpointError", text
        assert str(path) in text
        assert moved == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 3e-2}, "lr=0.01 saved, 0.03 now"),
        ({"momentum": 0.9}, "momentum"),
        ({"rules": [lm.Rule("square.weight", algorithm="adamw")]}, "square"),
        ({"rules": [lm.Rule("qkv", num_heads=13)]}, "qkv"),
    ],
)
@pytest.mark.parametrize("strategy", ["muon_fsdp", "muon_zero1"])
def test_another_recipe_is_refused(saved, options, message, strategy):
    for kind, text, moved in run_processes(2, resume, saved, strategy, options):
        assert kind == "ValueError", text
        assert message in text
        if strategy == "muon_fsdp":
            assert moved == 0


def test_another_recipe_on_purpose(saved):
    options = {"lr": 3e-2, "hyperparameters_on_load": "saved"}
    assert run_processes(2, resume, saved, "muon_fsdp", options)[0][0] is None


class Larger(AwkwardLightningModule):
    def __init__(self):
        super().__init__()
        self.model.one_col = torch.nn.Linear(1, 9)
        self.more = torch.nn.Linear(3, 3)
        self.model.tall = torch.nn.Linear(21, 63)


def resume_larger(path):
    module = Larger()
    before = weights(module)
    with pytest.raises(lm.CheckpointError, match=r"more\.weight"):
        trainer(SAVED_AT + 1, strategy="muon_fsdp").fit(module, ckpt_path=str(path))
    return distance(weights(module), before)


def test_another_model_is_refused(saved):
    assert run_processes(2, resume_larger, saved) == [0.0, 0.0]


def evaluate(path):
    module = AwkwardLightningModule(seed=3)
    run = trainer(strategy=lm.MuonFSDPStrategy(wrap=BLOCKS))
    loaded = run.test(module, ckpt_path=str(path))[0]["val_loss"]
    return loaded, weights(module)


def test_evaluation_needs_the_weights_only(saved):
    (loss, loaded), (other, _) = run_processes(2, evaluate, saved)
    assert loss == other
    checkpoint = lm.MuonCheckpointIO().load_checkpoint(saved)
    assert distance(loaded, checkpoint["state_dict"]) == 0


def save_in_background(folder):
    strategy = lm.MuonFSDPStrategy(wrap=BLOCKS, save_distributed_checkpoint=True, save_in_background=True)
    keep = L.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=2, save_top_k=1, monitor="step", mode="max"
    )
    module = AwkwardLightningModule()
    run = trainer(7, strategy=strategy, callbacks=[keep], enable_checkpointing=True)
    run.fit(module)
    return weights(module)


def test_saving_in_the_background(tmp_path):
    after = run_processes(2, save_in_background, str(tmp_path))[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step=6.ckpt"]
    assert run_processes(2, resume_to, str(tmp_path / "step=6.ckpt"), 7)[0].keys() == after.keys()
    assert distance(run_processes(2, resume_to, str(tmp_path / "step=6.ckpt"), 7)[0], after) == 0


def resume_to(path, steps):
    module = AwkwardLightningModule()
    trainer(steps, strategy=lm.MuonFSDPStrategy(wrap=BLOCKS)).fit(module, ckpt_path=path)
    return weights(module)


def weights_only_save(path, folder):
    module = AwkwardLightningModule()
    run = trainer(2, strategy=lm.MuonFSDPStrategy(wrap=BLOCKS, save_distributed_checkpoint=folder))
    run.fit(module)
    run.save_checkpoint(path, weights_only=True)
    again = AwkwardLightningModule()
    with pytest.raises(KeyError):
        trainer(4, strategy="muon_fsdp").fit(again, ckpt_path=path)
    trainer(strategy="muon_fsdp").test(again, ckpt_path=path)
    return distance(weights(again), weights(module))


@pytest.mark.parametrize("folder", [False, True])
def test_weights_alone(tmp_path, folder):
    assert run_processes(2, weights_only_save, str(tmp_path / "w.ckpt"), folder) == [0.0, 0.0]


FABRIC = {
    "zero1": ("muon_zero1", {}),
    "file": (FabricFSDP, {}),
    "folder": (FabricFSDP, {"save_distributed_checkpoint": True}),
    "background": (FabricFSDP, {"save_distributed_checkpoint": True, "save_in_background": True}),
}


def fabric_run(kind, max_steps=10, save_to=None, resume_from=None):
    strategy, options = FABRIC[kind]
    if not isinstance(strategy, str):
        strategy = strategy(wrap=BLOCKS, **options)
    found = fabric_fit(max_steps, save_to, resume_from, strategy=strategy)[0]
    if not isinstance(strategy, str):
        strategy.finish_saving()
    return found


@pytest.mark.parametrize("target", FABRIC)
@pytest.mark.parametrize("source", FABRIC)
def test_fabric_resumes(tmp_path, source, target):
    path = str(tmp_path / "fabric.ckpt")
    expected = run_processes(2, fabric_run, source)[0]
    run_processes(2, fabric_run, source, 5, path)
    resumed = run_processes(3, fabric_run, target, 10, None, path)[0]
    assert distance(resumed, expected) <= 1e-5
    if (source == "zero1") == (target == "zero1"):
        assert distance(run_processes(2, fabric_run, target, 10, None, path)[0], expected) == 0


def fabric_errors(path):
    fabric = L.Fabric(
        accelerator="cpu", devices=dist.get_world_size(), strategy="muon_fsdp", plugins=[PoolEnvironment()]
    )
    fabric.launch()
    model = awkward_model()
    model, optimizer = fabric.setup(model, lm.Muon(model))
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 3})
    with pytest.raises(KeyError, match="epoch"):
        fabric.load(path, {"model": model, "optimizer": optimizer, "epoch": 0})
    assert fabric.load(path, {"model": model})["step"] == 3
    with pytest.raises(lm.CheckpointError):
        fabric.load(path + "2", {"model": model})
    of_nobody = lm.Muon(model)
    with pytest.raises(RuntimeError, match="sharded"):
        of_nobody.state_dict()


def test_fabric_errors(tmp_path):
    run_processes(2, fabric_errors, str(tmp_path / "f.ckpt"))
