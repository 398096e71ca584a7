"""Looks at what every module of a model returns, for finding where numbers go bad.

Owns the hook into Linen. Knows no training. Law: nothing that a module computes is changed.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from jax.core import Tracer

# (path of a module, such as "decoder/stack/layers/block_0/mlp"; whether it is done, and not one of its own methods;
# the arrays that it returned)
Tap = Callable[[str, bool, list[jax.Array]], None]


@contextlib.contextmanager
def tapped(tap: Tap) -> Iterator[None]:
    """Calls `tap` with what each module of any model returns, inner modules before the ones that contain them.

    Only values are passed on, no tracers: run the model under `jax.disable_jit()` and without rematerialisation, where
    repeated layers come one after another under one path.
    """

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        arrays = [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]
        if arrays and not any(isinstance(leaf, Tracer) for leaf in arrays):
            tap("/".join(context.module.path), context.method_name == "__call__", arrays)
        return result

    with nn.intercept_methods(intercept):
        yield
