"""Logical axes: modules name what an axis means, one table says which mesh axes carry it.

Knows no model and no objective. Law: a name that is not in the table, or a missing mesh, is an
error; nothing is ever replicated silently because of a typo.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lm.parallel.mesh import MESH_AXES, Pipeline

# What an axis of a parameter or an activation can mean. Parameters and activations have separate
# names for the model dimension, so that FSDP shards the one and not the other.
LOGICAL_AXES = (
    # activations
    "batch",  # B
    "length",  # T or S
    "residual_length",  # T of the residual stream, between the branches of a block
    "kv_length",  # S of keys and values, when it differs in placement from the queries'
    "activation_embed",  # D of an activation
    "activation_heads",  # N or K of an activation
    "activation_mlp",  # F of an activation
    "activation_vocab",  # V of logits
    "activation_experts",  # E of dispatched tokens
    "capacity",  # C
    # parameters
    "vocab",  # V
    "embed",  # D
    "heads",  # N
    "kv_heads",  # K
    "head_dim",  # H
    "mlp",  # F
    "experts",  # E
    "latent",  # low-rank dimensions (MLA, factorised embeddings)
    "positions",  # learned position tables
    "buckets",  # relative position buckets
    "norm",  # scales and biases of width D
    "classes",  # labels of a classification head
    "layers",  # stacked by scan
)


@dataclasses.dataclass(frozen=True)
class Rules:
    """The table: logical axis -> mesh axes, one row per logical axis; () keeps the axis whole.

    Attributes:
      parameters: rows used for parameters.
      activations: rows used by `constrain`.
      pipeline: how stages share a batch.
      optimizer: rows used for optimizer state, gradients and parameter average; None means those of parameters.
      optimizer_on_host: whether arrays of the optimizer's state lie in the host's memory between updates.
    """

    parameters: Mapping[str, tuple[str, ...]]
    activations: Mapping[str, tuple[str, ...]]
    pipeline: Pipeline = Pipeline()
    optimizer: Mapping[str, tuple[str, ...]] | None = None
    optimizer_on_host: bool = False

    @property
    def state(self) -> Mapping[str, tuple[str, ...]]:
        """Rows used for what belongs to a parameter: optimizer state, gradient, average."""
        return self.parameters if self.optimizer is None else self.optimizer

    def __post_init__(self) -> None:
        for table in (self.parameters, self.activations, self.state):
            for name, mesh_axes in table.items():
                if name not in LOGICAL_AXES:
                    raise ValueError(f"unknown logical axis {name!r} in the sharding table; known: {LOGICAL_AXES}")
                for axis in mesh_axes:
                    if axis not in MESH_AXES:
                        raise ValueError(
                            f"row {name!r} of the sharding table names mesh axis {axis!r}; known: {MESH_AXES}"
                        )

    def without(self, mesh_axes: frozenset[str]) -> "Rules":
        """Returns the table with these mesh axes in no row."""

        def strip(table: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
            return {name: tuple(axis for axis in row if axis not in mesh_axes) for name, row in table.items()}

        return dataclasses.replace(self, parameters=strip(self.parameters), activations=strip(self.activations))


def spec(axes: tuple[str | None, ...], table: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
    """Resolves logical axis names to a PartitionSpec; a mesh axis is used once per array, first come.

    Args:
      axes: one logical name per array axis; None keeps that axis whole.
      table: rows of `Rules.parameters` or `Rules.activations`.

    Raises:
      ValueError: a name is not a logical axis.
    """
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for name in axes:
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(LOGICAL_AXES)}")
        free = tuple(a for a in table.get(name, ()) if a not in used) if name else ()
        used.update(free)
        entries.append(free or None)
    return PartitionSpec(*entries)


@dataclasses.dataclass(frozen=True)
class _Scope:
    mesh: Mesh | AbstractMesh
    rules: Rules
    # Whether the code that is traced is that of one device, where arrays are parts and nothing is left to place.
    alone: bool = False


# None where shapes alone are wanted and there may be no device yet.
_SCOPES: list[_Scope | None] = []


@contextlib.contextmanager
def use(mesh: Mesh | AbstractMesh, rules: Rules) -> Iterator[None]:
    """Makes `mesh` and `rules` the ones that `constrain` resolves names with, while tracing.

    On an abstract mesh programs are traced and never run.
    """
    _SCOPES.append(_Scope(mesh, rules))
    abstract = isinstance(mesh, AbstractMesh)
    try:
        with jax.sharding.use_abstract_mesh(mesh) if abstract else jax.set_mesh(mesh):
            yield
    finally:
        _SCOPES.pop()


@contextlib.contextmanager
def inside(without: frozenset[str] = frozenset()) -> Iterator[None]:
    """Puts the scope in force for code that is traced inside `jax.shard_map`.

    Args:
      without: the mesh axes that the code is of one device of, while the others go on as before; empty are all.
    """
    mesh, rules = current()
    _SCOPES.append(_Scope(mesh, rules.without(without), alone=not without))
    try:
        yield
    finally:
        _SCOPES.pop()


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Lets `constrain` check names and place nothing, for code that is traced for its shapes and never run."""
    _SCOPES.append(None)
    try:
        yield
    finally:
        _SCOPES.pop()


def current() -> tuple[Mesh | AbstractMesh, Rules]:
    """Returns the mesh and rules in force.

    Raises:
      RuntimeError: outside `use(...)`.
    """
    scope = _SCOPES[-1] if _SCOPES else None
    if scope is None:
        raise RuntimeError("no mesh in force: call the model inside `with lm.parallel.use(mesh, rules):`")
    return scope.mesh, scope.rules


def platform_of(mesh: Mesh | AbstractMesh) -> str | None:
    """Returns what the devices of a mesh are ("cpu", "gpu", "tpu"); None for one without devices."""
    devices = mesh.devices if isinstance(mesh, Mesh) else None
    return None if devices is None else devices.flat[0].platform


def is_old_gpu(mesh: Mesh | AbstractMesh) -> bool:
    """Returns whether the devices of a mesh are NVIDIA GPUs before Hopper (compute capability 9.0)."""
    capability = getattr(mesh.devices.flat[0], "compute_capability", "") if isinstance(mesh, Mesh) else ""
    major = str(capability).partition(".")[0]  # other makers' have letters
    return major.isdigit() and int(major) < 9


def is_on_cpu() -> bool:
    """Returns whether the devices of the mesh in force are CPUs; False without a mesh, or with one without devices."""
    scope = _SCOPES[-1] if _SCOPES else None
    return scope is not None and platform_of(scope.mesh) == "cpu"


def by_platform(*operands: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """Returns `cpu(*operands)` or `default(*operands)`, by the devices that the program is for.

    Where the mesh in force has devices, only the one is traced. Without a mesh, or with one that has no devices,
    `jax.lax.platform_dependent` traces both and decides when the program is lowered, which takes half as long again.
    """
    scope = _SCOPES[-1] if _SCOPES else None
    # What jax keeps of a trace is kept for one mesh, which knows its platform.
    platform = platform_of(scope.mesh) if scope else None
    if platform is None:
        return jax.lax.platform_dependent(*operands, cpu=cpu, default=default)
    return (cpu if platform == "cpu" else default)(*operands)


def is_placed() -> bool:
    """Returns whether there are devices; False inside `shapes_only()`."""
    return not (_SCOPES and _SCOPES[-1] is None)


def num_shards(name: str) -> int:
    """Returns over how many devices an axis of activations is divided; one where shapes alone are wanted.

    Raises:
      RuntimeError: no mesh in force.
    """
    if not is_placed():
        return 1
    mesh, rules = current()
    return math.prod(mesh.shape[axis] for axis in rules.activations.get(name, ()))


def inside_device() -> bool:
    """Returns whether the code that is traced is that of one device."""
    scope = _SCOPES[-1] if _SCOPES else None
    return scope is not None and scope.alone


def is_divided() -> bool:
    """Returns whether arrays are spread over several devices: not where shapes alone are wanted."""
    scope = _SCOPES[-1] if _SCOPES else None
    return scope is not None and scope.mesh.size > 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Says where an activation lives, by the meaning of its axes.

    Args:
      x: array of rank len(axes).
      *axes: a logical name, or None, for each axis.

    Raises:
      RuntimeError: no mesh in force. ValueError: an unknown name, or a wrong number of names.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names {axes} for an array of shape {x.shape}")
    if not is_placed():
        spec(axes, {})
        return x
    mesh, rules = current()
    resolved = spec(axes, rules.activations)
    if mesh.size == 1 or inside_device():
        return x
    if not isinstance(x, Tracer):  # op by op, as in a debugger
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, resolved))
    # Without its mesh: inside `jax.shard_map` over some axes the one in force is another.
    return jax.lax.with_sharding_constraint(x, resolved)


# Mesh axes that divide tokens, each of which can divide a dimension of parameters too.
TOKEN_AXES = ("fsdp", "expert", "context", "stage")
LATENT_AXES = ("fsdp", "context", "stage")
# One row per logical axis; the presets differ only in mesh shape, because an axis of size 1 costs nothing.
DEFAULT_RULES = Rules(
    parameters=MappingProxyType(
        {
            "vocab": ("tensor",),
            "embed": TOKEN_AXES,
            "heads": ("tensor",),
            "kv_heads": ("tensor",),
            "mlp": ("tensor",),
            "experts": ("expert",),
            # Beside "embed", which comes first, it stays whole; what projects a latent up has no "embed". Not over
            # experts: DeepSeek-V3's 512 would not divide over the devices of its 256.
            "latent": LATENT_AXES,
            "positions": (),
            "norm": (),
            "layers": ("stage",),
        }
    ),
    activations=MappingProxyType(
        {
            "batch": ("data", "fsdp", "expert", "stage"),
            "length": ("context",),
            "residual_length": ("context",),
            "kv_length": (),
            "activation_heads": ("tensor",),
            "activation_mlp": ("tensor",),
            "activation_vocab": ("tensor",),
            "activation_experts": ("expert",),
        }
    ),
)
