"""What not every version in the supported range has."""

import inspect

import lightning as L
import lightning.pytorch.callbacks as callbacks
import pytest
from torch.distributed.fsdp import FSDPModule

# Lightning 2.5 cannot be told how a checkpoint is loaded; those of lightning_muon are loaded safely there, too.
WEIGHTS_ONLY = {"weights_only": True} if "weights_only" in inspect.signature(L.Trainer.fit).parameters else {}

EMAWeightAveraging = getattr(callbacks, "EMAWeightAveraging", None)
needs_moving_average = pytest.mark.skipif(EMAWeightAveraging is None, reason="Lightning has it from 2.6 on")

needs_unused_parameters = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"),
    reason="FSDP2 can find parameters that some ranks do not use from torch 2.13 on",
)
