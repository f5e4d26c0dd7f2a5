"""Adam taken apart: sign, magnitude and variance of stochastic gradients."""

__version__ = "0.1.0"
