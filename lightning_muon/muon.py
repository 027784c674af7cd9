"""The optimizer: one class, one step loop, no word about processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muon import canonical_state
from lightning_muon.choosing import StepCounts, Treatment
from lightning_muon.construction import CONSTRUCTION, HyperparametersOnLoad, constructed_options, describe, settle
from lightning_muon.empty_state import empty_state, is_empty
from lightning_muon.explain import explain
from lightning_muon.guard import gradients_are_finite, nonfinite_error
from lightning_muon.local import local, local_numel
from lightning_muon.matrices import MatrixKey
from lightning_muon.muon_step import UpdateRecord
from lightning_muon.orthogonalize import (
    Orthogonalization,
)
from lightning_muon.param_groups import Router, as_param_groups, check_options, unique_name
from lightning_muon.partition import Alone, NamedState, Partition
from lightning_muon.routes import Route
from lightning_muon.routing import Rule
from lightning_muon.step import Step, treatments
from lightning_muon.suspects import warn_of_heads
from lightning_muon.watching import Watch

__all__ = ["Muon"]

NonFinite = Literal["raise", "skip", "propagate"]
IdleMatrices = Literal["skip", "update"]


class Muon(Optimizer):
    """Muon for every weight matrix, AdamW for the rest, as one ``torch.optim.Optimizer``.

    The update of a matrix ``W`` with gradient ``G`` (Moonlight, arXiv 2502.16982)::

        M ← μM + (1-μ)G
        O = orthogonalize((1-μ)G + μM)              # or of M, without Nesterov
        W ← W - lr·(scale·O + weight_decay·W)

    Which parameter is trained by what is decided by ordered rules, first match wins: a group's ``algorithm``, a
    ``lightning_muon.mark`` on the parameter, ``rules``, then built-in ones (embeddings, output heads and vectors
    go to AdamW; matrices, stacks of experts, convolutions to Muon). A parameter that no rule covers is an error.
    ``explain`` shows every decision.

    The state exists for every trainable parameter from the first step, ``state_dict()`` or ``load_state_dict()`` on:
    ``momentum_buffer`` (Muon; float32 at least), ``exp_avg``, ``exp_avg_sq``, ``step`` (AdamW; as torch keeps them),
    and ``master_weight`` where asked for. A parameter whose ``grad`` is ``None`` is left alone, as in torch. Every
    trainable parameter is decayed, vectors too: Moonlight found the decay of RMSNorm's weights crucial for stability.

    Args:
        params: A module; an iterable of ``(name, parameter)``; or groups whose ``"params"`` hold such pairs. A group
            may set ``algorithm``, ``split_sizes``, ``num_heads``, ``name``, and override any argument below; its
            ``lr`` is for both algorithms unless it sets ``adamw_lr`` too.
        lr: Learning rate of the matrices.
        weight_decay: Decoupled, with the learning rate and not the scale.
        momentum: μ.
        nesterov: Orthogonalise ``(1-μ)G + μM`` and not ``M``.
        scale: ``"match_rms_adamw"`` = 0.2·√max(rows, cols); ``"original"`` = √max(1, rows/cols);
            ``"spectral"`` = √(rows/cols).
        orthogonalization: What ``lightning_muon.orthogonalize`` takes; or ``"auto"``, which looks at the spectrum of
            each matrix's momentum now and then and takes the fewest steps that lift all but its lowest 10 % to within
            0.1 of 1; ``{"name": "auto", "quantile": 0.1, "band": 0.1, "every": 100, "most_steps": 8}`` says it in
            full (``lightning_muon.orthogonalize.Auto``).
        orthogonalization_dtype: ``None`` takes float16 on CUDA, bfloat16 for matrices with a short side of 128 or more
            on a CPU that has instructions for it, and float32 elsewhere.
        adamw_lr: Learning rate of the rest; ``None`` means ``lr``.
        betas: AdamW's.
        eps: AdamW's.
        maximize: Ascend.
        rules: ``lightning_muon.Rule`` s tried before the built-in ones, in order.
        nonfinite: What to do about a NaN or an infinity in a gradient, decided for all processes together before
            any state is touched. ``"raise"`` a ``FloatingPointError``; ``"skip"`` the step and count it in
            ``skipped_steps``; ``"propagate"`` saves the check, which waits for the device once a step.
        idle_matrices: What to do with a matrix whose gradient is exactly zero: an expert of a stack that received no
            token in the whole batch. Newton–Schulz gives every update full size, so what is left of the momentum
            would go on moving the expert as fast as ever, in a stale direction, for as long as it stays idle.
            ``"skip"`` leaves its weight and momentum alone, as if its gradient were ``None``, so that experts in a
            stack fare like experts that are modules of their own. ``"update"`` is what the published equations say,
            and saves a wait for the device.
        master_weights: Keep a float32 copy of every 16-bit parameter in the state, update that, and round it into the
            parameter. Without it (``bf16-true``), steps smaller than half a unit in the last place are lost. Under a
            sharded strategy only a weight's owner has the copy. Where a parameter was changed from outside since
            the last step, the copy follows it.
        hyperparameters_on_load: What ``load_state_dict`` does about a state of an optimizer that was constructed with
            other hyper-parameters, or read its parameters as other matrices. ``"match"`` raises. ``"saved"`` goes on
            with the saved ones, as torch's optimizers do, and still raises for matrices, which the rules decide.
            ``"current"`` keeps the values of now where the constructors' differ, and the matrices of now. A
            learning-rate scheduler restores its own ``base_lrs`` and goes on from those in any case.
        module: The module that the parameters are of, where ``params`` is not the module itself: some rules look at the
            types of its submodules (convolutions, ``nn.Embedding``).

    Attributes:
        skipped_steps: Steps left out because of ``nonfinite="skip"``.
        last_grad_norms: The gradient's norms before the last clipping by a sharded strategy: of ``"all"`` parameters,
            of those of ``"muon"``, and of ``"adamw"``; empty before.

    Raises:
        ValueError: A parameter no rule covers, a rule that matches nothing, or a hyper-parameter out of range.
        TypeError: Parameters without names.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: str = "match_rms_adamw",
        orthogonalization: Orthogonalization = "polar_express5",
        orthogonalization_dtype: torch.dtype | None = None,
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        maximize: bool = False,
        rules: Sequence[Rule] = (),
        nonfinite: NonFinite = "raise",
        idle_matrices: IdleMatrices = "skip",
        master_weights: bool = False,
        hyperparameters_on_load: HyperparametersOnLoad = "match",
        module: nn.Module | None = None,
    ) -> None:
        if nonfinite not in ("raise", "skip", "propagate"):
            raise ValueError(f"nonfinite={nonfinite!r} is not known; choose 'raise', 'skip' or 'propagate'.")
        if idle_matrices not in ("skip", "update"):
            raise ValueError(f"idle_matrices={idle_matrices!r} is not known; choose 'skip' or 'update'.")
        if not isinstance(master_weights, bool):
            raise ValueError(f"master_weights={master_weights!r} must be True or False.")
        if hyperparameters_on_load not in ("match", "saved", "current"):
            raise ValueError(
                f"hyperparameters_on_load={hyperparameters_on_load!r} is not known;"
                " choose 'match', 'saved' or 'current'."
            )
        groups, own_module = as_param_groups(params)
        self.nonfinite = nonfinite
        self.idle_matrices = idle_matrices
        self.master_weights = master_weights
        self.hyperparameters_on_load: HyperparametersOnLoad = hyperparameters_on_load
        self.skipped_steps = 0
        self._router = Router(rules, own_module if module is None else module)
        self._adamw_options = {"lr": lr if adamw_lr is None else adamw_lr, "betas": betas, "eps": eps}
        self._partition: Partition = Alone()
        # Changed in place only: Lightning's wrapper runs these methods with attributes of its own.
        self._consolidated: NamedState = {}
        self._constructed: list[dict[str, Any]] = []
        self._update_records: list[UpdateRecord] = []
        self._step_counts = StepCounts()
        self._watch = Watch()
        self.last_grad_norms: dict[str, Tensor] = {}  # in place, too
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "scale": scale,
            "orthogonalization": orthogonalization,
            "orthogonalization_dtype": orthogonalization_dtype,
            "maximize": maximize,
        }
        super().__init__(groups, defaults)
        if not self.param_groups:
            raise ValueError("Muon got no parameter that requires a gradient.")
        self._router.check_rules()
        warn_of_heads(self.param_groups, self.routes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Route the parameters of a group and add them: as one group, or as one for each algorithm.

        Raises:
            RuntimeError: The parameters are already shared out between processes.
        """
        if self._partition.is_sharded:
            raise RuntimeError(
                "add_param_group() after the strategy has shared the parameters out between processes: the new ones"
                " would have no owner. Give all parameters before the optimizer is set up."
            )
        groups, routes = self._router.split(param_group)
        for group in groups:
            check_options(group, self.defaults, self._adamw_options)
        for group in groups:
            group["name"] = unique_name(group["name"], {other["name"] for other in self.param_groups})
            super().add_param_group(group)
            self._constructed.append(constructed_options(group))
        self._router.routes.update(routes)

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Recomputes the loss; called once, with gradients enabled, before anything else.

        Returns:
            What ``closure`` returned.

        Raises:
            FloatingPointError: A gradient is not finite and ``nonfinite="raise"``. Nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._partition.finish_publishing()
        self._partition.check_gradients()
        self._create_state()
        self._consolidated.clear()
        self._update_records = []
        self._watch.begin(self.param_groups)
        if self._may_step():
            step = Step(self.param_groups, self.state, self.routes, self._partition)
            self._update_records += step.run(self._step_counts, self._watch, self.idle_matrices == "skip")
        self._partition.end_step()
        return loss

    def synchronize(self) -> None:
        """Wait until all weights of the last step have arrived on this process.

        Under a sharded strategy they may still be on their way when ``step`` returns. Whoever reads a parameter by
        torch's Python functions waits by himself; call this before anything that reads it otherwise: TorchScript,
        ``torch.func`` transformations of the parameters, C++ extensions, aliases such as ``weight.detach()`` kept
        from an earlier step.
        """
        self._partition.finish_publishing()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        super().zero_grad(set_to_none)
        self._partition.forget_gradients()

    def _may_step(self) -> bool:
        """The policy on gradients that are not finite, the same on every process."""
        if self.nonfinite == "propagate" or gradients_are_finite(self):
            return True
        if self.nonfinite == "raise":
            raise nonfinite_error(self)
        self.skipped_steps += 1
        return False

    # ------------------------------------------------------------------ what it is made of

    @property
    def routes(self) -> Mapping[str, Route]:
        """The decision on every trainable parameter, by name."""
        return self._router.routes

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trained parameter with its name, in the order of the groups."""
        for group in self.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    def local_ranges(self, name: str, param: Tensor) -> Sequence[tuple[int, int]]:
        """The runs of elements that this process updates, of those that it holds of a parameter: all of them unless a
        strategy shards the optimizer."""
        return self._partition.ranges(name, local_numel(param))

    def local_gradients(self, name: str, param: Tensor) -> list[Tensor]:
        """The gradient of ``local_ranges``, flat; empty without a gradient."""
        if param.grad is None:
            return []
        if param.grad.is_sparse:
            raise RuntimeError(f"{name!r} has a sparse gradient; Muon needs dense ones (nn.Embedding(sparse=False)).")
        flat = local(param.grad).reshape(-1)
        return [flat[start:stop] for start, stop in self.local_ranges(name, param) if stop > start]

    def local_state_bytes(self) -> int:
        """Bytes of optimizer state that this process keeps."""
        self._create_state()
        tensors = (
            local(value) for state in self.state.values() for value in state.values() if isinstance(value, Tensor)
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def partition(self) -> Partition:
        """Who this process shares the work with."""
        return self._partition

    @property
    def update_records(self) -> Sequence[UpdateRecord]:
        """What the last step did to this process's matrices, for the monitors; nothing if it was skipped."""
        return self._update_records

    def watch_next_step(self, spectra: Iterable[str] | None = None, *, alignments: bool = False) -> None:
        """Have the next step keep what it sees of the momentum, for ``lightning_muon.log_optimizer``.

        Every process must ask for the same, before ``step`` or in its closure; what is asked for before one step adds
        up.

        Args:
            spectra: Names of the parameters whose matrices' singular values are wanted, which cost an eigenvalue
                decomposition each, ``optimizer.routes`` for all; ``None`` for none.
            alignments: Keep the inner products of gradient, momentum and update: a pass over all three. Where spectra
                are wanted they are kept in any case.

        Raises:
            TypeError: ``spectra`` is not several names.
            ValueError: A name is of no parameter of this optimizer.
        """
        if isinstance(spectra, str) or not isinstance(spectra, Iterable | None):
            raise TypeError(
                f"watch_next_step(spectra={spectra!r}): expected names of parameters, ['{next(iter(self.routes))}']"
                " say; optimizer.routes for all."
            )
        names = frozenset(spectra or ())
        if unknown := sorted(map(str, names - self.routes.keys())):
            raise ValueError(
                f"watch_next_step: the optimizer has no parameter {', '.join(unknown[:3])}"
                f"{', …' if len(unknown) > 3 else ''}; optimizer.routes has the names, {next(iter(self.routes))!r} for"
                " one."
            )
        self._watch.ask(names, alignments or bool(names))

    @property
    def watch(self) -> Watch:
        """What was asked of the next and of the last step."""
        return self._watch

    @property
    def momentum_spectra(self) -> Mapping[MatrixKey, Tensor]:
        """Of the last step, where ``watch_next_step`` asked for them: the singular values of what was orthogonalised
        (with Nesterov's look ahead, where that is on), descending, relative to its Frobenius norm, of this process's
        matrices."""
        return self._watch.spectra

    @property
    def step_counts(self) -> Mapping[str, Sequence[int]]:
        """How many iteration steps each matrix takes, of the parameters with ``orthogonalization="auto"``; 0 before it
        was looked at."""
        return self._step_counts.counts

    def explain(self) -> str:
        """A table as text: every parameter, its shape, route, matrices, scale, and the rule that decided; and how the
        work is shared out, where a strategy has done that."""
        shared_out = self._partition.describe()
        table = explain(self.param_groups, self.routes, self._step_counts)
        return table + (f"\n{shared_out}" if shared_out else "")

    # ------------------------------------------------------------------ state

    def shard(self, partition: Partition) -> None:
        """Leave a part of the work to other processes; called by a strategy, before the first step.

        Raises:
            RuntimeError: There is state already that would not fit this process's new part.
        """
        keeps_its_part = all(
            list(partition.ranges(name, local_numel(param))) == list(self.local_ranges(name, param))
            for name, param in self.named_parameters()
        )
        if not keeps_its_part:
            if not all(is_empty(state) for state in self.state.values()):
                raise RuntimeError(
                    "This optimizer has stepped, or loaded a state, before the strategy set it up. Set it up first"
                    " (fabric.setup, Trainer.fit), then load the checkpoint."
                )
            self.state.clear()
        self._partition = partition
        self._create_state()

    def _create_state(self) -> None:
        """State for every trained parameter, with or without a gradient, so that all processes have the same keys."""
        if not self._partition.is_sharded and any(hasattr(param, "to_local") for _, param in self.named_parameters()):
            raise RuntimeError(
                "The parameters are sharded (DTensor), and the optimizer does not know with whom. Use the strategy"
                " 'muon_fsdp'; or, without Lightning, call lightning_muon.sharding.fsdp.shard_optimizer(optimizer,"
                " module) on every process, before the first step and before a state is loaded. In a Trainer the"
                " strategy does that after configure_optimizers: load or take over a state from on_fit_start on."
            )
        for name, param in self.named_parameters():
            ranges = self.local_ranges(name, param)
            if ranges and not self.state[param]:
                algorithm = self.routes[name].algorithm
                self.state[param].update(empty_state(param, algorithm, ranges, self.master_weights))

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the whole state to the process ``to``, in CPU memory, for the next ``state_dict`` there.

        Every process must call it. Trainer and Fabric do, before they save.
        """
        self._create_state()
        if self._partition.is_sharded:
            state = {name: self.state[param] for name, param in self.named_parameters() if self.state[param]}
            self._consolidated.clear()
            self._consolidated.update(self._partition.consolidate(state, to) or {})

    def state_dict(self) -> dict[str, Any]:
        """The canonical state: what a single process would have saved, with ``param_names`` in every group.

        Where the parameters are ``DTensor`` s its entries are, too, as in torch's optimizers, unless
        ``consolidate_state_dict`` was called; ``torch.distributed.checkpoint`` saves them.

        Raises:
            RuntimeError: Other processes hold a part of it and ``consolidate_state_dict`` was not called.
        """
        self._create_state()
        if self._partition.needs_consolidation and not self._consolidated:
            raise RuntimeError(
                "The optimizer's state is spread over several processes. Call consolidate_state_dict() on every one"
                " of them first, then state_dict() on process 0; fabric.save and the Trainer do this by themselves."
            )
        state = canonical_state.pack(super().state_dict(), dict(self.named_parameters()), self._consolidated)
        steps = self._step_counts.state(treatments(self.param_groups, self.routes))
        return {**state, CONSTRUCTION: {**describe(self._constructed, self.routes), **steps}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a canonical state, whole or of ``DTensor`` s like the parameters; a process takes what it owns.

        Parameters are matched by name.

        Raises:
            ValueError: The state is of another model, of other routes, or of other hyper-parameters or matrices and
                ``hyperparameters_on_load`` does not allow them. Nothing has been changed.
        """
        self._create_state()
        groups, by_name, constructed, found = self._match(state_dict)
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.clear()
        self._create_state()
        for name, param in self.named_parameters():
            canonical_state.unpack_(self.state[param], by_name[name], partial(self._partition.take, name))
        self._consolidated.clear()
        self._constructed[:] = constructed
        self._step_counts.load(state_dict.get(CONSTRUCTION, {}), found)

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise what ``load_state_dict`` would raise, and change nothing.

        Args:
            state_dict: A canonical state; tensors without values (on the device ``meta``) will do.
        """
        self._match(state_dict)

    def _match(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], list[dict[str, Any]], dict[str, Treatment]]:
        """Groups to go on with, entries by parameter name, what the groups count as constructed with, and how their
        matrices will be treated."""
        groups, by_name = canonical_state.match(state_dict, self.param_groups)
        kept, constructed = settle(
            state_dict, self.param_groups, self._constructed, self.routes, self.hyperparameters_on_load
        )
        for group, options in zip(groups, kept, strict=True):
            group.update(options)
        pairs = zip(groups, self.param_groups, strict=True)
        found = treatments([{**group, "params": now["params"]} for group, now in pairs], self.routes)
        return groups, by_name, constructed, found

    def replace_parameters(self, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Train other parameters in the place of some: the shards that a strategy has made of them.

        Raises:
            RuntimeError: There is state already.
        """
        if not all(is_empty(state) for state in self.state.values()):
            raise RuntimeError("This optimizer has stepped, or loaded a state, before the strategy set it up.")
        self.state.clear()
        for group in self.param_groups:
            group["params"] = [new.get(param, param) for param in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        policies = ("nonfinite", "idle_matrices", "master_weights", "hyperparameters_on_load")
        own = (
            *policies,
            "skipped_steps",
            "last_grad_norms",
            "_router",
            "_adamw_options",
            "_partition",
            "_constructed",
            "_step_counts",
        )
        state: dict[str, Any] = super().__getstate__()
        return {
            **state,
            **{key: getattr(self, key) for key in own},
            "_consolidated": {},
            "_update_records": [],
            "_watch": Watch(),
        }
