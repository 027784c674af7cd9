"""Pictures for TensorBoard while a model trains: heat maps of layer over time, and a layout of the scalars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities import rank_zero_warn

from lightning_muon.logs.keys import matrix_names, own_keys
from lightning_muon.logs.rows import arrange
from lightning_muon.reporting.catalogue import QUANTITIES, Quantity
from lightning_muon.reporting.history import History
from lightning_muon.reporting.image import heat_map_image
from lightning_muon.reporting.layout import custom_scalars_layout

__all__ = ["LayerPictures"]

_FIRST_DRAWING = 16
# Of a picture, at most.
_COLUMNS = 240


class LayerPictures:
    """Layers × time of what the monitors log, drawn now and then. For process 0, which has the writers.

    Images are ``muon/pictures/<quantity>``. They are drawn after 16, 32, 64, … measurements and when training ends: the
    newest is never older than half of the training, and all drawing together costs twice the last one. The layout of
    custom scalars is written when keys appear that were not there before, which is at the first measurement of each
    monitor; TensorBoard shows the last one. A resumed run begins new pictures.

    Args:
        max_rows: Of more layers, blocks spread over the depth are drawn.
    """

    def __init__(self, max_rows: int = 120) -> None:
        self.max_rows = max_rows
        self._history = {one: History(_COLUMNS) for one in QUANTITIES if one.in_tensorboard}
        self._keys: dict[str, None] = {}
        self._is_layout_new = False
        self._matrices: set[str] = set()
        self._measurements = 0
        self._is_drawn = True
        self._cannot_draw = False

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Remember what was logged.

        Args:
            step: The optimizer step it was logged at.
            values: By key.
        """
        self._is_layout_new |= not self._keys.keys() >= values.keys()
        self._keys.update(dict.fromkeys(values))
        for quantity, history in self._history.items():
            history.add(step, {name: values[key] for name, key in own_keys(values, quantity.family).items()})
        self._matrices |= matrix_names(values)
        self._measurements += 1
        self._is_drawn = False

    def draw(self, writers: Sequence[Any], step: int) -> None:
        """Write what is due.

        Args:
            writers: ``SummaryWriter`` of each TensorBoard logger, ``logger.experiment``.
            step: The optimizer step to show the pictures at.
        """
        if self._is_layout_new:
            layout = custom_scalars_layout(self._keys)
            for writer in writers:
                writer.add_custom_scalars(layout)
            self._is_layout_new = False
        is_power_of_two = self._measurements & (self._measurements - 1) == 0
        if is_power_of_two and self._measurements >= _FIRST_DRAWING:
            self._draw(writers, step)

    def finish(self, writers: Sequence[Any], step: int) -> None:
        """Write the last pictures, when training ends.

        Args:
            writers: See ``draw``.
            step: See there.
        """
        self.draw(writers, step)
        self._draw(writers, step)

    def _draw(self, writers: Sequence[Any], step: int) -> None:
        if self._is_drawn or self._cannot_draw or not writers:
            return
        for quantity, history in self._history.items():
            names = [name for name in history.names if self._is_shown(quantity, name)]
            if not names:
                continue
            rows = arrange(names, self.max_rows)
            try:
                image = heat_map_image(quantity, rows, history.grid(row.name for row in rows))
            except ImportError:
                self._cannot_draw = True
                rank_zero_warn(
                    "The monitors' heat maps for TensorBoard are left out: they need matplotlib, pip install"
                    " 'lightning-muon[scaling]'. Everything else is logged."
                )
                return
            for writer in writers:
                writer.add_image(f"muon/pictures/{_tag(quantity)}", image, step, dataformats="HWC")
        self._is_drawn = True

    def _is_shown(self, quantity: Quantity, name: str) -> bool:
        """Of parameters, matrices alone, as far as it is known which are."""
        return not quantity.is_of_matrices or not self._matrices or name in self._matrices


def _tag(quantity: Quantity) -> str:
    return quantity.family.removeprefix("muon/").replace("/", "_")
