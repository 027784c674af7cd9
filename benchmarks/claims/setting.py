"""What the experiments have in common: the model, the text's windows, the seeds, the grid, and which runs they share.

The model is of the example's kind with attention of the plain kind, so small that 600 steps take half a minute on one
core. A run that several experiments need is described once, here, and so is done once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from benchmarks.claims.description import Run
from benchmarks.claims.tuning import USUAL_INIT, Grid, Rates

MODEL: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "attention": "gqa",
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "max_seq_len": 64,
    }
)
STEPS = 600
TUNING_SEEDS = (100, 101, 102)  # not among those that are reported
SEEDS = (1, 2, 3, 4, 5)
GRIDS = {
    # The initial scale of models 2,048 wide and more, and 1/√64: one optimizer may want the one, one the other.
    "full": Grid((2e-3, 4e-3, 8e-3, 1.6e-2), (8e-3, 1.6e-2, 3.2e-2), (USUAL_INIT, 0.125)),
    # Around what is best at 600 steps, for longer runs.
    "inner": Grid((4e-3, 8e-3, 1.6e-2), (1.6e-2, 3.2e-2, 6.4e-2), (USUAL_INIT, 0.125)),
    "tiny": Grid((4e-3, 8e-3), (1.6e-2,)),  # to see that everything works
}


def interval(steps: int, times: int) -> int:
    """Steps between two measurements of at least so many, if there are so many steps; the last step is one of them."""
    return max(every for every in range(1, max(1, steps // times) + 1) if steps % every == 0)


@dataclass(frozen=True)
class Setting:
    """What a command may change: the length of the runs, their batch, and the text.

    Attributes:
        steps: Of a run at full length.
        files: The text; ``None`` is the standard library.
        val_windows: Windows of validation text.
        batch_size: Windows per step. Experiments with windows of another length have batches of their own.
    """

    steps: int = STEPS
    files: tuple[str, ...] | None = None
    val_windows: int = 256
    batch_size: int = Run.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Of a run with windows of the usual length."""
        return self.batch_size * Run.seq_len

    def run(self, optimizer: str, rates: Rates, seed: int, steps: int | None = None, **others: Any) -> Run:
        """A run of the common model; ``others`` are fields of `Run`."""
        model = {**others.pop("model", MODEL), "initializer_range": rates.initializer_range}
        fields: dict[str, Any] = {"model": model, "files": self.files, "val_windows": self.val_windows}
        fields |= {"batch_size": self.batch_size, **others}
        return Run(optimizer, rates.lr, rates.adamw_lr, steps or self.steps, seed, **fields)  # type: ignore[arg-type]

    def reported(self, optimizer: str, rates: Rates, seeds: Sequence[int]) -> dict[int, Run]:
        """The tuned runs at full length, by seed: what is measured of them and kept serves several experiments."""
        every = interval(self.steps, 10)
        return {
            seed: self.run(
                optimizer,
                rates,
                seed,
                measure=("updates", "weights", "spectra"),
                measure_every=every,
                keep_checkpoint=True,
            )
            for seed in seeds
        }
