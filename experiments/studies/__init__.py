"""Studies of the theory: pure computations that return plain, recordable numbers."""
