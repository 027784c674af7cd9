"""``python -m lightning_muon`` is the command ``lightning-muon``."""

import sys

from lightning_muon.cli import main

sys.exit(main())
