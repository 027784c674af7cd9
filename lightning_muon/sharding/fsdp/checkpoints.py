"""Sharded checkpoints of a sharded module and its optimizers: every rank writes and reads its own part."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from lightning_muon.checkpoint.atomic import remove
from lightning_muon.checkpoint.background import BackgroundSaver
from lightning_muon.checkpoint.canonical import OPTIMIZERS
from lightning_muon.checkpoint.check import check_weights
from lightning_muon.checkpoint.folders import load_folder, read_meta, read_shapes, save_folder
from lightning_muon.checkpoint.named import from_named, to_named
from lightning_muon.checkpoint.together import Processes
from lightning_muon.muon import Muon
from lightning_muon.names import canonical_name
from lightning_muon.sharding.fsdp.weights import sharded_weights

__all__ = ["ShardedCheckpoints", "require_keys"]


class ShardedCheckpoints:
    """Saves one after the other, in the background if wanted. Every rank must call the methods, in the same order.

    Args:
        in_background: ``save`` returns when the values have been copied to CPU memory.
        timeout: How long ranks wait for each other in the background; torch's default for ``None``.
    """

    def __init__(self, in_background: bool = False, timeout: timedelta | None = None) -> None:
        self._saver = BackgroundSaver(timeout) if in_background else None
        self._to_remove: list[Path] = []

    def save(
        self,
        path: Path,
        weights: Mapping[str, Mapping[str, Any]],
        optimizers: Mapping[str, Mapping[str, Any]],
        meta: Mapping[str, Any],
    ) -> None:
        """Save states in shards, and what is in ``meta`` of rank 0.

        Args:
            path: A folder, on a file system that all ranks share. What is there is replaced.
            weights: State of each module, as ``sharded_weights`` gives it, by the key that it has in the checkpoint.
            optimizers: ``state_dict()`` of each ``Muon``, by its key.
            meta: Everything else.

        Raises:
            TypeError: A module keeps something in its state that is no tensor.
            OSError: It could not be written; in the background, of the last save. What was there before is intact.
        """
        self.finish()
        tensors: dict[str, Any] = {key: dict(state) for key, state in weights.items()}
        rests = {}
        for key, state in optimizers.items():
            tensors[key], rests[key] = to_named(state)
        everything = {**meta, OPTIMIZERS: rests}
        if self._saver is None:
            save_folder(path, tensors, everything)
        else:
            self._saver.save(path, tensors, everything)

    def load(
        self,
        path: Path,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Muon],
        *,
        strict: bool = True,
        weights_only: bool = True,
        wanted: Collection[str] = (),
    ) -> dict[str, Any]:
        """Load into modules and optimizers, each rank its own shards, whatever the layout was that saved.

        Args:
            path: A folder that ``save`` wrote.
            modules: By key.
            optimizers: By key.
            strict: The names of the weights must be the same.
            weights_only: ``False`` lets ``meta`` run any code.
            wanted: What has to be in ``meta``.

        Returns:
            ``meta``.

        Raises:
            CheckpointError: It is missing, torn, altered, unsafe, or of another model; nothing has been changed.
            ValueError: It is of another optimizer; nothing has been changed.
            KeyError: Something that is asked for is not in it; nothing has been changed.
        """
        self.finish()
        looked: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def look() -> None:
            shapes, meta = read_shapes(path), read_meta(path, weights_only=weights_only)
            rests = meta.get(OPTIMIZERS, {})
            require_keys({**meta, **shapes, **rests}, [*modules, *optimizers, *wanted], path)
            for key, module in modules.items():
                check_weights(shapes[key], module, strict=strict, source=str(path))
            for key, optimizer in optimizers.items():
                optimizer.check_state_dict(from_named(shapes.get(key, {}), rests[key]))
            looked.append((shapes, rests))

        Processes.of(None).together(look)
        shapes, rests = looked[0]
        targets: dict[str, Any] = {}
        for key, module in modules.items():
            held = {canonical_name(name): value for name, value in sharded_weights(module).items()}
            names = {name: canonical_name(name) for name in shapes[key]}
            targets[key] = {name: held[own] for name, own in names.items() if own in held}
        for key, optimizer in optimizers.items():
            state, _ = to_named(optimizer.state_dict())
            targets[key] = {
                name: {entry: state[name][entry] for entry in saved if entry in state[name]}
                for name, saved in shapes.get(key, {}).items()
            }
        meta = load_folder(path, targets, weights_only=weights_only)
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict(from_named(targets[key], rests[key]))
        return meta

    def remove(self, path: Path) -> None:
        """Remove a checkpoint: one that is to be replaced by a save in the background, when that is whole."""
        if self._saver is None:
            self._remove(path)
        else:
            self._to_remove.append(path)

    def finish(self) -> None:
        """Wait until what was saved is under its name.

        Raises:
            OSError: It could not be written. What it was to replace has not been removed.
        """
        self._wait()
        while self._to_remove:
            self._remove(self._to_remove.pop())

    def _wait(self) -> None:
        if self._saver is not None:
            try:
                self._saver.wait()
            except BaseException:
                self._to_remove.clear()
                raise

    def _remove(self, path: Path) -> None:
        Processes.of(None).on_first(lambda: remove(path))

    def close(self) -> None:
        """Wait, and give the background's processes and memory back."""
        try:
            self._wait()
            if Processes.of(None).rank == 0:  # the others are not asked: a process that has failed comes here alone
                for path in self._to_remove:
                    remove(path)
            self._to_remove.clear()
        finally:
            if self._saver is not None:
                self._saver.close()
                self._saver = None


def require_keys(found: Collection[str], keys: Collection[str], path: object) -> None:
    """Raise if something that is asked for is not in a checkpoint.

    Raises:
        KeyError: It is not.
    """
    missing = [key for key in keys if key not in found]
    if missing:
        raise KeyError(f"{path} has nothing under {missing}; it has {sorted(found)}.")
