"""ZeRO-1 for Muon: every matrix has one owner, which keeps its momentum and orthogonalises it, once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_muon.muon import Muon
from lightning_muon.sharding.at_exit import end_process_group_at_exit
from lightning_muon.sharding.clipping import ClipScope
from lightning_muon.sharding.missing import MissingGradients, MissingPolicy
from lightning_muon.sharding.reduce import GradientReducer
from lightning_muon.sharding.require import require_muon
from lightning_muon.sharding.zero1_partition import Zero1Partition

__all__ = ["Zero1", "Zero1Options"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Zero1Options:
    """What can be chosen about ``muon_zero1``.

    Attributes:
        overlap: Whether the new weights may still be on their way when the optimizer's step returns: whoever reads a
            parameter waits for it. ``False`` waits inside the step.
        gather_mb: MiB that a rank sends at a time when the weights are gathered. Less starts earlier, more makes larger
            batches for the orthogonalisation.
        missing_gradients: A parameter got a gradient on some ranks only. ``"zero"`` averages with zeros, as DDP does;
            ``"skip"`` leaves it alone in this step; ``"raise"`` is an error on every rank. ``None`` requires every
            parameter to get one on every rank, unless ``find_unused_parameters=True``, which means ``"zero"``. All
            but ``None`` have DDP look for unused parameters.
        clip_scope: What ``gradient_clip_val`` and ``clip_gradients`` clip by the norm: ``"all"`` parameters by their
            common norm; those of ``"adamw"`` only, by theirs; or ``"none"``, to have the norms and clip nothing.

    Raises:
        ValueError: A value out of range.
    """

    overlap: bool = True
    gather_mb: float = 8.0
    missing_gradients: MissingPolicy | None = None
    clip_scope: ClipScope = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.overlap, bool):
            raise ValueError(f"overlap={self.overlap!r} must be True or False.")
        if not isinstance(self.gather_mb, (int, float)) or not 0 < self.gather_mb < float("inf"):
            raise ValueError(f"gather_mb={self.gather_mb!r} must be a positive number of MiB.")
        if self.missing_gradients not in (None, *get_args(MissingPolicy)):
            raise ValueError(
                f"missing_gradients={self.missing_gradients!r} is not known; choose one of"
                f" {', '.join(map(repr, get_args(MissingPolicy)))}, or leave it out."
            )
        if self.clip_scope not in get_args(ClipScope):
            raise ValueError(
                f"clip_scope={self.clip_scope!r} is not known; choose one of"
                f" {', '.join(map(repr, get_args(ClipScope)))}."
            )

    def ddp_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of ``DistributedDataParallel``: the user's, and what our own options need.

        Raises:
            ValueError: They contradict each other.
        """
        options: dict[str, Any] = {
            "gradient_as_bucket_view": True,
            **given,
        }  # without it, gradients and buckets are two copies
        if self.missing_gradients is not None and not options.get("static_graph"):
            if options.get("find_unused_parameters") is False:
                raise ValueError(
                    f"missing_gradients={self.missing_gradients!r} needs find_unused_parameters=True, or processes wait"
                    " for gradients that never come."
                )
            options["find_unused_parameters"] = True
        return options


class Zero1:
    """What a strategy needs of ZeRO-1: wrap the module, adopt the optimizers, guard each backward.

    Args:
        strategy: The strategy's name, for error messages.
        options: What the user chose.
        group: The process group; ``None`` is the default one.
        tell: What to do with a sentence for the user, on every rank.
    """

    def __init__(
        self,
        strategy: str,
        options: Zero1Options | None = None,
        group: dist.ProcessGroup | None = None,
        tell: Callable[[str], None] = _logger.info,
    ) -> None:
        self.strategy, self.options, self.tell = strategy, options or Zero1Options(), tell
        self.reducer = GradientReducer(group)
        self.missing = MissingGradients(self.options.missing_gradients or "zero", group)
        self._overlap = self.options.overlap
        self._optimizers: list[Muon] = []
        if "gloo" in dist.get_backend(group):
            end_process_group_at_exit()

    def attach(self, module: DistributedDataParallel) -> None:
        """Have the module's gradients reduced to their owners."""
        self.reducer.attach(module)
        self.missing.watch(module.parameters())
        module.register_forward_pre_hook(self._synchronize_for_evaluation)
        self._overlap = self._overlap and not _reads_out_of_sight(module)

    def adopt(self, optimizers: Iterable[Optimizer]) -> None:
        """Check the optimizers, plan who owns what, leave each with this rank's part, and tell what was planned.

        Raises:
            TypeError: An optimizer is not ``lightning_muon.Muon``.
        """
        for optimizer in [require_muon(optimizer, self.strategy) for optimizer in optimizers]:
            gather_bytes = int(self.options.gather_mb * 2**20)
            partition = Zero1Partition(optimizer, self.reducer, self.missing, self._overlap, gather_bytes, self.tell)
            optimizer.shard(partition)
            self._optimizers.append(optimizer)
            self.tell(f"{partition.describe()} optimizer.explain() shows each parameter.")

    def _synchronize_for_evaluation(self, module: nn.Module, _inputs: Any) -> None:
        """Modules have fast ways in evaluation that look at the classes of their parameters."""
        if not module.training:
            for optimizer in self._optimizers:
                optimizer.synchronize()

    def before_backward(self) -> None:
        """Call before every backward."""
        self.reducer.before_backward()

    def after_backward(self) -> None:
        """Call after every backward."""
        self.reducer.after_backward()


def _reads_out_of_sight(module: nn.Module) -> bool:
    """Whether parts of the module are compiled. TorchScript reads parameters without Python, and ``torch.compile``
    checks their class, so that it would compile again for every step."""
    return any(
        isinstance(part, torch.jit.ScriptModule)
        or hasattr(part, "_orig_mod")  # what torch.compile(module) returns
        or part._compiled_call_impl is not None  # module.compile()
        or getattr(part, "_compiler_ctx", None) is not None  # a LightningModule that the Trainer has unwrapped
        for part in module.modules()
    )
