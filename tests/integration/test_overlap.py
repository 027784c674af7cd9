"""Two hundred steps with weights arriving during the next forward, and everything going on that could look at them."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_muon as lm
from lightning_muon.sharding.in_flight import InFlight
from tests.lightning_runs import AwkwardLightningModule, trainer, weights
from tests.processes import run_processes
from tests.versions import EMAWeightAveraging

STEPS = 200


class Quiet(AwkwardLightningModule):
    """Reads no weight after a step, other than its parent."""

    def training_step(self, batch, batch_idx):
        return self.model.loss(self._share(self.batches[self.global_step % len(self.batches)]))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(STEPS), batch_size=None)


class CountInFlight(Callback):
    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, trainer, module, *_):
        self.counts.append(sum(isinstance(param, InFlight) for param in module.parameters()))


class KeepValidation(Callback):
    def __init__(self):
        self.losses = []

    def on_validation_end(self, trainer, module):
        self.losses.append(trainer.callback_metrics["val_loss"].item())


def fit(overlap, folder):
    module, in_flight, validation = Quiet(), CountInFlight(), KeepValidation()
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=13, save_top_k=-1, filename="{step}")
    averages = [] if EMAWeightAveraging is None else [EMAWeightAveraging(decay=0.9, update_every_n_steps=5)]
    run = trainer(
        STEPS,
        strategy=lm.MuonZero1Strategy(overlap=overlap, gather_mb=0.0005),
        callbacks=[in_flight, validation, checkpoints, *averages],
        enable_checkpointing=True,
        limit_val_batches=1,
        val_check_interval=7,
        check_val_every_n_epoch=None,
    )
    run.fit(module)
    return weights(module), validation.losses, in_flight.counts


def test_two_hundred_steps_are_bitwise_those_that_wait(tmp_path):
    results = {overlap: run_processes(2, fit, overlap, str(tmp_path / str(overlap))) for overlap in (True, False)}
    expected, losses, _ = results[False][0]
    assert len(losses) == STEPS // 7
    for overlap, ranks in results.items():
        for found, found_losses, counts in ranks:
            assert found_losses == losses
            assert all(torch.equal(found[name], weight) for name, weight in expected.items())
            assert len(counts) == STEPS
            assert (max(counts) > 0) == overlap, "there is something to hide"
    saved = {overlap: sorted((tmp_path / str(overlap)).glob("*.ckpt")) for overlap in (True, False)}
    assert [path.name for path in saved[True]] == [path.name for path in saved[False]]
    assert len(saved[True]) == STEPS // 13
    for paths in zip(saved[True], saved[False], strict=True):
        one, other = (torch.load(path, weights_only=True) for path in paths)
        for key in ("state_dict", "current_model_state"):  # the average, and what it is the average of
            assert one[key].keys() == other[key].keys()
            assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])
        states = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, other))
        for left, right in zip(*(state.values() for state in states), strict=True):
            assert all(torch.equal(left[key], right[key]) for key in left)
