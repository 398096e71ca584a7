"""What a traced program costs one device of a mesh: operations, bytes through memory, peak memory, collectives.

Reads the jaxpr of the real train step, so that a new layer is counted without being listed here; nothing is compiled
and no device is needed. Knows no model. Laws: a loop costs its body times its length; a chain of elementwise
operations is one kernel and what is between them needs no memory.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import core

from lm.scaling import liveness
from lm.scaling.cost import Cost
from lm.scaling.liveness import Operation
from lm.scaling.spread import Sizes, Spec, Value, join, multiply, propagate, whole

# Operations of shard_map bodies that communicate, by the name that a compiled program gives them.
EXPLICIT = {
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}
# What keeps a sum that is still to be taken over devices.
LINEAR = ("add", "add_any", "reshape", "transpose", "squeeze", "convert_element_type")
INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a program is counted for.

    Attributes:
      sizes: of the mesh axes.
      parameters: how the gradients of parameters are divided, by their shape, with and without the axis of stacked
        layers.
      platform: whose branch of platform-dependent code is counted.
      kept: mesh axes over which parameters are not gathered for a product.
    """

    sizes: Sizes
    parameters: Mapping[tuple[int, ...], Spec]
    platform: str = "tpu"
    kept: tuple[str, ...] = ()


def count(closed: Any, arguments: Sequence[Spec], setting: Setting) -> Cost:
    """Counts a traced program.

    Args:
      closed: from `jax.make_jaxpr`.
      arguments: how each flat argument is divided.
      setting: mesh, parameters and platform.
    """
    values = [_value(v, spec) for v, spec in zip(closed.jaxpr.invars, arguments, strict=True)]
    return _Walk(setting, in_place=True).run(closed.jaxpr, values)[0]


def _value(variable: Any, spec: Spec | None = None) -> Value:
    aval = variable.aval
    shape = tuple(getattr(aval, "shape", ()))
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 4)
    return Value(shape, itemsize, whole(len(shape)) if spec is None else spec)


class _Walk:
    """One pass over a program, or over the body of a loop, with calls written out."""

    def __init__(self, setting: Setting, *, in_place: bool = False) -> None:
        self.setting, self.in_place = setting, in_place
        self.cost = Cost()
        self.operations: list[Operation] = []
        self.values: list[Value] = []
        self.partial: dict[int, tuple[str, ...]] = {}
        self.branch: dict[int, int] = {}
        self.origin: dict[int, int] = {}
        self.gathered: set[Any] = set()
        self.at_home: set[int] = set()

    def run(self, jaxpr: Any, arguments: Sequence[Value]) -> tuple[Cost, list[Value]]:
        ids = [self._new(value) for value in arguments]
        results = self._follow(jaxpr, ids)
        for result in results:
            self._settle(result)
        sizes = [value.stored_bytes(self.setting.sizes) for value in self.values]
        kept = () if self.in_place else results
        self.cost.peak, moved = liveness.measure(self.operations, sizes, kept, results)
        self.cost.traffic += moved
        return self.cost, [self.values[result] for result in results]

    def _new(self, value: Value) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _follow(self, jaxpr: Any, ids: Sequence[int]) -> list[int]:
        """Appends the operations of a program to the list; returns the numbers of its results."""
        known: dict[Any, int] = dict(zip(jaxpr.invars, ids, strict=True))
        for variable in jaxpr.constvars:
            known[variable] = self._new(_value(variable))

        def number(atom: Any) -> int:
            return self._new(_value(atom)) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            reads = [number(atom) for atom in equation.invars]
            known.update(zip(equation.outvars, self._step(equation, reads), strict=True))
        return [number(atom) for atom in jaxpr.outvars]

    def _step(self, equation: Any, reads: list[int]) -> list[int]:
        name, params = equation.primitive.name, equation.params
        if name == "platform_index":
            known = params["platforms"]
            chosen = next((n for n, group in enumerate(known) if group is None or self.setting.platform in group), 0)
            out = self._plain(equation, reads)
            self.branch[out[0]] = chosen
            return out
        if name == "cond":
            branches = params["branches"]
            chosen = self.branch.get(reads[0], len(branches) - 1)
            return self._follow(_open(branches[chosen]), reads[1:])
        if name == "scan":
            return self._scan(equation, reads)
        if name == "while":
            return self._while(equation, reads)
        if name == "shard_map":
            return self._shards(equation, reads)
        inner = next((params[key] for key in INNER if key in params), None)
        if inner is not None:
            return self._follow(_open(inner), reads)
        if name == "dot_general":
            return [self._product(equation, reads)]
        if name.startswith("ragged_dot"):
            return [self._grouped(equation, reads)]
        if name == "optimization_barrier":
            return [self._emit("copy", [read], [self.values[read]])[0] for read in reads]
        return self._plain(equation, reads)

    def _emit(self, name: str, reads: Sequence[int], outs: Sequence[Value], inside: int = 0) -> list[int]:
        writes = [self._new(value) for value in outs]
        self.operations.append(Operation(name, tuple(reads), tuple(writes), inside))
        return writes

    def _plain(self, equation: Any, reads: list[int]) -> list[int]:
        """Handles what needs no rule of its own: elementwise operations, reductions, changes of shape, messages."""
        name, params, sizes = equation.primitive.name, equation.params, self.setting.sizes
        pending = {self.partial.get(read) for read in reads if self.values[read].shape}
        linear = name in LINEAR and len(pending) == 1
        if not linear:
            for read in reads:
                self._settle(read, self._wanted(equation) or self._beside(read, reads))
        operands = [self.values[read] for read in reads]
        outs = []
        for variable in equation.outvars:
            shape = _value(variable).shape
            spec = self._wanted(equation) or propagate(name, params, operands, shape, sizes)
            if name == "sharding_constraint" and reads[0] in self.at_home:
                # Asked for by its parameter, which is gathered so; a compiler sees through that to where it ends.
                spec = operands[0].spec
            if name.startswith("scatter") or (name == "broadcast_in_dim" and not operands[0].shape):
                spec = self.setting.parameters.get(shape, spec)
            repeats = operands[0].stored_bytes(sizes) if name == "broadcast_in_dim" else None
            repeats = operands[0].repeats if name in liveness.VIEWS else repeats
            repeats = 0 if name == "iota" else repeats
            outs.append(_value(variable, spec)._replace(repeats=repeats))
        writes = self._emit(name, reads, outs)
        if name == "sharding_constraint":
            self._gather(reads[0], outs[0].axes)
        if name == "gather":
            self._look_up(operands, writes[0])
        if name.startswith(("reduce_", "cumsum")) and "axes" in params:
            summed = tuple(axis for n in params["axes"] for axis in operands[0].spec[n])
            self._owe(writes[0], summed)
        if name.startswith("scatter") and len(operands) > 2:
            self._owe(writes[0], tuple(a for entry in operands[1].spec for a in entry))
        if name in EXPLICIT:
            self._message(equation, operands, outs)
        if linear and (axes := next(iter(pending))):
            self._owe(writes[0], axes)
        if name in ("convert_element_type", "clamp", "copy") and reads:
            self.origin[writes[0]] = self.origin.get(reads[0], reads[0])
            chosen = next((self.branch[read] for read in reads if read in self.branch), None)
            if chosen is not None:
                self.branch[writes[0]] = chosen
        return writes

    def _wanted(self, equation: Any) -> Spec | None:
        """Returns what a constraint asks for."""
        if equation.primitive.name != "sharding_constraint":
            return None
        entries = tuple(equation.params["sharding"].spec)
        rank = len(equation.outvars[0].aval.shape)
        entries += (None,) * (rank - len(entries))
        return tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)

    def _beside(self, read: int, reads: Sequence[int]) -> Spec | None:
        """Returns how a sum that is still to be taken is best divided: as what it is added to or multiplied by."""
        value = self.values[read]
        others = [n for n in reads if n not in self.partial and self.values[n].shape == value.shape]
        return join([*(self.values[n].spec for n in others), value.spec]) if others else None

    def _message(self, equation: Any, operands: Sequence[Value], outs: Sequence[Value]) -> None:
        params = equation.params
        axes = params["axes"] if "axes" in params else params["axis_name"]
        axes = (axes,) if isinstance(axes, str) else tuple(a for a in axes if isinstance(a, str))
        axes = tuple(axis for axis in axes if self.setting.sizes[axis] > 1)
        kind = EXPLICIT[equation.primitive.name]
        of = outs if kind == "all-gather" else operands
        size = sum(value.local_bytes(self.setting.sizes) for value in of)
        if axes:
            self.cost.send(kind, axes, 1, size)

    def _owe(self, result: int, axes: tuple[str, ...]) -> None:
        """Notes that a result is to be summed over mesh axes; a gradient is at once, onto its parameter's devices."""
        axes = tuple(axis for axis in dict.fromkeys(axes) if self.setting.sizes[axis] > 1)
        if not axes:
            return
        self.partial[result] = axes
        home = self.setting.parameters.get(self.values[result].shape)
        if home is not None and len(self.values[result].shape) > 1:
            self.at_home.add(result)
            whole_bytes = self.values[result].local_bytes(self.setting.sizes)
            self._settle(result, home)
            if self.values[result].local_bytes(self.setting.sizes) < whole_bytes:
                last = self.operations[-1]
                self.operations[-1] = last._replace(inside=last.inside + whole_bytes)

    def _settle(self, result: int, wanted: Spec | None = None) -> None:
        """Sums a result over the devices that each have a part of it: reduce-scatter where `wanted` divides it."""
        axes = self.partial.pop(result, None)
        if axes is None:
            return
        sizes, value = self.setting.sizes, self.values[result]
        spread = tuple(a for entry in wanted or () for a in entry if a in axes)
        if spread:
            self.cost.send("reduce-scatter", spread, 1, value.without(spread).local_bytes(sizes))
            assert wanted is not None
            value = value._replace(spec=wanted)
            self.values[result] = value
        rest = tuple(axis for axis in axes if axis not in spread)
        if rest:
            self.cost.send("all-reduce", rest, 1, value.local_bytes(sizes))

    def _gather(self, read: int, kept: Sequence[str]) -> int:
        """Gathers an operand over the mesh axes that do not divide it any more; returns the bytes of the result."""
        value, sizes = self.values[read], self.setting.sizes
        axes = tuple(axis for axis in value.axes if axis not in kept and sizes[axis] > 1)
        if not axes:
            return 0
        size = value.without(axes).local_bytes(sizes)
        key = (self.origin.get(read, read), value.itemsize, axes)
        if key not in self.gathered:
            self.gathered.add(key)
            self.cost.send("all-gather", axes, 1, size)
        return size

    def _look_up(self, operands: Sequence[Value], result: int) -> None:
        """Counts what a look-up sends: rows of a table that is divided by rows are a sum over its devices."""
        table, axes = operands[0], self.values[result].axes
        home = self.setting.parameters.get(table.shape)
        if home is None:
            return
        sizes = self.setting.sizes
        clashing = [axis for axis in table.axes if axis in operands[1].axes and sizes[axis] > 1]
        if clashing:
            self.cost.send("all-gather", tuple(clashing), 1, table.without(clashing).local_bytes(sizes))
        self._owe(result, tuple(a for a in table.axes if a not in axes and a not in clashing))

    def _product(self, equation: Any, reads: list[int]) -> int:
        for read in reads:
            self._settle(read)
        left, right = (self.values[read] for read in reads)
        sizes = self.setting.sizes
        known = [value.shape in self.setting.parameters for value in (left, right)]
        gathered = "smaller" if known[0] == known[1] else ("left" if known[0] else "right")
        product = multiply(left, right, equation.params["dimension_numbers"], sizes, gathered, self.setting.kept)
        inside = self._gather(reads[0], product.left.axes) + self._gather(reads[1], product.right.axes)
        out = _value(equation.outvars[0], product.spec)
        self.cost.flops += 2.0 * math.prod(out.local_shape(sizes)) * product.summed
        (result,) = self._emit("dot_general", reads, [out], inside)
        self._owe(result, product.partial)
        return result

    def _grouped(self, equation: Any, reads: list[int]) -> int:
        """Handles rows of several groups, each group with its matrix: a row meets one of them."""
        for read in reads:
            self._settle(read)
        left, right = (self.values[read] for read in reads[:2])
        sizes, shape = self.setting.sizes, equation.outvars[0].aval.shape
        rows = left.local_shape(sizes)[0]
        inside = 0
        if len(shape) == len(left.shape):
            inside = self._gather(reads[1], [a for a in right.axes if a not in left.axes])
            out = _value(equation.outvars[0], (left.spec[0], *whole(len(shape) - 1)))
            self.cost.flops += 2.0 * rows * left.shape[-1] * shape[-1]
        else:
            out = _value(equation.outvars[0])
            self.cost.flops += 2.0 * rows * left.shape[-1] * right.shape[-1]
        (result,) = self._emit("ragged_dot", reads, [out], inside)
        if len(shape) != len(left.shape):
            self._owe(result, left.spec[0])
        return result

    def _scan(self, equation: Any, reads: list[int]) -> list[int]:
        params = equation.params
        first, carried = _loop_arguments(params)
        body, length = _open(params["jaxpr"]), params["length"]
        for read in reads:
            self._settle(read)
        values = [self.values[read] for read in reads]
        each = [v._replace(shape=v.shape[1:], spec=v.spec[1:]) for v in values[first + carried :]]
        carry = values[first : first + carried]
        for _ in range(3):
            cost, results = _Walk(self.setting).run(body, [*values[:first], *carry, *each])
            # What begins whole, such as zeros, is divided as the body leaves it.
            known = [a._replace(spec=_prefer(a.spec, b.spec)) for a, b in zip(carry, results[:carried], strict=True)]
            if known == carry:
                break
            carry = known
        self.cost.add(cost, length)
        outs = [*carry]
        for variable, result in zip(equation.outvars[carried:], results[carried:], strict=True):
            outs.append(_value(variable, ((), *result.spec)))
        return self._emit("scan", reads, outs, cost.peak)

    def _while(self, equation: Any, reads: list[int]) -> list[int]:
        """Counts the body once: how often it runs is not known."""
        params = equation.params
        values = [self.values[read] for read in reads[params["cond_nconsts"] :]]
        cost, results = _Walk(self.setting).run(_open(params["body_jaxpr"]), values)
        self.cost.add(cost, 1)
        return self._emit("while", reads, results, cost.peak)

    def _shards(self, equation: Any, reads: list[int]) -> list[int]:
        """Follows a body that is written for one device's shards along its manual axes."""
        params = equation.params
        # The name of this parameter differs between versions of jax.
        manual = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        for read in reads:
            self._settle(read)
        inner = _open(params["jaxpr"])
        ids = []
        for read, variable, wanted in zip(reads, inner.invars, params["in_specs"], strict=True):
            self._gather(read, [*_flat(wanted), *(a for a in self.values[read].axes if a not in manual)])
            spec = self.values[read].without(tuple(manual)).spec
            ids += self._emit("sharding_constraint", [read], [_value(variable, spec)])
        outs = []
        for result, variable, wanted in zip(
            self._follow(inner, ids), equation.outvars, params["out_specs"], strict=True
        ):
            entries = (*wanted, *(None,) * (len(variable.aval.shape) - len(wanted)))
            kept = self.values[result].spec
            spec = tuple((*_flat((e,)), *k) for e, k in zip(entries, kept, strict=True))
            outs += self._emit("sharding_constraint", [result], [_value(variable, spec)])
        return outs


def _open(jaxpr: Any) -> Any:
    """Returns a program without its constants, closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _loop_arguments(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns how many arguments of a loop are the same in each turn, and how many are carried from turn to turn."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constant, carried, _ = params["ft_in"].unpack()  # jax 0.11
    return len(constant), len(carried)


def _flat(spec: Any) -> list[str]:
    return [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]


def _prefer(old: Spec, new: Spec) -> Spec:
    return tuple(b or a for a, b in zip(old, new, strict=True))
