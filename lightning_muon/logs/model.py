"""``muon_model.json``: what stands beside a run's scalars, so that they can be read without the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["FILE_NAME", "LogError", "MissingDescriptionError", "ModelDescription", "ParameterDescription"]

FILE_NAME = "muon_model.json"
_FORMAT = 1


class LogError(ValueError):
    """A run's logs cannot be used; the message says what was wrong and what to do."""


class MissingDescriptionError(LogError):
    """A run has no ``muon_model.json``."""


@dataclass(frozen=True)
class ParameterDescription:
    """One parameter that Muon trains.

    Attributes:
        matrices: ``(rows, cols, count)`` of the matrices it is split into, by shape.
        orthogonalization: What ``Muon(orthogonalization=)`` was: a name, the ``(a, b, c)`` of each step, or a mapping.
        dtype: Of the iteration, as ``"float32"``.
    """

    matrices: tuple[tuple[int, int, int], ...]
    orthogonalization: str | tuple[tuple[float, ...], ...] | Mapping[str, Any]
    dtype: str

    @property
    def rank(self) -> int:
        """``min(rows, cols)`` of a matrix; of matrices of several shapes, the lower median."""
        ranks = sorted(min(rows, cols) for rows, cols, count in self.matrices for _ in range(count))
        return ranks[(len(ranks) - 1) // 2]


@dataclass(frozen=True)
class ModelDescription:
    """The model that was trained.

    Attributes:
        num_parameters: Trained elements, of Muon and AdamW together.
        parameters: Those that Muon trains, by their names in the LightningModule.
    """

    num_parameters: int
    parameters: Mapping[str, ParameterDescription]

    def write(self, folder: str | Path) -> Path:
        """Write ``muon_model.json``, whole or not at all. For one process of a run.

        Args:
            folder: The logger's ``log_dir``; it is made if it is not there.

        Returns:
            The file.
        """
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "format": _FORMAT,
            "num_parameters": self.num_parameters,
            "parameters": {name: asdict(one) for name, one in self.parameters.items()},
        }
        unfinished = path.with_name(f".{FILE_NAME}.saving")
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return path

    @classmethod
    def read(cls, folder: str | Path) -> ModelDescription:
        """Read what ``write`` wrote.

        Raises:
            MissingDescriptionError: There is no such file.
            LogError: It is not of this format.
        """
        path = Path(folder) / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MissingDescriptionError(
                f"{path} is missing: it says how large the model is. MomentumSpectrumMonitor writes it, and"
                " log_optimizer in a Fabric loop, beside the scalars of a logger that has a log_dir."
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise LogError(f"{path} is not JSON: {error}") from None
        found = content.get("format") if isinstance(content, dict) else None
        if found != _FORMAT:
            raise LogError(
                f"{path} has format {found!r}, expected {_FORMAT}: read it with the version of lightning_muon that"
                " wrote it."
            )
        try:
            return cls(
                _positive(content["num_parameters"]),
                {name: _parameter(one) for name, one in content["parameters"].items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LogError(f"{path} is not what lightning_muon writes ({type(error).__name__}: {error}).") from None


def _parameter(content: Mapping[str, Any]) -> ParameterDescription:
    matrices = tuple((_positive(rows), _positive(cols), _positive(count)) for rows, cols, count in content["matrices"])
    if not matrices:
        raise ValueError("a parameter without matrices")
    given = content["orthogonalization"]
    if not isinstance(given, str | Mapping):
        given = tuple(tuple(float(value) for value in step) for step in given)
    return ParameterDescription(matrices, given, str(content["dtype"]))


def _positive(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"expected a whole number of 1 or more, got {value!r}")
    return value
