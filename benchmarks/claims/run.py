"""One run of an experiment, by itself: ``python -m benchmarks.claims.run FOLDER/run.json [--device cuda:0]``.

The description is `benchmarks.claims.description.Run` as JSON. What came out goes beside it, into ``result.json``,
whole or not at all; where that is there already, and of this very run, nothing is done.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.claims.description import Run
from lightning_muon.checkpoint.atomic import replacing


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        run: The run.
        figures: What `benchmarks.claims.train.train` returned.
        folder: Where its files are.
    """

    run: Run
    figures: dict[str, Any]
    folder: Path

    @property
    def val_loss(self) -> float:
        """In nats per byte; infinite if the run diverged."""
        loss = self.figures["val_loss"]
        return math.inf if loss is None else float(loss)

    @property
    def has_diverged(self) -> bool:
        """Whether something in it was not finite."""
        return self.figures["diverged"] is not None

    @property
    def checkpoint(self) -> Path:
        """Its weights, if the run keeps them."""
        return self.folder / "weights.ckpt"

    def curve(self, key: str) -> list[tuple[int, float]]:
        """``(step, value)`` of a monitor's key."""
        return [(step, value) for step, value in self.figures["measured"][key]]

    def last(self, prefix: str) -> dict[str, float]:
        """The last value of every key of a monitor that begins with ``prefix``, by the rest of the key."""
        measured = self.figures["measured"]
        return {key.removeprefix(prefix): points[-1][1] for key, points in measured.items() if key.startswith(prefix)}


def find(run: Run, folder: Path) -> Outcome | None:
    """What came out of a run, if it is done: in ``folder``, by its key."""
    return read(run, folder / run.key)


def read(run: Run, folder: Path) -> Outcome | None:
    """The same, in a folder of its own; another run's result there is none of this one."""
    path = folder / "result.json"
    if not path.exists():
        return None
    saved = json.loads(path.read_text())
    outcome = Outcome(Run.from_json(json.dumps(saved["run"])), saved["figures"], folder)
    is_whole = outcome.checkpoint.exists() or not run.keep_checkpoint
    return outcome if outcome.run == run and is_whole else None


def do(run: Run, folder: Path, device: str) -> Outcome:
    """Trains a run, and leaves its files in ``folder``."""
    from benchmarks.claims.train import train  # brings Lightning; a result is read without it

    outcome = Outcome(run, {}, folder)
    figures = train(run, device, outcome.checkpoint if run.keep_checkpoint else None)
    with replacing(folder / "result.json") as staged:
        staged.write_text(json.dumps({"run": json.loads(run.to_json()), "figures": figures}, indent=1) + "\n")
    return Outcome(run, figures, folder)


def main(args: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("description", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(args)
    run = Run.from_json(options.description.read_text())
    folder = options.description.resolve().parent
    outcome = read(run, folder) or do(run, folder, options.device)
    print(f"{run.key}: loss {outcome.val_loss:.4f}, {outcome.figures['seconds']:.0f} s")


if __name__ == "__main__":
    main()
