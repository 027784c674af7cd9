"""Checkpoints on disk: whole or absent at any moment, verified before they are loaded, and nothing in them is run."""
