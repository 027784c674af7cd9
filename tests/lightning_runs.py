"""The same training through the Trainer and through Fabric, inside processes that exist already."""

from __future__ import annotations

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from typing_extensions import override

import lightning_muon as lm
from tests.fsdp.layouts import copies_agree
from tests.models import awkward_model, token_batches
from tests.versions import WEIGHTS_ONLY

GLOBAL_BATCH = 12


class PoolEnvironment(ClusterEnvironment):
    """The processes of ``tests.processes``, as Lightning sees them."""

    creates_processes_externally = True
    main_address = "unused"
    main_port = 0

    @staticmethod
    @override
    def detect():
        return True

    @override
    def world_size(self):
        return dist.get_world_size()

    @override
    def set_world_size(self, size):
        pass

    @override
    def global_rank(self):
        return dist.get_rank()

    @override
    def set_global_rank(self, rank):
        pass

    @override
    def local_rank(self):
        return dist.get_rank()

    @override
    def node_rank(self):
        return 0


class AwkwardLightningModule(L.LightningModule):
    """Trains ``AwkwardModel``; the batch of a step depends on the step alone, so a resumed run sees the same."""

    def __init__(self, num_steps=20, seed=0, optimizer=None, **muon_options):
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        self.model = awkward_model(seed)
        self.optimizer_class = optimizer
        self.batches = token_batches(num_steps, GLOBAL_BATCH)
        self.muon_options = {"lr": 1e-2, "adamw_lr": 5e-3, "orthogonalization_dtype": torch.float32, **muon_options}
        self.norms = []
        self.replica_difference = 0.0

    def forward(self, tokens):
        return self.model(tokens)

    def _share(self, tokens, accumulated=1, number=0):
        return tokens.chunk(self.trainer.world_size)[self.global_rank].chunk(accumulated)[number]

    def training_step(self, batch, batch_idx):
        accumulated = self.trainer.accumulate_grad_batches
        tokens = self._share(self.batches[self.global_step], accumulated, batch_idx % accumulated)
        loss = self.model.loss(tokens)
        self.log("loss", loss, sync_dist=True, batch_size=1)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model.loss(self._share(self.batches[0])), sync_dist=True, batch_size=1)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.model(self.batches[0]).argmax(-1)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        norm = getattr(self.trainer.optimizers[0], "last_grad_norms", {}).get("all")
        if norm is not None:
            self.norms.append(norm.item())
        self.replica_difference = max(self.replica_difference, replica_difference(self))

    def configure_optimizers(self):
        if self.optimizer_class is not None:
            return self.optimizer_class(self.parameters(), lr=1e-2)
        return lm.Muon(self, **self.muon_options)

    def train_dataloader(self):
        return DataLoader(range(len(self.batches) * self.trainer.accumulate_grad_batches), batch_size=None)

    def val_dataloader(self):
        return DataLoader(range(1), batch_size=None)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def trainer(max_steps=20, strategy="muon_zero1", **options):
    defaults = {
        "accelerator": "cpu",
        "devices": dist.get_world_size() if dist.is_initialized() else 1,
        "max_steps": max_steps,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    if dist.is_initialized():
        defaults["plugins"] = [PoolEnvironment()]
    return L.Trainer(strategy=strategy, **{**defaults, **options})


def weights(module):
    """Weights by name, whole, as float32 copies."""
    return {name: _whole(param).float().clone() for name, param in module.named_parameters()}


def _whole(param):
    return param.full_tensor().detach() if isinstance(param, DTensor) else param.detach()


def replica_difference(module):
    """The largest difference of any weight to rank 0's; called by all ranks. Of shards, what there are copies of."""
    if not dist.is_initialized():
        return 0.0
    if any(isinstance(param, DTensor) for param in module.parameters()):
        return 0.0 if all(copies_agree(param) for param in module.parameters()) else float("inf")
    flat = torch.cat([param.detach().float().reshape(-1) for param in module.parameters()])
    first = flat.clone()
    dist.broadcast(first, 0)
    return (flat - first).abs().max().item()


def fit(max_steps=20, save_to=None, resume_from=None, module_options=None, **trainer_options):
    """Fit through the Trainer; returns the weights, the clipping norms, the gathered state bytes."""
    module = AwkwardLightningModule(**(module_options or {}))
    run = trainer(max_steps, **trainer_options)
    run.fit(module, ckpt_path=resume_from, **WEIGHTS_ONLY)
    if save_to is not None:
        run.save_checkpoint(save_to)
    assert module.replica_difference == 0, "replicas differ after some step"
    return weights(module), module.norms, run.optimizers[0].local_state_bytes()


class Loss(torch.nn.Module):
    """What strategies wrap has a forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.loss(tokens)


def fabric_fit(
    max_steps=20, save_to=None, resume_from=None, accumulate=1, max_norm=None, module_options=None, **fabric_options
):
    """The same training as a Fabric loop."""
    options = {"accelerator": "cpu", "devices": dist.get_world_size(), "strategy": "muon_zero1"}
    fabric = L.Fabric(**{**options, "plugins": [PoolEnvironment()], **fabric_options})
    fabric.launch()
    options = {"lr": 1e-2, "adamw_lr": 5e-3, "orthogonalization_dtype": torch.float32, **(module_options or {})}
    bare = Loss(awkward_model())
    module, optimizer = fabric.setup(bare, lm.Muon(bare, **options))
    first, norms = 0, []
    if resume_from is not None:
        first = fabric.load(resume_from, {"module": module, "optimizer": optimizer}, **WEIGHTS_ONLY)["step"]
    for step, tokens in enumerate(token_batches(20, GLOBAL_BATCH)[first:max_steps], start=first + 1):
        micro_batches = tokens.chunk(fabric.world_size)[fabric.global_rank].chunk(accumulate)
        for number, micro_batch in enumerate(micro_batches, start=1):
            with fabric.no_backward_sync(module, enabled=number < len(micro_batches)):
                fabric.backward(module(micro_batch) / len(micro_batches))
        if max_norm is not None:
            norms.append(fabric.clip_gradients(module, optimizer, max_norm=max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        assert replica_difference(bare) == 0, f"replicas differ after step {step}"
        if save_to is not None and step == max_steps:
            fabric.save(save_to, {"module": module, "optimizer": optimizer, "step": step})
    return weights(bare), norms, optimizer.optimizer.local_state_bytes()
