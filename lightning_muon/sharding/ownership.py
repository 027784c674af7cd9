"""Who owns what: a pure function of names, sizes and the number of ranks, so that every rank finds the same plan."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["ElementRun", "OwnershipPlan", "Slice", "Unit", "plan_ownership"]

# Element-wise parameters are cut at multiples of this, so that vectorised kernels see aligned slices.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Unit:
    """The smallest piece of a Muon parameter that one rank can own: whole matrices.

    Attributes:
        parameter: The parameter's name.
        start, stop: The elements.
        flops: Cost of its orthogonalisation.
        state_bytes: Bytes of its optimizer state.
    """

    parameter: str
    start: int
    stop: int
    flops: int
    state_bytes: int


@dataclass(frozen=True)
class ElementRun:
    """A parameter updated element by element, which may be cut anywhere.

    Attributes:
        parameter: The parameter's name.
        numel: Its elements.
        state_bytes_per_element: Bytes of optimizer state each brings.
        divisible: Whether it may be cut.
    """

    parameter: str
    numel: int
    state_bytes_per_element: int
    divisible: bool = True


@dataclass(frozen=True)
class Slice:
    """Elements ``[start, stop)`` of a parameter and the rank that owns them."""

    start: int
    stop: int
    owner: int


@dataclass(frozen=True)
class OwnershipPlan:
    """The plan.

    Attributes:
        world_size: Number of ranks.
        slices: For every parameter, ascending slices that cover it.
        flops: Orthogonalisation FLOPs per rank and step.
        state_bytes: Optimizer state per rank.
    """

    world_size: int
    slices: dict[str, tuple[Slice, ...]]
    flops: tuple[int, ...]
    state_bytes: tuple[int, ...]

    def describe(self) -> str:
        """The plan in a line: state per rank, and how uneven work and state are."""
        mean_bytes, mean_flops = sum(self.state_bytes) / self.world_size, sum(self.flops) / self.world_size
        return (
            f"{len(self.slices)} parameters, number of processes {self.world_size},"
            f" {mean_bytes / 2**20:.2f} MiB of state each (largest / mean"
            f" {max(self.state_bytes) / (mean_bytes or 1):.2f}), orthogonalisation"
            + (f" work largest / mean {max(self.flops) / mean_flops:.2f}" if mean_flops else ": nothing")
        )

    def digest(self) -> str:
        """A hash that is equal on two ranks only if their plans are, wherever their parameters stand."""
        return hashlib.sha256(repr((self.world_size, sorted(self.slices.items()))).encode()).hexdigest()


def plan_ownership(units: Iterable[Unit], element_runs: Iterable[ElementRun], world_size: int) -> OwnershipPlan:
    """Give every unit to one rank, then level the bytes of state with the element-wise parameters.

    Units go, most expensive first, to the rank with the fewest FLOPs so far, then the fewest bytes (longest
    processing time first: at most 4/3 of the best possible makespan, Graham 1969). Element-wise parameters fill the
    ranks up to a common level, like water.

    Args:
        units: Pieces of Muon parameters.
        element_runs: Element-wise parameters.
        world_size: Number of ranks.

    Returns:
        The plan; it does not depend on the order of ``units`` and ``element_runs``.
    """
    units = sorted(units, key=lambda unit: (unit.parameter, unit.start))
    element_runs = sorted(element_runs, key=lambda run: run.parameter)
    flops, state_bytes = [0] * world_size, [0] * world_size
    owners: dict[Unit, int] = {}
    for unit in sorted(units, key=lambda u: (-u.flops, -u.state_bytes)):  # stable: then by name
        rank = min(range(world_size), key=lambda r: (flops[r], state_bytes[r], r))
        owners[unit] = rank
        flops[rank] += unit.flops
        state_bytes[rank] += unit.state_bytes
    slices: dict[str, list[Slice]] = {}
    for unit, owner in _with_neighbours_together(units, owners):
        slices.setdefault(unit.parameter, []).append(Slice(unit.start, unit.stop, owner))
    for parameter, piece in _level(element_runs, state_bytes):
        slices.setdefault(parameter, []).append(piece)
    merged = {parameter: _merge(pieces) for parameter, pieces in slices.items()}
    return OwnershipPlan(world_size, merged, tuple(flops), tuple(state_bytes))


def _with_neighbours_together(units: Sequence[Unit], owners: dict[Unit, int]) -> Iterable[tuple[Unit, int]]:
    """Exchange equal units of one parameter between ranks so that each rank's are adjacent: fewer, longer slices."""
    alike: dict[tuple[str, int, int, int], list[Unit]] = {}
    for unit in units:
        alike.setdefault((unit.parameter, unit.stop - unit.start, unit.flops, unit.state_bytes), []).append(unit)
    for group in alike.values():
        ranks = sorted(owners[unit] for unit in group)
        yield from zip(sorted(group, key=lambda unit: unit.start), ranks, strict=True)


def _level(element_runs: Sequence[ElementRun], state_bytes: list[int]) -> Iterable[tuple[str, Slice]]:
    """Cut the element-wise parameters so that ``state_bytes`` (updated in place) end as equal as can be."""
    for run in (run for run in element_runs if not run.divisible):
        rank = min(range(len(state_bytes)), key=lambda r: (state_bytes[r], r))
        state_bytes[rank] += run.numel * run.state_bytes_per_element
        yield run.parameter, Slice(0, run.numel, rank)
    divisible = [run for run in element_runs if run.divisible]
    level = _water_level(state_bytes, sum(run.numel * run.state_bytes_per_element for run in divisible))
    rank = 0
    for run in divisible:
        start = 0
        if not run.numel:
            yield run.parameter, Slice(0, 0, 0)
        while start < run.numel:
            last = rank == len(state_bytes) - 1
            room = max(0.0, level - state_bytes[rank])
            aligned = int(room / run.state_bytes_per_element / _ALIGNMENT + 0.5) * _ALIGNMENT
            stop = run.numel if last else min(run.numel, start + aligned)
            if stop > start:
                state_bytes[rank] += (stop - start) * run.state_bytes_per_element
                yield run.parameter, Slice(start, stop, rank)
                start = stop
            if start < run.numel:
                rank += 1


def _water_level(heights: Sequence[int], volume: int) -> float:
    """The common height that ``volume`` reaches when it is poured over columns of ``heights``."""
    ascending = sorted(heights)
    for count in range(1, len(ascending) + 1):
        level = (volume + sum(ascending[:count])) / count
        if count == len(ascending) or level <= ascending[count]:
            return level
    raise AssertionError("there is at least one rank")


def _merge(pieces: Iterable[Slice]) -> tuple[Slice, ...]:
    merged: list[Slice] = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if merged and merged[-1].owner == piece.owner and merged[-1].stop == piece.start:
            merged[-1] = Slice(merged[-1].start, piece.stop, piece.owner)
        else:
            merged.append(piece)
    return tuple(merged)
