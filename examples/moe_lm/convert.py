"""Converts checkpoints between Hugging Face folders (DeepSeek-V3, Moonlight) and Lightning.

``python examples/moe_lm/convert.py from-hf DIR CKPT``, ``python examples/moe_lm/convert.py to-hf CKPT DIR``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: the repository's root makes `examples` importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import lightning_muon as lm
from examples.moe_lm.hugging_face.convert import Converted, from_hf, to_hf
from examples.moe_lm.hugging_face.errors import ConversionError
from examples.moe_lm.hugging_face.writing import parse_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    taken = commands.add_parser("from-hf", help="a Hugging Face folder to a file that MoELM.load_from_checkpoint loads")
    taken.add_argument("folder", metavar="DIR", type=Path, help="config.json and safetensors")
    taken.add_argument("checkpoint", metavar="CKPT", type=Path)
    given = commands.add_parser("to-hf", help="a checkpoint to a Hugging Face folder that transformers loads")
    given.add_argument("checkpoint", metavar="CKPT", type=Path)
    given.add_argument("folder", metavar="DIR", type=Path, help="a new folder")
    given.add_argument("--max-shard-size", type=_size, default="5GB", help="of a file; 5GB by default")
    given.add_argument("--like", type=Path, default=None, help="take tokenizer and other files from this folder")
    given.add_argument("--copy-code", action="store_true", help="with --like: its Python files, too")
    for command in (taken, given):
        command.add_argument("--dtype", choices=DTYPES, default=None, help="of the weights; by default as they are")
    options = parser.parse_args(args)
    if options.command == "to-hf" and options.copy_code and options.like is None:
        parser.error("--copy-code copies from the folder of --like: name one")
    return options


def main(args: list[str] | None = None) -> int:
    """Converts, says what was done, and returns the exit status."""
    options = parse_args(args)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    try:
        if options.command == "from-hf":
            done, target = from_hf(options.folder, options.checkpoint, dtype), options.checkpoint
        else:
            sizes = (options.max_shard_size, options.like, options.copy_code)
            done, target = to_hf(options.checkpoint, options.folder, dtype, *sizes), options.folder
    except (ConversionError, lm.CheckpointError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 1
    print("\n".join(report(done, target)))
    return 0


def report(done: Converted, target: Path) -> list[str]:
    """What was converted, as lines."""
    active = done.config.num_parameters().active
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in done.dtypes)
    lines = [f"{target}: {done.num_parameters:,} parameters, {active:,} active, {dtypes}"]
    if done.further:
        lines.append(f"left out: {len(done.further)} tensors that predict further tokens (multi-token prediction)")
    if done.copied:
        lines.append(f"copied: {', '.join(done.copied)}")
    if done.code:
        lines.append(f"not copied: {', '.join(done.code)} (code; --copy-code copies it)")
    return lines


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
