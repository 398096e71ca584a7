"""Tests of lm.optim."""
