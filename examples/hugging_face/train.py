"""Trains a causal language model of `transformers` with Muon, sharded, and saves it as `transformers` loads it.

``python examples/hugging_face/train.py --model FOLDER_OR_CONFIG_JSON --strategy muon_zero1 --devices 2 --save OUT``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root makes `examples` importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lightning_muon as lm
from examples.hugging_face.text import Text, load_tokenizer

_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.index.json")


def load_model(path: Path) -> Any:
    """The model of a folder or a ``config.json``, in train mode: with the folder's weights if it has some, else from
    scratch. Nothing comes from a network, and no code from the folder.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: The folder's weights are in files that are not read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: name a config.json, or a folder with one")
    if path.is_dir() and any(path.glob("*.safetensors")):
        model = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        )
        return model.train()  # `from_pretrained` leaves it in eval mode, and Lightning does not change that
    if path.is_dir() and (others := [file.name for kind in _OTHER_WEIGHTS for file in path.glob(kind)]):
        raise ValueError(
            f"{path} has weights, but not as *.safetensors: {', '.join(sorted(others))}. Save them again with"
            " save_pretrained, or name its config.json to begin from random weights"
        )
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, trust_remote_code=False, dtype=torch.float32
    )


class CausalLM(L.LightningModule):
    """A model of `transformers`, and its optimizer.

    Args:
        model: Takes ``input_ids`` and ``labels``, ``(batch, time)``, and returns a loss: its own, with the balancing
            term of a mixture of experts where its config asks for one.
        optimizer: ``"muon"``, for what ``explain()`` shows and AdamW for the rest; or ``"adamw"`` for all.
        lr: Learning rate; it rises over ``warmup`` steps and falls to a tenth in a line.
        adamw_lr: Of embeddings, head and vectors under Muon; ``None`` for ``lr``.
        weight_decay: Of both.
        warmup: Steps.
    """

    def __init__(
        self,
        model: Any,
        optimizer: str = "muon",
        lr: float = 2e-3,
        adamw_lr: float | None = None,
        weight_decay: float = 0.1,
        warmup: int = 10,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits ``(batch, time, vocabulary)`` of token ids ``(batch, time)``."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The model's own loss on ``(batch, time + 1)`` token ids."""
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs the same loss."""
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Both algorithms are ``lm.Muon``'s, so that its strategies shard either."""
        options = {key: self.hparams[key] for key in ("lr", "adamw_lr", "weight_decay")}
        if self.hparams["optimizer"] == "muon":
            optimizer = lm.Muon(self, **options)
        else:
            everything = [lm.Rule("", algorithm="adamw")]  # and the monitors see the same matrices
            optimizer = lm.Muon(self, rules=everything, **{**options, "adamw_lr": None})
        if self.trainer.is_global_zero:
            print(optimizer.explain())
        steps, warmup = self.trainer.estimated_stepping_batches, self.hparams["warmup"]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)) * (1 - 0.9 * min(1.0, step / steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save_pretrained(self, folder: Path) -> None:
        """Write weights and config as `transformers` reads them. Every process must call it."""
        weights = self.trainer.strategy.lightning_module_state_dict()  # whole, wherever they are sharded
        if self.trainer.is_global_zero:
            own = {name.removeprefix("model."): value for name, value in weights.items()}
            self.model.save_pretrained(folder, state_dict=own)


def main(args: Sequence[str] | None = None) -> CausalLM:
    """Train as the command line (or ``args``) says; returns the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a config.json, or a folder with one")
    parser.add_argument("--files", nargs="+", help="text to train on; by default the standard library's source")
    parser.add_argument("--strategy", default="muon_zero1", choices=("muon_zero1", "muon_fsdp"))
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"))
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--adamw-lr", type=float, help="of what AdamW trains beside Muon; by default --lr")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed", "bf16-true"))
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16, help="windows over all processes")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", type=Path, help="where to write the trained model, as transformers loads it")
    options = parser.parse_args(args)
    if options.save is not None:  # training ends long after a mistake here
        options.save.mkdir(parents=True, exist_ok=True)
    L.seed_everything(options.seed, verbose=False)
    try:
        model = load_model(options.model)
        tokenizer = load_tokenizer(options.model) if options.model.is_dir() else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and options.seq_len > longest:
        parser.error(f"--seq-len {options.seq_len} is more than the model's {longest} positions")
    windows = {"seq_len": options.seq_len, "batch_size": options.batch_size, "val_windows": 4 * options.batch_size}
    text = Text(tokenizer, files=options.files, **windows)
    if model.get_input_embeddings().weight.shape[0] < text.vocab_size:
        parser.error(f"the model has fewer embeddings than the text has tokens: set vocab_size to {text.vocab_size}")
    module = CausalLM(model, options.optimizer, options.lr, options.adamw_lr, options.weight_decay)
    trainer = L.Trainer(
        strategy=options.strategy,
        accelerator=options.accelerator,
        devices=options.devices,
        precision=options.precision,
        max_steps=options.max_steps,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, text)
    trainer.validate(module, text)  # prints the loss
    if options.save is not None:
        module.save_pretrained(options.save)
        if tokenizer is not None and trainer.is_global_zero:
            tokenizer.save_pretrained(options.save)
    return module


if __name__ == "__main__":
    main()
