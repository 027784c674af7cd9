"""The benchmark of the strategies measures what processes really hold."""

from benchmarks.strategies import VARIANTS, markdown, measure
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM


def test_memory_is_that_of_the_tensors_that_a_process_holds():
    rows = measure(2, rounds=2)
    weights = sum(param.nbytes for param in MoELM(ModelConfig()).parameters())
    held = {name: rows[name]["bytes"] for name in VARIANTS}
    assert held["AdamW, DDP"] == {"weights": weights, "gradients": weights, "state": 2 * weights}
    replicated = held["Muon on every process, DDP"]
    assert replicated["weights"] == replicated["gradients"] == weights < replicated["state"] < 2 * weights
    assert held["muon_zero1"] == {**replicated, "state": held["muon_zero1"]["state"]}
    assert replicated["state"] / 2 <= held["muon_zero1"]["state"] < 0.51 * replicated["state"]
    assert all(one / 2 <= held["muon_fsdp"][kind] < 0.51 * one for kind, one in replicated.items())


def test_table_has_every_variant_at_every_number_of_processes():
    cell = {"median_ms": 12.3, "bytes": {"weights": 2**20, "gradients": 2**20, "state": 2**19}}
    figures = {
        "by_processes": {"1": dict.fromkeys(VARIANTS, cell), "8": dict.fromkeys(VARIANTS, cell)},
        "cpu": "a processor",
        "cpu_count": 2,
        "torch": "2.13.0",
        "commit": "0123456789abcdef",
        "tokens_of_all_processes": 2048,
        "rounds": 20,
    }
    text = markdown(figures)
    assert text.splitlines()[0] == "|  | 1 process | 8 processes |"
    assert text.count("2.5 MiB, 12 ms") == 2 * len(VARIANTS)
    assert "2 cores of a processor, torch 2.13.0, commit `0123456789`" in text
