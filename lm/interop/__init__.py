"""Checkpoints of other projects, in and out. Contents page; nothing else here is public."""

from lm.interop.checkpoint import copy_tokenizer as copy_tokenizer
from lm.interop.checkpoint import import_params as import_params
from lm.interop.checkpoint import is_checkpoint as is_checkpoint
from lm.interop.checkpoint import load_config as load_config
from lm.interop.checkpoint import load_params as load_params
from lm.interop.checkpoint import save as save
from lm.interop.tensors import InteropError as InteropError
from lm.interop.tensors import new_folder as new_folder
