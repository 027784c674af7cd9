"""What a run will own, keep, send and compute, found out without running it. See ``docs/plan.md``."""
