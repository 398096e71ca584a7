"""How a program starts: absl flags, `--config=FILE[:variant]` with typed overrides, and how it ends.

Everything a user can mend ends in its sentence on stderr and exit status 2, before any device work.
Knows no particular config or program, imports no jax.
"""

import contextlib
import errno
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging

from lm import config as configs
from lm.config import ConfigError, UserError

# What a disk says that is full, read-only, or failing.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)

_OVERRIDES: dict[str, str] = {}


def run(
    main: Callable[[list[str]], int | None],
    schema: Callable[[], type] | None = None,
    *,
    takes_arguments: bool = False,
) -> None:
    """Runs an absl program: parses flags, calls `main(arguments)` and exits with its status (None is 0).

    Args:
      main: receives the positional arguments.
      schema: returns the dataclass that `--config` must give; None for a program without a config.
      takes_arguments: whether words that are no flags mean something; else they are refused, not passed over.
    """
    if schema is not None and "config" not in flags.FLAGS:
        flags.DEFINE_string("config", None, "Config FILE.py, FILE.py:variant or saved config.json.")

    def guarded(argv: list[str]) -> None:
        with _exit_status_2():
            if argv[1:] and not takes_arguments:
                raise UserError(f"{argv[1]!r} is not a flag; flags begin with -- (see --help)")
            sys.exit(main(argv[1:]) or 0)

    # Libraries log every file they touch at INFO; a program says what matters itself.
    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=lambda argv: _parse(list(argv), main.__module__, schema))


@contextlib.contextmanager
def _exit_status_2() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        print(f"{pathlib.Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"{pathlib.Path(sys.argv[0]).stem}: the disk cannot be used: {error.strerror}{where}", file=sys.stderr)
        sys.exit(2)


def _parse(argv: list[str], module: str, schema: Callable[[], type] | None) -> list[str]:
    """Splits off `--config.a.b=value`, gives the rest to absl; prints help or the error and exits."""
    rest = argv[:1]
    _OVERRIDES.clear()
    with _exit_status_2():
        foreign = [argument for argument in argv[1:] if re.match(r"--?config([.=]|$)", argument)]
        if schema is None and foreign:
            raise ConfigError(
                f"{foreign[0]}: only lm.train and lm.plan take a config; a run's own is read from its folder"
                " (--workdir)"
            )
        waiting: str | None = None
        for argument in argv[1:]:
            if waiting is not None:
                _OVERRIDES[waiting], waiting = argument, None
            elif schema is not None and argument.lstrip("-").startswith("config.") and argument.startswith("-"):
                path, equals, value = argument.lstrip("-").removeprefix("config.").partition("=")
                if equals:
                    _OVERRIDES[path] = value
                else:
                    waiting = path
            else:
                rest.append(argument)
        if waiting is not None:
            raise ConfigError(f"--config.{waiting} needs a value: --config.{waiting}=VALUE")
        if any(a in ("--help", "-help", "-h", "--helpfull", "--helpshort") for a in rest):
            print(_help(rest, module, schema))
            sys.exit(0)
        try:
            return flags.FLAGS(rest)
        except flags.Error as error:
            raise UserError(f"{error} (see --help)") from error


def _help(argv: Sequence[str], module: str, schema: Callable[[], type] | None) -> str:
    """The program's docstring, its own flags, and every field of the given (or default) config."""
    main_module = sys.modules[module]
    lines = [(main_module.__doc__ or "").strip(), "", "Flags:"]
    modules = (main_module, sys.modules[__name__])
    own = [flag for module in modules for flag in flags.FLAGS.get_flags_for_module(module)]
    defaults = ["" if flag.value is None else f" (default {flag.value})" for flag in own]
    lines += [f"  --{flag.name}: {flag.help}{default}" for flag, default in zip(own, defaults, strict=True)]
    if schema is not None:
        given = [a.partition("=")[2] for a in argv if a.startswith("-") and a.lstrip("-").startswith("config=")]
        given += [value for flag, value in itertools.pairwise(argv) if flag in ("--config", "-config")]
        lines += ["", "Config fields, each overridden by --config.PATH=VALUE:"]
        if given:
            shown = resolve(given[0], _OVERRIDES, schema())
            for path, value, hint, text in configs.leaves(shown):
                shown_value = type(value).__name__ if hasattr(value, "__dataclass_fields__") else repr(value)
                lines.append(f"  {path} = {shown_value}  [{configs.describe(hint)}] {text}")
        else:
            texts = configs.field_help(schema())
            for name, hint in configs.field_types(schema()).items():
                lines.append(f"  {name}  [{configs.describe(hint)}] {texts.get(name, '')}")
            lines.append("Give --config=FILE as well to see every field with its value.")
    return "\n".join(lines)


def folder(path: str | None, flag: str, what: str = "") -> str:
    """Returns the path of a folder that a flag names, if it is one on a file system.

    Args:
      path: the flag's value.
      flag: its name.
      what: of which the folder is, for the sentence that asks for it.

    Raises:
      ConfigError: there is none (also where the shell's variable was not set), or it is an address such as
        gs://bucket/run, of which a folder called `gs:` would be made.
    """
    if path is None or not path.strip():
        raise ConfigError(f"give {flag}=FOLDER{what}")
    if re.match(r"[A-Za-z][\w+.-]*:/", path):
        raise ConfigError(
            f"{flag}={path}: an address is no folder; mount the bucket, as launch_tpu.sh --bucket=gs://NAME does "
            f"(docs/tpu.md), and give its path there, such as {flag}=bucket/RUN"
        )
    return path


def define_start() -> None:
    """Defines the flags by which the processes of a run find each other; see `start`."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0. Not needed on TPU pods, under Slurm and Open MPI: jax finds them."
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes; 1 stays alone even where jax finds more.")
    flags.DEFINE_integer("process_id", None, "This process's number, from 0.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds to wait until all processes have joined.")


def start() -> dict[str, Any]:
    """Returns the values of the flags of `define_start`, the arguments of `lm.parallel.processes.Start`."""
    return {name: flags.FLAGS[name].value for name in ("coordinator", "num_processes", "process_id", "join_timeout")}


def resolve(path: str | None, overrides: dict[str, str], schema: type) -> Any:
    """Loads the config at `path`, applies the overrides and checks every leaf's type.

    Raises:
      ConfigError: no config given, or whatever `lm.config` finds.
    """
    if path is None:
        raise ConfigError("give --config=FILE.py, for example --config=configs/quickstart.py")
    loaded = configs.load(path)
    config = configs.from_json(schema, loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(config, schema):
        raise ConfigError(f"{path}: get_config returned {type(config).__name__}, not {schema.__name__}")
    config = configs.override(config, overrides)
    wrong = configs.check_types(config, schema)
    if wrong:
        raise ConfigError("\n".join(wrong))
    return config


def config(schema: type) -> Any:
    """Returns the resolved config that the command line names.

    Raises:
      ConfigError: see `resolve`.
    """
    return resolve(flags.FLAGS["config"].value, dict(_OVERRIDES), schema)
