"""The paper's experiments, from tuning to figures; run `python -m experiments`."""
