"""What a strategy needs of FSDP2: shard the module, adopt the optimizers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.optim import Optimizer

from lightning_muon.sharding.at_exit import end_process_group_at_exit
from lightning_muon.sharding.fsdp.blocks import describe_blocks, find_blocks
from lightning_muon.sharding.fsdp.missing import MissingFSDPGradients
from lightning_muon.sharding.fsdp.mixed_precision import unit_precision
from lightning_muon.sharding.fsdp.options import FSDPOptions
from lightning_muon.sharding.fsdp.reduce_scatter import reduce_scatter_pairwise
from lightning_muon.sharding.fsdp.shard_module import drop_gathered, is_sharded, require_sharded, shard_module
from lightning_muon.sharding.fsdp.sharding import shard_optimizer
from lightning_muon.sharding.require import require_muon

__all__ = ["FullySharded"]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")

_logger = logging.getLogger(__name__)


class FullySharded:
    """What a strategy needs of FSDP2.

    Args:
        strategy: The strategy's name, for error messages.
        options: What the user chose.
        tell: What to do with a sentence for the user, on every rank.
    """

    def __init__(self, strategy: str, options: FSDPOptions, tell: Callable[[str], None] = _logger.info) -> None:
        self.strategy, self.options, self.tell = strategy, options, tell
        self._missing: dict[nn.Module, MissingFSDPGradients] = {}

    def shard(self, module: nn.Module, mesh: DeviceMesh, precision: str) -> None:
        """Shard a module, unless the user has done it. Every rank must call it.

        Args:
            module: The whole module.
            mesh: ``(shards,)`` or ``(replicas, shards)``.
            precision: Lightning's name.

        Raises:
            ValueError: Part of the module cannot be sharded, or was left out by the user.
            TypeError: The module is wrapped otherwise.
        """
        if mesh.device_type == "cpu":
            end_process_group_at_exit()
        if not is_sharded(module):
            options = self.options
            blocks = find_blocks(module, options.wrap)
            again = options.activation_checkpointing
            recomputed = {} if again is False else blocks if again is True else find_blocks(module, again)
            units = describe_blocks(blocks, self.strategy)  # by the classes' own names, which fully_shard changes
            shard_module(
                module,
                mesh,
                blocks=blocks,
                precision=unit_precision(precision, options.mixed_precision, options.full_precision),
                checkpointed=recomputed.values(),
                reshard_after_forward=options.reshard_after_forward,
                strategy=self.strategy,
            )
            reduce_scatter_pairwise(module, mesh)
            more = f" Activations of {len(recomputed)} modules are computed again in backward." if recomputed else ""
            self.tell(units + more)
        drop_gathered(module)  # an evaluation may have left weights gathered
        require_sharded(module, self.strategy)
        for step in _STEPS:
            # Lightning calls them and not forward
            if callable(getattr(module, step, None)) and step not in vars(module):
                register_fsdp_forward_method(module, step)
        if module not in self._missing:
            self._missing[module] = MissingFSDPGradients(self.options.missing_policy)
            self._missing[module].watch(module)

    @property
    def modules(self) -> Collection[nn.Module]:
        """What has been sharded."""
        return self._missing.keys()

    def adopt(self, module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Check the optimizers of a sharded module, and plan what travels.

        Raises:
            TypeError: An optimizer is not ``lightning_muon.Muon``.
        """
        for optimizer in [require_muon(optimizer, self.strategy) for optimizer in optimizers]:
            shard_optimizer(
                optimizer,
                module,
                exchange_mb=self.options.exchange_mb,
                exchange_dtype=self.options.exchange_dtype,
                missing=self._missing[module],
                tell=self.tell,
            )
