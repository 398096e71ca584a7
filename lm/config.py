"""Typed configs: load, override, check, compare and save trees of frozen dataclasses.

A config file is Python with `get_config(variant: str = "") -> dataclass`, or a saved JSON. Any leaf is
overridden by its dotted path. Knows no particular config, imports no jax, executes nothing from JSON.
Laws: `from_json(type(c), to_json(c)) == c`, and every error names the field and the nearest valid one.
"""

import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")
_LEAVES = (int, float, bool, str)


class UserError(Exception):
    """Something the user can mend; programs print the sentence and exit with status 2."""


class ConfigError(UserError):
    """A config that cannot be loaded, overridden or run."""


def load(path: str) -> Any:
    """Loads `FILE.py`, `FILE.py:variant` or `FILE.json`; returns a dataclass, for JSON the plain data.

    Raises:
      ConfigError: no such file, no `get_config` in it, an unknown variant, or malformed JSON.
    """
    name, _, variant = path.partition(":")
    file = pathlib.Path(name)
    if not file.is_file():
        near = difflib.get_close_matches(name, [str(p) for p in file.parent.glob("*.py")], n=1, cutoff=0.5)
        raise ConfigError(f"--config: no file {name}" + (f"; did you mean {near[0]}?" if near else ""))
    if file.suffix == ".json":
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}: not a saved config: {error}") from error
    if file.suffix != ".py":
        raise ConfigError(f"--config: {name} is neither a .py nor a .json file")
    module_spec = importlib.util.spec_from_file_location(f"lm_config_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"--config: cannot import {name}")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, TypeError, ImportError, NameError, AttributeError) as error:
        raise ConfigError(f"{name}: {_plain(error)}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{name}: has no function get_config(variant)")
    try:
        config = module.get_config(variant) if variant else module.get_config()
    except TypeError as error:
        raise ConfigError(f"{name}: {_plain(error)}") from error
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name}: unknown variant {variant!r}: {_plain(error)}") from error
    if not dataclasses.is_dataclass(config):
        raise ConfigError(f"{name}: get_config returned {type(config).__name__}, not a dataclass")
    return config


def _plain(error: BaseException) -> str:
    return str(error.args[0]) if error.args else type(error).__name__


def field_types(cls: type) -> dict[str, Any]:
    """Returns the resolved type of every field of the dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def field_help(cls: type) -> dict[str, str]:
    """Returns the text that the `Attributes:` section of the class docstring gives each field."""
    doc = inspect.getdoc(cls) or ""
    _, _, section = doc.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        match = re.match(r"^  (\w+): (.*)$", line)
        if match:
            name = match[1]
            found[name] = match[2]
        elif line.startswith("    ") and name:
            found[name] += " " + line.strip()
        else:
            name = ""
    return found


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, or the type itself."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (Union, types.UnionType) else [hint]


def members(hint: Any) -> list[Any]:
    """Returns the dataclasses that a value of type `hint` can be or hold."""
    found = []
    for option in _alternatives(hint):
        if typing.get_origin(option) is tuple:
            found += members(typing.get_args(option)[0])
        elif dataclasses.is_dataclass(option):
            found.append(option)
    return found


def describe(hint: Any) -> str:
    """Returns a type hint in words a user types."""
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"comma-separated {describe(typing.get_args(hint)[0])}"
    if len(_alternatives(hint)) > 1:
        return " | ".join(describe(a) for a in _alternatives(hint))
    return "none" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


def _nearest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"


def override(config: T, values: Mapping[str, str]) -> T:
    """Returns `config` with leaves replaced, e.g. {"model.num_layers": "8", "objective": "PrefixLM"}.

    A union of dataclasses is switched by the name of the class and then has its defaults, except that
    fields of the same name and type are kept. Shorter paths are applied first.

    Raises:
      ConfigError: no such field, or text that is not of the field's type.
    """
    for path, text in sorted(values.items(), key=lambda item: item[0].count(".")):
        config = _set(config, path.split("."), text, path)
    return config


def _set(config: Any, keys: list[str], text: str, path: str) -> Any:
    key, rest = keys[0], keys[1:]
    if isinstance(config, tuple):
        if not key.isdigit() or int(key) >= len(config):
            raise ConfigError(f"config.{path}: {key!r} is not an index below {len(config)}")
        index = int(key)
        value = _set(config[index], rest, text, path)
        return (*config[:index], value, *config[index + 1 :])
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        where = path[: -len(".".join(keys)) - 1]
        raise ConfigError(f"config.{where} is {config!r}, which has no field {key!r}")
    hints = field_types(type(config))
    if key not in hints:
        raise ConfigError(f"config.{path}: {type(config).__name__} has no field {key!r}; {_nearest(key, hints)}")
    current = getattr(config, key)
    value = _set(current, rest, text, path) if rest else parse(hints[key], text, f"config.{path}", current)
    try:
        return dataclasses.replace(config, **{key: value})
    except ValueError as error:
        raise ConfigError(f"config.{path}: {error}") from error


def parse(hint: Any, text: str, path: str, current: Any = None) -> Any:
    """Reads `text` as a value of type `hint`.

    Raises:
      ConfigError: naming `path` and what is allowed there.
    """
    try:
        return _parse_any(hint, text, current)
    except ValueError:
        pass
    names = [describe(a) for a in _alternatives(hint) if dataclasses.is_dataclass(a)]
    names += [str(a) for h in _alternatives(hint) if typing.get_origin(h) is Literal for a in typing.get_args(h)]
    near = f"; {_nearest(text, names)}" if names else ""
    raise ConfigError(f"{path}: {text!r} is not {describe(hint)}{near}")


def _parse_any(hint: Any, text: str, current: Any) -> Any:
    # None before everything, since any text is a str; str after everything.
    for option in sorted(_alternatives(hint), key=lambda h: (h is not types.NoneType) + (h is str)):
        try:
            return _parse_one(option, text, current)
        except ValueError:
            continue
    raise ValueError(text)


def _parse_one(hint: Any, text: str, current: Any) -> Any:
    lowered = text.strip().lower()
    if hint is types.NoneType and lowered in ("none", "null", ""):
        return None
    if hint is bool and lowered in ("true", "false", "1", "0"):
        return lowered in ("true", "1")
    if hint is int:
        if not re.fullmatch(r"[\d.]+e\d+", lowered):
            return int(text.replace("_", ""))
        number = float(text)
        return int(number) if math.isfinite(number) and number == int(number) else _refuse(text)
    if hint is float:
        return _refuse(text) if math.isnan(float(text)) else float(text)
    if hint is str:
        return text
    if typing.get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        return choices[text] if text in choices else _refuse(text)
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        return tuple(_parse_any(element, part.strip(), None) for part in text.strip("()[]").split(",") if part.strip())
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and text == hint.__name__:
        return _switch(hint, current)
    return _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _switch(cls: type, current: Any) -> Any:
    """The class `cls` with its defaults, keeping what it shares with the value it replaces."""
    if isinstance(current, cls):
        return current
    shared: dict[str, Any] = {}
    if dataclasses.is_dataclass(current) and not isinstance(current, type):
        theirs = field_types(type(current))
        shared = {n: getattr(current, n) for n, h in field_types(cls).items() if n in theirs and theirs[n] == h}
    try:
        return cls(**shared)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__} cannot be chosen on the command line: {error}") from error


def to_json(value: Any) -> Any:
    """Returns plain data for `json.dumps`; a dataclass carries its class name under "type"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return value


def from_json(hint: Any, data: Any, path: str = "config") -> Any:
    """Rebuilds a value of type `hint` from `to_json`'s data; fields absent from it take their defaults.

    Raises:
      ConfigError: an unknown field or class, a wrong type, or a missing field without a default.
    """
    options = _alternatives(hint)
    if data is None and types.NoneType in options:
        return None
    classes = [a for a in options if dataclasses.is_dataclass(a)]
    if classes and isinstance(data, dict):
        return _dataclass_from_json(classes, data, path)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(data, list):
            element = typing.get_args(option)[0]
            return tuple(from_json(element, d, f"{path}.{i}") for i, d in enumerate(data))
        if typing.get_origin(option) is Literal and data in typing.get_args(option):
            return data
        # No setting means NaN, and no comparison of a check would find it.
        if option in _LEAVES and type(data) is option and data == data:
            return data
        if option is float and type(data) is int:
            return float(data)
    raise ConfigError(f"{path}: {data!r} is not {describe(hint)}")


def _dataclass_from_json(classes: list[Any], data: dict[str, Any], path: str) -> Any:
    named = {c.__name__: c for c in classes}
    name = data.get("type", classes[0].__name__ if len(classes) == 1 else None)
    if not isinstance(name, str) or name not in named:
        raise ConfigError(f"{path}: no type {name!r} here; {_nearest(str(name), named)}")
    cls = named[name]
    hints = field_types(cls)
    for key in data:
        if key != "type" and key not in hints:
            raise ConfigError(f"{path}.{key}: {name} has no field {key!r}; {_nearest(key, hints)}")
    values = {key: from_json(hints[key], value, f"{path}.{key}") for key, value in data.items() if key != "type"}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {_plain(error)}") from error


def check_types(value: Any, hint: Any, path: str = "config") -> list[str]:
    """Returns one sentence for each leaf whose value is not of its declared type (a config file's slip)."""
    try:
        from_json(hint, to_json(value), path)
    except ConfigError as error:
        return [str(error)]
    return []


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yields (path, value, type hint, help text) for every field, sections before their fields."""
    hints, texts = field_types(type(config)), field_help(type(config))
    for field in dataclasses.fields(config):
        path, value = f"{prefix}{field.name}", getattr(config, field.name)
        yield path, value, hints[field.name], texts.get(field.name, "")
        if dataclasses.is_dataclass(value):
            yield from leaves(value, path + ".")
        if isinstance(value, tuple):
            for index, element in enumerate(value):
                if dataclasses.is_dataclass(element):
                    yield from leaves(element, f"{path}.{index}.")


def say_first(lines: list[str]) -> str:
    """Returns the first of several lines, and how many more there are."""
    return lines[0] if len(lines) == 1 else f"{lines[0]} (and {len(lines) - 1} more)"


def differences(old: Any, new: Any, prefix: str = "config") -> list[str]:
    """Returns one line "field: old -> new" for each leaf in which two configs' plain data differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines: list[str] = []
        for key in [*old, *[k for k in new if k not in old]]:
            absent = "(absent)"
            lines += differences(old.get(key, absent), new.get(key, absent), f"{prefix}.{key}")
        return lines
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{prefix}.{i}")
        ]
    return [] if old == new else [f"{prefix}: {json.dumps(old)} -> {json.dumps(new)}"]
