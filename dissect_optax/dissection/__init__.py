"""Table 1 on the user's own problem: training, tuning, effects and reports."""
