"""What every test must leave as it found it."""

from __future__ import annotations

import os
import threading

import pytest
import torch
import torch.distributed as dist

from tests.processes import close_pools


@pytest.fixture(scope="session", autouse=True)
def _end_process_pools():
    torch.set_num_threads(1)  # two cores, and every test process is another
    yield
    close_pools()


@pytest.fixture(autouse=True)
def _leaves_nothing_behind():
    """Fail a test that leaks an environment variable, a process group or a thread."""
    environment, threads = _environment(), set(threading.enumerate())
    yield
    leaked = {key for key, _ in set(environment.items()) ^ set(_environment().items())}
    for key in leaked:
        os.environ.pop(key, None)
    os.environ.update({key: environment[key] for key in leaked if key in environment})
    assert not leaked, f"environment variables changed: {sorted(leaked)}"
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("a process group was left initialised")
    new_threads = [thread.name for thread in set(threading.enumerate()) - threads if not thread.daemon]
    assert not new_threads, f"threads left running: {new_threads}"


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}  # pytest's own
