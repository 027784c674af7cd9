"""Conversations for fine-tuning: functions of the standard library and their docstrings, or files of the user's.

Shape suffixes: B batch, T time (tokens).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

import lightning_muon as lm

from .conversation import Encoder, Example, byte_encoder, messages_of, tokenizer_encoder
from .corpus import Document, split_documents, standard_library
from .docstrings import docstring_pairs

__all__ = ["InstructionBatch", "InstructionDataModule", "collate", "read_conversations"]


class InstructionBatch(NamedTuple):
    """Padded conversations ``(B, T+1)`` int64, and which tokens behind the first are targets, ``(B, T)`` bool.

    The padding is behind everything, so that no token that counts sees it. The experts compute it in vain.
    """

    windows: Tensor
    is_target_BT: Tensor


def collate(examples: Sequence[Example]) -> InstructionBatch:
    """A batch as long as its longest conversation."""
    windows = torch.nn.utils.rnn.pad_sequence([example.ids_T for example in examples], batch_first=True)
    is_target = torch.nn.utils.rnn.pad_sequence([example.is_target_T for example in examples], batch_first=True)
    return InstructionBatch(windows, is_target[:, 1:])


def read_conversations(files: Sequence[str]) -> list[Document]:
    """The lines of JSON Lines files, named by what is asked in them, so that a question is on one side of a split.

    A line may be a text of its own, too: ``{"text": …}``.

    Raises:
        ValueError: A line is no conversation; the text names it.
    """
    found = []
    for file in files:
        # not splitlines(), which also ends a line at characters that JSON allows in its strings
        for number, line in enumerate(Path(file).read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                text = _text_of(record)
                asked = [m["content"] for m in messages_of(record) if m["role"] == "user"] if text is None else [text]
            except ValueError as error:  # JSON's, too
                raise ValueError(f"{file}, line {number}: {error}") from error
            found.append(Document(json.dumps(asked[:1]), line.encode()))
    return found


def _text_of(record: Any) -> str | None:
    text = record.get("text") if isinstance(record, dict) else None
    return text if isinstance(text, str) else None


class InstructionDataModule(L.LightningDataModule):
    """Batches of conversations; the global batch holds the same ones for any number of ranks.

    Conversations that are longer than ``seq_len`` are left out: one that is cut would teach half of an answer. Texts
    are cut into pieces, and all of their tokens are targets.

    Args:
        files: JSON Lines, ``{"prompt": …, "response": …}``, ``{"messages": [{"role": …, "content": …}, …]}`` or
            ``{"text": …}``; ``None`` takes the standard library's functions and their docstrings.
        tokenizer: Folder of a Hugging Face tokenizer; ``None`` takes bytes.
        trust_remote_code: Let the tokenizer run Python files of its folder.
        seq_len: Tokens to predict per conversation, at most.
        batch_size: Conversations per batch over *all* ranks together.
        val_fraction: Share that validates: of the library's files, or of the questions.
        seed: Of the order.
        num_workers: Loader processes per rank.

    Raises:
        ValueError: A line is no conversation, or too few are left.
    """

    def __init__(
        self,
        files: list[str] | None = None,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        seq_len: int = 256,
        batch_size: int = 32,
        val_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"InstructionDataModule: val_fraction lies between 0 and 1, got {val_fraction}")
        self.files, self.tokenizer, self.trust_remote_code = files, tokenizer, trust_remote_code
        self.seq_len, self.batch_size, self.val_fraction = seq_len, batch_size, val_fraction
        self.seed, self.num_workers = seed, num_workers
        self.train_set: list[Example] = []
        self.val_set: list[Example] = []
        self.vocab_size = 0
        self.num_too_long = 0
        self.save_hyperparameters()

    @override
    def setup(self, stage: str = "fit") -> None:
        """Reads, splits and encodes, once."""
        if self.train_set:
            return
        encoder = (
            byte_encoder()
            if self.tokenizer is None
            else tokenizer_encoder(self.tokenizer, trust_remote_code=self.trust_remote_code)
        )
        train, val = self._records()
        train_set, val_set = self._encode(train, encoder), self._encode(val, encoder)
        if len(train_set) < self.batch_size or not val_set:
            raise ValueError(
                f"InstructionDataModule: {len(train_set)} conversations to train on and {len(val_set)} to validate on"
                f" are left, {self.num_too_long} are longer than seq_len={self.seq_len}; a batch takes"
                f" {self.batch_size}. Give more, raise seq_len, or lower batch_size"
            )
        self.train_set, self.val_set, self.vocab_size = train_set, val_set, encoder.vocab_size
        rank_zero_info("conversations: " + ", ".join(f"{what} {number}" for what, number in self.describe().items()))

    def describe(self) -> dict[str, int]:
        """Numbers of conversations, and of tokens to be learnt."""
        self.setup()
        return {
            "train": len(self.train_set),
            "val": len(self.val_set),
            "too_long": self.num_too_long,
            "train_targets": sum(int(example.is_target_T.sum()) for example in self.train_set),
            "val_targets": sum(int(example.is_target_T.sum()) for example in self.val_set),
        }

    @override
    def train_dataloader(self) -> DataLoader[InstructionBatch]:
        """This rank's share of every global batch."""
        self.setup()
        data = cast("Dataset[Any]", self.train_set)
        return lm.GlobalBatchLoader(
            data, self.batch_size, seed=self.seed, collate_fn=collate, num_workers=self.num_workers
        )

    @override
    def val_dataloader(self) -> DataLoader[InstructionBatch]:
        """Every validation conversation once, over all ranks together; each rank has as many batches."""
        self.setup()
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        nothing = Example(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))
        filled = cast("Dataset[Any]", self.val_set + [nothing] * (-len(self.val_set) % ranks))
        sampler: DistributedSampler[Any] = DistributedSampler(filled, ranks, rank, shuffle=False)
        size = max(1, self.batch_size // ranks)
        return DataLoader(filled, size, sampler=sampler, collate_fn=collate, num_workers=self.num_workers)

    def _records(self) -> tuple[list[Any], list[Any]]:
        if self.files is None:
            train, val = split_documents(standard_library(), self.val_fraction)
            return docstring_pairs(train), docstring_pairs(val)
        conversations = read_conversations(self.files)
        if len(conversations) < 2:
            raise ValueError(f"InstructionDataModule: {len(conversations)} conversations cannot be split; give more")
        train, val = split_documents(conversations, self.val_fraction)
        return [json.loads(line.content) for line in train], [json.loads(line.content) for line in val]

    def _encode(self, records: Sequence[Any], encoder: Encoder) -> list[Example]:
        kept = []
        for record in records:
            text = _text_of(record)
            if text is not None:
                kept += encoder.pieces(text, self.seq_len)
                continue
            try:
                example = encoder(messages_of(record))
            except ValueError as error:
                raise ValueError(f"{json.dumps(record, ensure_ascii=False)[:100]} …: {error}") from error
            if len(example.ids_T) <= self.seq_len + 1:
                kept.append(example)
            else:
                self.num_too_long += 1
        return kept
