"""Triton device code and launchers."""
