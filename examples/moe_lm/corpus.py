"""Finding documents and splitting them by file."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Tests repeat themselves, idlelib and lib2to3 left the library over the versions, the rest is not the library's.
_SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_SKIPPED |= {"_bundled"}  # ensurepip's wheels


class Document(NamedTuple):
    """A file's relative path with forward slashes, the same on every machine, and its bytes."""

    name: str
    content: bytes


def standard_library() -> list[Document]:
    """The running interpreter's own Python sources, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root): path for path in root.rglob("*.py")}
    return _read({name.as_posix(): path for name, path in paths.items() if not _SKIPPED & set(name.parts[:-1])})


def find_documents(files: Sequence[str]) -> list[Document]:
    """Files by name, directory (all files below, hidden ones left out) or glob pattern, in the order of their names.

    A file below a directory is named by its path from there; any other as the user, or the pattern's match, spelt it.
    """
    named: dict[str, Path] = {}
    for entry in files:
        found = [Path(entry)] if Path(entry).exists() else [Path(match) for match in glob.glob(entry, recursive=True)]
        if not found:
            raise FileNotFoundError(f"TextDataModule: no file, directory or glob match for {entry!r}")
        for path in found:
            if path.is_dir():
                below = {leaf.relative_to(path): leaf for leaf in path.rglob("*") if leaf.is_file()}
                hidden = {name for name in below if any(part.startswith(".") for part in name.parts)}
                named |= {name.as_posix(): leaf for name, leaf in below.items() if name not in hidden}
            else:
                named[path.as_posix()] = path
    return _read(named)


def _read(named: Mapping[str, Path]) -> list[Document]:
    # Sorted, because the order in which a file system lists a directory is its own business.
    return [Document(name, path.read_bytes()) for name, path in sorted(named.items())]


def split_documents(documents: Sequence[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; no file is in both.

    A file's side depends on its name alone, so adding files moves no other file to the other side. With very few
    files at least one is kept on each side; a single file is cut, and its tail validates.
    """
    if len(documents) == 1:
        (name, content), cut = documents[0], round(len(documents[0].content) * (1 - val_fraction))
        return [Document(name, content[:cut])], [Document(name, content[cut:])]
    by_hash = sorted(documents, key=lambda document: _hash_fraction(document.name))
    num_val = sum(_hash_fraction(document.name) < val_fraction for document in documents)
    num_val = min(max(num_val, 1), len(documents) - 1)
    val_names = {document.name for document in by_hash[:num_val]}
    train = [document for document in documents if document.name not in val_names]
    return train, [document for document in documents if document.name in val_names]


def _hash_fraction(name: str) -> float:
    """A number in [0, 1) that the name determines, uniform over names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
