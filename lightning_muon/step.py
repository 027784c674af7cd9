"""One step of the optimizer: who takes part in it, and the order of its stages."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muon.adamw_step import step_adamw
from lightning_muon.choosing import Chooser, StepCounts, Treatment
from lightning_muon.local import local_numel
from lightning_muon.matrices import MatrixKey, MatrixLayout
from lightning_muon.muon_step import HeldMatrices, MatrixOptions, MuonStage, UpdateRecord, zero_gradients
from lightning_muon.orthogonalize import auto_settings, check_range, default_dtype_of, nominal_sequence
from lightning_muon.owned import OwnedParameter
from lightning_muon.partition import Partition
from lightning_muon.routes import Route
from lightning_muon.watching import Watch

__all__ = ["Step", "treatments"]

_logger = logging.getLogger(__name__)


class Step:
    """The next step of an optimizer, on this process.

    Args:
        param_groups: The optimizer's.
        state: The optimizer's, which exists for every parameter.
        routes: The decision on every parameter, by name.
        partition: Who this process shares the work with.

    Raises:
        ValueError: A sequence is not safe in the precision that it would run in.
    """

    def __init__(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        routes: Mapping[str, Route],
        partition: Partition,
    ) -> None:
        self._groups, self._state, self._routes, self._partition = param_groups, state, routes, partition
        self._treatments = treatments(param_groups, routes)

    def run(self, step_counts: StepCounts, watch: Watch, rest_if_zero: bool) -> Iterator[UpdateRecord]:
        """Update stage by stage: while one is orthogonalised, its neighbours may travel.

        Args:
            step_counts: Counted on; where it is time, the owners look at spectra and all processes learn the outcome.
            watch: What is kept for the monitors goes in here.
            rest_if_zero: Whether a matrix with a gradient of zeros is left alone, as one without a gradient is.

        Yields:
            What the updates of this process's matrices were. Exhaust it.
        """
        names = [name for name, _ in self._named()]
        idle = self._idle(names) if rest_if_zero else self._without_gradient()
        options = self._options()
        step_counts.step += 1
        chooser = Chooser(self._treatments, step_counts, watch.last or frozenset())
        ahead, stages = self._partition.ahead, [frozenset(stage) for stage in self._partition.stages(names)]
        sent: deque[MuonStage] = deque()
        returning: deque[tuple[int, MuonStage]] = deque()
        for number in range(len(stages) + ahead):
            if number < len(stages):
                exchange = self._partition.exchange(number, idle)
                held = self._held_matrices(stages[number])
                sent.append(MuonStage(held, options, exchange, idle, watch.alignments))
                watch.moved |= self._update_elementwise(stages[number])
            if number >= ahead:
                stage = sent.popleft()
                yield from stage.orthogonalize(chooser, with_telemetry=watch.last is not None)
                returning.append((number - ahead, stage))
            while returning and (len(returning) > ahead or not sent):
                finished, stage = returning.popleft()
                stage.finish()
                self._partition.publish(finished)
        self._settle(chooser, step_counts)
        watch.spectra = chooser.spectra

    def _settle(self, chooser: Chooser, step_counts: StepCounts) -> None:
        """All processes learn what the owners have chosen."""
        if step_counts.is_due(self._treatments.values()):
            device = next(param for _, param in self._named()).device
            chosen = torch.tensor(chooser.settled(), dtype=torch.float32, device=device)
            everybodys = [int(count) for count in self._partition.maximum(chosen).tolist()]
            changed = step_counts.adopt(self._treatments, everybodys)
            if changed and self._partition.rank == 0:
                _logger.info(
                    "auto at optimizer step %d: %d matrices take another number of steps; now %s",
                    step_counts.step,
                    changed,
                    step_counts.describe(),
                )

    def _idle(self, names: Sequence[str]) -> Container[MatrixKey]:
        return self._partition.idle(*zero_gradients(self._held_matrices(names)))

    def _without_gradient(self) -> Container[MatrixKey]:
        return frozenset(
            (name, number)
            for name, param in self._named()
            if param.grad is None and name in self._treatments
            for number in range(self._treatments[name].num_matrices)
        )

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self._groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    def _held(self, algorithm: str, names: Container[str]) -> Iterator[OwnedParameter]:
        for group in self._groups:
            if group["algorithm"] == algorithm:
                for name, param in zip(group["param_names"], group["params"], strict=True):
                    if name in names and param.grad is not None:
                        ranges = self._partition.ranges(name, local_numel(param))
                        if ranges:
                            yield OwnedParameter(name, param, self._state[param], ranges, group)

    def _held_matrices(self, names: Container[str]) -> list[HeldMatrices]:
        return [
            HeldMatrices(
                held, self._partition.parts(held.name, _layout(self._routes, held.name), local_numel(held.param))
            )
            for held in self._held("muon", names)
        ]

    def _options(self) -> dict[str, MatrixOptions]:
        return {
            name: MatrixOptions(group, _layout(self._routes, name).transposed, self._treatments[name])
            for group in self._groups
            if group["algorithm"] == "muon"
            for name in group["param_names"]
        }

    def _update_elementwise(self, names: Container[str]) -> set[str]:
        """Of the parameters that AdamW trains, those that were updated."""
        held = list(self._held("adamw", names))
        for group in self._groups:
            step_adamw(group, [parameter for parameter in held if parameter.group is group])
        return {parameter.name for parameter in held}


def treatments(param_groups: Sequence[Mapping[str, Any]], routes: Mapping[str, Route]) -> dict[str, Treatment]:
    """How the matrices of each parameter that Muon trains are orthogonalised, in the order of their names: processes
    may list them in any order, and tell each other of them in this one.

    Raises:
        ValueError: A sequence is not safe in the precision that it would run in.
    """
    found = {}
    for group in param_groups:
        if group["algorithm"] == "muon":
            auto, dtype = auto_settings(group["orthogonalization"]), group["orthogonalization_dtype"]
            sequence = nominal_sequence(group["orthogonalization"])
            for name, param in zip(group["param_names"], group["params"], strict=True):
                layout = _layout(routes, name)
                if sequence is not None:
                    check_range(
                        sequence, dtype or default_dtype_of(param.dtype, param.device, _longest_short_side(layout))
                    )
                found[name] = Treatment(sequence, auto, dtype, layout.num_matrices)
    return dict(sorted(found.items()))


@lru_cache(maxsize=4096)
def _longest_short_side(layout: MatrixLayout) -> int:
    return max(map(min, layout.shapes()))


def _layout(routes: Mapping[str, Route], name: str) -> MatrixLayout:
    layout = routes[name].layout
    assert layout is not None  # the routes to Muon have one
    return layout
