"""What the comparison on FSDP2 says of figures that are known."""

import pytest

from benchmarks.two_hosts.report import figures
from benchmarks.two_hosts.sharded_report import print_updates, sharded_limits

STEPS = 2


def rank(seconds, sent, calls):
    """One rank's measurements of two blocks of each variant; the optimizer takes half of the time and of the bytes."""
    names = ("fsdp2_adamw", "muon_fsdp", "fsdp2_muon_fsdp2")
    block = {name: {"seconds": seconds[name], "sent": sent[name], "received": sent[name]} for name in names}
    half = {name: {key: value / 2 for key, value in row.items()} for name, row in block.items()}
    return {
        "blocks": {name: [block[name]] * 2 for name in names},
        "updates": {name: [half[name]] * 2 for name in names},
        "collectives": {name: {"all_to_all": calls[name], "all_reduce": 1} for name in names},
        "left_out": {},
        "orthogonalization_seconds": [0.0, 0.0],
        "owned_matrices": 0,
        "num_parameters": 25,
        "num_matrices": 1,
        "parameter_bytes": 100,
    }


@pytest.fixture
def run():
    seconds = {"fsdp2_adamw": 1.0, "muon_fsdp": 2.0, "fsdp2_muon_fsdp2": 4.0}
    slower = {name: 1.5 * value for name, value in seconds.items()}
    sent = {"fsdp2_adamw": 400, "muon_fsdp": 600, "fsdp2_muon_fsdp2": 500}
    calls = {"fsdp2_adamw": 0, "muon_fsdp": 5, "fsdp2_muon_fsdp2": 11}
    more = {**calls, "muon_fsdp": 8}
    return figures([rank(seconds, sent, calls), rank(slower, sent, more)], STEPS, 256, {"fsdp2_dion": "not there"})


def test_a_step_is_as_slow_as_its_slowest_rank_and_sends_what_the_busiest_sends(run):
    ours = run["rows"]["muon_fsdp"]
    assert (ours["step_seconds"], ours["sent_parameter_bytes"]) == (1.5, 3.0)
    update = ours["update"]
    assert (update["step_seconds"], update["sent_parameter_bytes"], update["num_collectives"]) == (0.75, 1.5, 9)


def test_limits_are_ratios_to_every_rival_that_ran(run):
    limits = {what: (ratio, at_most) for what, ratio, at_most in sharded_limits(run["rows"])}
    assert limits == {
        "bytes of the optimizer's step, muon_fsdp / fsdp2_muon_fsdp2": (600 / 500, 1.0),
        "collectives of the optimizer's step, muon_fsdp / fsdp2_muon_fsdp2": (9 / 12, 1.0),
        "optimizer's step, muon_fsdp / fsdp2_muon_fsdp2": (0.5, 1.0),
        "whole step, muon_fsdp / fsdp2_muon_fsdp2": (0.5, 1.0),
    }
    assert [limit["holds"] for limit in run["limits"]] == [False, True, True, True]


def test_the_table_has_the_variants_whose_step_can_be_told_apart(run, capsys):
    del run["rows"]["fsdp2_adamw"]["update"]
    print_updates(run["rows"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["muon_fsdp", "fsdp2_muon_fsdp2"]
    print_updates({})
    assert not capsys.readouterr().out
