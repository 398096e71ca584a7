"""Scaling on paper: python -m benchmarks.scaling [--picture=docs/scaling.png]

Prints the tables of docs/scale.md (large runs, published figures beside the plan's, weak and strong scaling) and draws
the curves, all from `lm.scaling.planner`: one trace of the real train step for each point, published speeds of chips
and links, no device. Rewrites docs/scale.md between its markers with --update_document.
"""

import contextlib
import os
import pathlib
import re
import shlex

from absl import app, flags

_PICTURE = flags.DEFINE_string("picture", None, "The PNG to draw; none draws nothing.")
_UPDATE_DOCUMENT = flags.DEFINE_bool("update_document", False, "Write the tables into docs/scale.md.")

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "scale.md"
LONG = "--config.model.attention.kernel=Chunked --config.loss.chunk=1024"
EXCHANGED = "--config.model.mlp.dispatch=AllToAll --config.model.mlp.dispatch.factor=1.0"
# name -> arguments of lm.plan
RUNS = {
    "BERT-large": "--config=configs/bert.py:large --devices=16 --hardware=v5e --config.mesh.data=1"
    " --config.mesh.fsdp=16 --config.model.dtype=bfloat16 --config.model.remat=full --config.batch_size=4096",
    "T5-XXL (v1.1, 11B)": "--config=configs/t5.py:v1_1_xxl --devices=64 --hardware=v5p --config.mesh.data=1"
    " --config.mesh.fsdp=64 --config.model.dtype=bfloat16 --config.model.remat=full --config.batch_size=2048",
    "Llama 3 8B": "--config=configs/llama3.py:8b --devices=64 --hardware=v5p --config.mesh.data=1 --config.mesh.fsdp=64"
    f" {LONG} --config.batch_size=256",
    "Llama 3 70B": "--config=configs/llama3.py:70b --devices=512 --hardware=v5p --config.mesh.data=1"
    f" --config.mesh.fsdp=512 {LONG} --config.batch_size=1024",
    "Mixtral 8x22B (141B)": "--config=configs/mixtral.py:8x22b --devices=256 --hardware=v5p --config.mesh.data=1"
    f" --config.mesh.fsdp=256 {LONG} --config.batch_size=512",
    "Mixtral 8x22B, experts divided": "--config=configs/mixtral.py:8x22b --devices=256 --hardware=v5p"
    f" --config.mesh.data=1 --config.mesh.fsdp=32 --config.mesh.expert=8 {EXCHANGED} {LONG} --config.batch_size=512",
    "DeepSeek-V3 (671B)": "--config=configs/deepseek_v3.py:671b --devices=1024 --hardware=v5p --config.mesh.data=1"
    f" --config.mesh.fsdp=16 --config.mesh.expert=64 {EXCHANGED} {LONG} --config.batch_size=2048",
}
# name -> (arguments of lm.plan, published MFU or None, published tokens/s a device, where it stands)
PUBLISHED = {
    "Llama 3.1 8B, 256 x v6e": (
        "--config=configs/llama3.py:8b --devices=256 --hardware=v6e --config.mesh.data=1 --config.mesh.fsdp=256"
        f" {LONG} --config.batch_size=512",
        0.4546,
        7207,
        "MaxText, docs/reference/models/tiering.md",
    ),
    "Llama 3.1 70B, 256 x v6e": (
        "--config=configs/llama3.py:70b --devices=256 --hardware=v6e --config.mesh.data=1 --config.mesh.fsdp=256"
        f" {LONG} --config.batch_size=256",
        0.5033,
        960,
        "MaxText, docs/reference/models/tiering.md",
    ),
    "Mixtral 8x7B, rows of 4096, 256 x v5p": (
        "--config=configs/mixtral.py:8x7b --devices=256 --hardware=v5p --config.mesh.data=1 --config.mesh.fsdp=256"
        f" --config.data.sequence_length=4096 {LONG} --config.batch_size=1024",
        0.5256,
        2909,
        "MaxText, docs/reference/models/tiering.md",
    ),
    "Llama 3.1 8B, 8 x H100": (
        "--config=configs/llama3.py:8b --devices=8 --hardware=h100 --config.mesh.data=1 --config.mesh.fsdp=8"
        f" {LONG} --config.batch_size=8",
        None,
        5762,
        "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (FSDP, not compiled; 6,667 compiled)",
    ),
    "Llama 3.1 8B, 128 x H100": (
        "--config=configs/llama3.py:8b --devices=128 --hardware=h100 --config.mesh.data=1 --config.mesh.fsdp=128"
        f" {LONG} --config.batch_size=128",
        None,
        5605,
        "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (FSDP, not compiled; 6,514 compiled)",
    ),
}
# (model, hardware, tokens: rows a device for weak scaling, rows a step for strong scaling)
CURVES = (("llama3.py:8b", "v5p", 2, 2048), ("llama3.py:70b", "v5p", 1, 2048), ("llama3.py:8b", "h100", 1, 2048))
CHIPS = (64, 256, 1024, 4096, 8192)
MOST_FSDP = {"v5p": 2048, "h100": 256}


def plan(arguments: str):
    """Returns the plan that `python -m lm.plan ARGUMENTS` prints."""
    from lm.experiment import Experiment
    from lm.flags import resolve
    from lm.parallel.hardware import HARDWARE
    from lm.scaling.planner import make_plan

    given = dict(part.removeprefix("--").split("=", 1) for part in shlex.split(arguments))
    overrides = {name.removeprefix("config."): value for name, value in given.items() if name.startswith("config.")}
    experiment = resolve(given["config"], overrides, Experiment)
    experiment.validate()
    return make_plan(experiment, int(given["devices"]), HARDWARE[given["hardware"]])


def run_row(name: str) -> str:
    """Returns a line of the table of large runs."""
    from lm.scaling.report import amount, duration, mesh_words

    found = plan(RUNS[name])
    return (
        f"| {name} | {amount(found.num_parameters)} | {found.num_devices} x {found.hardware.name}, "
        f"{mesh_words(found.sizes)} | {found.tokens:,} | {amount(found.argument_bytes, 'B')} + "
        f"{amount(found.total_bytes - found.argument_bytes, 'B')} of {amount(found.hardware.memory, 'B')} | "
        f"{duration(found.compute_seconds)} | {duration(found.communication_seconds)} | "
        f"{duration(found.memory_seconds)} | {found.utilization(found.roof_seconds):.0%} | "
        f"{found.utilization(found.worst_seconds):.0%} |"
    )


def published_row(name: str) -> str:
    """Returns a line of the comparison with published figures."""
    arguments, utilization, tokens, source = PUBLISHED[name]
    found = plan(arguments)
    roof = found.tokens / found.roof_seconds / found.num_devices
    stated = "not stated" if utilization is None else f"{utilization:.1%}"
    return (
        f"| {name} | {roof:,.0f} | {found.utilization(found.roof_seconds):.0%} | {tokens:,} | {stated} | "
        f"{tokens / roof:.0%} | {source} |"
    )


def point(config: str, hardware: str, chips: int, rows: int):
    """Returns the plan of a run whose parameters are divided over as many chips as its rows and links allow.

    Chips that are left divide heads and hidden units, with the stream between them, or the sequence: what is faster.
    """
    from lm.config import ConfigError

    fsdp = min(chips, rows, MOST_FSDP[hardware])
    data = min(chips, rows) // fsdp
    rest = chips // (data * fsdp)
    arguments = (
        f"--config=configs/{config} --devices={chips} --hardware={hardware} --config.mesh.data={data}"
        f" --config.mesh.fsdp={fsdp} {LONG} --config.batch_size={rows}"
    )
    if rest == 1:
        return plan(arguments)
    found = []
    for way in (f"--config.mesh.tensor={rest} --config.sharding.sequence=True", f"--config.mesh.context={rest}"):
        # A width does not divide over any number of chips.
        with contextlib.suppress(ConfigError):
            found.append(plan(f"{arguments} {way}"))
    return min(found, key=lambda plan: plan.roof_seconds)


def curves() -> dict:
    """Returns for each curve the plans at each number of chips: weak and strong scaling."""
    found = {}
    for config, hardware, rows_each, rows in CURVES:
        name = f"{config.removeprefix('llama3.py:').upper()} on {hardware}"
        found[f"{name}, weak, {rows_each * 8192:,} tokens a chip"] = [
            point(config, hardware, chips, rows_each * chips) for chips in CHIPS
        ]
        found[f"{name}, strong, {rows * 8192:,} tokens a step"] = [
            point(config, hardware, chips, rows) for chips in CHIPS
        ]
    return found


def curve_rows(found: dict) -> list[str]:
    """Returns the table of the curves: at each number of chips the MFU of the roof and with nothing hidden."""
    lines = []
    for name, plans in found.items():
        cells = [
            f"{p.utilization(p.roof_seconds):.0%} / {p.utilization(p.compute_seconds + p.communication_seconds):.0%}"
            for p in plans
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw(found: dict, output: pathlib.Path) -> None:
    """Draws MFU against chips, weak scaling left and strong right: a band from nothing hidden to the roof."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for panel, kind in zip(panels, ("weak", "strong"), strict=True):
        for name, plans in found.items():
            if f", {kind}," in name:
                serial = [100 * p.utilization(p.compute_seconds + p.communication_seconds) for p in plans]
                roof = [100 * p.utilization(p.roof_seconds) for p in plans]
                panel.fill_between(CHIPS, serial, roof, alpha=0.3)
                panel.plot(CHIPS, roof, marker="o", label=name.replace(f", {kind}", ""))
        panel.set(title=f"{kind} scaling", xlabel="chips", xscale="log", ylim=(0, 100))
        panel.set_xticks(CHIPS, [f"{chips:,}" for chips in CHIPS])
        panel.legend(loc="lower left", fontsize=8)
    panels[0].set_ylabel("MFU, %: line all hidden, band's edge nothing")
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def replace(document: str, name: str, rows: list[str]) -> str:
    """Replaces the lines of a table, those after its head, between the markers of that name."""
    pattern = rf"(<!-- {name} -->\n(?:\|.*\n){{2}})(?:\|.*\n)*"
    return re.sub(pattern, lambda match: match[1] + "".join(f"{row}\n" for row in rows), document)


def main(_) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    found = curves()
    tables = {
        "runs": [run_row(name) for name in RUNS],
        "published": [published_row(name) for name in PUBLISHED],
        "curves": curve_rows(found),
    }
    for rows in tables.values():
        print("\n".join(rows), end="\n\n")
    if _UPDATE_DOCUMENT.value:
        document = DOCUMENT.read_text(encoding="utf-8")
        for name, rows in tables.items():
            document = replace(document, name, rows)
        DOCUMENT.write_text(document, encoding="utf-8")
    if _PICTURE.value:
        draw(found, pathlib.Path(_PICTURE.value))


if __name__ == "__main__":
    app.run(main)
