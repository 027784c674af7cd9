"""Writes the results into the page that explains them, and the first into the README:
``python -m benchmarks.claims.write_docs``.

What stands between ``<!-- results of NAME -->`` and ``<!-- end of NAME -->`` in a page is made from ``NAME.json``,
and from nothing else; the rest of the page is left alone.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import strategies
from benchmarks.claims import (
    attention_logits,
    fine_tuning,
    loss_curves,
    momentum_spectra,
    scale_rule,
    scaling_law,
    steps_to_loss,
    svd_entropy,
    weight_decay,
)
from benchmarks.claims.command import Results
from benchmarks.claims.markdown import listed, table
from benchmarks.claims.setting import Setting

_MODULES: dict[str, Any] = {  # in the page's order
    steps_to_loss.NAME: steps_to_loss,
    "steps_to_loss_longer": steps_to_loss,
    loss_curves.NAME: loss_curves,
    **{one.NAME: one for one in (scaling_law, scale_rule, weight_decay, svd_entropy, attention_logits)},
    **{one.NAME: one for one in (momentum_spectra, fine_tuning)},
}
EXPERIMENTS: dict[str, Callable[[Results], str]] = {name: module.tables for name, module in _MODULES.items()}
ROOT = Path(__file__).parents[2]
PAGE, RESULTS, PICTURES = ROOT / "docs" / "evidence.md", ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures"
README = ROOT / "README.md"
_IN_README: dict[str, Callable[[Results], str]] = {
    "steps_to_loss_longer": steps_to_loss.headline,
    "strategies": strategies.markdown,
}
_USUAL_TOKENS = Setting().tokens_per_step
_NOTHING = "There are no results here yet."


def written(page: str, results: Path, pictures: Path = PICTURES) -> str:
    """The page of all experiments with what the results say.

    Args:
        page: The page as it is.
        results: The folder of the JSON files.
        pictures: The folder beside the page with the pictures.

    Raises:
        ValueError: An experiment has no place in the page.
    """
    for name, tables in EXPERIMENTS.items():
        page = _filled(page, name, _block(name, tables, results / f"{name}.json", pictures / f"{name}.png"))
    return _filled(page, "all", summary(page, results))


def summary(page: str, results: Path) -> str:
    """Every verdict, each with a link to its section of the page, which is the heading above its results."""
    rows = []
    for name, module in _MODULES.items():
        path = results / f"{name}.json"
        if not path.exists():
            continue
        found: Results = json.loads(path.read_text())
        heading = re.findall(r"^## (.+)$", page[: page.index(f"<!-- results of {name} -->")], flags=re.MULTILINE)[-1]
        anchor = re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-")
        of = f", {_length(found)}" if module is steps_to_loss else ""
        for line in module.findings(found):
            said = re.match(r"- (Seen|Not seen)(?:, ([^:]+))?: (.+?)\.(?: (.+?)\.)?(?: |$)", line)
            if said is not None:
                claim = said[3] if said[2] is None else f"{said[2]}: {said[3]}"
                rows.append([said[1].lower(), claim, said[4] or "", f"[{heading}](#{anchor}){of}"])
    return table(["", "claim, as it is judged here", "", "experiment"], rows) if rows else _NOTHING


def written_readme(page: str, results: Path) -> str:
    """The README with the claim that leads it, and with the strategies' memory and time.

    Raises:
        ValueError: It has no place for them.
    """
    for name, block in _IN_README.items():
        path = results / f"{name}.json"
        page = _filled(page, name, block(json.loads(path.read_text())) if path.exists() else _NOTHING)
    return page


def _filled(page: str, name: str, block: str) -> str:
    found = re.search(rf"(<!-- results of {name} -->\n).*?(<!-- end of {name} -->)", page, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no place for {name}: <!-- results of {name} --> and <!-- end of {name} -->")
    return f"{page[: found.start()]}{found[1]}\n{block}\n\n{found[2]}{page[found.end() :]}"


def _block(name: str, tables: Callable[[Results], str], path: Path, picture: Path) -> str:
    if not path.exists():
        return _NOTHING
    results: Results = json.loads(path.read_text())
    what = momentum_spectra.described if name == momentum_spectra.NAME else described
    parts = [what(results), tables(results)]
    if picture.exists():
        parts.append(f"![{name.replace('_', ' ')}]({picture.parent.name}/{picture.name})")
    return "\n\n".join(parts)


def described(results: Results) -> str:
    """What the runs were: lengths, seeds, learning rates, hardware, versions and commits."""
    seeds = listed([str(seed) for seed in results["seeds"]])
    tuning_seeds = listed([str(seed) for seed in results["tuning_seeds"]])
    rates = [f"{_NAMES.get(name, name)} {_rates(one)}" for name, one in results["tuning"].items()]
    edge = [_NAMES.get(name, name) for name, one in results["tuning"].items() if one["is_on_edge"]]
    device = listed([results["cpu"] if one == "cpu" else one for one in results["devices_of_runs"]])
    commits = listed([f"`{commit[:10]}`" for commit in results["commits_of_runs"]])
    minutes, several = results["seconds_of_runs"] / 60, len(results["seeds"]) > 1
    return (
        f"{len(results['runs'])} runs, {minutes:,.0f} minutes of one process each, added up; {_length(results)}"
        f" at full length; seed{'s' if several else ''} {seeds}. Tuned on {tuning_seeds}, each with the learning rate"
        f" of the matrices, that of the rest, and the initial scale: {'; '.join(rates)}."
        + (f" Best on the edge of the grid: {listed(edge)}." if edge else "")
        + f" {device}, Python {results['python']}, torch {results['torch']}, Lightning {results['lightning']},"
        f" commit {commits}."
    )


def _length(results: Results) -> str:
    tokens = results.get("tokens_per_step", _USUAL_TOKENS)  # older results are of these and do not say so
    return f"{results['steps']:,} steps" + (f" of {tokens:,} tokens" if tokens != _USUAL_TOKENS else "")


def _rates(tuned: Mapping[str, Any]) -> str:
    rest = "the same" if tuned["adamw_lr"] is None else f"{tuned['adamw_lr']:g}"
    return f"{tuned['lr']:g}, {rest}, {tuned['initializer_range']:g}"


_NAMES = {
    "adamw": "AdamW",
    "muon": "Muon",
    "muon_short": "Muon in shorter runs",
    "adamw_one_rate": "AdamW with one rate",
}


def main(args: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    parser.add_argument("--out", type=Path, default=None, help="a folder for trials; by default the pages themselves")
    options = parser.parse_args(args)
    texts = {
        PAGE: written(PAGE.read_text(), options.results, options.pictures),
        README: written_readme(README.read_text(), options.results),
    }
    for path, text in texts.items():
        (path if options.out is None else options.out / path.name).write_text(text)


if __name__ == "__main__":
    main()
