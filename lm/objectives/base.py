"""What an objective is: a pure, host-side function from a document to training examples.

An objective is a frozen dataclass of its settings with a method `examples`. It knows no model, no
mesh and no packing, and imports no jax. Law: the examples are a function of (document, settings,
lengths, seed, epoch, index) only, never of worker, process or call order.
"""

from lm.document import Context, Objective, Vocabulary

__all__ = ["Context", "Objective", "Vocabulary"]
