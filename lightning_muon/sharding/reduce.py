"""Gradients on their way to the owners, while backward still runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_muon.sharding.collectives import Piece, in_chunks, sum_onto_owners
from lightning_muon.sharding.in_flight import InFlight
from lightning_muon.sharding.ownership import Slice

__all__ = ["GradientReducer"]


@dataclass(frozen=True)
class _Exchange:
    """A part of a bucket that is reduced at once.

    Attributes:
        pieces: The runs of the bucket that every rank owns; there is one bucket, number 0.
    """

    pieces: tuple[tuple[Piece[int], ...], ...]

    def sizes(self) -> list[int]:
        """Elements per owner."""
        return [sum(stop - start for _, start, stop in owned) for owned in self.pieces]


class GradientReducer:
    """The communication hook of ``DistributedDataParallel`` that averages each gradient on its owner only.

    Every rank sends each owner its part of the bucket: ``(N-1)/N`` of the bucket each way on average, which is what the
    reduce-scatter half of DDP's all-reduce sends. Elsewhere the gradient is set to zero, so that the sum over ranks
    of anything additive (squares, say) is that of the averaged gradient.

    Args:
        group: The process group; ``None`` is the default one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._slices: dict[nn.Parameter, tuple[Slice, ...]] = {}
        self._exchanges: dict[tuple[int, ...], list[_Exchange]] = {}
        self._module_of: dict[nn.Parameter, DistributedDataParallel] = {}
        # Parameters whose gradient is an average by now, and averages set aside during another backward.
        self._reduced: set[nn.Parameter] = set()
        self._set_aside: dict[nn.Parameter, list[Tensor]] = {}

    def attach(self, module: DistributedDataParallel) -> None:
        """Reduce this module's gradients; before its first backward."""
        self._module_of.update(dict.fromkeys(module.parameters(), module))
        for param in module.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(_refuse_in_flight)  # type: ignore[no-untyped-call]
        module.register_comm_hook(None, self._hook)

    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters of all modules, in their order, which DDP has found to be equal on all ranks."""
        return self._module_of

    def assign(self, slices: Mapping[nn.Parameter, tuple[Slice, ...]]) -> None:
        """Say who owns these parameters."""
        self._slices.update(slices)
        self._exchanges.clear()

    def before_backward(self) -> None:
        """Set averaged gradients aside, so that the local ones of another backward do not mix with them.

        Only a second backward without ``zero_grad`` in between has any: two losses, or accumulation without
        ``no_backward_sync``.
        """
        self._check_owners()
        self._set_aside = {param: runs for param, runs in self._set_aside.items() if param.grad is not None}
        for param in self._reduced:
            if param.grad is None:
                continue
            runs = [run.clone() for run in self._own_runs(param, param.grad)]
            if param in self._set_aside:
                runs = [old + new for old, new in zip(self._set_aside[param], runs, strict=True)]
            self._set_aside[param] = runs
            param.grad.zero_()
        self._reduced.clear()

    def after_backward(self) -> None:
        """Join what ``before_backward`` has set aside, except for modules that still accumulate locally."""
        for param in list(self._set_aside):
            if not self._module_of[param].require_backward_grad_sync:
                continue
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            for own, aside in zip(self._own_runs(param, param.grad), self._set_aside.pop(param), strict=True):
                own.add_(aside)
            self._reduced.add(param)

    def forget(self, params: Iterable[nn.Parameter]) -> None:
        """The user has dropped these gradients."""
        for param in params:
            self._reduced.discard(param)
            self._set_aside.pop(param, None)

    def check_complete(self, names: Mapping[nn.Parameter, str]) -> None:
        """Raise if one of these parameters, given with their names, has a gradient that has not been averaged over the
        ranks, or is still waited for by the others."""
        if self.world_size == 1:
            return
        is_local = any(param.grad is not None and param not in self._reduced for param in names)
        unused = self._without_gradient(names) if is_local or not self._reduced.isdisjoint(names) else ""
        if unused:
            raise RuntimeError(
                f"No gradient on this process for {unused}, which takes no part in the loss here; the other processes"
                " wait for it. Choose what that means by MuonZero1Strategy(missing_gradients='zero') (average with"
                " zeros; the same as strategy='muon_zero1_find_unused_parameters_true') or 'skip' (leave the parameter"
                " alone for the step); or freeze it before the strategy sets up the model. (If the last backward ran"
                " under no_backward_sync, leave the last micro-batch of each step out of that.)"
            )
        if is_local:
            raise RuntimeError(
                "Gradients that were not averaged over the processes. Either the last backward ran under"
                " no_backward_sync (or no_sync): leave the last micro-batch of each step out of it. Or it was"
                " loss.backward(): call self.manual_backward(loss), or fabric.backward(loss)."
            )

    def _without_gradient(self, names: Mapping[nn.Parameter, str]) -> str:
        """The parameters that DDP waits for, if there are any."""
        found = [
            name
            for param, name in names.items()
            if param.requires_grad and param.grad is None and param not in self._reduced and self._is_awaited(param)
        ]
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        return ", ".join(found[:5]) + more

    def _is_awaited(self, param: nn.Parameter) -> bool:
        module = self._module_of.get(param)
        return module is not None and not (module.find_unused_parameters or module.static_graph)

    def _check_owners(self) -> None:
        for param, module in self._module_of.items():
            if param.requires_grad and param not in self._slices:
                name = next(name for name, other in module.module.named_parameters() if other is param)
                raise RuntimeError(
                    f"The parameter {name!r} requires a gradient but belongs to no optimizer, so that no process owns"
                    " it. Pass it to lm.Muon, or freeze it with requires_grad_(False), before the strategy sets up the"
                    " model; what is frozen then cannot be unfrozen later."
                )

    def _own_runs(self, param: nn.Parameter, tensor: Tensor) -> Iterable[Tensor]:
        if not tensor.is_contiguous():  # such a parameter has one owner for all of it
            return [tensor] if self._slices[param][0].owner == self.rank else []
        flat = tensor.view(-1)
        return [flat[s.start : s.stop] for s in self._slices[param] if s.owner == self.rank]

    # DDP compares the annotations of a hook with the types themselves, which postponed annotations are not.
    def _hook(self, state, bucket):  # type: ignore[no-untyped-def]
        buffer: Tensor = bucket.buffer()
        params: list[nn.Parameter] = bucket.parameters()
        if not self._reduced.isdisjoint(params):
            raise RuntimeError(
                "A second backward before optimizer.zero_grad() would mix averaged and local gradients, because the"
                " strategy was not told of it. Call fabric.backward(loss) or self.manual_backward(loss), not"
                " loss.backward(); and optimizer.zero_grad(), not model.zero_grad()."
            )
        self._reduced.update(params)
        if self.world_size == 1:
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(buffer)
            return future
        exchanges = self._exchanges_of(params, buffer)
        sums = [
            sum_onto_owners(
                torch.cat([buffer[start:stop] for owned in exchange.pieces for _, start, stop in owned]),
                exchange.sizes(),
                self.group,
            )
            for exchange in exchanges
        ]

        def average(done: Iterable[torch.futures.Future[Tensor]]) -> Tensor:
            buffer.zero_()
            for exchange, own in zip(exchanges, done, strict=True):
                mean = own.value().div_(self.world_size)
                offset = 0
                for _, start, stop in exchange.pieces[self.rank]:
                    buffer[start:stop] = mean[offset : offset + stop - start]
                    offset += stop - start
            return buffer

        result: torch.futures.Future[Tensor]
        if len(sums) == 1:  # on CUDA always, where only a future of tensors orders the streams
            result = sums[0].then(lambda done: average([done]))
        else:
            result = torch.futures.collect_all(sums).then(lambda done: average(done.value()))
        return result

    def _exchanges_of(self, params: list[nn.Parameter], buffer: Tensor) -> list[_Exchange]:
        """DDP puts its buckets together anew after the first backward, so ownership is looked up per parameter."""
        key = tuple(id(param) for param in params)
        if key not in self._exchanges:
            pieces: list[list[Piece[int]]] = [[] for _ in range(self.world_size)]
            offset = 0
            for param in params:
                for piece in self._slices[param]:
                    pieces[piece.owner].append((0, offset + piece.start, offset + piece.stop))
                offset += param.numel()
            self._exchanges[key] = [_Exchange(chunk) for chunk in in_chunks(pieces, buffer, self.group)]
        return self._exchanges[key]


def _refuse_in_flight(param: nn.Parameter) -> None:
    if isinstance(param, InFlight):
        raise RuntimeError(
            "This forward used weights of the last step, because it read parameters in a way that the strategy does not"
            " see (TorchScript, a C++ extension). Pass overlap=False to the strategy, or call optimizer.synchronize()"
            " first."
        )
