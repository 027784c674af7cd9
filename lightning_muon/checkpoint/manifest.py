"""What belongs to a sharded checkpoint, byte by byte: written last, read first.

The checksums find what disks, networks and half-finished copies do to files. They are no signature: whoever can write
the files can write the manifest, so files from strangers are kept harmless by how they are unpickled, not by this.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_muon.checkpoint.atomic import recover
from lightning_muon.checkpoint.errors import unusable

__all__ = ["MANIFEST", "checksums", "read_manifest", "verify_pieces", "write_manifest"]

MANIFEST = "manifest.json"
_PIECE_BYTES = 64 * 2**20  # what one process checks at a time: small enough to share one rank's file out
_READ_BYTES = 1 << 20

Files = Mapping[str, Mapping[str, Any]]


def checksums(file: Path) -> dict[str, Any]:
    """The size of a file and the CRC-32 of each of its pieces, in order."""
    size = file.stat().st_size
    return {
        "bytes": size,
        "crc32": [_crc32(file, start, _PIECE_BYTES) for start in range(0, size, _PIECE_BYTES)],
    }


def write_manifest(folder: Path, files: Files) -> None:
    """Write down what the checkpoint in ``folder`` consists of.

    Args:
        folder: The checkpoint.
        files: ``checksums`` of each file, by its name in the folder.
    """
    content = {"format": 1, "piece_bytes": _PIECE_BYTES, "files": dict(sorted(files.items()))}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``write_manifest`` wrote.

    Raises:
        CheckpointError: There is no checkpoint, or none that was completed.
    """
    recover(folder)
    if folder.is_file():
        raise unusable(folder, "It is a file, not a folder.", "Files are read by lightning_muon.checkpoint.files.")
    if not folder.is_dir():
        raise unusable(folder, "There is no such checkpoint.")
    try:
        content = json.loads((folder / MANIFEST).read_text())
        files = content["files"]
        assert content["format"] == 1
        assert content["piece_bytes"] > 0
        for name, entry in files.items():
            assert Path(name).name == name
            assert len(entry["crc32"]) == -(-entry["bytes"] // content["piece_bytes"])
    except FileNotFoundError as error:
        what = f"It has no {MANIFEST}: it was not completed, or not saved by lightning_muon."
        raise unusable(folder, what) from error
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise unusable(folder, f"Its {MANIFEST} is altered, or of a later version of lightning_muon.") from error
    return dict(content)


def verify_pieces(folder: Path, manifest: Mapping[str, Any], *, rank: int = 0, world_size: int = 1) -> None:
    """Check that all files are there in full, and this process's share of what is in them.

    Args:
        folder: The checkpoint.
        manifest: Of it.
        rank: Which share to read; of the whole every ``world_size``-th piece.
        world_size: Into how many shares.

    Raises:
        CheckpointError: A file is missing, torn or altered.
    """
    piece_bytes, pieces = manifest["piece_bytes"], []
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise unusable(folder, f"Its file {name} is missing.")
        if file.stat().st_size != entry["bytes"]:
            raise unusable(folder, f"Its file {name} has {file.stat().st_size:,} of {entry['bytes']:,} bytes.")
        pieces += [(file, number * piece_bytes, crc) for number, crc in enumerate(entry["crc32"])]
    for file, start, crc in pieces[rank::world_size]:
        if _crc32(file, start, piece_bytes) != crc:
            raise unusable(folder, f"Its file {file.name} is not as it was written (after byte {start:,}).")


def _crc32(file: Path, start: int, length: int) -> int:
    value = 0
    with open(file, "rb") as stream:
        stream.seek(start)
        while length > 0 and (data := stream.read(min(length, _READ_BYTES))):
            value = zlib.crc32(data, value)
            length -= len(data)
    return value
