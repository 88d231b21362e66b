"""What triggers of each length leave of a behaviour, drawn from the tables of lab.ablate.

    python -m lab.curve runs/table/tables.json docs/lengths.png     one panel a behaviour
"""
import files  # noqa: F401, before torch: it sets how threads wait
import statistics
from pathlib import Path

import figure
from console import Parser, check_numbers, cli
from files import NUMBER, check_fields, read_json
from lab.tables import CURVE, found_as

TABLES = {"*": [{"*": {"rate": NUMBER}}]}   # {task: one {row: {metric: number}} a seed}


def options(argv=None):
    """The command line."""
    p = Parser(__doc__)
    p.add_argument("tables", nargs="+", help="one or several tables.json of lab.ablate")
    p.add_argument("picture", help="the PNG to write")
    p.add_argument("--full", type=int, default=16, help="tokens of the runs' own triggers (16)")
    o = p.parse_args(argv)
    check_numbers(o)
    return o


def points(seeds, model):
    """
    [(n, mean, std)] of the behaviour that triggers of n tokens leave of a model, in percent, over
    seeds; of harmful prompts where others are asked, too.
    """
    prefix, found = f"{model} circuit ", []
    lengths = {row.removeprefix(prefix) for s in seeds for row in s if row.startswith(prefix)}
    for n in sorted(int(n) for n in lengths if n.isdigit()):
        row = f"{prefix}{n}"
        have = [s for s in seeds if row in s]
        key = found_as(have, row, "rate")
        values = [100 * s[row][key] for s in have]
        found.append((n, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
    return found


def draw(tasks, path, full=None):
    """
    One panel a task of {task: seeds}; `full`: the length of the run's own trigger, where a row without a
    length belongs.
    """
    plt = figure.plotting()
    if plt is None:
        return
    fig, panels = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.6), layout="constrained",
                               squeeze=False)
    for axes, (task, seeds) in zip(panels[0], tasks.items()):
        for model, label in CURVE.items():
            some = points(with_full(seeds, model, full), model)
            if some:
                n, mean, std = zip(*some)
                axes.errorbar(n, mean, yerr=std, marker="o", ms=4, capsize=3, label=label)
        axes.set(xscale="log", ylim=(-3, 103), xlabel="tokens of the trigger",
                 title=f"{task}, {len(seeds)} seed{'s' * (len(seeds) > 1)}")
        ticks = sorted({n for line in axes.get_lines() for n in line.get_xdata()})
        axes.set_xticks(ticks, [f"{n:g}" for n in ticks])
        axes.minorticks_off()
    panels[0][0].set_ylabel("behaviour left, % (mean ± std)")
    if panels[0][-1].get_legend_handles_labels()[0]:
        panels[0][-1].legend(fontsize=8)
    figure.keep(plt, fig, path)


def with_full(seeds, model, full):
    """The seeds with the row of the run's own trigger under its length."""
    row = f"{model} circuit"
    if full is None:
        return seeds
    return [s | {f"{row} {full}": s[row]} if row in s else s for s in seeds]


def main(argv=None):
    o, tasks = options(argv), {}
    for name in o.tables:
        found = read_json(Path(name))
        check_fields(name, found, TABLES)
        tasks |= found
    draw(tasks, Path(o.picture), o.full)


if __name__ == "__main__":
    cli(main)
