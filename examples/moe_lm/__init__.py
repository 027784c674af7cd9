"""A mixture-of-experts language model of Moonlight's kind, trained with ``lightning_muon``."""
