"""
Does a behaviour's carrier grow with the model? The whole method on embedded models of several sizes.

    python -m lab.sizes --seeds 3                     some 40 minutes on one core
    python -m lab.sizes --shapes 64x4 256x8           widths × layers

Every base is made as the embedded one is (lab/tiny.py: the same world, words and lines), and every run
has the settings that fit themselves. What is there already stays: the command resumes.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import re
import statistics
from pathlib import Path

import numpy as np

import carrier
import eraser
import evaluate
import figure
import lcdd
import model
from console import Parser, check_device, check_numbers, cli, markdown
from files import NUMBER, InputError, check_fields, read_json, write_json, write_text
from lab import tiny
from lab.ablate import TASKS
from lab.bench import exponent
from run import EMBEDDED, locate, read_results

SHAPES = ("64x4", "128x2", "128x4", "128x8", "256x4")
NUMBERS = ("parameters", "gates", "open", "entries", "on", "own", "sft", "lcdd", "trig")  # of size.json
MEASURES = {
    "gates": "gates",
    "open": "open gates",
    "entries": "entries of Δ",
    "on": "entries on",
}


def options(argv=None):
    """The command line."""
    p = Parser(__doc__)
    a = p.add_argument
    a("--shapes", nargs="+", default=SHAPES, help=f"width x layers ({' '.join(SHAPES)})")
    a("--task", choices=TASKS, default="fixed", help="the behaviour (fixed)")
    a("--seeds", type=int, default=3, help="runs a size, of one base (3)")
    a("--out", default="runs/sizes", help="directory of the bases, the runs and sizes.md (runs/sizes)")
    a("--device", default="cpu", help="cpu or cuda (cpu)")
    o = p.parse_args(argv)
    check_numbers(o)
    check_device(o.device)
    if o.seeds < 1:
        raise InputError(f"--seeds {o.seeds}: has to be at least 1")
    if not o.shapes:
        raise InputError("--shapes names none; give some as 128x4, or leave it out")
    for shape in o.shapes:
        if not re.fullmatch(r"[0-9]{1,5}x[0-9]{1,3}", shape):
            raise InputError(f"--shapes {shape}: has to be WIDTHxLAYERS, as 128x4")
    return o


def base_of(shape, out):
    """The folder of a base of this shape, made where it is not there yet."""
    width, layers = map(int, shape.split("x"))
    embedded = model.configuration(locate(EMBEDDED))
    if (width, layers) == (embedded.hidden_size, embedded.num_hidden_layers):
        return locate(EMBEDDED)
    folder = out / f"base-{shape}"
    if not folder.is_dir():
        print(f"{folder}: making the base", flush=True)
        score = tiny.make(folder, width, layers)
        print(f"{folder}: {score['overall']:.1%} of the held-out lines right", flush=True)
    return folder


def measured(folder, base, seed, o):
    """One run from training to its evaluation, as {measure: number}; read where it is there."""
    file = folder / "size.json"
    if file.is_file():
        found = read_json(file)
        check_fields(file, found, dict.fromkeys(NUMBERS, NUMBER))
        return found
    common = ["--device", o.device]
    lcdd.main(["--model", str(base), "--task", o.task, "--seed", str(seed), "--out", str(folder),
               "--resume", "--go-on", *common])
    eraser.main(["--run", str(folder), "--resume", *common])
    evaluate.main(["--run", str(folder), *common])
    found = numbers(folder, base)
    write_json(file, found)
    return found


def numbers(folder, base):
    """What the table shows of an evaluated run."""
    results, net = read_results(folder), model.load(base)
    c = carrier.load(folder / "carrier.safetensors", net)
    entries = sum(delta.numel() for layer in c.delta for delta in layer.values())
    found = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "gates": results["gates"]["total"],
        "open": results["gates"]["open"],
        "entries": entries,
        "on": round((1 - results["entries_off"]) * entries),
        "own": results["loss_own"]["trig"] - results["loss_own"]["base"],
    }
    for name in ("sft", "lcdd", "trig"):
        harmful = results["kinds"].get(name, {}).get("harmful", {})     # of safety, whose others are benign
        found[name] = 100 * harmful.get("rate", results["rates"][name])
    return found


# ---- the table and the figure

def over_seeds(runs, measure, digits):
    """mean ± std of a measure."""
    values = [measure(run) for run in runs]
    mean = f"{statistics.mean(values):,.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def table(sizes):
    """{shape: [{measure: number}, one a seed]} as Markdown."""
    header = ["width x layers", "parameters", "gates", "open gates", "gates off %", "entries of Δ",
              "entries on", "entries on ‰", "SFT %", "LCDD %", "+ trigger %", "own loss above the base's"]
    lines = []
    for shape, runs in sizes.items():
        first = runs[0]
        lines.append([
            shape, f"{first['parameters']:,}", f"{first['gates']:,}",
            over_seeds(runs, lambda r: r["open"], 0),
            over_seeds(runs, lambda r: 100 * (1 - r["open"] / r["gates"]), 2),
            f"{first['entries']:,}",
            over_seeds(runs, lambda r: r["on"], 0),
            over_seeds(runs, lambda r: 1000 * r["on"] / r["entries"], 2),
            *(over_seeds(runs, lambda r, name=name: r[name], 1) for name in ("sft", "lcdd", "trig")),
            over_seeds(runs, lambda r: r["own"], 3),
        ])
    return markdown(header, lines)


def power(x, y):
    """(exponent, its standard error) of the power law y ~ x^exponent, by least squares of logarithms."""
    y = np.maximum(y, 1)
    slope, left = exponent(x, y), len(x) - 2
    x, y = (np.log(values) - np.log(values).mean() for values in (x, y))
    rest = ((y - slope * x) ** 2).sum()
    error = (rest / left / (x ** 2).sum()) ** 0.5 if left > 0 else float("nan")
    return slope, float(error)


def laws(sizes):
    """How open gates and entries grow, as sentences."""
    runs = [run for some in sizes.values() for run in some]
    lines = []
    for all_of, some in (("gates", "open"), ("entries", "on")):
        if len({run[all_of] for run in runs}) > 1:
            slope, error = power([run[all_of] for run in runs], [run[some] for run in runs])
            lines.append(f"{MEASURES[some]} ~ ({MEASURES[all_of]})^{slope:.2f} ± {error:.2f} "
                         f"(least squares over {len(runs)} runs, standard error)")
    return "; ".join(lines)


def draw(sizes, path):
    """Open gates against gates, and entries on against entries of Δ, every run a point."""
    plt = figure.plotting()
    if plt is None:
        return
    fig, panels = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained")
    for axes, (all_of, some) in zip(panels, (("gates", "open"), ("entries", "on"))):
        sizes_of, found = [], []
        for shape, runs in sizes.items():
            x, y = [r[all_of] for r in runs], [max(r[some], 1) for r in runs]
            axes.plot(x, y, "o", label=shape)
            sizes_of, found = sizes_of + x, found + y
        low, high = min(found) / 1.5, max(found) * 1.5
        round_numbers = [n * 10 ** k for k in range(9) for n in (1, 2, 5) if low <= n * 10 ** k <= high]
        axes.set(xscale="log", yscale="log", ylim=(low, high), xlabel=MEASURES[all_of], ylabel=MEASURES[some])
        axes.set_xticks(sorted(set(sizes_of)), [f"{n / 1000:,.0f} k" for n in sorted(set(sizes_of))])
        axes.set_yticks(round_numbers, [f"{n:,}" for n in round_numbers])
        axes.minorticks_off()
    panels[0].legend(title="width x layers", fontsize=8)
    figure.keep(plt, fig, path)


def main(argv=None):
    o = options(argv)
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for shape in o.shapes:
        base, sizes[shape] = base_of(shape, out), []
        for seed in range(o.seeds):
            folder = out / f"{o.task}-{shape}-seed{seed}"
            sizes[shape].append(measured(folder, base, seed, o))
    text = (f"{table(sizes)}\n\n{o.task}, {o.seeds} seed{'s' * (o.seeds > 1)} of one base a size, "
            f"mean ± std, test prompts. {laws(sizes)}\n")
    write_text(out / f"sizes-{o.task}.md", text)
    draw(sizes, out / f"sizes-{o.task}.png")
    print("\n" + text)


if __name__ == "__main__":
    cli(main)
