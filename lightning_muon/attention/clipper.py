"""QK-Clip for any loop: watch attention, take the maxima over all processes, scale the rows of the heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_muon.attention.find import Attention, find_attention, require_clippable
from lightning_muon.attention.heads import DescribeHeads
from lightning_muon.attention.observe import LogitObserver
from lightning_muon.attention.report import attention_figures, attention_findings
from lightning_muon.attention.rescale import scale_rows_
from lightning_muon.attention.unseen import Unseen
from lightning_muon.monitoring.alarms import Finding
from lightning_muon.sharding.fsdp.shard_module import drop_gathered

__all__ = ["QKClipper"]


class QKClipper:
    """Keeps attention's logits from exploding (QK-Clip of Kimi K2, arXiv 2507.20534), in any training loop::

        clipper = lm.QKClipper(model, tau=100.0)
        for batch in batches:
            fabric.backward(model(batch))
            optimizer.step()
            optimizer.zero_grad()
            clipper.clip(optimizer)

    A head's ``S`` is its largest logit ``q·k·scale`` over what attention has seen since the last clip, of all
    training forwards on all processes. Where ``S > tau``, the rows that make the head's queries and keys are scaled so
    that its logits become ``tau/S`` of what they were. All other rows stay as they are, bit for bit.

    Args:
        model: The model, before or after it was sharded or wrapped. Watch it before its first compiled training step.
        tau: τ, the largest logit that is left alone.
        log_only: Change nothing.
        include: Regular expression that the name of an attention module must match somewhere; ``None`` takes all.
        exclude: Regular expression that it must not match.
        heads: Describes attention modules that are not found by the names of their projections.
        group: The process group; ``None`` is the default one.

    Attributes:
        maxima: What `reduce` has found last: S of each head by module; -∞ if there was nothing to see, ∞ if a query or
            key was not finite. The same on all processes.
        is_reduced: Whether the next `clip` has them already.

    Raises:
        ValueError: There is no attention in the model, its heads are not known, or clipping it would do nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        tau: float = 100.0,
        *,
        log_only: bool = False,
        include: str | None = None,
        exclude: str | None = None,
        heads: DescribeHeads | None = None,
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        if not tau > 0:
            raise ValueError(f"tau={tau} must be positive.")
        self.tau, self.log_only, self.group = float(tau), log_only, group
        self._model = model
        found = find_attention(model, heads, include, exclude)
        if not log_only:
            require_clippable(found)
        self._observers = [LogitObserver(attention) for attention in found]
        self.maxima: dict[str, list[float]] = {}
        self.is_reduced = False
        self._to_log: dict[str, list[float]] = {}
        self._clipped: dict[str, set[int]] = {attention.name: set() for attention in found}
        self._trained_by: WeakKeyDictionary[Optimizer, list[LogitObserver]] = WeakKeyDictionary()
        self._unseen = Unseen(attention.name for attention in found)

    @property
    def attention(self) -> list[Attention]:
        """What is watched."""
        return [observer.attention for observer in self._observers]

    def watch(self, is_on: bool = True) -> None:
        """Look at the forwards to come, or stop looking. Looking, at first."""
        for observer in self._observers:
            if is_on and not observer.is_on:
                observer.reset()
            observer.is_on = is_on

    @property
    def is_watching(self) -> bool:
        """Whether it looks."""
        return self._observers[0].is_on

    def close(self) -> None:
        """Stop watching, for good."""
        for observer in self._observers:
            observer.close()

    @torch.no_grad()
    def reduce(self) -> None:
        """Take the maxima over all processes, by one collective. Every process must call it.

        ``clip`` does it where it was not done. Called after backward and before the optimizer's step, it does not wait
        for the step, nor for the weights that the step sends.

        Raises:
            RuntimeError: An attention module has run and was not seen, or none has run; on every process.
        """
        sizes = [attention.heads.num_heads for attention in self.attention]
        device = self._device()
        parts = [
            torch.full((size,), -math.inf, device=device) if observer.maxima is None else observer.maxima.to(device)
            for size, observer in zip(sizes, self._observers, strict=True)
        ]
        ran = [float(observer.has_run) * (1 + (observer.maxima is None)) for observer in self._observers]
        # collectives need not agree about the maximum of NaN
        values = torch.cat([*parts, torch.tensor(ran, device=device)])
        values = torch.where(values.isnan(), math.inf, values)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(values, distributed.ReduceOp.MAX, group=self.group)
        *maxima, outcomes = torch.split(values.cpu(), [*sizes, len(sizes)])
        names = [attention.name for attention in self.attention]
        self.maxima = dict(zip(names, [found.tolist() for found in maxima], strict=True))
        self.is_reduced = True
        self._unseen.check(self.maxima, outcomes.tolist())
        self._to_log.update({name: heads for name, heads in self.maxima.items() if max(heads) > -math.inf})

    @torch.no_grad()
    def clip(self, *optimizers: Optimizer) -> None:
        """After a step of these optimizers: scale the heads above τ that they train. Every process must call it.

        Args:
            optimizers: Any of torch's, or ``Muon``, as ``fabric.setup`` returned them or bare.

        Raises:
            ValueError: They train no attention that is watched.
            RuntimeError: See ``reduce``.
        """
        bare: list[Optimizer] = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
        mine = [observer for optimizer in bare for observer in self._observers_of(optimizer)]
        if not mine and not self.log_only:
            raise ValueError(
                "QKClipper.clip: the optimizers that were given train none of"
                f" {', '.join(attention.name for attention in self.attention[:3])}. Give those that have just stepped."
            )
        if not self.is_reduced:
            self.reduce()
        self.is_reduced = False
        if not self.log_only and any(self._heads_above(observer.attention) for observer in mine):
            drop_gathered(self._model)  # parameters become what the optimizers have
            scale_rows_(self._factors([observer.attention for observer in mine]), bare)
        for observer in self._observers if self.log_only else mine:
            observer.reset()

    def is_trained_by(self, optimizer: Optimizer) -> bool:
        """Whether a step of the optimizer changes attention that is watched."""
        return bool(self._observers_of(optimizer))

    def untrained(self, optimizers: Sequence[Optimizer]) -> list[str]:
        """The names of the modules that none of these trains."""
        trained = {observer for optimizer in optimizers for observer in self._observers_of(optimizer)}
        return [observer.attention.name for observer in self._observers if observer not in trained]

    def _observers_of(self, optimizer: Optimizer) -> list[LogitObserver]:
        if optimizer not in self._trained_by:
            drop_gathered(self._model)
            trained = {param for group in optimizer.param_groups for param in group["params"]}
            self._trained_by[optimizer] = [
                observer for observer in self._observers if observer.attention.parameters()[0] in trained
            ]
        return self._trained_by[optimizer]

    def figures(self, mode: str = "brief") -> dict[str, float]:
        """What there is to log, by key, the same on all processes; see the table in the documentation.

        Of each module the last S, and the heads that were clipped, since the last call.

        Args:
            mode: ``"brief"``, or ``"detailed"`` for every head as well.
        """
        clipped = {} if self.log_only else {name: len(heads) for name, heads in self._clipped.items()}
        values = attention_figures(self._to_log, clipped, mode)
        self._to_log.clear()
        for heads in self._clipped.values():
            heads.clear()
        return values

    def findings(self) -> list[Finding]:
        """What an alarm should know of the maxima: a look at each module that has run."""
        return attention_findings(self.maxima, self.tau, self.log_only)

    def _heads_above(self, attention: Attention) -> dict[int, float]:
        """Their S, where it says something of the weights: what is not finite does not."""
        return {head: s for head, s in enumerate(self.maxima[attention.name]) if self.tau < s < math.inf}

    def _factors(self, attentions: Sequence[Attention]) -> dict[nn.Parameter, Tensor]:
        """Of the parameters with rows to scale."""
        factors: dict[nn.Parameter, Tensor] = {}
        for attention in attentions:
            above, projections = self._heads_above(attention), attention.projections()
            self._clipped[attention.name] |= above.keys()
            for head, largest in above.items():
                for own in attention.heads.rows[head]:
                    for kind in ("weight", "bias"):
                        param = projections[own.projection]._parameters.get(kind)
                        if param is not None:
                            rows = factors.setdefault(param, torch.ones(param.shape[0]))
                            rows[own.start : own.stop] = (self.tau / largest) ** own.power
        return factors

    def _device(self) -> torch.device:
        """Where attention runs."""
        seen = [observer.maxima.device for observer in self._observers if observer.maxima is not None]
        return seen[0] if seen else self.attention[0].parameters()[0].device
