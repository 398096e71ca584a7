"""What a model costs: parameters, floating point operations and cache, from its description alone.

Allocates nothing. One counter for encoders, decoders and pairs, dense or mixtures. Law: the counts
follow from the parameter tree and the settings, so that a new layer is counted without being listed here.
"""

from typing import TYPE_CHECKING, Any

import jax

from lm.models.layers import Parameter
from lm.parallel import shapes_only

if TYPE_CHECKING:
    from lm.models.transformer import Transformer


def leaves(parameters: Any) -> list[tuple[str, Parameter]]:
    """Returns (path, description) of each parameter, the path as "decoder/stack/..."."""
    flat = jax.tree_util.tree_leaves_with_path(parameters, is_leaf=lambda leaf: isinstance(leaf, Parameter))
    return [("/".join(str(entry.key) for entry in path), parameter) for path, parameter in flat]


def num_parameters(parameters: Any) -> int:
    """Counts the elements of all parameters."""
    return sum(parameter.size for _, parameter in leaves(parameters))


def num_active_parameters(parameters: Any) -> int:
    """Counts the elements that one token meets: all of them but for experts that it does not select.

    Tables count whole, as in the published figures of Mixtral, Qwen3 and DeepSeek.
    """
    return round(sum(parameter.size * parameter.active_share for _, parameter in leaves(parameters)))


def matrix_parameters(config: "Transformer", parameters: Any, prefixes: tuple[str, ...]) -> float:
    """Counts the matrix elements that one token meets in the parts whose paths begin with one of `prefixes`.

    Of experts only the share that is active counts; a matrix of shared layers counts as often as it is used. Tables,
    scales and biases do not count.
    """
    total = 0.0
    for path, parameter in leaves(parameters):
        if parameter.role == "matrix" and path.startswith(prefixes):
            in_decoder = path.startswith("decoder/")
            depth = config.decoder_depth if in_decoder else config.encoder_depth
            uses = depth // len(config.layers) if config.share_layers and "/stack/" in path else 1
            total += parameter.size * parameter.active_share * uses
    return total


def mean_keys(length: int, window: int | None, causal: bool) -> float:
    """Returns how many keys a query sees on average in a sequence of `length`; causal is half, windows are cut."""
    if not causal:
        return float(length if window is None else min(length, 2 * (window // 2) + 1))
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def attention_flops(config: "Transformer", depth: int, length: int, causal: bool) -> float:
    """Counts a token's forward operations in scores and reading, all layers of a tower, without projections."""
    layers = [layer for _, group, repeats in config.runs(depth) for layer in group * repeats]
    return sum(config.attention.flops(config, mean_keys(length, layer.window, causal)) for layer in layers)


def flops_per_token(config: "Transformer", parameters: Any, length: int, encoder_length: int | None) -> float:
    """Counts the operations of one training step per token of the main tower: three times the forward pass.

    The forward pass is 2 operations for each matrix element a token meets (output projection included, lookups not)
    and 4 N H for each key it sees, where a causal query sees (length + 1) / 2 keys on average. A token meets the
    experts that it selects, each once, whatever room a capacity leaves idle or drops. Recomputation is not counted:
    these are the model's operations, not the hardware's (PaLM, appendix B).

    Args:
      config: the settings.
      parameters: tree of descriptions.
      length: tokens of a sequence of the main tower.
      encoder_length: tokens of the encoder's sequence; None without a second tower.
    """
    both = config.encoder_depth > 0 and config.decoder_depth > 0
    main = "decoder" if config.decoder_depth else "encoder"
    forward = 2 * matrix_parameters(config, parameters, (f"{main}/", "head/", "classifier/"))
    if config.tied_embeddings and config.predicts_tokens:
        forward += 2 * config.vocab_size * config.embedding_width
    depth = config.decoder_depth or config.encoder_depth
    forward += attention_flops(config, depth, length, causal=config.decoder_depth > 0)
    if both:
        if encoder_length is None:
            raise ValueError("flops_per_token of an encoder-decoder needs encoder_length")
        # Keys and values of cross attention are made of the encoder's tokens, not of the decoder's.
        kernels = ("/cross/key/kernel", "/cross/value/kernel")
        crossed = sum(parameter.size for path, parameter in leaves(parameters) if path.endswith(kernels))
        encoder = 2 * (matrix_parameters(config, parameters, ("encoder/",)) + crossed)
        encoder += attention_flops(config, config.encoder_depth, encoder_length, causal=False)
        forward += encoder * encoder_length / length - 2 * crossed
        forward += config.decoder_depth * config.attention.flops(config, encoder_length)
    return 3 * forward


def cache_bytes_per_token(config: "Transformer") -> int:
    """Counts the bytes that each token of a decoder adds to the cache, all layers, in the compute dtype.

    As the cache is laid out here: every layer keeps every position, also one with a window. An encoder has none.
    On CPUs keys and values are float32 whatever is computed in.
    """
    with shapes_only():
        slot = jax.eval_shape(lambda: config.attention.init_cache(config, 1, 1))
    return config.decoder_depth * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(slot))
