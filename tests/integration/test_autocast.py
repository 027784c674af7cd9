"""Manual optimization under bf16-mixed: Lightning calls the optimizer within autocast."""

import lightning as L
import torch
from torch import nn

import lightning_muon as lm


class Manual(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.layer = nn.Linear(48, 12, bias=False)
        self.sizes, self.saw_autocast = [], False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.layer(batch) - batch.roll(1, 1)[:, :12]).square().mean())
        self.saw_autocast |= torch.is_autocast_enabled("cpu")
        before = self.layer.weight.detach().clone()
        optimizer.step()
        update = (before - self.layer.weight.detach()) / (1e-2 * 0.2 * 48**0.5)
        self.sizes.append(torch.linalg.matrix_norm(update, 2).item())

    def configure_optimizers(self):
        return lm.Muon(self, lr=1e-2, weight_decay=0.0)


def test_updates_keep_their_size(tmp_path):
    spiky = torch.randn(200, 48) * torch.logspace(0, -3, 48) + 3 * torch.randn(200, 1)
    model = Manual()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=25,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, torch.utils.data.DataLoader(spiky, batch_size=8))
    assert model.saw_autocast
    assert len(model.sizes) == 25
    assert max(model.sizes) < 1.2
