"""Where the model comes from: a class, a LightningCLI configuration, a Hugging Face one, or a table of shapes.

Everything is built on the meta device: shapes and dtypes, no memory.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_muon.usage import UsageError

__all__ = [
    "NamedParameters",
    "dtype_of_configs",
    "from_class",
    "from_configs",
    "from_hugging_face",
    "from_shapes",
    "import_object",
]

NamedParameters = list[tuple[str, nn.Parameter]]


def import_object(path: str) -> Any:
    """The object ``package.module.Name``; the working directory is searched too, as by ``python -m``.

    Raises:
        UsageError: There is none.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module may fail in any way
        raise UsageError(
            f"cannot import {path!r} (expected package.module.Class): {type(error).__name__}: {error}"
        ) from error


def from_class(path: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The module that the class, or function, ``path`` makes of ``arguments``."""
    build = import_object(path)
    return _build(path, lambda: build(**arguments))


def from_configs(path: str | None, files: Sequence[Path]) -> nn.Module:
    """The module that LightningCLI would build from these files, the later ones overriding the earlier.

    Args:
        path: The class, if the files hold its arguments (``LightningCLI(Class)``); ``None`` if they name it
            (``model: {class_path, init_args}``).
        files: YAML files; only their ``model`` is looked at.
    """
    sections = [_section(file, "model") for file in files]
    try:
        import jsonargparse
    except ImportError:
        raise UsageError("--config needs jsonargparse: pip install 'lightning-muon[cli]'") from None
    names_class = any("class_path" in section for section in sections)
    if path is None and not names_class:
        raise UsageError(
            "the files of --config name no class (model: {class_path: ...}); give the one that they configure with"
            " --model, for example --model examples.moe_lm.model.MoELM"
        )
    base = nn.Module if path is None else import_object(path)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    try:
        if names_class:
            parser.add_subclass_arguments(base, "model")
        else:
            parser.add_class_arguments(base, "model", fail_untyped=False)
        config = None
        for section in sections:
            config = parser.parse_object({"model": section}, config)
    except (jsonargparse.ArgumentError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{', '.join(map(str, files))}: {error}") from error
    # `instantiate` since jsonargparse 4.49
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return _build(path or "the model of --config", lambda: instantiate(config).model)


def from_hugging_face(path: Path) -> nn.Module:
    """The causal language model of a Hugging Face configuration: a JSON file, or a folder with a ``config.json``.

    No code is taken from the folder, and nothing from a network.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"--hf {path}: there is no such file; expected a JSON file, or a folder with a config.json")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise UsageError("--hf needs transformers: pip install transformers") from None
    options = {"local_files_only": True, "trust_remote_code": False}
    return _build(
        f"--hf {path}",
        lambda: AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.from_pretrained(file, **options), trust_remote_code=False
        ),
    )


def from_shapes(file: Path) -> NamedParameters:
    """The parameters of a table: JSON ``{name: [rows, cols]}``, or CSV lines ``name,rowsxcols``."""
    try:
        text = file.read_text()
        rows: Any
        if file.suffix == ".json":
            rows = json.loads(text, object_pairs_hook=lambda pairs: pairs)  # a dict would hide a name given twice
        elif file.suffix == ".csv":
            rows = [(row[0], ",".join(row[1:])) for row in csv.reader(text.splitlines()) if row]
        else:
            raise UsageError(f"--shapes {file}: expected a .json or a .csv file")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--shapes {file}: {error}") from error
    if not (isinstance(rows, list) and rows and all(isinstance(row, tuple) for row in rows)):
        raise UsageError(
            f"--shapes {file}: expected a JSON object, {{name: [rows, cols]}}, or CSV lines name,rowsxcols"
        )
    repeated = [name for name, count in Counter(name for name, _ in rows).items() if count > 1]
    if repeated:
        raise UsageError(f"--shapes {file}: two parameters are named {repeated[0]!r}; names must tell them apart")
    return [(name, nn.Parameter(torch.empty(_shape(name, shape), device="meta"))) for name, shape in rows]


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    """``[4096, 1024]`` or ``"4096x1024"`` as a tuple."""
    try:
        sizes = tuple(map(int, shape.lower().split("x") if isinstance(shape, str) else shape))
    except (TypeError, ValueError):
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--shapes: {name!r} has the shape {shape!r}; expected positive sizes like 4096x1024 or 4096")
    return sizes


def dtype_of_configs(files: Sequence[Path]) -> torch.dtype | None:
    """The dtype that ``trainer.precision`` in these files gives the parameters; ``None`` leaves them as built."""
    precisions = [_section(file, "trainer").get("precision") for file in files]
    precision = next((precision for precision in reversed(precisions) if precision is not None), None)
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(str(precision))


def _section(file: Path, name: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {file}: {error}") from error
    section = (config.get(name) or {}) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise UsageError(f"--config {file}: expected what LightningCLI takes, with a mapping {name!r}")
    return section


def _build(what: str, build: Callable[[], Any]) -> nn.Module:
    """Build a module on the meta device; what it prints must not end up in the JSON."""
    try:
        with torch.device("meta"), contextlib.redirect_stdout(sys.stderr):
            module = build()
            if hasattr(module, "configure_model"):  # where big LightningModules make their layers
                module.configure_model()
    except Exception as error:
        raise UsageError(
            f"{what} cannot be built on the meta device: {type(error).__name__}: {error}. If it needs more than"
            " shapes, write its parameters' shapes to a file and use --shapes."
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{what} made a {type(module).__name__}; expected a torch.nn.Module")
    lazy = [name for name, param in module.named_parameters() if is_lazy(param)]
    if lazy:
        raise UsageError(f"{what}: {lazy[0]!r} gets its shape in the first forward pass; use --shapes")
    return module
