"""What a training run is, as plain values: enough to repeat it, and to know that it was done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from examples.moe_lm.optim import OptimizerName

ScaleRule = Literal["adjusted", "baseline", "update_norm"]
Measure = Literal["updates", "weights", "spectra", "loss"]


@dataclass(frozen=True)
class Run:
    """One training run. Two runs with the same seed begin with the same weights (times their initial
    scales, where these differ) and see the same windows of text.

    Args:
        optimizer: ``"muon"`` or ``"adamw"``, see `examples.moe_lm.optim.build_optimizer`.
        lr: Learning rate of the matrices at its peak.
        adamw_lr: Learning rate of embedding, head and norms; ``None`` takes ``lr``.
        steps: Optimizer steps; the schedule ends with them.
        seed: Of the initial weights and of the windows.
        model: Fields of `ModelConfig` that are not its defaults.
        batch_size: Windows per step.
        seq_len: Tokens to predict per window.
        weight_decay: Decoupled, applied as ``lr · weight_decay``.
        update_rms: The factor r of Muon's scale, r·√max(rows, cols); Moonlight takes 0.2.
        scale_rule: What Moonlight's Table 1 compares, H being the hidden size: ``"adjusted"`` r·√max(rows, cols),
            ``"baseline"`` r·√H, ``"update_norm"`` r/RMS(O).
        orthogonalization: Name of the polynomial sequence for Muon.
        router_optimizer: ``"muon"`` or ``"adamw"`` for the routers' matrices.
        clip_tau: τ of QK-Clip; ``None`` does not clip.
        watch_logits: Log attention's largest logits, at the steps that are measured.
        measure: What to measure: updates, weights, spectra of the weights (the monitors of those names), the
            validation loss.
        measure_every: Steps between two measurements; 0 measures after the last step only. The last one is measured
            if this divides ``steps``.
        start_from: A checkpoint to fine-tune on conversations, see `benchmarks.claims.conversations`; ``files`` are
            then JSON Lines. ``None`` trains new weights on text.
        keep_checkpoint: Leave the weights beside the result.
        files: The text, see `TextDataModule`; ``None`` is the standard library.
        val_windows: Windows of validation text.

    Raises:
        ValueError: A value that no run can have.
    """

    optimizer: OptimizerName
    lr: float
    adamw_lr: float | None
    steps: int
    seed: int
    model: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    seq_len: int = 64
    weight_decay: float = 0.1
    update_rms: float = 0.2
    scale_rule: ScaleRule = "adjusted"
    orthogonalization: str = "polar_express5"
    router_optimizer: OptimizerName = "muon"
    clip_tau: float | None = None
    watch_logits: bool = False
    measure: tuple[Measure, ...] = ()
    measure_every: int = 0
    start_from: str | None = None
    keep_checkpoint: bool = False
    files: tuple[str, ...] | None = None
    val_windows: int = 256

    def __post_init__(self) -> None:
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"Run: optimizer is 'muon' or 'adamw', got {self.optimizer!r}")
        if self.steps < 1 or self.measure_every < 0:
            raise ValueError(f"Run: steps={self.steps} must be positive and measure_every={self.measure_every} not < 0")
        if self.scale_rule not in ("adjusted", "baseline", "update_norm"):
            raise ValueError(f"Run: scale_rule={self.scale_rule!r} is none of 'adjusted', 'baseline', 'update_norm'")
        if unknown := set(self.measure) - set(get_args(Measure)):
            raise ValueError(f"Run: measure has {sorted(unknown)}; choose from {', '.join(get_args(Measure))}")
        if self.optimizer == "adamw" and (self.update_rms, self.scale_rule) != (0.2, "adjusted"):
            raise ValueError("Run: update_rms and scale_rule are Muon's; AdamW has neither")

    @property
    def interval(self) -> int:
        """Steps between two measurements."""
        return self.measure_every or self.steps

    @property
    def key(self) -> str:
        """A readable name, and a hash of everything: different runs have different keys."""
        aux = "" if self.adamw_lr is None else f"-aux{self.adamw_lr:g}"
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:10]
        return f"{self.optimizer}-lr{self.lr:g}{aux}-steps{self.steps}-seed{self.seed}-{digest}"

    def to_json(self) -> str:
        """The one way to write it."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Run:
        """The run that was written.

        Raises:
            ValueError: A field that no run has, or one is missing.
        """
        values: dict[str, Any] = json.loads(text)
        known = {one.name for one in fields(cls)}
        if unknown := values.keys() - known:
            raise ValueError(f"a run has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
        for name in ("measure", "files"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"this describes no run: {error}") from None
