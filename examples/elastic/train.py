"""A job that goes on with fewer machines when one is lost: ``docs/elastic.md`` says how it is started."""

import os
import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import lightning_muon as lm


class Model(L.LightningModule):
    """Learns which of its inputs is the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (inputs,) = batch
        loss = cross_entropy(self.layers(inputs), inputs.argmax(1)) * self.loader.weight
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: object, batch: list[Tensor], batch_idx: int) -> None:
        loss, processes = self.trainer.callback_metrics["loss"], self.trainer.world_size
        if self.trainer.is_global_zero:
            print(f"step {self.global_step} on {processes} processes: loss {loss:.6f}", flush=True)

    def configure_optimizers(self) -> lm.Muon:
        return lm.Muon(self, lr=0.01)

    def train_dataloader(self) -> lm.GlobalBatchLoader:
        inputs = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        self.loader = lm.GlobalBatchLoader(TensorDataset(inputs), batch_size=16)  # of all processes together
        return self.loader


def main(folder: str) -> None:
    """Train, from the last checkpoint in ``folder`` if there is one."""
    L.seed_everything(0)
    saving = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=0, save_last=True)
    trainer = L.Trainer(
        strategy="muon_fsdp",
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),  # as many as torchrun has found this time
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        max_steps=30,
        callbacks=[saving],
        logger=False,
    )
    trainer.fit(Model(), ckpt_path="last")


if __name__ == "__main__":
    main(sys.argv[1])
