"""Reads and writes checkpoint folders of `transformers`: the engine behind the families' tables.

Owns the list of families. Knows no tensor's name and no architecture. Laws: `load_params(save(x)) == x`
bit for bit; every tensor of the folder is used exactly once or known to carry nothing; a folder is
written whole or not at all.
"""

import json
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.batch import SpecialTokens
from lm.config import check_types, say_first
from lm.interop.albert import ALBERT
from lm.interop.bart import BART
from lm.interop.bert import BERT, ROBERTA
from lm.interop.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from lm.interop.experts import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from lm.interop.family import Config, Entry, Family, Fields, expand
from lm.interop.gemma import GEMMA, GEMMA2, GEMMA3
from lm.interop.gpt2 import GPT2
from lm.interop.layouts import LayoutError
from lm.interop.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from lm.interop.meaning import differences
from lm.interop.modernbert import MODERNBERT
from lm.interop.t5 import T5
from lm.interop.tensors import Dtype, InteropError, Tensors, new_folder, read_json, tensor_names, write_tensors
from lm.models import path_name
from lm.models.transformer import Transformer

# Where several can express a config, the first writes it.
FAMILIES: tuple[Family, ...] = (
    *(GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3),
    *(BERT, ROBERTA, ALBERT, MODERNBERT, T5, BART),
)

CONFIG = "config.json"
# A list of all layers is made, and compared with itself: a damaged file must not take hours.
_MOST_LAYERS = 1 << 14
# Files that say how text becomes ids and how to generate; carried along as they are.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def _family(folder: pathlib.Path) -> tuple[Family, Config]:
    """Finds the family of a folder by its config.json.

    Raises:
      InteropError: there is no config.json, it is of no family, or the files of tensors are damaged.
    """
    fields = read_json(folder / CONFIG)
    kind = fields.get("model_type")
    for family in FAMILIES:
        if family.model_type == kind:
            return family, Config(fields, str(folder / CONFIG), tensor_names(folder))
    known = ", ".join(family.model_type for family in FAMILIES)
    raise InteropError(f"{folder / CONFIG}: model_type is {kind!r}, which is none of {known}")


def load_config(folder: str | pathlib.Path) -> Transformer:
    """Reads config.json as a config of ours; dtype is float32, how to compute is left at our defaults.

    Raises:
      InteropError: no family, or a field that no config of ours expresses.
    """
    family, config = _family(pathlib.Path(folder))
    for name, value in config.items():
        if re.fullmatch(r"n_layer|\w*_layers", name) and isinstance(value, int) and value > _MOST_LAYERS:
            raise config.refuse(name, f"a model has at most {_MOST_LAYERS}")
    try:
        found = family.read(config)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # A list where a number belongs, and the like.
        raise InteropError(f"{folder}/{CONFIG} has a field of the wrong kind: {error}") from error
    problems = check_types(found, type(found)) or found.problems()
    if problems:
        raise InteropError(f"{folder}/{CONFIG} describes a model that cannot work: {'; '.join(problems)}")
    return found


def is_checkpoint(folder: str | pathlib.Path) -> bool:
    """Returns whether a folder has a config.json with a `model_type`, as checkpoints of `transformers` do."""
    file = pathlib.Path(folder) / CONFIG
    return file.is_file() and "model_type" in read_json(file)


def _find_family(config: Transformer) -> Family | None:
    """Returns the family whose checkpoints can hold the model; None if there is none."""
    try:
        return _describe(config)[0]
    except InteropError:
        return None


def _named(config: Transformer, family: Family | None) -> str:
    kind = type(config).__name__
    return f"{kind} of no family" if family is None else f"{kind} of the family {family.model_type}"


def _leaves(config: Transformer) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every leaf by its path."""
    import jax

    model = config.build()
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def load_params(folder: str | pathlib.Path, config: Transformer | None = None) -> dict[str, Any]:
    """Reads a checkpoint's weights, tensor by tensor, into arrays of the model.

    Args:
      folder: with config.json and safetensors.
      config: the model that is wanted, which must mean what config.json says; None takes what it says.

    Returns:
      The parameters: a nested dict of float32 NumPy arrays, layers stacked on a leading axis.

    Raises:
      InteropError: another model than wanted, or a tensor that is missing, left over, misshapen or cut short.
    """
    folder = pathlib.Path(folder)
    family, _ = _family(folder)
    theirs = load_config(folder)
    config = theirs if config is None else config
    if changes := differences(config, theirs):
        raise InteropError(
            f"{folder} holds another model than the config describes, {_named(theirs, family)} and not "
            f"{_named(config, _find_family(config))}: {say_first(changes)}"
        )
    shapes = _leaves(config)
    with Tensors(folder) as tensors:
        entries = expand(family.rows, config, shapes)
        names = _match(family, folder, entries, tensors)
        leaves = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
        for entry in entries:
            _fill(leaves, entry, names[entry.name], tensors, folder)
    return _nest(leaves)


def import_params(folder: str, config: Transformer) -> dict[str, Any] | None:
    """Returns the parameters of a checkpoint folder as `load_params` does; None if the folder is no such checkpoint."""
    return load_params(folder, config) if is_checkpoint(folder) else None


def _match(family: Family, folder: pathlib.Path, entries: list[Entry], tensors: Tensors) -> dict[str, str]:
    """Returns the name in the files of each entry's tensor; checks that none is missing, left over or misshapen."""
    there = {_current(family, name): name for name in tensors.names}
    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in there)
    names = {entry.name: entry.name.removeprefix(family.prefix) if bare else entry.name for entry in entries}
    missing = [name for name in names.values() if name not in there]
    if missing:
        raise InteropError(f"{folder} lacks {_listed(missing)}, which a model of family {family.model_type} has")
    ignored = [re.compile(pattern) for pattern in family.ignored]
    extra = sorted(there.keys() - set(names.values()))
    extra = [name for name in extra if not any(pattern.search(name) for pattern in ignored)]
    if extra:
        raise InteropError(f"{folder} holds {_listed(extra)}, which its {CONFIG} has no place for")
    names = {name: there[found] for name, found in names.items()}
    for entry in entries:
        expected, found = entry.their_shape(), tensors.shape(names[entry.name])
        if expected != found:
            wrong = f"the tensor {names[entry.name]} has shape {list(found)}"
            raise InteropError(f"{folder}: {wrong}, but {CONFIG} asks for {list(expected)}")
    return names


def _current(family: Family, name: str) -> str:
    """Returns a tensor's name as the table has it."""
    for old, new in family.legacy:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _listed(names: list[str]) -> str:
    more = "" if len(names) == 1 else f" and {len(names) - 1} more" + (" tensors" if len(names) > 2 else " tensor")
    return f"the tensor {names[0]}{more}"


def _fill(leaves: dict[str, np.ndarray], entry: Entry, name: str, tensors: Tensors, folder: pathlib.Path) -> None:
    try:
        parts = entry.split(tensors.read(name))
    except LayoutError as error:
        raise InteropError(f"{folder}: the tensor {name} {error}") from error
    for (path, index), part in zip(entry.parts, parts, strict=True):
        leaves[path][index] = part


def save(
    folder: str | pathlib.Path,
    config: Transformer,
    params: Mapping[str, Any],
    *,
    tokenizer_dir: str | pathlib.Path | None = None,
    specials: SpecialTokens | None = None,
    dtype: Dtype = "float32",
    shard_bytes: int = 5_000_000_000,
    start: str = "bos",
) -> str:
    """Writes a folder that `transformers` opens with `from_pretrained`.

    Args:
      folder: to write; must not exist, or be empty.
      config: of the model.
      params: its parameters; each tensor is brought to the host when it is written.
      tokenizer_dir: folder whose tokenizer files are copied, byte for byte.
      specials: ids for config.json's bos, eos and pad; None leaves them null.
      dtype: of the tensors in the files.
      shard_bytes: size from which tensors are spread over several files.
      start: name of the special token with which the decoder of two stacks starts (`lm.document.Frame`).

    Returns:
      The class of `transformers` that opens it.

    Raises:
      InteropError: no family expresses the config, or the folder is not empty.
    """
    import jax

    family, fields, entries = _describe(config)
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    wrong = [path for path, shape in _leaves(config).items() if path not in leaves or leaves[path].shape != shape]
    if wrong:
        raise InteropError(f"the parameter {wrong[0]} is missing or not of the shape that the config gives it")
    by_name = {entry.name: entry for entry in entries}

    def make(name: str) -> np.ndarray:
        entry = by_name[name]
        return entry.merge([np.asarray(jax.device_get(leaves[path][index])) for path, index in entry.parts])

    begins = None if specials is None else getattr(specials, start)
    if begins is not None and "decoder_start_token_id" in fields:
        fields = {**fields, "decoder_start_token_id": begins}
    with new_folder(pathlib.Path(folder)) as partial:
        text = json.dumps({**_header(family, specials, dtype), **fields}, indent=2) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
        shapes = {name: entry.their_shape() for name, entry in by_name.items()}
        write_tensors(partial, shapes, make, dtype, shard_bytes)
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, partial)
    return fields.get("architectures", [family.architecture])[0]


def _header(family: Family, specials: SpecialTokens | None, dtype: Dtype) -> Fields:
    ids = {} if specials is None else {"bos": specials.bos, "eos": specials.eos, "pad": specials.pad}
    return {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "torch_dtype": dtype,
        **{f"{name}_token_id": ids.get(name) for name in ("bos", "eos", "pad")},
    }


def _describe(config: Transformer) -> tuple[Family, Fields, list[Entry]]:
    """Finds the first family whose config.json, read back, means the same model.

    Returns:
      The family, the config.json and the tensors.

    Raises:
      InteropError: none; the message says what the nearest cannot express.
    """
    shapes = _leaves(config)
    # Whether the model has parameters that the family has not, and which differences there are.
    nearest: tuple[str, bool, list[str]] | None = None
    for family in FAMILIES:
        fields = family.write(config)
        if fields is None:
            continue
        try:
            entries = expand(family.rows, config, shapes)
            names = [entry.name for entry in entries]
            lost = differences(config, family.read(Config(fields, CONFIG, names)))
        except InteropError as error:
            entries, lost = None, [str(error)]
        if entries is not None and not lost:
            return family, fields, entries
        if nearest is None or (entries is None, len(lost)) < (nearest[1], len(nearest[2])):
            nearest = family.model_type, entries is None, lost
    if nearest is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise InteropError(f"no family of checkpoints has such a model; known are {known}")
    raise InteropError(
        f"no family of checkpoints expresses this model; the nearest is {nearest[0]}, where {say_first(nearest[2])}"
    )


def copy_tokenizer(source: str | pathlib.Path, target: str | pathlib.Path) -> list[str]:
    """Copies the tokenizer's files of a folder, byte for byte; returns their names."""
    found = [name for name in TOKENIZER_FILES if (pathlib.Path(source) / name).is_file()]
    for name in found:
        shutil.copyfile(pathlib.Path(source) / name, pathlib.Path(target) / name)
    return found
