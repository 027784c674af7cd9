"""A thousand measured steps on two processes leave nothing behind in memory, threads or open files."""

import gc
import os
import threading

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

import lightning_muon as lm
from tests.lightning_runs import AwkwardLightningModule, trainer
from tests.processes import run_processes

STEPS = 1000


class Small(AwkwardLightningModule):
    def __init__(self):
        super().__init__(num_steps=1)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

    def training_step(self, batch, batch_idx):
        return self.model(torch.ones(2, 6) + batch_idx / STEPS).square().mean()

    def train_dataloader(self):
        return DataLoader(range(STEPS), batch_size=None)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


class Footprint(Callback):
    """Objects, threads and open files in the middle and at the end."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in (STEPS // 2, STEPS - 1):
            gc.collect()
            tensors = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
            files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
            self.found.append((tensors, threading.active_count(), files, len(gc.get_objects())))


def train(folder):
    monitors = (lm.UpdateRMSMonitor, lm.WeightNormMonitor, lm.SpectrumMonitor, lm.MomentumSpectrumMonitor)
    footprint = Footprint()
    logger = TensorBoardLogger(folder, name="tb", version="")
    callbacks = [footprint, *(one(every_n_steps=1) for one in monitors)]
    trainer(STEPS, logger=logger, callbacks=callbacks, log_every_n_steps=10**6).fit(Small())
    return footprint.found


def test_a_thousand_measured_steps_leave_nothing_behind(tmp_path):
    for middle, end in run_processes(2, train, str(tmp_path)):
        assert end[:3] == middle[:3]
        assert end[3] - middle[3] < 500  # less than one object per measured step
