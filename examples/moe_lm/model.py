"""The language model as a LightningModule.

Shape suffixes: B batch, T time (tokens), H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import time
from typing import Any, Literal, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import SumMetric
from typing_extensions import override

from .balancing import balance, take_sequence_losses
from .config import ModelConfig
from .decoder import Decoder, init_weights
from .flops import flops_per_token, num_tokens
from .moe import MixtureOfExperts
from .optim import OptimizerName, build_optimizer, warmup_cosine


class MoELM(L.LightningModule):
    """A byte-level mixture-of-experts language model of Moonlight's kind.

    Args:
        config: geometry (a mapping of its fields is taken too: that is how a checkpoint stores it).
        optimizer: ``"muon"`` (matrices by Muon, the rest by AdamW) or ``"adamw"`` (everything by AdamW).
        lr: learning rate of the matrices at its peak.
        adamw_lr: learning rate of embedding, head and norms; ``None`` takes ``lr``.
        weight_decay: decoupled, applied as ``lr * weight_decay``.
        warmup_fraction: share of the steps over which the learning rate rises; then a cosine leads to 10 % of the peak.
        orthogonalization: name of the polynomial sequence for Muon.
        router_optimizer: ``"muon"`` (as Moonlight) or ``"adamw"`` for the routers' matrices.
        activation_checkpointing: keep only the layers' inputs for the backward pass and compute the rest again.

    Attributes:
        flops_per_batch: floating-point operations of the last batch on this rank; Lightning's ``ThroughputMonitor``
            reads it.
    """

    def __init__(
        self,
        config: ModelConfig = ModelConfig(),  # noqa: B008 (frozen, so sharing one default is safe)
        optimizer: OptimizerName = "muon",
        lr: float = 8e-3,
        adamw_lr: float | None = None,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.05,
        orthogonalization: str = "polar_express5",
        router_optimizer: Literal["muon", "adamw"] = "muon",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config = ModelConfig.of(config)
        self.optimizer_name: OptimizerName = optimizer
        self.lr, self.adamw_lr, self.weight_decay = lr, adamw_lr, weight_decay
        self.warmup_fraction = warmup_fraction
        self.orthogonalization, self.router_optimizer = orthogonalization, router_optimizer
        # Plain values only: a checkpoint then loads under torch's `weights_only`, and from any import path.
        self.save_hyperparameters(
            {
                "config": config.asdict(),
                "optimizer": optimizer,
                "lr": lr,
                "adamw_lr": adamw_lr,
                "weight_decay": weight_decay,
                "warmup_fraction": warmup_fraction,
                "orthogonalization": orthogonalization,
                "router_optimizer": router_optimizer,
                "activation_checkpointing": activation_checkpointing,
            }
        )
        self.flops_per_batch = 0
        self.model = Decoder(config, activation_checkpointing)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        init_weights(self, config.initializer_range)
        self.val_nll, self.val_tokens = SumMetric(), SumMetric()
        self.moe_layers = {name: m for name, m in self.named_modules() if isinstance(m, MixtureOfExperts)}
        self._tokens_since = 0
        self._clock = math.nan

    @override
    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits for the token after each: ``(B, T)`` int64 to ``(B, T, V)``."""
        logits_BTV: Tensor = self.lm_head(self.model(ids_BT))
        return logits_BTV

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood in nats of windows ``(B, T+1)``, and the auxiliary loss if there is one."""
        loss = next_token_nll(self(batch[:, :-1]), batch[:, 1:]).mean()
        self._count_flops(batch, training=True)
        self._tokens_since += num_tokens(batch) * self.trainer.world_size
        if self._logs_this_step:
            now = time.perf_counter()
            # The loss of all ranks' tokens, added up only where it is shown.
            self.log("train/loss", loss, prog_bar=True, sync_dist=True)
            if not math.isnan(self._clock):
                self.log("train/tokens_per_sec", self._tokens_since / (now - self._clock), prog_bar=True)
            self._restart_clock()
        return self.with_auxiliary_loss(loss)

    def with_auxiliary_loss(self, loss: Tensor) -> Tensor:
        """``loss`` plus the last training forward's sequence-wise balancing loss, if ``aux_loss_alpha`` asks for one.

        A Fabric loop passes the loss of every batch through it.
        """
        auxiliary = take_sequence_losses(self.moe_layers)
        return loss if auxiliary is None else loss + auxiliary

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Balances the experts: here, because this runs once per optimizer step however many batches it accumulates."""
        self.balance_experts()

    def balance_experts(self) -> dict[str, Tensor]:
        """Moves the routers' biases towards equal load, and returns MaxVio by layer.

        A Fabric loop calls it once per optimizer step, on every rank.
        """
        return balance(self.moe_layers)

    @override
    def on_validation_epoch_start(self) -> None:
        """Starts the sums anew: not at the end, where `validate` would leave inference tensors to a later `fit`."""
        self.val_nll.reset()
        self.val_tokens.reset()

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Adds up the negative log-likelihood and the tokens of windows ``(B, T+1)``."""
        nll_BT = next_token_nll(self(batch[:, :-1]), batch[:, 1:])
        self.val_nll.update(nll_BT.sum())
        self.val_tokens.update(nll_BT.numel())
        self._count_flops(batch, training=False)

    @override
    def on_validation_epoch_end(self) -> None:
        """Logs nats per token, perplexity, and bits per byte (a token is a byte; a separator counts as one)."""
        loss = self.val_nll.compute() / self.val_tokens.compute()
        # Equal on all ranks already; `sync_dist` keeps Lightning from warning that it might not be.
        self.log_dict(validation_figures(loss), sync_dist=True)
        # Once more without "/", for the progress bar and for checkpoints' file names.
        self.log("val_loss", loss, prog_bar=True, logger=False, sync_dist=True)

    @override
    def on_train_epoch_start(self) -> None:
        self._restart_clock()

    @override
    def on_validation_end(self) -> None:
        self._restart_clock()  # tokens per second of training, without validation

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """One optimizer, and the learning rate's factor per step."""
        optimizer = self.make_optimizer()
        scheduler = self.make_scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def make_optimizer(self) -> Optimizer:
        """The optimizer for all parameters, also for a Fabric loop."""
        return build_optimizer(
            self,
            optimizer=self.optimizer_name,
            lr=self.lr,
            adamw_lr=self.adamw_lr,
            weight_decay=self.weight_decay,
            orthogonalization=self.orthogonalization,
            router_optimizer=self.router_optimizer,
        )

    def make_scheduler(self, optimizer: Optimizer, num_steps: int) -> LambdaLR:
        """Linear warm-up, then a cosine to 10 %, over ``num_steps`` optimizer steps."""
        return LambdaLR(optimizer, lambda step: warmup_cosine(step, num_steps, self.warmup_fraction))

    @torch.no_grad()
    def generate(
        self,
        prompt_ids_BT: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues ``(B, T)`` token ids by sampling: ``(B, T + max_new_tokens)``. Temperature 0 takes the likeliest.

        Each token is computed from the last ``config.max_seq_len`` tokens anew; there is no key/value cache.
        """
        was_training = self.training
        self.eval()
        ids_BT = prompt_ids_BT
        for _ in range(max_new_tokens):
            logits_BV = self(ids_BT[:, -self.config.max_seq_len :])[:, -1].float()
            if temperature == 0:
                next_B1 = logits_BV.argmax(-1, keepdim=True)
            else:
                next_B1 = torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)
            ids_BT = torch.cat((ids_BT, next_B1), dim=1)
        self.train(was_training)
        return ids_BT

    @property
    def _logs_this_step(self) -> bool:
        # The Trainer hands its loggers what the n-th, 2n-th … step logged.
        every = int(cast(Any, self.trainer).log_every_n_steps)
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def _count_flops(self, batch: Tensor, training: bool) -> None:
        self.flops_per_batch = num_tokens(batch) * flops_per_token(self.config, batch.shape[1] - 1, training=training)

    def _restart_clock(self) -> None:
        self._tokens_since, self._clock = 0, time.perf_counter()


def next_token_nll(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood in nats of every target: ``(B, T)`` fp32."""
    nll = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
    return nll.view_as(targets_BT)


def validation_figures(loss: Tensor) -> dict[str, Tensor]:
    """What is logged for a mean negative log-likelihood ``loss`` in nats per byte."""
    return {"val/loss": loss, "val/perplexity": loss.exp(), "val/bpb": loss / math.log(2)}
