"""Documents, their split, and which windows a global batch holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DistributedSampler

from examples.moe_lm import corpus
from examples.moe_lm.corpus import find_documents, split_documents, standard_library
from examples.moe_lm.data import SEPARATOR, TextDataModule


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Sixty files whose content differs."""
    for number in range(60):
        path = tmp_path / "text" / f"part{number % 3}" / f"file{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number} " * (50 + number))
    return tmp_path / "text"


def test_no_file_is_on_both_sides_and_the_split_is_by_name() -> None:
    documents = standard_library()
    train, val = split_documents(documents, 0.05)
    train_names, val_names = {d.name for d in train}, {d.name for d in val}
    assert not train_names & val_names
    assert len(train) + len(val) == len(documents)
    assert 0.02 < len(val) / len(documents) < 0.09
    fewer_train, fewer_val = split_documents(documents[::2], 0.05)
    assert {d.name for d in fewer_val} <= val_names
    assert {d.name for d in fewer_train} <= train_names


def test_standard_library_leaves_out_what_is_not_the_library() -> None:
    names = [document.name for document in standard_library()]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [
        n for n in names if {"test", "tests", "idlelib", "lib2to3", "site-packages", "_bundled"} & set(n.split("/"))
    ]


def test_order_does_not_come_from_the_file_system(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = find_documents([str(text)])
    rglob = Path.rglob
    monkeypatch.setattr(corpus.Path, "rglob", lambda self, pattern: reversed(list(rglob(self, pattern))))
    assert find_documents([str(text)]) == expected
    assert [d.name for d in expected] == sorted(d.name for d in expected)


def test_files_directories_and_patterns(text: Path) -> None:
    single, pattern = str(text / "part0/file0.txt"), str(text / "part1/*.txt")
    assert len(find_documents([single, pattern])) == 1 + 20
    assert len(find_documents([single, single, pattern, pattern])) == 1 + 20
    (text / ".hidden").write_text("x")
    assert len(find_documents([str(text)])) == 60
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        find_documents(["nothing_here*"])


def test_few_files_leave_something_on_each_side(text: Path) -> None:
    train, val = split_documents(find_documents([str(text)])[:2], 1e-9)
    assert (len(train), len(val)) == (1, 1)
    train, val = split_documents(find_documents([str(text)])[:1], 0.25)
    assert abs(len(val[0].content) / len(train[0].content) - 1 / 3) < 0.05


def global_batches(text: Path, num_ranks: int) -> list[list[tuple[int, ...]]]:
    """The windows of the first three global batches, put together from all ranks' loaders."""
    batches: list[list[tuple[int, ...]]] = [[], [], []]
    for rank in range(num_ranks):
        data = TextDataModule([str(text)], seq_len=16, batch_size=8, num_ranks=num_ranks, rank=rank)
        loader = data.train_dataloader()
        assert isinstance(loader.sampler, DistributedSampler)  # else Lightning puts in its own, which shuffles
        for batch, mine in zip(batches, loader, strict=False):
            batch += [tuple(window.tolist()) for window in mine]
    return [sorted(batch) for batch in batches]


def test_global_batch_is_the_same_for_any_number_of_ranks(text: Path) -> None:
    one = global_batches(text, 1)
    assert [len(batch) for batch in one] == [8, 8, 8]
    assert one[0] != one[1]
    assert global_batches(text, 2) == one
    assert global_batches(text, 4) == one


def test_what_does_not_divide_is_refused(text: Path) -> None:
    data = TextDataModule([str(text)], seq_len=16, batch_size=8, num_ranks=3, val_windows=8)
    with pytest.raises(ValueError, match=r"batch_size=8 .* 3 ranks; use 6"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"val_windows=8 .* 3 ranks; use 6"):
        data.val_dataloader()


def test_validation_windows_do_not_overlap_and_stay_in_validation_files(text: Path) -> None:
    data = TextDataModule([str(text)], seq_len=16, batch_size=4, val_windows=12)
    data.setup()
    assert data.val_set is not None
    starts = data.val_set.starts
    assert len(starts) == 12
    assert (starts.diff() >= 16).all()
    assert int(starts[-1]) + 17 <= len(data.val_set.tokens)
    assert next(iter(data.val_dataloader())).shape == (4, 17)
    _, val = split_documents(find_documents([str(text)]), 0.05)
    assert data.val_set.tokens.tolist() == [token for d in val for token in (SEPARATOR, *d.content)]


def test_describe_identifies_the_text(text: Path) -> None:
    first, second = (TextDataModule([str(text)], seq_len=16).describe() for _ in range(2))
    assert first == second
    assert first["text_files"] == 60
    assert len(first["text_sha256"]) == 64
    (text / "part0/file0.txt").write_text("something else")
    assert TextDataModule([str(text)], seq_len=16).describe()["text_sha256"] != first["text_sha256"]


def test_too_little_text_is_refused(text: Path) -> None:
    with pytest.raises(ValueError, match="name more text"):
        TextDataModule([str(text / "part0/file0.txt")], seq_len=1000).setup()


def test_windows_start_everywhere(text: Path) -> None:
    data = TextDataModule([str(text)], seq_len=16, train_windows=5000)
    data.setup()
    assert data.train_set is not None
    starts = data.train_set.starts
    last = len(data.train_set.tokens) - 17
    assert 0 <= starts.min() < 50 < last - 50 < starts.max() <= last
    assert torch.equal(data.train_set[7], data.train_set[7])
