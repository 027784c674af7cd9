"""``Fabric(strategy="muon_fsdp")``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.types import _PATH
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.checkpoint.canonical import load_canonical
from lightning_muon.checkpoint.check import check_weights
from lightning_muon.checkpoint.together import Processes
from lightning_muon.fabric.checkpoint_io import WholeCheckpoints, is_folder, read_together, require_local
from lightning_muon.muon import Muon
from lightning_muon.sharding.clipping import ClipScope, clip_grad_norm_
from lightning_muon.sharding.fsdp.blocks import WrapPolicy
from lightning_muon.sharding.fsdp.checkpoints import ShardedCheckpoints, require_keys
from lightning_muon.sharding.fsdp.fully_sharded import FullySharded
from lightning_muon.sharding.fsdp.mesh import data_mesh, make_mesh
from lightning_muon.sharding.fsdp.options import FSDPOptions
from lightning_muon.sharding.fsdp.shard_module import is_sharded
from lightning_muon.sharding.fsdp.weights import load_whole_weights, sharded_weights, whole_weights
from lightning_muon.sharding.missing import MissingPolicy
from lightning_muon.sharding.precision import share_overflows
from lightning_muon.sharding.require import require_muon

if TYPE_CHECKING:
    from lightning.fabric.strategies.registry import _StrategyRegistry

__all__ = ["MuonFSDPStrategy"]


class MuonFSDPStrategy(WholeCheckpoints, ModelParallelStrategy):
    """Fabric's twin of ``lightning_muon.MuonFSDPStrategy``, which says what it does.

    For float16, Fabric refuses ``precision="16-mixed"``, with the strategy's name, too: pass
    ``plugins=[MixedPrecision("16-mixed", "cuda")]``, from ``lightning.fabric.plugins``, instead.

    Args:
        parallelize_fn: Shards the module, or splits its layers, itself: gets the module and the device mesh and returns
            the module. What it leaves whole is sharded as without it.
        num_replicas: See ``lightning_muon.MuonFSDPStrategy``.
        tensor_parallel_size: See there.
        wrap: See ``lightning_muon.sharding.fsdp.FSDPOptions``.
        activation_checkpointing: See there.
        mixed_precision: See there.
        full_precision: See there.
        reshard_after_forward: See there.
        exchange_mb: See there.
        exchange_dtype: See there.
        missing_gradients: See there.
        clip_scope: See there.
        save_distributed_checkpoint: See ``lightning_muon.MuonFSDPStrategy``.
        save_in_background: See there.
        process_group_backend: Lightning's.
        timeout: Lightning's.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        parallelize_fn: Callable[[nn.Module, DeviceMesh], nn.Module] | None = None,
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
            parallelize_fn or (lambda module, _mesh: module),
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._num_replicas, self._tensor_size = num_replicas, tensor_parallel_size
        self._name = f"fabric.{type(self).__name__}"
        self._sharded = FullySharded(self._name, options, tell=rank_zero_info)
        self._save_in_background = save_in_background
        self._checkpoints: ShardedCheckpoints | None = None

    # ------------------------------------------------------------------ processes

    @override
    def setup_environment(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._setup_distributed()
        self._device_mesh = make_mesh(self.root_device.type, self.world_size, self._num_replicas, self._tensor_size)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        size = self._tensor_size  # these see the same batches
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    # ------------------------------------------------------------------ module and optimizers

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        module = self._parallelize_fn(module, self.device_mesh)  # type: ignore[arg-type]
        if not isinstance(module, nn.Module):
            raise TypeError(f"parallelize_fn must return a module and returned {type(module).__name__}.")
        if is_sharded(module):
            _materialize_distributed_module(module, self.root_device)
        share_overflows(self.precision, self._name)
        self._sharded.shard(module, data_mesh(self.device_mesh), self.precision.precision)
        return module

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], *scheduler: Any
    ) -> tuple[Any, ...]:
        """Shard a module whose optimizers exist; they go on with its shards.

        A module that is made on the meta device is set up first, and its optimizer after it.
        """
        before = dict(module.named_parameters(remove_duplicate=False))
        module = self.setup_module(module)
        after = dict(module.named_parameters(remove_duplicate=False))
        new = {param: after[name] for name, param in before.items()}
        for optimizer in optimizers:
            require_muon(optimizer, self._name).replace_parameters(new)
        # Fabric 2.6 passes a scheduler, or None, and takes it back; 2.5 does neither
        return module, [self.setup_optimizer(optimizer) for optimizer in optimizers], *scheduler

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        self._sharded.adopt(self._module_of(require_muon(optimizer, self._name)), [optimizer])
        return super().setup_optimizer(optimizer)

    def _module_of(self, optimizer: Muon) -> nn.Module:
        params = {param for _, param in optimizer.named_parameters()}
        for module in self._sharded.modules:
            if params <= set(module.parameters()):
                return module
        raise RuntimeError(
            "The optimizer's parameters are not those of a module that fabric.setup or fabric.setup_module has sharded."
            " Call module = fabric.setup_module(module) first, then make lm.Muon(module, ...), then"
            " fabric.setup_optimizers(optimizer); or give both to fabric.setup(module, optimizer)."
        )

    @override
    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip by the norm of the whole gradient of the optimizer's parameters; returns that norm, on every rank.

        See ``lightning_muon.fabric.MuonZero1Strategy`` on ``error_if_nonfinite``.
        """
        self.precision.unscale_gradients(optimizer)
        muon = require_muon(optimizer, self._name)
        if getattr(self.precision, "scaler", None) is not None:
            error_if_nonfinite = False
        scope = self._sharded.options.clip_scope
        return clip_grad_norm_(muon, float(max_norm), float(norm_type), error_if_nonfinite, scope)

    # ------------------------------------------------------------------ checkpoints

    @override
    def save_checkpoint(
        self,
        path: _PATH,
        state: dict[str, nn.Module | Optimizer | Any],
        storage_options: Any | None = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Save a file, or with ``save_distributed_checkpoint`` a folder; see Fabric's ``save``.

        Raises:
            ValueError: A filter, storage options or a path with a protocol, with a folder.
        """
        path = self.broadcast(path)
        if not self._save_distributed_checkpoint:
            whole = self._convert_stateful_objects_in_state(state, filter=filter or {})
            write = partial(self.checkpoint_io.save_checkpoint, whole, path, storage_options)
            Processes.of(None).on_first(write)  # all learn whether it went well
            return
        require_local(path, self._name)
        if filter is not None or storage_options is not None:
            raise ValueError(f"{self._name} saves shards without filter and storage_options: leave them out.")
        modules, optimizers, rest = _sorted(state)
        weights = {key: sharded_weights(module) for key, module in modules.items()}
        states = {key: muon.state_dict() for key, muon in optimizers.items()}
        self._saved.save(Path(path), weights, states, self._convert_stateful_objects_in_state(rest, filter={}))

    @override
    def load_checkpoint(
        self,
        path: _PATH,
        state: nn.Module | Optimizer | dict[str, nn.Module | Optimizer | Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a file or a folder that any strategy has saved; see Fabric's ``load``.

        Raises:
            CheckpointError: It is missing, torn, altered, unsafe, or of another model; nothing has been changed.
            ValueError: It is of another optimizer; nothing has been changed.
            KeyError: With ``strict``, something that ``state`` asks for is not in it.
        """
        path = self.broadcast(path)
        self._saved.finish()
        if isinstance(state, nn.Module):  # fabric.load_raw
            module, raw = state, read_together(self.checkpoint_io, path, weights_only)
            Processes.of(None).together(lambda: check_weights(raw, module, strict=strict, source=str(path)))
            load_whole_weights(module, raw)
            return {}
        if isinstance(state, Optimizer):
            raise TypeError("Give the optimizer's key in the checkpoint: fabric.load(path, {'optimizer': optimizer}).")
        modules, optimizers, rest = _sorted(state or {})
        safe = weights_only is not False
        wanted = list(rest) if strict else []
        in_shards = is_folder(path)
        if in_shards and (modules or optimizers):
            found = self._saved.load(Path(path), modules, optimizers, strict=strict, weights_only=safe, wanted=wanted)
        elif in_shards:
            found = load_canonical(Path(path), weights_only=safe)
        else:
            found = read_together(self.checkpoint_io, path, weights_only)

            def check() -> None:
                require_keys(found, [*modules, *optimizers, *wanted], path)
                for key, module in modules.items():
                    check_weights(found[key], module, strict=strict, source=str(path))
                for key, muon in optimizers.items():
                    muon.check_state_dict(found[key])

            Processes.of(None).together(check)  # before anything is changed, on any process
            for key, module in modules.items():
                load_whole_weights(module, found.pop(key))
            for key, muon in optimizers.items():
                muon.load_state_dict(found.pop(key))
        for key in rest:
            if key in found:
                value = found.pop(key)
                if callable(getattr(rest[key], "load_state_dict", None)):
                    rest[key].load_state_dict(value)
                elif state is not None:
                    state[key] = value
        return found

    @override
    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The whole weights on process 0, and nothing elsewhere."""
        return whole_weights(module)

    @override
    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The canonical state on process 0, and nothing elsewhere."""
        muon = require_muon(getattr(optimizer, "optimizer", optimizer), self._name)
        muon.consolidate_state_dict()
        return muon.state_dict() if self.is_global_zero else {}

    @property
    def _saved(self) -> ShardedCheckpoints:
        if self._checkpoints is None:
            self._checkpoints = ShardedCheckpoints(self._save_in_background, self._timeout)
        return self._checkpoints

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being saved in the background is under its name. Every process must call
        it, after the last save."""
        self._saved.finish()

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


def _sorted(state: Mapping[str, Any]) -> tuple[dict[str, nn.Module], dict[str, Muon], dict[str, Any]]:
    """Modules, optimizers, and the rest."""
    modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    optimizers = {key: require_muon(value, "muon_fsdp") for key, value in state.items() if isinstance(value, Optimizer)}
    rest = {key: value for key, value in state.items() if key not in modules and key not in optimizers}
    return modules, optimizers, rest
