"""Alarms speak once where trouble begins, and again only after it was over."""

from lightning_muon.monitoring.alarms import Alarms, Finding


def finding(name="a", trouble="is too large."):
    return Finding("size", name, trouble)


def test_a_trouble_is_said_where_it_begins():
    alarms = Alarms()
    assert alarms.hear([finding(trouble=None)]) == []
    assert alarms.hear([finding()]) == ["a: is too large."]
    assert alarms.hear([finding()]) == []
    assert alarms.standing() == {"size": 1}


def test_what_swings_about_its_threshold_is_one_alarm():
    alarms = Alarms()
    said = []
    for step in range(200):
        said += alarms.hear([finding(trouble="is too large." if step % 2 else None)])
    assert len(said) == 1


def test_what_comes_back_is_said_again():
    alarms = Alarms()
    alarms.hear([finding()])
    for _ in range(9):
        alarms.hear([finding(trouble=None)])
    assert alarms.hear([finding()]) == []  # nine good measurements are not enough
    for _ in range(10):
        alarms.hear([finding(trouble=None)])
    assert alarms.standing() == {}
    assert alarms.hear([finding()]) == ["a: is too large."]


def test_many_at_once_do_not_flood():
    said = Alarms().hear([finding(f"layer{number}") for number in range(40)])
    assert len(said) == 4
    assert said[-1].startswith("The same (size) of 37 more: layer3, layer4")
    assert said[-1].endswith("layer12, …")


def test_patience_waits_for_a_row():
    alarms = Alarms()
    slow = Finding("size", "a", "is small.", patience=3)
    for _ in range(5):
        assert alarms.hear([slow, finding("b")]) in ([], ["b: is too large."])
        assert alarms.hear([slow]) == []
        assert alarms.hear([finding(trouble=None)]) == []
    assert [alarms.hear([slow]) for _ in range(4)] == [[], [], ["a: is small."], []]


def test_kinds_and_names_are_apart():
    alarms = Alarms()
    alarms.hear([finding(), Finding("rank", "a", "is low."), finding("b")])
    assert alarms.standing() == {"size": 2, "rank": 1}
    assert alarms.hear([Finding("rank", "b", "is low.")]) == ["b: is low."]
