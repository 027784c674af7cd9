"""``examples/elastic/train.py`` on a machine that is lost: worker and agent are killed before a step, once."""

import os
import signal
import sys

import torch

from examples.elastic import train

KILLED_AFTER = 18


def die(module, batch, batch_idx):
    if "IS_LOST" in os.environ and module.global_step == KILLED_AFTER:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train.Model.on_train_batch_start = die
    train.main(sys.argv[1])
