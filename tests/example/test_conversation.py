"""Conversations as tokens: what is a target, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.moe_lm.conversation import byte_encoder, messages_of, tokenizer_encoder
from examples.moe_lm.corpus import Document, split_documents, standard_library
from examples.moe_lm.data import SEPARATOR
from examples.moe_lm.docstrings import docstring_pairs
from examples.moe_lm.instructions import InstructionDataModule, collate, read_conversations

END = chr(0x110000 - 1)  # stands for the separator below


def shown(ids: list[int], of: list[bool] | None = None) -> str:
    """The text of token ids, those marked in ``of`` alone if given."""
    kept = [token for token, keep in zip(ids, of or [True] * len(ids), strict=True) if keep]
    return "".join(END if token == SEPARATOR else chr(token) for token in kept)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_targets_are_the_answer_and_its_end() -> None:
    example = byte_encoder()(messages_of({"prompt": "2+2", "response": "4!"}))
    ids, is_target = example.ids_T.tolist(), example.is_target_T.tolist()
    assert shown(ids) == f"{END}### User\n2+2\n\n### Assistant\n4!{END}"
    assert is_target == [False] * (len(ids) - 3) + [True] * 3


def test_every_answer_of_a_conversation_is_a_target_and_nothing_else() -> None:
    messages = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    example = byte_encoder()(messages_of({"messages": messages}))
    ids, is_target = example.ids_T.tolist(), example.is_target_T.tolist()
    first = f"{END}### System\ns\n\n### User\na\n\n### Assistant\nb{END}"
    assert shown(ids) == first + f"### User\nc\n\n### Assistant\nd{END}"
    assert shown(ids, is_target) == f"b{END}d{END}"


def test_bytes_of_other_scripts() -> None:
    example = byte_encoder()(messages_of({"prompt": "?", "response": "é"}))
    assert example.ids_T[example.is_target_T].tolist() == [0xC3, 0xA9, SEPARATOR]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "x"}, "expected"),
        ({"prompt": "x", "response": 3}, "expected"),
        ([], "expected"),
        ({"messages": [{"role": "user"}]}, "role and a content"),
        ({"messages": [{"role": "robot", "content": ""}]}, "system, user, assistant; got 'robot'"),
        ({"messages": [user("a")]}, "nothing to learn"),
    ],
)
def test_what_is_no_conversation(record: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        byte_encoder()(messages_of(record))


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_folder(folder: Path, template: str | None) -> str:
    """A tokenizer of single words and signs."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<end>", "#", "\n", " ", "User", "Assistant"]
    words += list("abcdefgh")
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|User|Assistant|."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_tokenizers_chat_template_says_where_answers_are(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    encoder = tokenizer_encoder(tokenizer_folder(tmp_path, TEMPLATE))
    example = encoder([user("ab"), assistant("cd"), user("e"), assistant("f")])
    assert example.ids_T.tolist() == [4, 12, 13, 6, 5, 14, 15, 6, 4, 16, 6, 5, 17, 6]
    assert example.ids_T[example.is_target_T].tolist() == [14, 15, 6, 17, 6]
    assert encoder.vocab_size == 20


def test_a_template_that_rewrites_the_past_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    template = "{{ messages | length }}" + TEMPLATE
    encoder = tokenizer_encoder(tokenizer_folder(tmp_path, template))
    with pytest.raises(ValueError, match="writes earlier messages anew"):
        encoder([user("a"), assistant("b"), user("c"), assistant("d")])


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    encoder = tokenizer_encoder(tokenizer_folder(tmp_path, None))
    example = encoder([user("ab"), assistant("cd")])
    assert (example.ids_T[0], example.ids_T[-1]) == (1, 2)
    assert example.ids_T[example.is_target_T].tolist() == [14, 15, 2]


SOURCE = '''
import os

def plain(a):
    """Adds one.

    To a.
    """
    return a + 1

class C:
    @property
    async def inner(self):
        "Short."
        x = 1
        def deep():
            """Deep."""
        return x

def none(a):
    return a

def one_line(): "Doc."

def shared():
    """Doc."""; return 1

def only():
    """Nothing else."""
'''


def test_functions_and_their_docstrings() -> None:
    pairs = docstring_pairs([Document("a.py", SOURCE.encode()), Document("b.py", b"def ("), Document("c.py", b"\xff")])
    assert pairs == [
        {"prompt": "def plain(a):\n    return a + 1", "response": "Adds one.\n\nTo a."},
        {
            "prompt": 'async def inner(self):\n    x = 1\n    def deep():\n        """Deep."""\n    return x',
            "response": "Short.",
        },
        {"prompt": "def deep():", "response": "Deep."},
        {"prompt": "def only():", "response": "Nothing else."},
    ]


def test_the_library_gives_pairs_split_by_file() -> None:
    train, val = split_documents(standard_library(), 0.05)
    pairs = docstring_pairs(train)
    assert len(pairs) > 2000
    assert all('"""' + pair["response"] not in pair["prompt"] for pair in pairs)
    assert len(docstring_pairs(val)) > 50


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return str(path)


def test_a_question_is_on_one_side_whatever_the_answers(tmp_path: Path) -> None:
    records = [{"prompt": f"q{n % 40}", "response": f"r{n}"} for n in range(120)]
    data = InstructionDataModule([write_lines(tmp_path / "a.jsonl", records)], batch_size=4, val_fraction=0.3)
    data.setup()
    asked = [
        {shown(example.ids_T[~example.is_target_T].tolist()) for example in side}
        for side in (data.train_set, data.val_set)
    ]
    assert len(data.train_set) + len(data.val_set) == 120
    assert not asked[0] & asked[1]
    assert len(asked[1]) > 5


def test_texts_are_cut_and_every_token_but_the_first_is_a_target_once(tmp_path: Path) -> None:
    texts = ["abcdefghij" * 3, "xyz", ""]
    for seq_len in (7, 8, 31, 100):
        pieces = byte_encoder().pieces(texts[0], seq_len)
        assert max(len(piece.ids_T) for piece in pieces) <= seq_len + 1
        ids = [SEPARATOR, *texts[0].encode(), SEPARATOR]
        assert [token for piece in pieces for token in piece.ids_T[1:].tolist()] == ids[1:]
        assert all(piece.is_target_T[1:].all() and not piece.is_target_T[0] for piece in pieces)
    file = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    data = InstructionDataModule([file], seq_len=8, batch_size=1, val_fraction=0.4)
    assert data.describe()["train_targets"] + data.describe()["val_targets"] == sum(len(t) + 1 for t in texts)


def test_characters_that_end_lines_elsewhere_end_none_here(tmp_path: Path) -> None:
    answer = "one\u2028two\u0085three\x0cfour"
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"prompt": f"q{n}", "response": answer}, ensure_ascii=False) for n in range(3)]
    path.write_text("\n".join(lines), encoding="utf-8")
    found = read_conversations([str(path)])
    assert [json.loads(one.content)["response"] for one in found] == [answer] * 3
    pages = '"""A module."""\n\x0c\ndef f(x):\n    """Doc."""\n    return "\x0c"\n'
    for newline in ("\n", "\r\n"):
        (pair,) = docstring_pairs([Document("a.py", pages.replace("\n", newline).encode())])
        assert pair == {"prompt": 'def f(x):\n    return "\x0c"', "response": "Doc."}


def test_a_record_that_cannot_be_encoded_is_shown(tmp_path: Path) -> None:
    records = [{"prompt": f"q{n}", "response": "r"} for n in range(9)]
    records.append({"messages": [{"role": "user", "content": "nobody answers"}]})
    file = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match=r"nobody answers.*the assistant says nothing"):
        InstructionDataModule([file], batch_size=2, val_fraction=0.2).setup()


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected"):
        read_conversations([str(path)])
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: "):
        read_conversations([str(path)])


def test_long_conversations_are_left_out_not_cut(tmp_path: Path) -> None:
    records = [{"prompt": f"{n}", "response": "r" * n} for n in range(100)]
    file = write_lines(tmp_path / "a.jsonl", records)
    data = InstructionDataModule([file], seq_len=60, batch_size=2, val_fraction=0.2)
    figures = data.describe()
    examples = data.train_set + data.val_set
    assert figures["too_long"] == 100 - len(examples) > 20
    assert max(len(example.ids_T) for example in examples) == 61
    assert all(example.ids_T[-1] == SEPARATOR for example in examples)
    with pytest.raises(ValueError, match=r"0 conversations .* longer than seq_len=5"):
        InstructionDataModule([file], seq_len=5, batch_size=2).setup()


def test_a_batch_is_padded_behind() -> None:
    encoder = byte_encoder()
    short, long = (encoder([user("a"), assistant(answer)]) for answer in ("b", "bcd"))
    batch = collate([short, long])
    assert batch.windows.shape == (2, len(long.ids_T))
    assert batch.is_target_BT.shape == (2, len(long.ids_T) - 1)
    assert batch.is_target_BT.sum(1).tolist() == [2, 4]
    assert torch.equal(batch.windows[0, : len(short.ids_T)], short.ids_T)
    assert torch.equal(batch.windows[0, 1:][batch.is_target_BT[0]], short.ids_T[short.is_target_T])
