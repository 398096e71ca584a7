"""Tokens/s of the data pipeline when nobody makes it wait: text to packed batches, as the train loop reads them."""

import dataclasses
import pathlib
import time

from configs import quickstart
from lm.data import load_tokenizer, train_batches


def measure(seconds: float, folder: pathlib.Path) -> dict[str, float]:
    """Reads batches of the quickstart's data for some seconds.

    Returns:
      tokens_per_second, padding left out, by the clock; and the tokens read.
    """
    config = quickstart.get_config()
    tokenizer = load_tokenizer(config.data.tokenizer, config.data, folder / "tokenizer")
    batches = train_batches(dataclasses.replace(config.data), config.objective, tokenizer, config.batch_size)
    try:
        next(batches)
        started, tokens = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            tokens += int((next(batches).segment_ids != 0).sum())
        return {"tokens_per_second": tokens / (time.perf_counter() - started), "tokens": tokens}
    finally:
        batches.close()
