"""Text as bytes: which files, which of them validate, and windows of tokens from both.

Token ids are the bytes 0-255; ``SEPARATOR`` = 256 stands before every document. Shape suffix: T time (tokens).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from .corpus import Document, find_documents, split_documents, standard_library

SEPARATOR = 256
VOCAB_SIZE = 257


def tokenize(documents: Sequence[Document]) -> Tensor:
    """All documents one after the other, each behind a separator: ``(T,)`` int16 (257 ids do not fit a byte)."""
    parts = [np.empty(0, np.int16)]
    for document in documents:
        parts += [np.array([SEPARATOR], np.int16), np.frombuffer(document.content, np.uint8).astype(np.int16)]
    return torch.from_numpy(np.concatenate(parts))


class RandomWindows(Dataset[Tensor]):
    """Windows from random places; window ``index`` is the same in every process and for any number of ranks.

    Args:
        tokens: ``(T,)`` int16.
        seq_len: tokens to predict per window; a window has one more.
        num_windows: the data set's length, which defines an epoch. The next epoch brings the same windows.
        seed: chooses the places.
    """

    def __init__(self, tokens: Tensor, seq_len: int, num_windows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens, self.seq_len = tokens, seq_len
        self.starts = torch.randint(len(tokens) - seq_len, (num_windows,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    @override
    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.tokens[start : start + self.seq_len + 1].long()


class FixedWindows(RandomWindows):
    """Up to ``num_windows`` windows that do not overlap, spread evenly over the text."""

    def __init__(self, tokens: Tensor, seq_len: int, num_windows: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        available = (len(tokens) - 1) // seq_len
        num_windows = min(num_windows, available)
        self.starts = torch.arange(num_windows) * available // max(1, num_windows) * seq_len


class TextDataModule(L.LightningDataModule):
    """Windows of bytes from the running interpreter's standard library, or from files of the user's.

    Rank r of N takes the windows r, r+N, r+2N …, so the global batch holds the same windows whatever N is.

    Args:
        files: files, directories (all files below) and glob patterns; ``None`` takes the standard library's sources.
        seq_len: tokens to predict per window.
        batch_size: windows per batch over *all* ranks together; each rank gets its share of them.
        val_fraction: share of the files that validates, chosen by a hash of the file's relative path.
        val_windows: windows of validation text.
        train_windows: windows per epoch; ``None`` takes as many as the training text has tokens for.
        window_seed: chooses the training windows.
        num_workers: loader processes per rank.
        num_ranks, rank: number of processes and this one's place, where no Trainer is attached that knows (Fabric).
    """

    def __init__(
        self,
        files: list[str] | None = None,
        seq_len: int = 128,
        batch_size: int = 32,
        val_fraction: float = 0.05,
        val_windows: int = 256,
        train_windows: int | None = None,
        window_seed: int = 0,
        num_workers: int = 0,
        num_ranks: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"TextDataModule: val_fraction lies between 0 and 1, got {val_fraction}")
        self.files, self.seq_len, self.batch_size = files, seq_len, batch_size
        self.val_fraction, self.val_windows, self.train_windows = val_fraction, val_windows, train_windows
        self.window_seed, self.num_workers, self.num_ranks, self.rank = window_seed, num_workers, num_ranks, rank
        self.train_set: RandomWindows | None = None
        self.val_set: FixedWindows | None = None
        self._description: dict[str, Any] = {}
        self.save_hyperparameters(ignore=["num_ranks", "rank"])

    @override
    def setup(self, stage: str = "fit") -> None:
        """Reads and splits the text, once."""
        if self.train_set is not None:
            return
        documents = standard_library() if self.files is None else find_documents(self.files)
        train, val = split_documents(documents, self.val_fraction)
        train_tokens, val_tokens = tokenize(train), tokenize(val)
        for side, tokens in (("training", train_tokens), ("validation", val_tokens)):
            if len(tokens) <= self.seq_len:
                raise ValueError(
                    f"TextDataModule: the {side} text has {len(tokens)} tokens, a window needs {self.seq_len + 1}; "
                    "name more text in `files`, or lower `seq_len` or change `val_fraction`"
                )
        num_windows = self.train_windows or len(train_tokens) // self.seq_len
        self.train_set = RandomWindows(train_tokens, self.seq_len, num_windows, self.window_seed)
        self.val_set = FixedWindows(val_tokens, self.seq_len, self.val_windows)
        self._description = {
            "text": "standard library" if self.files is None else " ".join(self.files),
            "text_python": platform.python_version(),
            "text_files": len(documents),
            "text_bytes": sum(len(document.content) for document in documents),
            "text_sha256": hashlib.sha256(b"".join(document.content for document in documents)).hexdigest(),
            "text_val_files": len(val),
            "text_val_bytes": sum(len(document.content) for document in val),
        }
        # A second call adds to the first: the text's identity then stands beside every logged run.
        self.save_hyperparameters(self._description)
        rank_zero_info("text: " + ", ".join(f"{key[5:] or 'of'} {value}" for key, value in self._description.items()))

    def describe(self) -> dict[str, Any]:
        """What was read: Python's version, numbers of files and bytes, sha256 of all files' bytes in order."""
        self.setup()
        return dict(self._description)

    def per_rank(self, number: int, what: str) -> int:
        """A rank's share of ``number`` things."""
        ranks, _ = self._place()
        if number % ranks:
            raise ValueError(
                f"TextDataModule: {what}={number} counts over all ranks and does not divide by {ranks} ranks; "
                f"use {number - number % ranks or ranks} or another multiple of {ranks}"
            )
        return number // ranks

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches ``(batch_size / ranks, seq_len + 1)`` of token ids, int64."""
        self.setup()
        assert self.train_set is not None
        return self._loader(self.train_set, drop_last=True)

    @override
    def val_dataloader(self) -> DataLoader[Tensor]:
        """The same shapes, from the validation files."""
        self.setup()
        assert self.val_set is not None
        self.per_rank(len(self.val_set), "val_windows")  # the sampler fills up unequal shares by repeating windows
        return self._loader(self.val_set, drop_last=False)

    def _place(self) -> tuple[int, int]:
        """Number of ranks, and which one this is."""
        if self.trainer is not None:
            return self.trainer.world_size, self.trainer.global_rank
        return self.num_ranks, self.rank

    def _loader(self, windows: RandomWindows, drop_last: bool) -> DataLoader[Tensor]:
        # Our own sampler, because the one that Lightning puts in shuffles: the windows are in random order already,
        # and which come in a batch shall not hang on how many there are.
        ranks, rank = self._place()
        sampler: DistributedSampler[Tensor] = DistributedSampler(
            windows, ranks, rank, shuffle=False, drop_last=drop_last
        )
        return DataLoader(
            windows,
            batch_size=self.per_rank(self.batch_size, "batch_size"),
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
