"""Warnings that a person can act on: each is said where it begins, and again only after it was over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Alarms", "Finding"]

# measurements in a row without trouble, after which the same trouble is news
_OVER_AFTER = 10
# of the same kind that are said in full at one step
_SAID_IN_FULL = 3


@dataclass(frozen=True)
class Finding:
    """What one look at one thing has shown.

    Attributes:
        kind: Which alarm it is about, as in the key ``muon/alarms/<kind>``.
        name: The parameter, layer or head.
        trouble: What is wrong, in which units, and what helps: sentences that follow the name. ``None`` if all is well.
        patience: In how many measurements in a row it must be found before it is said.
    """

    kind: str
    name: str
    trouble: str | None
    patience: int = 1


class Alarms:
    """What is wrong now, over all measurements of a run.

    A value that swings about its threshold is one alarm, not many: a trouble is over when ten measurements in a row
    did not show it.
    """

    def __init__(self) -> None:
        self._well_for: dict[tuple[str, str], int] = {}  # of what was said and is not over
        self._bad_for: dict[tuple[str, str], int] = {}  # of what was not said yet

    def hear(self, findings: Iterable[Finding]) -> list[str]:
        """Take in the findings of one step.

        Returns:
            What to say: a text for each trouble that begins, and one for those of a kind that are too many to be said
            each.
        """
        begun: dict[str, list[Finding]] = {}
        for finding in findings:
            key = (finding.kind, finding.name)
            if key in self._well_for:
                self._well_for[key] = 0 if finding.trouble else self._well_for[key] + 1
                if self._well_for[key] >= _OVER_AFTER:
                    del self._well_for[key]
            elif finding.trouble is None:
                self._bad_for.pop(key, None)
            else:
                self._bad_for[key] = self._bad_for.get(key, 0) + 1
                if self._bad_for[key] >= finding.patience:
                    del self._bad_for[key]
                    self._well_for[key] = 0
                    begun.setdefault(finding.kind, []).append(finding)
        said = []
        for kind, new in begun.items():
            said += [f"{one.name}: {one.trouble}" for one in new[:_SAID_IN_FULL]]
            if more := [one.name for one in new[_SAID_IN_FULL:]]:
                said.append(f"The same ({kind}) of {len(more)} more: {', '.join(more[:10])}{', …' * (len(more) > 10)}")
        return said

    def standing(self) -> dict[str, int]:
        """How many things are in trouble, by kind; those that were said and are not over."""
        return dict(Counter(kind for kind, _ in self._well_for))
