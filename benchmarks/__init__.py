"""Opt-in measurements; each prints a table and writes JSON with its environment."""
