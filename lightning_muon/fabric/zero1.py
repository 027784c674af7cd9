"""``Fabric(strategy="muon_zero1")``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.checkpoint.check import naming_what_differs
from lightning_muon.fabric.checkpoint_io import WholeCheckpoints
from lightning_muon.sharding.clipping import ClipScope, clip_grad_norm_
from lightning_muon.sharding.missing import MissingPolicy
from lightning_muon.sharding.precision import share_overflows
from lightning_muon.sharding.require import require_muon
from lightning_muon.sharding.zero1 import Zero1, Zero1Options

if TYPE_CHECKING:
    from lightning.fabric.strategies.registry import _StrategyRegistry

__all__ = ["MuonZero1Strategy"]


class MuonZero1Strategy(WholeCheckpoints, DDPStrategy):
    """Fabric's twin of ``lightning_muon.MuonZero1Strategy``, which says what it does.

    Call ``fabric.backward(loss)``, not ``loss.backward()``; ``fabric.clip_gradients`` clips by the norm of the whole
    gradient and returns it.

    Args:
        overlap: See ``lightning_muon.sharding.zero1.Zero1Options``.
        gather_mb: See there.
        missing_gradients: See there.
        clip_scope: See there.
        **kwargs: Those of ``lightning.fabric.strategies.DDPStrategy``. ``gradient_as_bucket_view`` is ``True`` unless
            said otherwise, which saves a copy of the gradients.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        *,
        overlap: bool = True,
        gather_mb: float = 8.0,
        missing_gradients: MissingPolicy | None = None,
        clip_scope: ClipScope = "all",
        **kwargs: Any,
    ) -> None:
        self._options = Zero1Options(overlap, gather_mb, missing_gradients, clip_scope)
        super().__init__(**self._options.ddp_options(kwargs))
        self._zero1: Zero1 | None = None

    @property
    def _sharding(self) -> Zero1:
        if self._zero1 is None:  # only now do the processes exist
            name = f"fabric.{type(self).__name__}"
            share_overflows(self.precision, name)
            self._zero1 = Zero1(name, self._options, tell=rank_zero_info)
        return self._zero1

    @override
    def setup_module(self, module: Module) -> DistributedDataParallel:
        wrapped = super().setup_module(module)
        self._sharding.attach(wrapped)
        return wrapped

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        optimizer = super().setup_optimizer(optimizer)
        self._sharding.adopt([optimizer])
        return optimizer

    @override
    def backward(self, tensor: Tensor, module: Module | None, *args: Any, **kwargs: Any) -> None:
        self._sharding.before_backward()
        super().backward(tensor, module, *args, **kwargs)
        self._sharding.after_backward()

    @override
    def clip_gradients_norm(
        self,
        module: Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip by the norm of the whole gradient of the optimizer's parameters; returns that norm, on every rank.

        Fabric's default ``error_if_nonfinite=True`` raises before the optimizer's own policy (``nonfinite="skip"``)
        can act; pass ``False`` to leave it the decision. With ``16-mixed`` it is the scaler's in any case.
        """
        self.precision.unscale_gradients(optimizer)
        muon = require_muon(optimizer, f"fabric.{type(self).__name__}")
        if getattr(self.precision, "scaler", None) is not None:
            error_if_nonfinite = False
        return clip_grad_norm_(muon, float(max_norm), float(norm_type), error_if_nonfinite, self._options.clip_scope)

    @override
    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any | Tensor], strict: bool = True) -> None:
        with naming_what_differs(state_dict, module, strict=strict):
            super().load_module_state_dict(module, state_dict, strict)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register ``muon_zero1`` and its variants by start method; importing ``lightning_muon`` does this."""
        register = partial(strategy_registry.register, strategy=cls, override=True)
        for name, start_method in (("", "popen"), ("_spawn", "spawn"), ("_notebook", "fork")):
            register(
                f"muon_zero1{name}",
                description=f"Muon, sharded by whole matrices (ZeRO-1), processes started by {start_method}",
                start_method=start_method,
            )
        register(
            "muon_zero1_find_unused_parameters_true",
            description="muon_zero1 for models with parameters that some backward passes do not reach",
            find_unused_parameters=True,
        )
