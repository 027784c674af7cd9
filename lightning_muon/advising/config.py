"""The advice as code to paste."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lightning_muon.advising.advice import Advice
from lightning_muon.advising.places import Place

__all__ = ["patterns", "snippet"]

_FUNCTION = '''\
def param_groups(module):
    """Groups of one orthogonalization each; parameters that no pattern matches keep the optimizer's."""
    groups, chosen, matched = {}, {}, set()
    for name, param in module.named_parameters(remove_duplicate=False):
        pattern = next((pattern for pattern in STEPS if re.search(pattern, name)), None)
        matched.add(pattern)
        steps = chosen.setdefault(param, STEPS.get(pattern))  # a tied parameter goes by its first name
        groups.setdefault(steps, []).append((name, param))
    if unmatched := [pattern for pattern in STEPS if pattern not in matched]:
        raise ValueError(f"no parameter's name matches {unmatched}; there is {name!r}, for one")
    settings = {steps: {"orthogonalization": SEQUENCES[steps]} if steps else {} for steps in groups}
    return [{"params": pairs, **settings[steps]} for steps, pairs in groups.items()]


def build(module, **options):
    """The optimizer; ``module=`` keeps the routes that the types of submodules decide, of embeddings say."""
    return lm.Muon(param_groups(module), module=module, **options)
'''


def patterns(advices: Sequence[Advice]) -> dict[str, int]:
    """Steps by a regular expression for the names; a type whose blocks all take the same is one."""
    by_type: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for advice in advices:
        by_type[advice.place.type][advice.steps] += advice.place.blocks
    return {
        Place(type_, tuple(sorted(blocks))).pattern(all_blocks=len(by_steps) == 1): steps
        for type_, by_steps in by_type.items()
        for steps, blocks in by_steps.items()
    }


def snippet(advices: Sequence[Advice]) -> str:
    """Python that gives each parameter its sequence."""
    sequences = {advice.steps: advice.orthogonalization for advice in sorted(advices, key=lambda one: one.steps)}
    return "\n".join(
        [
            "import re",
            "",
            "import lightning_muon as lm",
            "",
            "SEQUENCES = {",
            *(f"    {steps}: {_literal(sequence)}," for steps, sequence in sequences.items()),
            "}",
            "STEPS = {",
            *(f'    r"{pattern}": {steps},' for pattern, steps in patterns(advices).items()),
            "}",
            "",
            "",
            _FUNCTION,
            "",
            "# in configure_optimizers, with the other arguments as they were:",
            "#     return build(self, lr=...)",
        ]
    )


def _literal(sequence: dict[str, object]) -> str:
    return repr(sequence).replace("'", '"')
