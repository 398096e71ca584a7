"""Measuring a trained model: held-out scoring and the pictures of a run."""

from lm.evaluation.curves import draw_curves as draw_curves
from lm.evaluation.curves import load_history as load_history
from lm.evaluation.heldout import HeldOut as HeldOut
from lm.evaluation.heldout import make_evaluate as make_evaluate
