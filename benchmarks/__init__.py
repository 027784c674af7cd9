"""Measurements, each one command. Figures in documents come from here."""
