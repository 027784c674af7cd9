"""What the monitors share: when they are due, and one collection and one log call for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.arguments import check_interval
from lightning_muon.monitoring import Collection, Mode, ObservedOptimizer, Request, Session, Subject
from lightning_muon.muon import Muon
from lightning_muon.names import canonical_name
from lightning_muon.pytorch.callbacks.output import Output

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import Logger

__all__ = ["Monitor", "parameter_names"]


class Monitor(Callback):
    """Base of the monitors.

    All monitors of a trainer that are due at the same step are served by the first of them: one look at the momentum
    on its way through the step, one sum over the processes per optimizer, one ``log_metrics`` per logger. Names are
    those of the parameters in the LightningModule. What is trouble in it is a warning where it begins, and
    ``muon/alarms/<kind>`` counts it.
    Where a sharded strategy clips by norm, the norm before clipping is logged as well: ``muon/grad_norm``, and of
    either algorithm's parameters ``muon/grad_norm_muon``, ``muon/grad_norm_adamw``.

    Args:
        every_n_steps: Optimizer steps between two measurements; ``None`` takes the monitor's default.
        include: Regular expression that a parameter's name must match somewhere; ``None`` takes all.
        exclude: Regular expression that it must not match.
        mode: ``"brief"`` or ``"detailed"``: for a parameter of several matrices (a stack of experts), its own value
            with ``.min`` and ``.max``, or every matrix ``.0``, ``.1``, … as well.
    """

    families: ClassVar[tuple[str, ...]] = ()
    needs_muon: ClassVar[bool] = False

    def __init__(
        self,
        every_n_steps: int | None = None,
        include: str | None = None,
        exclude: str | None = None,
        mode: Mode = "brief",
    ) -> None:
        check_interval(every_n_steps)
        self.every_n_steps = every_n_steps
        self.request = Request(self.families, include, exclude, mode)
        self._last_step = 0
        self._session = Session()
        self._output = Output()
        self._subjects: dict[Optimizer, Subject] = {}

    def default_interval(self, trainer: pl.Trainer) -> int:
        """Steps between two measurements where the user said nothing; 0 is never."""
        return int(getattr(trainer, "log_every_n_steps", 50))

    def is_due(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether to measure what this optimizer step, counted from 1, leaves behind."""
        interval = self.every_n_steps or self.default_interval(trainer)
        return interval > 0 and step % interval == 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.loggers:
            raise MisconfigurationException(
                f"{type(self).__name__} needs a logger; this Trainer has none (logger=False). Give it one, or leave"
                " the callback out."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.needs_muon and not any(isinstance(optimizer, Muon) for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                f"{type(self).__name__} watches lightning_muon.Muon; this Trainer's optimizers are"
                f" {[type(optimizer).__name__ for optimizer in trainer.optimizers]}. Leave it out; UpdateRMSMonitor,"
                " WeightNormMonitor and SpectrumMonitor watch any optimizer."
            )
        names = self._measurable(trainer, pl_module)
        if not any(map(self.request.wants, names)):
            raise MisconfigurationException(
                f"{type(self).__name__}(include={self.request.include!r}, exclude={self.request.exclude!r}) leaves none"
                f" of the {len(names)} parameters that it could measure; the first is {names[0]!r}."
            )
        interval = self.every_n_steps or self.default_interval(trainer)
        if 0 < (trainer.max_steps or 0) - trainer.global_step < interval:
            rank_zero_info(
                f"{type(self).__name__} measures every {interval} steps, and this training has"
                f" {trainer.max_steps - trainer.global_step}: give it every_n_steps= to see anything."
            )
        self._last_step = trainer.global_step
        if _monitors(trainer)[0] is self:
            self._subjects = _subjects(trainer, pl_module)
            self._session, self._output = Session(), Output()

    def _measurable(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        names = parameter_names(pl_module)
        muons = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Muon)]
        if not self.needs_muon:
            return list(names.values())
        pairs = [(muon.routes[key], names.get(param, key)) for muon in muons for key, param in muon.named_parameters()]
        return [name for route, name in pairs if route.algorithm == "muon"] or list(names.values())

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _monitors(trainer)[0] is self and trainer.is_global_zero:
            self._output.finish(trainer)
        self._close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        for subject in self._subjects.values():
            if isinstance(subject, ObservedOptimizer):
                subject.close()
        self._subjects = {}

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        monitors = _monitors(trainer)
        subject = self._subjects.get(optimizer)
        if monitors[0] is not self or subject is None:
            return
        # where the batch ends, every other optimizer may have stepped as well
        steps = range(trainer.global_step + 1, trainer.global_step + 1 + len(trainer.optimizers))
        due = [monitor.request for monitor in monitors if any(monitor.is_due(trainer, step) for step in steps)]
        if not due:
            return
        names = parameter_names(pl_module)
        if isinstance(subject, ObservedOptimizer):
            asking = [request for request in due if request.has_updates]
            subject.watch_next_step({n for n in names.values() if any(request.wants(n) for request in asking)})
        elif isinstance(subject, Muon) and any(request.is_watching for request in due):
            spectra = {key for request in due for key in request.spectra_of(subject, names)}
            subject.watch_next_step(spectra, alignments=any(request.has_alignments for request in due))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        monitors = _monitors(trainer)
        if monitors[0] is not self or trainer.global_step == self._last_step:
            return  # another one serves, or the optimizer did not step (accumulation)
        self._last_step = trainer.global_step
        due = [monitor for monitor in monitors if monitor.is_due(trainer, trainer.global_step)]
        if not due:
            for subject in self._subjects.values():
                if isinstance(subject, ObservedOptimizer):
                    subject.forget()  # the batch has ended with another step than one that is measured
            return
        requests = [monitor.request for monitor in due]
        sighting = self._session.look(list(self._subjects.values()), requests, parameter_names(pl_module))
        for text in sighting.warnings:
            rank_zero_warn(text)
        if trainer.is_global_zero:
            self._log(trainer, due, sighting.collection)

    def _log(self, trainer: pl.Trainer, due: Sequence[Monitor], collection: Collection) -> None:
        self._output.log(trainer, collection, [partial(monitor.show, trainer) for monitor in due])

    def show(self, trainer: pl.Trainer, logger: Logger, collection: Collection) -> None:
        """Log what is no scalar; on process 0, once for each logger."""


def _monitors(trainer: pl.Trainer) -> list[Monitor]:
    return [c for c in trainer.callbacks if isinstance(c, Monitor)]  # type: ignore[attr-defined]


def parameter_names(pl_module: pl.LightningModule) -> dict[Tensor, str]:
    """What the logs call each parameter."""
    return {param: canonical_name(name) for name, param in pl_module.named_parameters()}


def _subjects(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[Optimizer, Subject]:
    """What of each optimizer can be measured."""
    subjects: dict[Optimizer, Subject] = {}
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, Muon):
            subjects[optimizer] = optimizer
        else:
            try:
                subjects[optimizer] = ObservedOptimizer(optimizer, pl_module)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from None
            rank_zero_info(
                f"The monitors see {type(optimizer).__name__} by the differences of the weights: at a step that they"
                " measure they keep a copy of the weights from before."
            )
    return subjects
