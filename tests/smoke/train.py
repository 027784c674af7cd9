"""What a user of the wheel does first: ``train.py muon_zero1``, ``train.py muon_fsdp``, then ``train.py resume``."""

import sys

import lightning as L
import torch

import lightning_muon as lm


class Model(L.LightningModule):
    """Two matrices for Muon, a head and vectors for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32))
        self.head = torch.nn.Linear(32, 4)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        """Learns which of the first four inputs is the largest."""
        return torch.nn.functional.cross_entropy(self.head(self.layers(batch)), batch[:, :4].argmax(1))

    def configure_optimizers(self) -> lm.Muon:
        """Muon."""
        return lm.Muon(self, lr=1e-2)


def fit(strategy: str, devices: int, steps: int, checkpoint: str | None = None) -> L.Trainer:
    """Trains to so many steps."""
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(torch.randn(64, 8), batch_size=4)
    trainer.fit(Model(), data, ckpt_path=checkpoint)
    return trainer


if __name__ == "__main__":
    strategy = sys.argv[1]
    if strategy == "resume":
        for saved in ("muon_zero1.ckpt", "muon_fsdp.ckpt"):
            assert fit("auto", devices=1, steps=6, checkpoint=saved).global_step == 6
        print("resumed on one process")
    else:
        trainer = fit(strategy, devices=2, steps=4)
        trainer.save_checkpoint(f"{strategy}.ckpt")
        trainer.print(trainer.optimizers[0].explain())
