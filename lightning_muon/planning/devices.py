"""Named devices: the speeds that products of matrices and copies really reach, not those of the data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_muon.usage import UsageError

__all__ = ["DEVICES", "Device", "device"]


@dataclass(frozen=True)
class Device:
    """The speeds of one accelerator.

    Attributes:
        name: Its name.
        flops: Dense bfloat16 products of matrices, in FLOP/s.
        memory_bandwidth: Reads and writes of its memory, in bytes/s.
    """

    name: str
    flops: float
    memory_bandwidth: float


# A copy by torch on an H200 moved 4.3 of the data sheet's 4.8 TB/s.
_OF_THE_DATA_SHEET = 0.9

# FLOP/s: the best bfloat16 `matmul` found by search, mean of 100, in the table "Maximum Achievable Matmul FLOPS" of
# github.com/stas00/ml-engineering, compute/accelerator/README.md (August 2026), which gives H100 and H200 one line.
# Bytes/s: the table "Accelerator memory size and speed" of the same page, from the makers' data sheets.
DEVICES = {
    name: Device(name, 1e12 * teraflops, _OF_THE_DATA_SHEET * 1e12 * terabytes)
    for name, teraflops, terabytes in [
        ("a100", 271.2, 2.00),  # SXM, 80 GB
        ("h100", 794.5, 3.35),  # SXM
        ("h200", 794.5, 4.80),  # SXM
        ("gh200", 828.6, 4.80),
        ("b200", 1745.0, 8.00),
        ("mi300x", 668.4, 5.30),
    ]
}


def device(name: str, teraflops: float | None = None, gigabytes: float | None = None) -> Device:
    """A named device, or one of the user's own.

    Args:
        name: A key of ``DEVICES``, or any name if both speeds are given.
        teraflops: 1e12 FLOP/s, in place of the named device's.
        gigabytes: 1e9 bytes/s of memory, in place of the named device's.

    Raises:
        UsageError: The device is not known and a speed is missing.
    """
    known = DEVICES.get(name)
    if known is None and (teraflops is None or gigabytes is None):
        raise UsageError(
            f"--device {name!r} is not known; there are {', '.join(DEVICES)}. For another one give its speeds with"
            " --flops (TFLOP/s that its bfloat16 products reach; for a CPU, its float32 ones) and --memory-bandwidth"
            " (GB/s)."
        )
    return Device(
        name,
        1e12 * teraflops if teraflops is not None else known.flops if known else 0.0,
        1e9 * gigabytes if gigabytes is not None else known.memory_bandwidth if known else 0.0,
    )
