"""Conversations as tokens, and which of them are to be learnt: what the assistant says, and that it has finished.

Shape suffix: T time (tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import SEPARATOR, VOCAB_SIZE

__all__ = ["Encoder", "Example", "byte_encoder", "messages_of", "tokenizer_encoder"]

Message = Mapping[str, str]
_ROLES = ("system", "user", "assistant")


class Example(NamedTuple):
    """Token ids ``(T,)`` int64, and for each whether it is a target, ``(T,)`` bool."""

    ids_T: Tensor
    is_target_T: Tensor


@dataclass(frozen=True)
class Encoder:
    """Turns a conversation into an ``Example``.

    Args:
        render: Messages as text; with its second argument true, also what comes before an answer to them.
        encode: Token ids of a text.
        vocab_size: Of them; larger ids do not occur.
        start: Ids before everything.
        end: Ids after every answer; empty where ``render`` writes what ends one.
    """

    render: Callable[[Sequence[Message], bool], str]
    encode: Callable[[str], list[int]]
    vocab_size: int
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def __call__(self, messages: Sequence[Message]) -> Example:
        """The tokens of a conversation up to the assistant's last message.

        Every answer is encoded by itself, so that no token reaches over its border.

        Raises:
            ValueError: The assistant says nothing, or the chat template writes earlier messages anew when later ones
                come.
        """
        ids, is_target = list(self.start), [False] * len(self.start)
        for text, answers in self._segments(messages):
            new = self.encode(text) + (list(self.end) if answers else [])
            ids += new
            is_target += [answers] * len(new)
        if not any(is_target):
            raise ValueError("the assistant says nothing: there is nothing to learn")
        return Example(torch.tensor(ids), torch.tensor(is_target))

    def pieces(self, text: str, seq_len: int) -> list[Example]:
        """A text on its own, cut into examples of ``seq_len`` targets: every token but the first is a target once."""
        ids_T = torch.tensor([*self.start, *self.encode(text), *self.end])
        cuts = range(0, max(1, len(ids_T) - 1), seq_len)
        pieces = [ids_T[cut : cut + seq_len + 1] for cut in cuts]
        return [Example(piece, torch.arange(len(piece)) > 0) for piece in pieces if len(piece) > 1]

    def _segments(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        written = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self.render(messages[:number], True)
            answered = self.render(messages[: number + 1], False)
            if not (asked.startswith(written) and answered.startswith(asked)):
                raise ValueError(
                    "the chat template writes earlier messages anew when later ones come, so that answers cannot be"
                    " told from the rest: give it conversations of one answer"
                )
            yield asked[len(written) :], False
            yield answered[len(asked) :], True
            written = answered


def byte_encoder() -> Encoder:
    """Bytes, as ``data.py`` has them; a separator begins a conversation and ends every answer."""
    return Encoder(_plain, lambda text: list(text.encode()), VOCAB_SIZE, (SEPARATOR,), (SEPARATOR,))


def tokenizer_encoder(folder: str, *, trust_remote_code: bool = False) -> Encoder:
    """The tokenizer of a Hugging Face folder, with its chat template if it has one.

    Args:
        folder: Or a name on the hub.
        trust_remote_code: Run Python files of the folder, as Moonlight's tokenizer needs.

    Raises:
        ValueError: It has neither a chat template nor a token that ends a text.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def chat(messages: Sequence[Message], asks: bool) -> str:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)
        return text

    if tokenizer.chat_template:
        return Encoder(chat, encode, len(tokenizer))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has neither a chat template nor a token that ends a text")
    start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return Encoder(_plain, encode, len(tokenizer), start, (tokenizer.eos_token_id,))


def messages_of(record: Any) -> list[Message]:
    """The conversation of ``{"prompt": …, "response": …}`` or ``{"messages": [{"role": …, "content": …}, …]}``.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        messages = record["messages"]
        for message in messages:
            if not (isinstance(message, dict) and isinstance(message.get("content"), str)):
                raise ValueError(f"a message has a role and a content, both text; got {message!r}")
            if message.get("role") not in _ROLES:
                raise ValueError(f"a message's role is one of {', '.join(_ROLES)}; got {message.get('role')!r}")
        return list(messages)
    if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("prompt", "response")):
        prompt, response = record["prompt"], record["response"]
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    raise ValueError('expected {"prompt": …, "response": …}, {"messages": […]} or {"text": …}, all text')


def _plain(messages: Sequence[Message], asks: bool) -> str:
    parts = [
        f"### {message['role'].capitalize()}\n{message['content']}" + ("" if message["role"] == "assistant" else "\n\n")
        for message in messages
    ]
    return "".join(parts) + ("### Assistant\n" if asks else "")
