"""ZeRO-1 for Muon: every matrix has one owner, which keeps its momentum and orthogonalises it, once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_muon.muon import Muon
from lightning_muon.orthogonalize import orthogonalization_flops, polynomial_sequence
from lightning_muon.partition import NamedState, Range
from lightning_muon.sharding.at_exit import end_process_group_at_exit
from lightning_muon.sharding.consolidate import consolidate
from lightning_muon.sharding.ownership import ElementRun, OwnershipPlan, Unit, plan_ownership
from lightning_muon.sharding.publish import WeightPublisher
from lightning_muon.sharding.reduce import GradientReducer
from lightning_muon.updates import state_dtype

__all__ = ["Zero1", "Zero1Partition", "ownership_plan", "require_muon"]


def require_muon(optimizer: Optimizer, strategy: str) -> Muon:
    """The optimizer, if it is one that the strategy can shard.

    Raises:
        TypeError: It is another optimizer.
    """
    if isinstance(optimizer, Muon):
        return optimizer
    raise TypeError(
        f"{strategy} needs lightning_muon.Muon and got {type(optimizer).__module__}.{type(optimizer).__qualname__}."
        " Return `lightning_muon.Muon(self, lr=...)` from configure_optimizers (or pass it to fabric.setup); it trains"
        " what is no matrix by AdamW. To train everything by AdamW under this strategy, pass it the group"
        ' [{"params": list(self.named_parameters()), "algorithm": "adamw"}].'
    )


def ownership_plan(optimizer: Muon, world_size: int) -> OwnershipPlan:
    """Plan who owns what, from the optimizer's routes."""
    units, runs = [], []
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            layout = optimizer.routes[name].layout
            if group["algorithm"] == "adamw" or layout is None:
                runs.append(ElementRun(name, param.numel(), 2 * param.dtype.itemsize, param.is_contiguous()))
                continue
            sequence = polynomial_sequence(group["orthogonalization"])
            itemsize = state_dtype(param).itemsize
            pieces = [
                Unit(
                    name,
                    block.start,
                    block.stop,
                    sum(orthogonalization_flops(block.rows, cut, sequence) for cut in block.cuts),
                    (block.stop - block.start) * itemsize,
                )
                for block in layout.blocks()
            ]
            if not param.is_contiguous():  # its elements have no common order that could be cut
                pieces = [
                    Unit(
                        name,
                        0,
                        param.numel(),
                        sum(p.flops for p in pieces),
                        sum(p.state_bytes for p in pieces),
                    )
                ]
            units += pieces
    return plan_ownership(units, runs, world_size)


class Zero1Partition:
    """One optimizer's share of the work on this rank. See ``lightning_muon.partition.Partition``.

    Args:
        optimizer: The optimizer; not yet stepped.
        reducer: What brings the gradients to the owners.
    """

    is_sharded = True

    def __init__(self, optimizer: Muon, reducer: GradientReducer) -> None:
        self.reducer = reducer
        self.rank, self.world_size = reducer.rank, reducer.world_size
        self.plan = ownership_plan(optimizer, reducer.world_size)
        self._ranges = {
            name: [(piece.start, piece.stop) for piece in slices if piece.owner == reducer.rank]
            for name, slices in self.plan.slices.items()
        }
        # The optimizer's own order may differ between ranks (a set in the user's code); DDP checks the module's.
        position = {param: number for number, param in enumerate(reducer.parameters())}
        named = sorted(optimizer.named_parameters(), key=lambda pair: (position.get(pair[1], -1), pair[0]))
        self._params = {param: self.plan.slices[name] for name, param in named}
        self._device = named[0][1].device  # Trainer.fit moves the state to the CPU at its end; NCCL stays where it was
        kinds = [(name, param.dtype, tuple(param.shape)) for name, param in named]
        self._check_equal_on_all_ranks(f"{self.plan.digest()} {kinds} nonfinite={optimizer.nonfinite}")
        self._publisher = WeightPublisher(self._params, reducer.group)
        names = {param: name for name, param in named}
        self._stages = [[names[param] for param in stage] for stage in self._publisher.stages]
        reducer.assign(self._params)

    def _check_equal_on_all_ranks(self, facts: str) -> None:
        digests: list[str | None] = [None] * self.world_size
        digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
        dist.all_gather_object(digests, digest, group=self.reducer.group)
        if len(set(digests)) > 1:
            raise RuntimeError(
                "The processes disagree about the parameters (names, shapes, dtypes), who owns them, or the policy"
                f" `nonfinite`; hashes by rank: {digests}. Build the model and the optimizer in the same way on"
                " every rank."
            )

    def ranges(self, name: str, numel: int) -> Sequence[Range]:
        """The elements this rank owns."""
        return self._ranges[name]

    def check_gradients(self) -> None:
        """Raise if the gradients have not been brought to their owners."""
        self.reducer.check_complete(self._params)

    def forget_gradients(self) -> None:
        """Nothing of this step's gradients is to come back."""
        self.reducer.forget(self._params)

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

    def consolidate(self, state: Mapping[str, Mapping[str, Tensor]], to: int) -> NamedState | None:
        """Bring everybody's state to one rank."""
        return consolidate(state, self.plan.slices, to, self._device, self.reducer.group)


class Zero1:
    """What a strategy needs of ZeRO-1: wrap the module, adopt the optimizers, guard each backward.

    Args:
        strategy: The strategy's name, for error messages.
        group: The process group; ``None`` is the default one.
    """

    def __init__(self, strategy: str, group: dist.ProcessGroup | None = None) -> None:
        self.strategy = strategy
        self.reducer = GradientReducer(group)
        if "gloo" in dist.get_backend(group):
            end_process_group_at_exit()

    def attach(self, module: DistributedDataParallel) -> None:
        """Have the module's gradients reduced to their owners."""
        self.reducer.attach(module)

    def adopt(self, optimizers: Iterable[Optimizer]) -> str:
        """Check the optimizers, plan who owns what, and leave each with this rank's part.

        Returns:
            What was planned, in words.

        Raises:
            TypeError: An optimizer is not ``lightning_muon.Muon``.
        """
        summaries = []
        for optimizer in [require_muon(optimizer, self.strategy) for optimizer in optimizers]:
            partition = Zero1Partition(optimizer, self.reducer)
            optimizer.shard(partition)
            summaries.append(partition.plan.describe())
        return f"{self.strategy}: " + "; ".join(summaries) + ". optimizer.explain() shows each parameter."

    def before_backward(self) -> None:
        """Call before every backward."""
        self.reducer.before_backward()

    def after_backward(self) -> None:
        """Call after every backward."""
        self.reducer.after_backward()
