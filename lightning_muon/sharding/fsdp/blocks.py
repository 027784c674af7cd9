"""The repeated blocks of a module, which are sharded as units of their own: found from the module tree alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import TypeAlias

from torch import nn

__all__ = ["WrapPolicy", "describe_blocks", "find_blocks"]

WrapPolicy: TypeAlias = type[nn.Module] | Collection[type[nn.Module]] | Callable[[str, nn.Module], bool]

# A list of small things beside the blocks (norms, adapters, heads) is not worth collectives of its own.
_SMALLEST_SHARE = 0.1


def find_blocks(module: nn.Module, wrap: WrapPolicy | None = None) -> dict[str, nn.Module]:
    """The modules to shard as units of their own, by name, in the order of ``module.named_modules()``.

    By default these are the members of lists (``nn.ModuleList``, ``nn.Sequential``, and ``nn.ModuleDict`` with numbers
    for keys) whose class occurs in lists at least twice, that are more than one layer of torch's, and whose class holds
    at least a tenth of the parameters that the largest such class holds. Blocks within blocks stay part of the outer
    one. Lists of experts are no blocks: every unit must run on every rank, and an expert without tokens does not.

    Args:
        module: The whole module; it is always a unit itself, for what is in no block.
        wrap: Which modules to take instead: a class or several, whose instances are taken wherever they are, or a
            function of name and module. ``()`` takes none.

    Raises:
        TypeError: ``wrap`` is something else.
        ValueError: A class of ``wrap`` is nowhere in the module, a function picks nothing, or what was picked has no
            ``forward``.
    """
    if wrap is None:
        blocks = _repeated(module)
    elif isinstance(wrap, type) or not callable(wrap):
        blocks = _instances(module, wrap)
    else:
        blocks = {name: part for name, part in _parts(module) if wrap(name, part)}
        if not blocks:
            raise ValueError(f"The function that chooses blocks picked no module. {_classes_there_are(module)}")
    for name, block in blocks.items():
        if _is_never_called(block):
            raise ValueError(
                f"{name} is a {_class_name(block)}, which is never called, so its weights would never be gathered."
                " Choose its members instead."
            )
    return blocks


def describe_blocks(blocks: dict[str, nn.Module], strategy: str) -> str:
    """A sentence for the user about what is sharded as a unit."""
    if not blocks:
        return (
            f"{strategy} shards the module as one unit, so that every rank holds all weights while it computes."
            " Choose smaller units with wrap={BlockClass}."
        )
    by_class: dict[str, list[str]] = {}
    for name, block in blocks.items():
        by_class.setdefault(_class_name(block), []).append(name)
    kinds = [
        f"{len(names)} {kind} ({names[0]})" if len(names) == 1 else f"{len(names)} {kind} ({names[0]} … {names[-1]})"
        for kind, names in by_class.items()
    ]
    return f"{strategy} shards {', '.join(kinds)} and the rest as one unit."


def _repeated(module: nn.Module) -> dict[str, nn.Module]:
    members = [part for _, part in _list_members(module) if _is_composite(part)]
    counts = Counter(map(_inner_class, members))
    outermost: dict[str, nn.Module] = {}
    for name, part in _list_members(module):
        within_another = any(name.startswith(f"{outer}.") for outer in outermost)
        if _is_composite(part) and counts[_inner_class(part)] > 1 and not within_another:
            outermost[name] = part
    sizes: Counter[type[nn.Module]] = Counter()
    for part in outermost.values():
        sizes[_inner_class(part)] += sum(param.numel() for param in part.parameters())
    smallest = _SMALLEST_SHARE * max(sizes.values(), default=0)
    return {name: part for name, part in outermost.items() if sizes[_inner_class(part)] >= max(smallest, 1)}


def _list_members(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What is directly in a list of modules and is not itself such a list."""
    for name, container in module.named_modules():
        is_list = isinstance(container, (nn.ModuleList, nn.Sequential)) or (
            isinstance(container, nn.ModuleDict) and all(key.isdigit() for key in container)
        )
        if is_list and "expert" not in name.lower():
            for key, part in container.named_children():
                if not _is_never_called(part) and type(part) is not nn.Sequential:
                    yield f"{name}.{key}" if name else key, part


def _is_composite(part: nn.Module) -> bool:
    return any(True for _ in part.children()) or not type(part).__module__.startswith("torch.nn.")


def _is_never_called(part: nn.Module) -> bool:
    return isinstance(part, (nn.ModuleList, nn.ModuleDict)) and type(part).forward is nn.Module.forward


def _instances(module: nn.Module, classes: type[nn.Module] | Collection[type[nn.Module]]) -> dict[str, nn.Module]:
    wanted = tuple(classes) if isinstance(classes, Collection) else (classes,)
    for kind in wanted:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(
                f"wrap must be classes of modules, such as {{nn.TransformerEncoderLayer}}, or a function of name and"
                f" module; it has {kind!r}."
            )
        if not any(issubclass(_inner_class(part), kind) for _, part in _parts(module)):
            raise ValueError(f"No module is a {kind.__qualname__}. {_classes_there_are(module)}")
    blocks: dict[str, nn.Module] = {}
    for name, part in _parts(module):
        parent = blocks.get(name.rpartition(".")[0])
        is_inside_its_wrapper = parent is not None and _unwrapped(parent) is part
        if issubclass(_inner_class(part), wanted) and not is_inside_its_wrapper:
            blocks[name] = part
    return blocks


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, part) for name, part in module.named_modules() if name)


def _unwrapped(part: nn.Module) -> nn.Module:
    """The module in the wrapper of ``torch.compile`` or of activation checkpointing, or the module itself."""
    for attribute in ("_orig_mod", "_checkpoint_wrapped_module"):
        inner = part._modules.get(attribute)
        if inner is not None:
            return _unwrapped(inner)
    return part


def _inner_class(part: nn.Module) -> type[nn.Module]:
    return type(_unwrapped(part))


def _class_name(part: nn.Module) -> str:
    return _inner_class(part).__qualname__


def _classes_there_are(module: nn.Module) -> str:
    names = dict.fromkeys(_class_name(part) for _, part in _parts(module))
    return f"The classes there are: {', '.join(names)}." if names else "It has no modules inside."
