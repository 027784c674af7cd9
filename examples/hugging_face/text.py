"""The text of `examples.moe_lm.data`, as bytes or in the tokens of a folder's tokenizer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from typing_extensions import override

from examples.moe_lm.data import SEPARATOR, VOCAB_SIZE, FixedWindows, RandomWindows, TextDataModule

_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken")


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in a folder, from its files alone; ``None`` if there is none.

    Raises:
        OSError, ValueError: There are files of one, but `transformers` makes none of them.
    """
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class Text(TextDataModule):
    """Windows of tokens: bytes, and 256 before every document; with a tokenizer its tokens, and its end of text there.

    Args:
        tokenizer: Of `transformers`; ``None`` for bytes.
        options: Of ``TextDataModule``.
    """

    def __init__(self, tokenizer: Any | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return VOCAB_SIZE if self.tokenizer is None else len(self.tokenizer)

    @override
    def setup(self, stage: str = "fit") -> None:
        if self.train_set is not None:
            return
        # without super(): Lightning 2.5's save_hyperparameters takes what calls that for an __init__
        TextDataModule.setup(self, stage)
        if self.tokenizer is None:
            return
        train, val = self._encode(self.train_set), self._encode(self.val_set)
        count = self.train_windows or len(train) // self.seq_len
        if min(len(train), len(val)) <= self.seq_len:
            raise ValueError(
                f"the text has {len(train)} tokens to train on and {len(val)} to validate; a window needs"
                f" {self.seq_len + 1}: name more text in `files`, or lower `seq_len`"
            )
        self.train_set = RandomWindows(train, self.seq_len, count, self.window_seed)
        self.val_set = FixedWindows(val, self.seq_len, self.val_windows)

    def _encode(self, windows: RandomWindows | None) -> Tensor:
        assert windows is not None
        assert self.tokenizer is not None
        documents = [
            bytes(group).decode(errors="replace")
            for is_text, group in itertools.groupby(windows.tokens.tolist(), lambda token: token != SEPARATOR)
            if is_text
        ]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        encoded = self.tokenizer(documents, add_special_tokens=False)["input_ids"]
        return torch.tensor([token for ids in encoded for token in (*end, *ids)], dtype=torch.int32)
