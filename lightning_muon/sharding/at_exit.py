"""A clean end of a gloo process group, which Lightning leaves to the interpreter's own."""

from __future__ import annotations

import atexit
import functools
import time

import torch.distributed as dist

__all__ = ["end_process_group_at_exit"]

# For the group's threads to let go of the last collective's tensors; it takes them microseconds when they get to run.
_GRACE_S = 0.2


@functools.cache
def end_process_group_at_exit() -> None:
    """End the default process group while the interpreter is still alive.

    gloo's threads hold tensors a moment longer than the collective takes. If the interpreter is being torn down when
    they let go, the process aborts ("terminate called without an active exception", pytorch/pytorch#179291), and
    Lightning kills the other processes for it. Seen once in 25 runs of the demo on a busy machine.
    """
    atexit.register(_end)


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(_GRACE_S)
