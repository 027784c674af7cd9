"""What ``test_two_hosts`` starts on each host: a run of the Trainer over two hosts, one process each."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_muon as lm
from tests.lightning_runs import AwkwardLightningModule, trainer, weights

STEPS = 10
SAVE_EVERY = 2
KILLED_AFTER = 5  # so many finished steps
PROCESS_GROUP_TIMEOUT_S = 30


class KilledModule(AwkwardLightningModule):
    """One rank is killed in the middle of a backward pass."""

    def __init__(self, killed_rank):
        super().__init__()
        self.killed_rank = killed_rank

    def on_train_start(self):
        self.model.wide.weight.register_hook(self._die)

    def _die(self, gradient):
        if self.global_rank == self.killed_rank and self.global_step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder):
    module = AwkwardLightningModule()
    run = trainer(STEPS, num_nodes=2)
    run.fit(module)
    assert run.world_size == 2
    assert module.replica_difference == 0
    torch.save(weights(module), folder / f"weights-{run.global_rank}.pt")


def die(folder, killed_rank):
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1)
    strategy = lm.MuonZero1Strategy(timeout=timedelta(seconds=PROCESS_GROUP_TIMEOUT_S))
    run = trainer(STEPS, strategy, num_nodes=2, enable_checkpointing=True, callbacks=[saving])
    run.fit(KilledModule(killed_rank))


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, *arguments = sys.argv[1:]
    if what == "train":
        train(Path(folder))
    else:
        die(Path(folder), int(arguments[0]))
