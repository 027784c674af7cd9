"""One optimizer's share of the work under ZeRO-1: the part of the step that knows of other processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from lightning_muon.muon import Muon
from lightning_muon.partition import NamedState, Range, WholeMatrices
from lightning_muon.sharding.agreement import choices
from lightning_muon.sharding.consolidate import consolidate
from lightning_muon.sharding.missing import MissingGradients
from lightning_muon.sharding.publish import WeightPublisher
from lightning_muon.sharding.reduce import GradientReducer
from lightning_muon.sharding.units import ownership_plan

__all__ = ["Zero1Partition"]


class Zero1Partition(WholeMatrices):
    """One optimizer's share of the work on this rank. See ``lightning_muon.partition.Partition``.

    Args:
        optimizer: The optimizer; not yet stepped.
        reducer: What brings the gradients to the owners.
        missing: What is done about gradients that some ranks lack.
        overlap: See ``WeightPublisher``.
        gather_bytes: See ``WeightPublisher``.
        tell: What to do with a sentence for the user, on every rank.

    Raises:
        RuntimeError: The ranks disagree; on every rank.
    """

    is_sharded = True
    needs_consolidation = True

    def __init__(
        self,
        optimizer: Muon,
        reducer: GradientReducer,
        missing: MissingGradients,
        overlap: bool,
        gather_bytes: int,
        tell: Callable[[str], None],
    ) -> None:
        self.reducer, self.missing = reducer, missing
        self.rank, self.world_size = reducer.rank, reducer.world_size
        self.plan = ownership_plan(optimizer, reducer.world_size)
        self._ranges = {
            name: [(piece.start, piece.stop) for piece in slices if piece.owner == reducer.rank]
            for name, slices in self.plan.slices.items()
        }
        # The optimizer's own order may differ between ranks (a set in the user's code); DDP checks the module's.
        position = {param: number for number, param in enumerate(reducer.parameters())}
        named = sorted(optimizer.named_parameters(), key=lambda pair: (position.get(pair[1], -1), pair[0]))
        self._names = {param: name for name, param in named}
        self._device = named[0][1].device  # Trainer.fit moves the state to the CPU at its end; NCCL stays where it was
        kinds = [(name, param.dtype, tuple(param.shape)) for name, param in named]
        chosen = {**choices(optimizer), "missing_gradients": missing.policy, "gather_bytes": gather_bytes}
        self._check_equal_on_all_ranks(f"{self.plan.digest()} {kinds} {chosen}", chosen)
        slices = {param: self.plan.slices[name] for param, name in self._names.items()}
        self._publisher = WeightPublisher(slices, reducer.group, overlap, gather_bytes, tell)
        self._stages = [[self._names[param] for param in stage] for stage in self._publisher.stages]
        reducer.assign(slices)

    def _check_equal_on_all_ranks(self, facts: str, chosen: Mapping[str, object]) -> None:
        digests: list[str | None] = [None] * self.world_size
        digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
        dist.all_gather_object(digests, digest, group=self.reducer.group)
        if len(set(digests)) > 1:
            here = ", ".join(f"{key}={value!r}" for key, value in chosen.items())
            raise RuntimeError(
                "The processes disagree about the parameters (names, shapes, dtypes), who owns them, a policy or an"
                f" option of a group (here: {here}); hashes by rank: {digests}. Build the model, the optimizer and the"
                " strategy in the same way on every rank."
            )

    def describe(self) -> str:
        """The plan, and when weights arrive."""
        when = "during the next forward" if self._publisher.overlap else "within the step"
        return f"muon_zero1: {self.plan.describe()}. New weights arrive {when}."

    def ranges(self, name: str, numel: int) -> Sequence[Range]:
        """The elements this rank owns."""
        return self._ranges[name]

    def check_gradients(self) -> None:
        """Apply the policy on missing gradients, and raise if not all have been brought to their owners."""
        self.reducer.check_complete(self._names)
        self.missing.resolve(self._names)

    def forget_gradients(self) -> None:
        """Nothing of this step's gradients is to come back."""
        self.reducer.forget(self._names)
        self.missing.forget(self._names)

    def maximum(self, values: Tensor) -> Tensor:
        """The element-wise maximum over the ranks, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.reducer.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        """The element-wise sum over the ranks, in place."""
        dist.all_reduce(values, group=self.reducer.group)
        return values

    def stages(self, names: Sequence[str]) -> Sequence[Collection[str]]:
        """The optimizer's parameters, in the order in which the next forward needs them."""
        return self._stages

    def publish(self, stage: int) -> None:
        """Start to bring the owners' weights to everyone."""
        self._publisher.publish(stage)

    def finish_publishing(self) -> None:
        """Wait until all weights have arrived."""
        self._publisher.finish()

    def end_step(self) -> None:
        """The gradients have been used; without overlap, the weights have arrived."""
        self.missing.forget(self._names)
        if not self._publisher.overlap:
            self._publisher.finish()

    def consolidate(self, state: Mapping[str, Mapping[str, Tensor]], to: int) -> NamedState | None:
        """Bring everybody's state to one rank."""
        return consolidate(state, self.plan.slices, to, self._device, self.reducer.group)
