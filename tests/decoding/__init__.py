"""Tests of lm.decoding."""
