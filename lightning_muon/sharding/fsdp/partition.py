"""One optimizer's share of the work where the parameters are ``DTensor`` s."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_muon.exchange import Exchange
from lightning_muon.local import local, local_numel
from lightning_muon.matrices import MatrixKey, MatrixLayout, MatrixPart
from lightning_muon.muon import Muon
from lightning_muon.orthogonalize import default_dtype
from lightning_muon.partition import NamedState, Range
from lightning_muon.sharding.fsdp.announce import announce
from lightning_muon.sharding.fsdp.exchange import ShardExchange, routes_of
from lightning_muon.sharding.fsdp.missing import MissingFSDPGradients
from lightning_muon.sharding.fsdp.plan import plan_shards
from lightning_muon.sharding.fsdp.shard_module import drop_gathered
from lightning_muon.sharding.fsdp.transfers import Loads, StageTransfers, held_matrices, plan_stage

__all__ = ["ShardPartition"]


class ShardPartition:
    """One optimizer's share of the work on this rank. See ``lightning_muon.partition.Partition``.

    Momentum, scale, decay and all of AdamW stay where the shard is; a matrix comes together on one rank for its
    orthogonalisation only. Ranks that hold copies (the replicas of HSDP; tensor parallelism, of what it does not split)
    get the same update from the same owner, so that they cannot drift apart.

    Args:
        optimizer: The optimizer; not yet stepped.
        module: The sharded module.
        missing: What is done about gradients that some ranks lack.
        stage_bytes: What a rank sends to owners in one stage, about, in float32.
        exchange_dtype: What values travel as; ``None`` for bfloat16 where matrices are orthogonalised in bfloat16,
            which loses nothing on the way back, and as they are elsewhere.
        group: The process group of all ranks that hold something; ``None`` is the default one.

    Raises:
        ValueError: A parameter is held in a way that Muon cannot bring together; on every rank.
        RuntimeError: The ranks disagree; on every rank.
    """

    is_sharded = True
    needs_consolidation = False
    ahead = 1

    def __init__(
        self,
        optimizer: Muon,
        module: nn.Module,
        missing: MissingFSDPGradients,
        stage_bytes: int,
        exchange_dtype: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.world_size, self.group = dist.get_rank(group), dist.get_world_size(group), group
        self.module, self.missing = module, missing
        options = {
            "the size of stages": stage_bytes,
            "exchange_dtype": exchange_dtype,
            "missing_gradients": missing.policy,
        }
        announced = announce(optimizer, options, group)
        held = {name: [one.shards[name] for one in announced] for name in announced[0].shards}  # in rank 0's order
        self._held, self._hosts, self._shards = held, [one.host for one in announced], announced[self.rank].shards
        self.plan = plan_shards(optimizer, held, self._hosts, stage_bytes)
        self._readings: dict[str, StageTransfers] = {}
        self._reading_loads = Loads.none(self.world_size)
        self._copies = {name: shards.count(self._shards[name]) for name, shards in held.items()}
        params = dict(optimizer.named_parameters())
        self._params = {name: params[name] for name in held}
        self._device = next(iter(self._params.values())).device
        groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
        self._parts = {
            name: self._shards[name].parts(name, layout)
            for name in held
            if (layout := optimizer.routes[name].layout) is not None
        }
        self._number = {key: number for number, key in enumerate(self.plan.keys)}
        self._stages = []
        for transfers in self.plan.transfers:
            used = {name for name, _ in transfers.owners}
            wide = {torch.promote_types(params[name].dtype, torch.float32) for name in used} or {torch.float32}
            like = torch.empty(0, dtype=wide.pop(), device=self._device)
            narrow = {groups[name]["orthogonalization_dtype"] or default_dtype(like) for name in used}
            sent_as = torch.bfloat16 if narrow <= {torch.bfloat16, torch.float16} else like.dtype
            self._stages.append(routes_of(transfers, self.rank, self.world_size, like, exchange_dtype or sent_as))

    def describe(self) -> str:
        """The plan in a line: how uneven the work is, and what travels."""
        flops = self.plan.loads.flops
        mean = sum(flops) / self.world_size
        sent = sum((routes.to_owners.sent + routes.back.sent) * routes.sent_as.itemsize for routes in self._stages)
        kinds = ", ".join(sorted({str(routes.sent_as).removeprefix("torch.") for routes in self._stages}))
        copies = max(self._copies.values())
        weights = sum(local_numel(param) * param.element_size() for param in self._params.values())
        units = sum(isinstance(part, FSDPModule) for part in self.module.modules())
        shared = f"{self.world_size // copies} processes" + (f" in {copies} copies" if copies > 1 else "")
        return (
            f"muon_fsdp: {len(self._params)} parameters in {units} units, sharded over {shared}, {weights / 2**20:.2f}"
            f" MiB of weights on this one; it sends {sent / 2**20:.2f} MiB to owners and back in a step, as {kinds}, in"
            f" {len(self._stages)} stages; orthogonalisation"
            + (f" work largest / mean {max(flops) / mean:.2f}." if mean else ": nothing.")
        )

    def ranges(self, name: str, numel: int) -> Sequence[Range]:
        """All that this rank holds."""
        return [(0, numel)]

    def parts(self, name: str, layout: MatrixLayout, numel: int) -> Sequence[Sequence[MatrixPart]]:
        """What the shard holds of each matrix."""
        return [self._parts[name]]

    def copies(self, name: str) -> int:
        """How many ranks hold the same shard."""
        return self._copies[name]

    def take(self, name: str, whole: Tensor) -> Tensor:
        """This rank's shard."""
        return self._shards[name].take(whole).reshape(-1)

    def idle(self, keys: Sequence[MatrixKey], is_zero: Tensor) -> Container[MatrixKey]:
        """Ask all ranks, as each sees its part of a matrix."""
        active = torch.zeros(len(self._number), dtype=torch.int32, device=self._device)
        if keys:
            places = torch.tensor([self._number[key] for key in keys], device=self._device)
            active.scatter_reduce_(0, places, (~is_zero).to(active), "amax")
        is_active = self.maximum(active).tolist()
        return frozenset(key for key, number in self._number.items() if not is_active[number])

    def exchange(self, stage: int, leave_out: Container[MatrixKey]) -> Exchange:
        """The stage's matrices travel to their owners and back."""
        return ShardExchange(self._stages[stage], leave_out, self.group)

    def deal(self, weights: Mapping[str, tuple[Tensor, MatrixLayout]]) -> Iterator[tuple[MatrixKey, Tensor]]:
        """The matrices travel to owners, exactly as they are, one parameter at a time."""
        for name, (weight, layout) in weights.items():
            if name not in self._readings:
                flops = dict.fromkeys(((name, number) for number in range(layout.num_matrices)), 1)
                parts = [shard.parts(name, layout) for shard in self._held[name]]
                self._readings[name] = plan_stage(held_matrices(parts, flops), self._hosts, self._reading_loads)
            like = torch.empty(0, dtype=weight.dtype, device=self._device)
            routes = routes_of(self._readings[name], self.rank, self.world_size, like)
            exchange = ShardExchange(routes, (), self.group)
            flat = local(weight).reshape(-1)
            exchange.gather([(part, part.view(flat).reshape(part.size)) for part in self._parts[name]])
            yield from exchange.matrices().items()

    def stages(self, names: Sequence[str]) -> Sequence[Collection[str]]:
        """Parameters whose matrices travel together."""
        return self.plan.stages

    def check_gradients(self) -> None:
        """Apply the policy on missing gradients, and drop weights that are still gathered and about to be old."""
        drop_gathered(self.module)
        self.missing.resolve({param: name for name, param in self._params.items()})

    def forget_gradients(self) -> None:
        """Nothing of this step's gradients is to come back."""
        self.missing.forget(self._params.values())

    def maximum(self, values: Tensor) -> Tensor:
        """The element-wise maximum over the ranks, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        """The element-wise sum over the ranks, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def publish(self, stage: int) -> None:
        """FSDP gathers the weights when they are needed."""

    def finish_publishing(self) -> None:
        """Every rank has its shard."""

    def end_step(self) -> None:
        """The gradients have been used."""
        self.missing.forget(self._params.values())

    def consolidate(self, state: Mapping[str, Mapping[str, Tensor]], to: int) -> NamedState | None:
        """Bring the state together, tensor by tensor, and keep it on one rank, in CPU memory."""
        whole: NamedState = {}
        for name in self._params:
            for key, value in state[name].items():
                full = value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value)
                if self.rank == to:
                    whole.setdefault(name, {})[key] = full.reshape(-1).cpu() if full.ndim else full
        return whole if self.rank == to else None
