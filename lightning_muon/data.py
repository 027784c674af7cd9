"""The same batches in the same order, whatever the number of processes, and from wherever a run resumes."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

__all__ = ["GlobalBatchLoader"]


class _Share(DistributedSampler[int]):
    """This process's part of every global batch: torch's order of the epoch, cut into global batches, each into shares.

    Of torch's class, so that Lightning keeps it and calls ``set_epoch``.
    """

    def __init__(self, num_samples: int, batch_size: int, num_replicas: int, rank: int, shuffle: bool, seed: int):
        super().__init__(cast("Dataset[int]", range(num_samples)), num_replicas, rank, shuffle, seed, drop_last=True)
        self.batch_size = batch_size
        self.num_batches = num_samples // batch_size
        self.first = batch_size * rank // num_replicas
        self.size = batch_size * (rank + 1) // num_replicas - self.first
        self.start = 0  # the global batch that the next iteration begins with
        self.earliest_epoch = 0

    @override
    def set_epoch(self, epoch: int) -> None:
        if epoch < self.earliest_epoch:
            raise ValueError(
                f"The loader is to go on in epoch {self.earliest_epoch} and was told to begin epoch {epoch}."
                " fabric.setup_dataloaders counts epochs from 0 whenever a script starts: iterate over the loader"
                " itself, `for epoch in range(loader.epoch, num_epochs): loader.set_epoch(epoch)`, and move batches by"
                " fabric.to_device(batch)."
            )
        super().set_epoch(epoch)

    @override
    def __iter__(self) -> Iterator[int]:
        num_samples = len(cast(Sized, self.dataset))
        order = torch.arange(num_samples)
        if self.shuffle:
            order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for number in range(self.start, self.num_batches):
            first = number * self.batch_size + self.first
            yield from order[first : first + self.size].tolist()

    @override
    def __len__(self) -> int:
        return self.num_batches * self.size


class GlobalBatchLoader(DataLoader[Any]):
    """A ``DataLoader`` whose global batches do not depend on the number of processes.

    Batch ``k`` of an epoch holds the same samples on 1, 7 or 8 processes; each loads its share. What is left over at
    the end of an epoch and fills no batch is dropped. The Trainer keeps the loader's position in its checkpoints, and
    a run that resumes, on however many processes, goes on with the batch that would have been next. With Fabric, put
    the loader into the state, ``fabric.save(path, {"loader": loader, ...})``, and iterate over the loader itself rather
    than over what ``fabric.setup_dataloaders`` returns, which counts epochs from 0 whenever a script starts.

    Where the batch cannot be shared equally, the mean over the processes of their mean losses is not the mean over the
    batch; multiply the loss by ``loader.weight``.

    Args:
        dataset: With a length and indices.
        batch_size: Samples in a *global* batch, of all processes together.
        shuffle: A new order in each epoch, drawn from ``seed`` and the epoch's number.
        seed: The same on all processes.
        num_replicas: Into how many shares; by default, the number of processes. With tensor parallelism, the number
            of groups of processes that see the same samples.
        rank: Which share is this process's.
        **kwargs: Those of ``DataLoader``: ``num_workers``, ``collate_fn``, ``pin_memory`` and so on.

    Attributes:
        weight: Samples of this process's share over the mean of all shares; 1.0 where they are equal.

    Raises:
        ValueError: There are more shares than samples in a batch, or the dataset fills no batch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        has_processes = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if has_processes else 1
        if rank is None:
            rank = dist.get_rank() if has_processes else 0
        num_samples = len(cast(Sized, dataset))
        if not num_replicas <= batch_size <= num_samples:
            raise ValueError(
                f"A global batch of {batch_size} samples cannot be shared by {num_replicas} processes and filled from"
                f" {num_samples} samples: batch_size must be at least the number of processes and at most the size of"
                " the dataset."
            )
        self._share = _Share(num_samples, batch_size, num_replicas, rank, shuffle, seed)
        self._position = (0, 0)  # epoch, batches of it that have been handed out
        self._resumes_at = (0, 0)  # where `load_state_dict` was told to go on
        self.weight = self._share.size * num_replicas / batch_size
        super().__init__(dataset, self._share.size, sampler=self._share, **kwargs)

    @override
    def __iter__(self) -> Any:
        # a generator: the Trainer asks for the iterator first and chooses the epoch then, and workers read ahead
        share = self._share
        epoch, number = self._resumes_at
        if epoch != share.epoch or number == share.num_batches:
            epoch, number = share.epoch, 0
        first, share.start, share.earliest_epoch = number, number, 0
        for batch in super().__iter__():
            number += 1
            if number == first + 2:
                self._resumes_at = (0, 0)  # and not before: one batch may only have been looked at
            self._position = (epoch, number)
            yield batch
        self._resumes_at = (0, 0)

    @property
    def epoch(self) -> int:
        """The epoch whose order comes next."""
        return self._share.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; the Trainer does this itself."""
        self._share.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Epoch, and how many of its batches have been handed out: the same on every process."""
        epoch, number = self._position
        share = self._share
        return {
            "epoch": epoch,
            "batches": number,
            "batch_size": share.batch_size,
            "seed": share.seed,
            "shuffle": share.shuffle,
            "num_samples": len(cast(Sized, share.dataset)),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches of a ``state_dict``.

        Raises:
            ValueError: It is of a loader with another batch size, seed or order, or over another number of samples,
                whose batches are others.
        """
        own = self.state_dict()
        for key in own.keys() & state.keys() - {"epoch", "batches"}:
            if state[key] != own[key]:
                raise ValueError(
                    f"The checkpoint's batches were made with {key}={state[key]}, and these with {key}={own[key]}: to"
                    " go on in the same order, use the same."
                )
        self._position = self._resumes_at = (state["epoch"], state["batches"])
        self._share.earliest_epoch = 0
        self._share.set_epoch(state["epoch"])
        self._share.earliest_epoch = state["epoch"]
