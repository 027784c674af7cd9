"""The loads of a model's experts, for any loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_muon.arguments import Mode, check_mode, check_pattern
from lightning_muon.experts.counting import Counted, count_routing, new_sums
from lightning_muon.experts.keys import logged_values
from lightning_muon.experts.reading import Read, Routing, read_by, read_output
from lightning_muon.experts.routers import find_routers
from lightning_muon.experts.starved import StarvedExperts
from lightning_muon.monitoring.alarms import Alarms

__all__ = ["ExpertLoads"]


class ExpertLoads:
    """Counts which experts the routers of a model choose, in any training loop, without changing the model::

        loads = lm.ExpertLoads(model)
        for step in range(1, num_steps + 1):
            if step % 100 == 0:
                loads.start()
            ...  # forward, backward, optimizer.step()
            if step % 100 == 0:
                fabric.log_dict(loads.collect(step), step)

    Hooks on the routers count the forwards in training mode between `start` and `collect`, on the device; at other
    times they return at once. A forward that activation checkpointing repeats in backward is not counted again.
    `lightning_muon.ExpertLoadMonitor` does all this for a Trainer.

    Args:
        model: The model, also after Fabric or DistributedDataParallel have wrapped it; before `torch.compile` has
            compiled it for the first time.
        include: Regular expression that a layer's name must match somewhere; `None` takes all. The layer is the module
            that holds the router.
        exclude: Regular expression that it must not match.
        mode: `"brief"`, or `"detailed"` for the load of every expert as well.
        read: What a router has chosen, from `(module, inputs, output)` of its forward: a tuple of the chosen experts,
            integers `(tokens, k)`, the scores, not negative, `(tokens, experts)` or `None`, and the number of experts.
            `None` reads what most routers return.
        routers: Regular expression, searched for in a module's name: which modules are routers. `None` takes those
            called `gate` or `router` that have a neighbour called `experts`.

    Raises:
        ValueError: There is no router, or the mode is unknown.
        TypeError: Raised by the model's forward: what a router returns is not understood.
    """

    def __init__(
        self,
        model: nn.Module,
        include: str | None = None,
        exclude: str | None = None,
        mode: Mode = "brief",
        read: Read | None = None,
        routers: str | None = None,
    ) -> None:
        check_mode(mode)
        for argument, value in (("include", include), ("exclude", exclude), ("routers", routers)):
            check_pattern(argument, value)
        found = find_routers(model, routers, include, exclude)
        if not found:
            raise ValueError(_no_router(model, include, exclude, routers))
        self._model, self._mode = model, mode
        self._layers = {name: _Layer(read_output if read is None else read_by(read)) for name in found}
        self._handles = [module.register_forward_hook(self._layers[name].hook) for name, module in found.items()]
        self._sizes_agreed = False
        self._starved, self._alarms, self._num_collected = StarvedExperts(), Alarms(), 0

    @property
    def is_counting(self) -> bool:
        """Whether forwards are counted now."""
        return any(layer.is_counting for layer in self._layers.values())

    def start(self) -> None:
        """Forget what was counted, and count from here. The same on all processes."""
        for layer in self._layers.values():
            layer.start()

    def stop(self) -> None:
        """Stop counting."""
        for layer in self._layers.values():
            layer.is_counting = False

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def collect(self, step: int | None = None) -> dict[str, float]:
        """What was counted since `start`, over all processes; stops counting. Every process must call it.

        One sum over the processes and one copy to the host. An expert that has had no token in twenty measurements in
        a row, over 500 steps at least, is warned of, on process 0, once.

        Args:
            step: The optimizer step that was counted, for that warning; `None` takes the number of the call.

        Returns:
            The values by key, the same on every process: `moe/max_vio/<layer>` and so on, the aggregates `_min`,
            `_mean`, `_max` over the layers, and `muon/alarms/dead_experts`. A layer that no token has passed has none.

        Raises:
            ValueError: Nobody has called `start`.
        """
        if not self.is_counting:
            raise ValueError(
                "ExpertLoads.collect() has nothing to tell: call start() before the forwards that are to be counted,"
                " on every process."
            )
        self.stop()
        counted = {name: one for name, one in self._total().items() if one.tokens.any()}
        if not counted:
            rank_zero_warn(_NOTHING_COUNTED)
        for name, one in counted.items():
            if one.router_entropy is not None and one.router_entropy < _LEAST_ENTROPY:
                raise ValueError(
                    f"{name}: the scores of its router make an entropy of {one.router_entropy}: some are negative."
                    " What read= returns as scores must be weights, as after a softmax or a sigmoid, and no logits; or"
                    " None."
                )
        values = logged_values(counted, self._mode)
        self._num_collected += 1
        tokens = {name: one.tokens for name, one in counted.items()}
        findings = self._starved.look(self._num_collected if step is None else step, tokens)
        for text in self._alarms.hear(findings):
            rank_zero_warn(text)
        kind = StarvedExperts.kind
        return {**values, f"muon/alarms/{kind}": float(self._alarms.standing().get(kind, 0))}

    def _total(self) -> dict[str, Counted]:
        """The sums over the processes. They differ in which layers they have run, and so in which sizes they know."""
        layers, device = list(self._layers.values()), next(self._model.parameters()).device
        is_distributed = dist.is_available() and dist.is_initialized()
        if is_distributed and not self._sizes_agreed:
            sizes = torch.tensor([layer.num_experts for layer in layers], device=device)
            dist.all_reduce(sizes, dist.ReduceOp.MAX)
            for layer, size in zip(layers, sizes.tolist(), strict=True):
                layer.num_experts = size
            self._sizes_agreed = all(layer.num_experts for layer in layers)
        known = {name: layer for name, layer in self._layers.items() if layer.num_experts}
        if not known:
            return {}
        parts = [layer.sums_on(device) for layer in known.values()]
        total = torch.cat(parts)
        if is_distributed:
            dist.all_reduce(total)
        found = torch.split(total.cpu(), [len(part) for part in parts])
        return {name: Counted.of(sums) for name, sums in zip(known, found, strict=True)}


class _Layer:
    """What one router has chosen."""

    def __init__(self, read: Callable[[nn.Module, tuple[Any, ...], Any], Routing]) -> None:
        self._read = read
        self._sums: Tensor | None = None
        self.num_experts = 0  # not known before the first forward
        self.is_counting = False

    def start(self) -> None:
        if self._sums is not None:
            self._sums.zero_()
        self.is_counting = True

    def hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """After the router's forward."""
        if not self.is_counting or not module.training:
            return
        routing = self._read(module, inputs, output)
        if self._sums is None:
            self._sums = new_sums(routing.num_experts, routing.experts.device)
            self.num_experts = routing.num_experts
        with torch.no_grad():
            count_routing(self._sums, routing.experts, routing.scores, routing.weights, routing.num_experts)

    def sums_on(self, device: torch.device) -> Tensor:
        if self._sums is None:
            return new_sums(self.num_experts, device)
        return self._sums.to(device)


# below 0 by no more than rounding
_LEAST_ENTROPY = -1e-3
_NOTHING_COUNTED = (
    "ExpertLoads has seen no router run in training mode since start(). Is the model in evaluation mode, or did a"
    " compiled model run before ExpertLoads was made? What torch.compile has compiled does not see hooks that come"
    " later: make ExpertLoads before, or call torch.compiler.reset()."
)


def _no_router(model: nn.Module, include: str | None, exclude: str | None, routers: str | None) -> str:
    looked_for = (
        "no module called 'gate' or 'router' has a neighbour called 'experts'"
        if routers is None
        else f"no module's name matches routers={routers!r}"
    )
    filtered = f", in a layer that include={include!r} and exclude={exclude!r} leave" if include or exclude else ""
    return (
        f"No router of experts found in {type(model).__name__}: {looked_for}{filtered}. Pass routers=, a regular"
        " expression for the names of the modules that are routers; and read= as well, unless they return the chosen"
        " experts as integers (tokens, k), their weights (tokens, k) and all scores (tokens, experts)."
    )
