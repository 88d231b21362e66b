"""
The figure of a run: training, open gates, rates and divergences.
"""
import io
import math
import sys

import torch

import carrier as carriers
from files import read_jsonl, whole
from metrics import METRICS, called
from parallel import once


def draw_training(axes, rows):
    """LCDD's loss against its budget, with λ and the share of gates off, step by step."""
    steps = [r["step"] + 1 for r in rows]
    axes.plot(steps, [max(r["ema"], 1e-6) for r in rows], label="loss (average)")
    axes.plot(steps, [r.get("budget") or math.nan for r in rows], "k--", lw=1, label="budget ε")
    axes.plot(steps, [r["lambda"] for r in rows], color="tab:orange", lw=1, label="λ")
    title = "LCDD: loss against budget, λ, sparsity"
    axes.set(yscale="log", xlabel="optimizer step", title=title)
    share = axes.twinx()
    share.plot(steps, [r["sparsity"] for r in rows], color="tab:green", label="gates off")
    share.set(ylim=(0, 1), ylabel="share of gates off")
    lines = axes.get_lines() + share.get_lines()
    axes.legend(lines, [x.get_label() for x in lines], loc="lower right", fontsize=8)


def is_point(row):
    """Has a line of the log all numbers that draw_training() needs?"""
    needed = [row.get(name) for name in ("step", "ema", "lambda", "sparsity")]
    if row.get("budget") is not None:
        needed.append(row["budget"])
    return all(type(x) in (int, float) and abs(x) < 1e300 for x in needed)


def draw_gates(axes, carrier, sparsity):
    """The share of open gates, layer by group."""
    groups = carrier.logits.detach().cpu().split(list(carrier.sizes.values()), dim=1)
    opened = torch.stack([(g > 0).float().mean(1) for g in groups], dim=1)   # (L, 8)
    image = axes.imshow(opened.numpy(), aspect="auto", vmin=0, cmap="viridis")
    title = f"share of gates open ({1 - sparsity:.1%} in all)"
    axes.set(xticks=range(len(groups)), yticks=range(len(opened)), ylabel="layer", title=title)
    axes.set_xticklabels(carriers.GROUPS, rotation=40, ha="right", fontsize=8)
    axes.figure.colorbar(image, ax=axes)


def draw_bars(axes, results, metrics, title):
    """Metrics as bars beside each other for every condition, with their confidence intervals."""
    names = [n for n in ("base", "sft", "lcdd", "trig") if n in results["rates"]]
    width = 0.8 / len(metrics)
    for i, metric in enumerate(metrics):
        values, intervals = results.get(metric.entry, {}), results["ci"].get(metric.entry, {})
        x, y, below, above = [], [], [], []
        for j, name in enumerate(names):
            key = metric.prefix + name
            if key in values:
                low, high = intervals[key]
                x.append(j + (i - (len(metrics) - 1) / 2) * width)
                y.append(values[key])
                below.append(max(0, values[key] - low))
                above.append(max(0, high - values[key]))
        if x:
            axes.bar(x, y, width, yerr=[below, above], label=metric.header, capsize=2,
                     error_kw={"lw": 0.8})
    axes.set(xticks=range(len(names)), title=f"{title} (95 % CI)")
    axes.set_xticklabels([called(n, results) for n in names])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, ncols=2, loc="upper center")


def plotting():
    """matplotlib.pyplot for a file, or None and a line that says so."""
    try:
        import matplotlib
    except ImportError:
        return print("no figure: matplotlib is not installed (pip install matplotlib)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def keep(plt, fig, path):
    """Write a figure as PNG, whole or not at all, and close it."""
    picture = io.BytesIO()
    try:
        fig.savefig(picture, dpi=110, format="png")
    except ValueError as e:                     # of numbers in a damaged log, say
        return print(f"no figure: {e}", file=sys.stderr)
    finally:
        plt.close(fig)
    with whole(path) as partial:
        partial.write_bytes(picture.getvalue())


@once
def draw(run, results, carrier, path):
    """Training, open gates, and the metrics of the four conditions: one PNG of a run."""
    plt = plotting()
    if plt is None:
        return
    file = run / "metrics.jsonl"
    logged = read_jsonl(file) if file.is_file() else []
    steps = [row for row in logged if row.get("phase") == "lcdd" and is_point(row)]
    fig, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    training, gates, shares, nats = axes.flat
    if steps:
        draw_training(training, steps)
    draw_gates(gates, carrier, results["sparsity"])
    draw_bars(shares, results, [m for m in METRICS if m.share], "share of test prompts")
    shares.set(ylim=(0, 1.3))
    draw_bars(nats, results, [m for m in METRICS if not m.share], "nats a token")
    nats.set_yscale("symlog", linthresh=0.1)
    nats.set_ylim(0, 4 * nats.get_ylim()[1])                 # room for the legend
    fig.suptitle(f"{results['task']}: base, SFT, LCDD, LCDD + trigger", parse_math=False)
    keep(plt, fig, path)
