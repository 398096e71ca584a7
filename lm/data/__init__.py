"""The data: text in, batches out. Imports no jax; Grain, which does, is imported with the first batch.

sources, formats     where text comes from, and how files are read
tokenized            corpora tokenised ahead
tokenizers           bytes and SentencePiece; hugging_face reads a tokenizer.json
documents            one side of the split, tokenised and cached
order, mixtures      which document and which source comes when
packing              examples to rows, rows to a batch
lanes                rows in the run's order, and the state to continue from
pipeline             `train_batches`, `validation_batches`
config               `DataConfig`
"""

from lm.data.config import DataConfig
from lm.data.documents import fingerprint, load_tokenizer
from lm.data.formats import DataError
from lm.data.hugging_face import HuggingFace
from lm.data.pipeline import Batches, join_digests, merge_states, train_batches, validation_batches
from lm.data.sources import Files, StandardLibrary, Tokenized
from lm.data.tokenizers import Bytes, Saved, SentencePiece, Tokenizer

__all__ = [
    "Batches",
    "Bytes",
    "DataConfig",
    "DataError",
    "Files",
    "HuggingFace",
    "Saved",
    "SentencePiece",
    "StandardLibrary",
    "Tokenized",
    "Tokenizer",
    "fingerprint",
    "join_digests",
    "load_tokenizer",
    "merge_states",
    "train_batches",
    "validation_batches",
]
