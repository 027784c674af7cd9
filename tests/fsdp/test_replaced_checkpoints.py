"""A checkpoint that ModelCheckpoint replaces is there until the one that replaces it is whole."""

import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_muon as lm
from lightning_muon.checkpoint import folders
from lightning_muon.checkpoint.folders import load_whole
from tests.distributed.test_checkpoint_background import HeldWrites
from tests.lightning_runs import AwkwardLightningModule, trainer
from tests.processes import run_processes


def job(folder, steps, *callbacks):
    """Saves every second step, in the background, and keeps one."""
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=1)
    strategy = lm.MuonFSDPStrategy(save_distributed_checkpoint=True, save_in_background=True)
    return trainer(steps, strategy, enable_checkpointing=True, callbacks=[*callbacks, saving])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class AfterStep(Callback):
    def __init__(self, actions):
        self.actions = actions

    def on_train_batch_start(self, trainer, *_):
        self.actions.get(trainer.global_step, lambda: None)()


def hold_the_second(folder):
    writes, seen = HeldWrites(), []

    def look():
        dist.barrier()
        seen.extend(names(folder))
        dist.barrier()
        writes.go_on()

    def hold():
        run.strategy._saved.finish()  # the first one
        writes.__enter__()

    run = job(folder, 5, AfterStep({3: hold, 4: look}))
    run.fit(AwkwardLightningModule())
    writes.__exit__()
    return seen


def test_it_stays_while_the_next_is_written(tmp_path):
    for seen in run_processes(2, hold_the_second, tmp_path):
        assert "step=2.ckpt" in seen
        assert "step=4.ckpt" not in seen
    assert names(tmp_path) == ["step=4.ckpt"]
    assert load_whole(tmp_path / "step=4.ckpt")[1]["global_step"] == 4


def fail_the_second(folder):
    original = folders._Writer.write_data

    def fail(*args):
        raise OSError(28, "No space left on device")

    def break_disk():
        run.strategy._saved.finish()
        if dist.get_rank() == 1:
            folders._Writer.write_data = fail

    run = job(folder, 7, AfterStep({3: break_disk}))  # told at step 6
    try:
        with pytest.raises(OSError, match="No space left on device"):
            run.fit(AwkwardLightningModule())
    finally:
        folders._Writer.write_data = original


def test_it_stays_if_the_next_cannot_be_written(tmp_path):
    run_processes(2, fail_the_second, tmp_path)
    assert names(tmp_path) == ["step=2.ckpt"]
    assert load_whole(tmp_path / "step=2.ckpt")[1]["global_step"] == 2
