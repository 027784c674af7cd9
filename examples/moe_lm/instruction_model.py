"""The language model, learning answers: the loss sees no token of what is asked.

Shape suffixes: B batch, T time (tokens), V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import Self, override

from lightning_muon.checkpoint.files import load_file

from .instructions import InstructionBatch
from .model import MoELM

__all__ = ["InstructionLM", "ResponseLoss", "response_loss", "warmup_linear"]


class ResponseLoss(NamedTuple):
    """Negative log-likelihood of all targets in nats, and how many there are; scalars."""

    nll: Tensor
    num_targets: Tensor


class InstructionLM(MoELM):
    """``MoELM`` under supervised fine-tuning; its checkpoints are those of ``MoELM``.

    The loss is the mean over the targets of *all* ranks' parts of the batch: a token weighs the same wherever it is.
    With ``accumulate_grad_batches`` every batch has its own mean, as Lightning adds them up. The experts' balance is
    left as it was trained: neither the biases nor the auxiliary loss take part.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.moe_layers.values():
            layer.bias_update_rate = layer.aux_loss_alpha = 0.0

    @classmethod
    def from_file(cls, checkpoint: str | Path, **changes: Any) -> Self:
        """Load a checkpoint of ``MoELM``, from ``convert.py`` or a Trainer; the file is read page by page.

        Args:
            checkpoint: A file.
            changes: Arguments of ``MoELM`` in place of those it was trained with.

        Raises:
            CheckpointError: It is missing, torn or altered.
            ValueError: It is another kind of checkpoint.
        """
        content = load_file(checkpoint)
        if not {cls.CHECKPOINT_HYPER_PARAMS_KEY, "state_dict"} <= set(content):
            raise ValueError(f"{checkpoint} is no checkpoint of MoELM: it has {', '.join(map(str, content))}")
        model = cls(**{**content[cls.CHECKPOINT_HYPER_PARAMS_KEY], **changes})
        model.load_state_dict(content["state_dict"])
        return model

    @override
    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:  # type: ignore[override]
        """Mean negative log-likelihood in nats of all ranks' targets; its mean over the ranks is what is minimised."""
        part = response_loss(self(batch.windows[:, :-1]), batch)
        total, ranks = part.num_targets.clone(), 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            ranks = dist.get_world_size()
        loss = part.nll * ranks / total
        self._count_flops(batch.windows, training=True)
        if self._logs_this_step:
            self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=1)
        return loss

    @override
    def validation_step(self, batch: InstructionBatch | Tensor, batch_idx: int) -> None:
        """Adds up the targets' negative log-likelihood; a tensor is a window of text, and every token a target."""
        if isinstance(batch, Tensor):
            super().validation_step(batch, batch_idx)
            return
        part = response_loss(self(batch.windows[:, :-1]), batch)
        self.val_nll.update(part.nll)
        self.val_tokens.update(part.num_targets)
        self._count_flops(batch.windows, training=False)

    @override
    def make_scheduler(self, optimizer: Optimizer, num_steps: int) -> LambdaLR:
        """Linear warm-up, then linear to 0, over ``num_steps`` optimizer steps."""
        return LambdaLR(optimizer, lambda step: warmup_linear(step, num_steps, self.warmup_fraction))


def response_loss(logits_BTV: Tensor, batch: InstructionBatch) -> ResponseLoss:
    """The loss of a batch's targets, added up."""
    logits, targets = logits_BTV[batch.is_target_BT], batch.windows[:, 1:][batch.is_target_BT]
    return ResponseLoss(F.cross_entropy(logits.float(), targets, reduction="sum"), batch.is_target_BT.sum())


def warmup_linear(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Factor on the learning rate at optimizer step ``step`` (from 0) of ``num_steps``: up to 1, then down to 0."""
    warmup = max(1, round(warmup_fraction * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (num_steps - step) / max(1, num_steps - warmup))
