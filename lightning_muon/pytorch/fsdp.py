"""``Trainer(strategy="muon_fsdp")``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.checkpoint.check import check_weights
from lightning_muon.checkpoint.together import Processes
from lightning_muon.fabric.checkpoint_io import WholeCheckpoints, is_folder, read_together, require_local
from lightning_muon.muon import Muon
from lightning_muon.pytorch.clipping import clip_by_the_whole_norm, restore_clipping
from lightning_muon.sharding.clipping import ClipScope
from lightning_muon.sharding.fsdp.blocks import WrapPolicy
from lightning_muon.sharding.fsdp.checkpoints import ShardedCheckpoints
from lightning_muon.sharding.fsdp.fully_sharded import FullySharded
from lightning_muon.sharding.fsdp.mesh import data_mesh, make_mesh
from lightning_muon.sharding.fsdp.options import FSDPOptions
from lightning_muon.sharding.fsdp.shard_module import drop_gathered, is_sharded
from lightning_muon.sharding.fsdp.weights import load_whole_weights, sharded_weights, whole_weights
from lightning_muon.sharding.missing import MissingPolicy
from lightning_muon.sharding.precision import share_overflows
from lightning_muon.sharding.require import require_muon

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.strategies.registry import _StrategyRegistry

__all__ = ["MuonFSDPStrategy"]


class MuonFSDPStrategy(WholeCheckpoints, ModelParallelStrategy):
    """Weights, gradients and optimizer state in shards (FSDP2), trained by ``lightning_muon.Muon``.

    A LightningModule needs no code for it: its repeated blocks are found and sharded, and the rest as one unit. One
    that shards itself in ``configure_model`` keeps control. Momentum, scale and decay stay where the shard is; a matrix
    comes together on one process for its orthogonalisation only, and each is orthogonalised once, whatever the number
    of processes and replicas.

    For float16, beside an object of this class, Lightning refuses ``precision="16-mixed"``: pass
    ``plugins=[MixedPrecision("16-mixed", "cuda")]``, from ``lightning.pytorch.plugins``, instead. It takes both names
    together, ``Trainer(strategy="muon_fsdp", precision="16-mixed")``.

    Args:
        num_replicas: Copies of the sharded model (HSDP): each is shared by the same number of processes, and the copies
            average their gradients. They share the orthogonalisation, too.
        tensor_parallel_size: Processes that split layers between them, by ``parallelize_module`` in ``configure_model``
            on ``self.device_mesh["tensor_parallel"]``.
        wrap: See ``lightning_muon.sharding.fsdp.FSDPOptions``.
        activation_checkpointing: See there.
        mixed_precision: See there.
        full_precision: See there.
        reshard_after_forward: See there.
        exchange_mb: See there.
        exchange_dtype: See there.
        missing_gradients: See there.
        clip_scope: See there.
        save_distributed_checkpoint: Save a folder into which every process writes its shards, rather than one file that
            process 0 writes. Every strategy reads either; the file has to fit into process 0's memory.
        save_in_background: Go on training while such a folder is written; the values are copied to CPU memory first.
        process_group_backend: Lightning's.
        timeout: Lightning's.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        *,
        num_replicas: int = 1,
        tensor_parallel_size: int = 1,
        wrap: WrapPolicy | None = None,
        activation_checkpointing: bool | WrapPolicy = False,
        mixed_precision: MixedPrecisionPolicy | None = None,
        full_precision: Collection[type[nn.Module]] = (),
        reshard_after_forward: bool | int | None = None,
        exchange_mb: float = 8.0,
        exchange_dtype: torch.dtype | None = None,
        missing_gradients: MissingPolicy | None = None,
        clip_scope: ClipScope = "all",
        save_distributed_checkpoint: bool = False,
        save_in_background: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if save_in_background and not save_distributed_checkpoint:
            raise ValueError(
                "save_in_background=True is for sharded saves: pass save_distributed_checkpoint=True as well."
            )
        options = FSDPOptions(
            wrap=wrap,
            activation_checkpointing=activation_checkpointing,
            mixed_precision=mixed_precision,
            full_precision=full_precision,
            reshard_after_forward=reshard_after_forward,
            exchange_mb=exchange_mb,
            exchange_dtype=exchange_dtype,
            missing_gradients=missing_gradients,
            clip_scope=clip_scope,
        )
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._num_replicas, self._tensor_size = num_replicas, tensor_parallel_size
        self._sharded = FullySharded(type(self).__name__, options, tell=rank_zero_info)
        self._save_in_background = save_in_background
        self._checkpoints: ShardedCheckpoints | None = None
        self._is_loaded = False

    # ------------------------------------------------------------------ processes

    @override
    def setup_environment(self) -> None:
        self._setup_distributed()
        self._device_mesh = make_mesh(self.root_device.type, self.world_size, self._num_replicas, self._tensor_size)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh  # what configure_model sees as self.device_mesh

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        size = self._tensor_size  # these see the same batches
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    # ------------------------------------------------------------------ module and optimizers

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        name = type(self).__name__
        _require_no_copies(trainer, name)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            share_overflows(self.precision_plugin, name)
        clip_by_the_whole_norm(self.precision_plugin, name, self._sharded.options.clip_scope)
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        module = self.precision_plugin.convert_module(self.lightning_module)
        if is_sharded(module):  # by configure_model
            _materialize_distributed_module(module, self.root_device)
        self._sharded.shard(module, data_mesh(self.device_mesh), self.precision_plugin.precision)
        self.model = module
        self.model_to_device()
        self.barrier()
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
        self._checkpoints = ShardedCheckpoints(self._save_in_background, self._timeout)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        self._sharded.adopt(self._module, self.optimizers)

    @property
    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        drop_gathered(self._module)

    @override
    def teardown(self) -> None:
        restore_clipping(self.precision_plugin)
        checkpoints, self._checkpoints = self._checkpoints, None
        if checkpoints is not None:
            checkpoints.close()
        super().teardown()

    # ------------------------------------------------------------------ checkpoints

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights: their shards, for a sharded checkpoint; otherwise whole on process 0, and nothing elsewhere."""
        return sharded_weights(self._module) if self._save_distributed_checkpoint else whole_weights(self._module)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The canonical state: in shards for a sharded checkpoint, else whole on process 0, and empty elsewhere."""
        muon = self._muon(optimizer)
        if self._save_distributed_checkpoint:
            return muon.state_dict()
        muon.consolidate_state_dict()
        return muon.state_dict() if self.is_global_zero else {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        filepath = self.broadcast(filepath)
        if not self._save_distributed_checkpoint:
            write = partial(self.checkpoint_io.save_checkpoint, checkpoint, filepath, storage_options)
            Processes.of(None).on_first(write)  # all learn whether it went well
            return
        require_local(filepath, type(self).__name__)
        if storage_options is not None:
            raise ValueError(f"{type(self).__name__} saves shards without storage_options: leave them out.")
        rest = dict(checkpoint)
        weights = {"state_dict": rest.pop("state_dict")}
        optimizers = {f"optimizer_{number}": state for number, state in enumerate(rest.pop("optimizer_states", []))}
        self._saved.save(Path(filepath), weights, optimizers, rest)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        filepath = self.broadcast(filepath)
        if self._save_distributed_checkpoint:
            self._saved.remove(Path(filepath))
        else:
            Processes.of(None).on_first(lambda: self.checkpoint_io.remove_checkpoint(filepath))

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder into module and optimizers, or a file into memory. Lightning asks for the rest later."""
        path = self.broadcast(checkpoint_path)
        self._saved.finish()
        self._is_loaded = is_folder(path)
        if not self._is_loaded:
            checkpoint: dict[str, Any] = read_together(self.checkpoint_io, path, weights_only)
            return checkpoint
        assert self.lightning_module is not None
        meta = self._saved.load(
            Path(path),
            {"state_dict": self._module},
            self._keyed_optimizers,
            strict=self.lightning_module.strict_loading,
            weights_only=weights_only is not False,
        )
        return {**meta, "state_dict": {}, "optimizer_states": [{} for _ in self.optimizers]}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if not self._is_loaded:

            def check() -> None:
                check_weights(checkpoint["state_dict"], self._module, strict=strict)
                for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
                    self._muon(optimizer).check_state_dict(state)

            Processes.of(None).together(check)  # before anything is changed, on any process
            load_whole_weights(self._module, checkpoint["state_dict"])

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if not self._is_loaded:
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                optimizer.load_state_dict(state)

    @property
    def _keyed_optimizers(self) -> dict[str, Muon]:
        return {f"optimizer_{number}": self._muon(optimizer) for number, optimizer in enumerate(self.optimizers)}

    @property
    def _saved(self) -> ShardedCheckpoints:
        # after training nobody would wait for a save in the background
        return self._checkpoints or ShardedCheckpoints()

    def _muon(self, optimizer: Optimizer) -> Muon:
        bare = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return require_muon(bare, type(self).__name__)

    def __repr__(self) -> str:
        # pytorch_lightning.Trainer and Fabric print this when they refuse the object
        return (
            f"<lightning_muon.{type(self).__name__}: a strategy of lightning.pytorch.Trainer, not of"
            " pytorch_lightning.Trainer; for Fabric there is lightning_muon.fabric.MuonFSDPStrategy>"
        )

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register ``muon_fsdp``; importing ``lightning_muon`` does this."""
        strategy_registry.register(
            "muon_fsdp",
            cls,
            description="Muon on FSDP2: weights, gradients and state in shards",
            override=True,
        )


def _require_no_copies(trainer: pl.Trainer, strategy: str) -> None:
    """Averages of weights are taken on a copy of the module, which is made before it is sharded, or cannot be made."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if {kind.__name__ for kind in type(callback).__mro__} & {"WeightAveraging", "StochasticWeightAveraging"}:
            raise TypeError(
                f"{strategy} does not support {type(callback).__name__}: it averages on a copy of the module, and a"
                " sharded module cannot be copied. Use muon_zero1, or leave the callback out."
            )
