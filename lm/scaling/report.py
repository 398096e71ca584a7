"""A plan in words: what a user reads before a run.

Knows no arithmetic but sums and units. Law: every figure is printed with its unit, and every time with its formula.
"""

from lm.parallel.hardware import Torus
from lm.scaling.compiled import Compiled
from lm.scaling.planner import Plan
from lm.scaling.suggestions import Suggestion

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(number: float, unit: str = "") -> str:
    """Returns a number in three figures with a decimal prefix: "1.23 G" and the unit."""
    for size, prefix in UNITS:
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Returns a time in three figures, in s, ms or us."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def mesh_words(sizes: dict[str, int]) -> str:
    """Returns a mesh as "fsdp 16 x tensor 4"."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"


def _memory(plan: Plan) -> list[str]:
    model, experiment = plan.experiment.model, plan.experiment
    rows = experiment.batch_size // experiment.num_microbatches
    chunk = "all at once" if experiment.loss.chunk is None else f"{experiment.loss.chunk} positions at a time"
    kept = {"none": "everything kept", "full": "inputs of layers kept"}.get(model.remat, f"{model.remat} kept")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    host = []
    if plan.host_bytes:
        fullest = "the update" if plan.update_bytes > plan.cost.peak else "the backward pass"
        host = [
            f"  on the host      {amount(plan.host_bytes, 'B'):>10}  the optimizer's, fetched whole before the update:"
            " it saves memory outside the update alone,",
            f"{'':31}and none where XLA fetches it before the backward pass; {fullest} is the fullest",
        ]
    return [
        "Memory of each device",
        f"  parameters       {amount(plan.parameter_bytes, 'B'):>10}",
        f"  optimizer        {amount(plan.optimizer_bytes, 'B'):>10}",
        *host,
        f"  batch            {amount(plan.batch_bytes, 'B'):>10}",
        f"  gradients        {amount(plan.gradient_bytes, 'B'):>10}",
        f"  activations      {amount(plan.activation_bytes, 'B'):>10}  {kept}; logits {chunk}; {rows:,} rows at a time",
        f"  total            {amount(plan.total_bytes, 'B'):>10}  of {amount(plan.hardware.memory, 'B')}: {verdict}"
        " (nine tenths may be used)",
    ]


def _communication(plan: Plan) -> list[str]:
    messages = [message for message in plan.cost.messages() if message.bytes >= 1e3]
    small = len(plan.cost.messages()) - len(messages)
    lines = ["Collectives of a step, of each device"]
    lines += [
        f"  {m.kind:<18} over {' x '.join(m.axes):<15} {m.count:>7,} times {amount(m.bytes, 'B'):>10}"
        f"  {duration(plan.seconds_of(m)):>8}"
        for m in messages
    ]
    if not plan.cost.messages():
        lines.append("  none")
    elif small:
        lines.append(f"  and {small} kinds of less than a kilobyte")
    return lines


def _host_link(plan: Plan) -> list[str]:
    seconds, link = plan.host_seconds, plan.hardware.host_link
    if seconds == 0:
        return []
    moved = f"{amount(plan.host_bytes, 'B')} to the device and as much back"
    if seconds is None or link is None:
        return [f"  host's link         unknown  {moved}; how fast is not published, and not in the times below"]
    return [f"  host's link      {duration(2 * seconds):>10}  {moved} / {amount(link, 'B/s')} each way"]


def _time(plan: Plan) -> list[str]:
    hardware = plan.hardware
    fast, slow = plan.best_seconds, plan.worst_seconds
    over, link = ("the three and the host's link", ", the host's link") if plan.host_seconds else ("the three", "")
    links = "a slice's links, shared by the mesh axes" if isinstance(hardware.links, Torus) else "NVLink in a node"
    return [
        f"Time of a step on {plan.num_devices:,} x {hardware.name}",
        f"  products         {duration(plan.compute_seconds):>10}  {amount(plan.cost.flops, 'FLOP')} (what is computed"
        f" again included) / {amount(hardware.flops, 'FLOP/s')}",
        f"  memory           {duration(plan.memory_seconds):>10}  {amount(plan.traffic, 'B')} read and written /"
        f" {amount(hardware.memory_bandwidth, 'B/s')}",
        f"  communication    {duration(plan.communication_seconds):>10}  sum of (n-1)/n bytes (all-reduce twice) /"
        f" up to {amount(hardware.links.send, 'B/s')} ({links})",
        *_host_link(plan),
        f"  roof             {duration(plan.roof_seconds):>10}  max of products{link} and communication (kernels that"
        f" keep attention scores on the chip): {plan.utilization(plan.roof_seconds):.1%} MFU",
        f"  if all overlaps  {duration(fast):>10}  max of {over}: {plan.utilization(fast):.1%} MFU,"
        f" {plan.tokens / fast / plan.num_devices:,.0f} tokens/s a device",
        f"  if none does     {duration(slow):>10}  sum of {over}: {plan.utilization(slow):.1%} MFU,"
        f" {plan.tokens / slow / plan.num_devices:,.0f} tokens/s a device",
    ]


def describe(plan: Plan) -> str:
    """Returns the whole plan as text."""
    active = plan.num_active_parameters
    of_them = f", {amount(active)} of them active for a token" if active != plan.num_parameters else ""
    experiment = plan.experiment
    pieces = f" in {experiment.num_microbatches} microbatches" if experiment.num_microbatches > 1 else ""
    head = [
        f"{type(experiment.model).__name__} of {plan.num_parameters:,} parameters{of_them}",
        f"mesh {mesh_words(plan.sizes)}: {plan.num_devices:,} devices; {experiment.batch_size:,} rows of"
        f" {experiment.data.lengths.tokens:,} tokens a step{pieces}",
        f"{amount(plan.model_flops, 'FLOP')} of the model a step",
    ]
    return "\n".join([*head, "", *_memory(plan), "", *_communication(plan), "", *_time(plan)])


def advise(plan: Plan, suggestion: Suggestion | None) -> str:
    """Returns in words what to do about a run that does not fit."""
    if suggestion is None:
        return (
            f"No mesh, recomputation, number of microbatches or place of the optimizer's state tried makes it fit"
            f" {plan.num_devices:,} x {plan.hardware.name}: use more devices or a smaller batch."
        )
    found = suggestion.plan
    flags = " ".join(f"--{override}" for override in suggestion.overrides)
    rule = type(found.experiment.optimizer.rule).__name__
    rounded = "" if type(plan.experiment.optimizer.rule).__name__ == rule else f"; {rule} rounds the moments"
    return (
        f"It fits with {flags}\n"
        f"  ({amount(found.total_bytes, 'B')} of each device, {duration(found.best_seconds)} to"
        f" {duration(found.worst_seconds)} a step{rounded})"
    )


def describe_compiled(found: Compiled, plan: Plan) -> str:
    """Returns what XLA says of the compiled step beside the plan's own figures."""
    unseen = []
    if found.unseen_bytes:
        unseen = [
            f"  on the host      {amount(found.unseen_bytes, 'B'):>10}  in none of these, nor what is fetched of it: a"
            " CPU's two memories are one"
        ]
    return "\n".join(
        [
            f"XLA's figures of each device (compiled in {found.seconds:.0f} s)",
            f"  arguments        {amount(found.argument_bytes, 'B'):>10}  planned {amount(plan.argument_bytes, 'B')}",
            f"  temporaries      {amount(found.temporary_bytes, 'B'):>10}  planned {amount(plan.temporary_bytes, 'B')}",
            f"  total            {amount(found.total_bytes, 'B'):>10}  planned {amount(plan.total_bytes, 'B')}",
            f"  most alive       {amount(found.peak_bytes, 'B'):>10}  of a TPU; a CPU's leaves out temporaries",
            *unseen,
            f"  operations       {amount(found.flops, 'FLOP'):>10}  the body of each loop counted once",
            *(
                f"  {kind:<18} {count:>7,} times {amount(size, 'B'):>10} of results"
                for kind, (count, size) in found.collectives.items()
            ),
        ]
    )
