"""``python -m tests.claims.experiments_script FOLDER``: the smaller experiments, for a few steps each."""

import sys
from pathlib import Path

from benchmarks.claims import attention_logits, loss_curves, scale_rule, svd_entropy, weight_decay
from benchmarks.claims.command import main
from tests.claims.conftest import ROOT, few_steps

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for one in (svd_entropy, scale_rule, weight_decay, attention_logits, loss_curves):
        seeds = [1, 2] if one in (svd_entropy, loss_curves) else [1]
        where = ["--json", str(folder / f"{one.NAME}.json"), "--picture", str(folder / "pictures" / f"{one.NAME}.png")]
        arguments = [*few_steps(10, seeds, ROOT / "docs", folder / "runs"), *where]
        main(one.__doc__, one.NAME, one.experiment, one.tables, one.draw, arguments)
