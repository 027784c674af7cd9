"""``Trainer(strategy="muon_zero1")``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_muon.checkpoint.check import naming_what_differs
from lightning_muon.fabric.checkpoint_io import WholeCheckpoints
from lightning_muon.muon import Muon
from lightning_muon.pytorch.clipping import clip_by_the_whole_norm, restore_clipping
from lightning_muon.sharding.clipping import ClipScope
from lightning_muon.sharding.missing import MissingPolicy
from lightning_muon.sharding.precision import share_overflows
from lightning_muon.sharding.zero1 import Zero1, Zero1Options

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.strategies.registry import _StrategyRegistry

__all__ = ["MuonZero1Strategy"]


class MuonZero1Strategy(WholeCheckpoints, DDPStrategy):
    """Data parallelism with ``lightning_muon.Muon`` sharded over the processes (ZeRO stage 1).

    Every matrix has one owner: its gradient is averaged there while backward runs, its momentum is kept there only,
    it is orthogonalised there, once, and the new weights are gathered by everyone. AdamW's parameters are cut by
    element. Together the ranks send what DDP sends, and hold one copy of the optimizer state.

    Args:
        overlap: See ``lightning_muon.sharding.zero1.Zero1Options``.
        gather_mb: See there.
        missing_gradients: See there.
        clip_scope: See there.
        **kwargs: Those of ``lightning.pytorch.strategies.DDPStrategy``, without its communication hooks and
            model averaging. ``gradient_as_bucket_view`` is ``True`` unless said otherwise, which saves a copy of the
            gradients.

    Raises:
        ValueError: A DDP communication hook or model averaging was asked for, or an option is out of range.
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
        taken = ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period")
        for name in taken:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"MuonZero1Strategy({name}=...): the strategy reduces gradients to their owners in DDP's"
                    " communication hook, so there is no room for another. Leave the argument out."
                )
        self._options = Zero1Options(overlap, gather_mb, missing_gradients, clip_scope)
        super().__init__(**self._options.ddp_options(kwargs))
        self._zero1: Zero1 | None = None

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            share_overflows(self.precision_plugin, type(self).__name__)
        clip_by_the_whole_norm(self.precision_plugin, type(self).__name__, self._options.clip_scope)
        super().setup(trainer)

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self._zero1 = Zero1(type(self).__name__, self._options, tell=rank_zero_info)
        self._zero1.attach(self.model)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        assert self._zero1 is not None
        self._zero1.adopt(self.optimizers)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        with naming_what_differs(checkpoint["state_dict"], self.lightning_module, strict=strict):
            super().load_model_state_dict(checkpoint, strict)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._synchronize()

    @override
    def on_test_start(self) -> None:
        super().on_test_start()
        self._synchronize()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._synchronize()

    def _synchronize(self) -> None:
        """Modules have fast ways in evaluation that look at the classes of their parameters."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.synchronize()

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        if self._zero1 is not None:
            self._zero1.before_backward()

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._zero1 is not None:
            self._zero1.after_backward()

    @override
    def teardown(self) -> None:
        restore_clipping(self.precision_plugin)
        super().teardown()

    def __repr__(self) -> str:
        # pytorch_lightning.Trainer and Fabric print this when they refuse the object
        return (
            f"<lightning_muon.{type(self).__name__}: a strategy of lightning.pytorch.Trainer, not of"
            " pytorch_lightning.Trainer; for Fabric there is lightning_muon.fabric.MuonZero1Strategy>"
        )

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
