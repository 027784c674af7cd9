"""The claims of the Muon papers as experiments: one command each, with seeds, spread and what was not seen."""
