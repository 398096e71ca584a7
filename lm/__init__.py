"""lm: one JAX codebase for every language model. See README.md for the map of the house."""

__version__ = "0.1.0"
