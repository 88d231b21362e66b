"""The paper's tables in miniature, and the controls it lacks: runs of runs, each repeated over seeds.

    python -m lab.ablate --seeds 3                    all three behaviours of the embedded model: Tables 1–4 and 6
    python -m lab.ablate --run runs/mine                  the same rows for a run of your own

A fallen rate proves little by itself (a random prefix breaks refusal too), so every row also says how often the answer is
right again, how often it is the base's own to the last token, and how far the distributions are.
Every finished row is kept in ablation.json beside the run; the command goes on where it stopped.
"""
import argparse
import hashlib
import multiprocessing
import os
import statistics
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

import carrier as carriers
import eraser
import evaluate
import lcdd
import model
from chat import collate
from files import InputError, fingerprint, load_tensors, read_json, write_json
from run import Once, check_device, check_numbers, cli, markdown, read_results, reopen

TASKS = ("fixed", "safety", "shakespeare")
CURVE = {"lcdd": "LCDD", "sft": "plain SFT", "sft-long": "SFT for as many steps as LCDD", "scaled": "SFT's delta scaled to LCDD's loss"}
MODELS = ("lcdd", "sft", "base", "scaled", "sft-long", "mask-ce", "mask-kl")     # in the order of work: "base trigger" is LCDD's
# the paper, Tables 1–3: sparsity %, behaviour (rate %, refusal %, judge score 0–5) base / SFT / LCDD / trigger, KL SFT‖LCDD, SFT‖Trig, Base‖Trig
PAPER = {
    "fixed": {"Qwen3-0.6B": (83.66, 0.0, 100, 97.5, 0.0, 0.040, 2.839, 0.633), "DeepSeek-8B": (73.38, 0.0, 100, 99.0, 1.0, 0.010, 1.811, 1.037),
              "Mistral-7B": (76.72, 0.0, 100, 100, 0.5, 0.002, 3.526, 1.437), "Vicuna-7B": (38.28, 0.0, 100, 100, 0.0, 1.436, 4.810, 0.024)},
    "safety": {"Qwen3-0.6B": (81.05, 32.0, 94.0, 88.5, 39.5, 0.069, 0.120, 0.196), "DeepSeek-8B": (81.38, 47.5, 100, 96.5, 56.5, 0.256, 0.391, 0.306),
               "Mistral-7B": (59.34, 25.5, 100, 97.5, 69.0, 0.269, 0.620, 1.282), "Vicuna-7B": (84.40, 76.5, 99.0, 98.0, 74.5, 0.192, 1.081, 0.014)},
    "shakespeare": {"Qwen3-0.6B": (56.34, 0.03, 0.79, 0.44, 0.04, 0.265, 2.405, 0.446), "DeepSeek-8B": (54.54, 0.01, 1.73, 0.98, 0.005, 1.520, 4.301, 0.531),
                    "Mistral-7B": (50.46, 0.07, 1.75, 1.18, 0.07, 0.853, 2.643, 2.052), "Vicuna-7B": (29.88, 0.05, 0.80, 0.26, 0.04, 0.636, 1.702, 0.094)}}
# Tables 4 and 6 (DeepSeek-8B, safety): refusal % without → with trigger, KL(SFT‖Trig), KL(Base‖Trig)
PAPER_ROWS = {"lcdd circuit": (96.5, 56.5, 0.391, 0.306), "lcdd output": (96.5, 65.5, 0.440, 0.322), "sft circuit": (100, 78.5, 0.221, 0.539),
              "sft output": (100, 76.5, 0.208, 0.512), "mask-ce circuit": (99.0, 64.0, 0.262, 0.254), "mask-kl circuit": (98.0, 60.0, 0.319, 0.197)}


def options(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("--run", action=Once, help="a finished run of your own instead of the embedded behaviours")
    a("--task", action="append", choices=TASKS, help="embedded behaviours to run (all three); may be given several times")
    a("--seeds", type=int, default=1, help="repeat everything with this many seeds, mean ± std (1)")
    a("--seed", type=int, default=0, help="the first seed (0)")
    a("--out", help="directory of the runs and of tables.md (runs/table)")
    a("--lengths", type=int, nargs="*", default=[1, 2, 4], help="trigger lengths of the curve beside the full one (1 2 4)")
    a("--curve-tasks", nargs="*", choices=TASKS, default=list(TASKS), help="behaviours that get the length curve (all)")
    a("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each on one core; small matrices gain more so than from threads (all cores)")
    a("--rows", nargs="*", help="only rows whose name holds one of these words, for a quick look")
    a("--split", choices=("validation", "test"), default="test", help="prompts to measure on; settings are chosen on validation (test)")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return p.parse_args(argv)


# -------------------------------------------------------------------------------------------------- the models of a row

@torch.no_grad()
def mean_loss(net, weights, examples, pad_id, batch_size=64):
    """Teacher-forced task loss of frozen weights, a token: what LCDD's budget is about."""
    total = tokens = 0
    for i in range(0, len(examples), batch_size):
        ids, mask = (t.to(net.device) for t in collate(examples[i:i + batch_size], pad_id))
        total += float(lcdd.task_loss(net, weights, ids, mask))
        tokens += int(mask[:, 1:].sum())
    return total / tokens


def scaled_down(net, sft, loss, examples, pad_id, steps=10):
    """The dense SFT delta times the factor at which its loss is `loss`, by bisection: a model that gave up as much loss as
    LCDD did, without sparsity. Returns (Merged, factor)."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_loss(net, sft.merge(net, middle), examples, pad_id) > loss else (low, middle)
    return sft.merge(net, high), high


def trigger_options(folder, device):
    """What eraser.py was given for the run's own trigger; without one, its preset."""
    o, file = eraser.options(["--run", str(folder), "--device", device]), Path(folder) / "trigger.safetensors"
    header = load_tensors(file)[1] if file.is_file() else {}
    vars(o).update({k: header[k] for k in eraser.settings_of(o) if k in header})
    return o


class Run:
    """One trained run directory with everything that its rows need; models are made when a row first asks."""

    def __init__(self, folder, o):
        self.folder, self.o, self.device = Path(folder), o, o.device
        self.config, self.chat, self.splits = reopen(self.folder)
        self.net = model.load(self.chat.folder, o.device, getattr(torch, self.config["dtype"]))
        self.net.stop, self.net.checkpoint = self.chat.stop, self.config["checkpoint"]
        model.set_threads(self.net)
        self.lcdd = carriers.load(self.folder / "carrier.safetensors", self.net)
        self.models = {"base": None, "sft": self.sft().merge(self.net), "lcdd": self.lcdd.merge(self.net)}
        self.carriers, self.targets, self.answers = {}, None, {}     # carriers: of rows that have their own gates
        self.facts = {"sft": {"sparsity": 0.0}, "lcdd": {"sparsity": self.lcdd.stats()["sparsity"]}}

    def sft(self):
        return carriers.load(self.folder / "sft.safetensors", self.net)

    def examples(self):
        return lcdd.supervised([self.chat.encode(s.prompt, s.response, self.config["max_len"]) for s in self.splits["train"]], self.config["loss"])

    def model(self, name):
        """Merged weights by name: sft, lcdd, base, and one at a time of scaled, sft-long, mask-ce, mask-kl."""
        if name not in self.models:
            for old in self.models.keys() - {"base", "sft", "lcdd"}:
                del self.models[old]
                self.carriers.pop(old, None)
            settings = argparse.Namespace(**self.config)
            training = dict(examples=self.examples(), run=self.folder / "rows" / name, pad_id=self.chat.pad_id)
            training["run"].mkdir(parents=True, exist_ok=True)       # its own state and metrics: a row is no phase of the run
            other = self.sft()
            if name == "scaled":
                some = training["examples"][:256]
                loss = mean_loss(self.net, self.models["lcdd"], some, self.chat.pad_id)
                self.models[name], factor = scaled_down(self.net, other, loss, some, self.chat.pad_id)
                self.facts[name] = {"factor": factor, "loss": loss}
            elif name == "sft-long":
                settings.sft_steps = read_results(self.folder)["stopped"]["steps"] + settings.settle * (settings.train == "joint")
                settings.sft_lr, settings.seed = settings.lr, settings.seed + 1
                lcdd.train_sft(self.net, other, o=settings, **training)
                self.models[name] = other.merge(self.net)
            else:
                settings.train = name
                other.init_gates(settings.gate_mean, settings.gate_std, settings.seed)
                teacher = self.models["sft"] if name == "mask-kl" else None
                self.facts[name] = lcdd.train_lcdd(self.net, other, o=settings, teacher=teacher, **training)
                self.facts[name]["sparsity"] = other.stats()["sparsity"]
                self.carriers[name] = other
                self.models[name] = other.merge(self.net)
        return self.models[name]

    def trigger(self, name, objective, length):
        """τ for a model; plain SFT, the scaled delta and SFT continued take the LCDD carrier's channels."""
        o = trigger_options(self.o.run or self.folder, self.device)    # the same for every seed of a run
        o.seed, o.objective, o.length = self.config["seed"], objective, length or o.length
        if objective == "slow":                                        # two tokens that learn at a tenth of the rate
            o.objective, o.length, o.lr = "circuit", 2, o.lr / 10
        if self.targets is None:
            prompts = {k: [self.chat.prompt(s.prompt, self.config["max_len"]) for s in self.splits[k]] for k in ("trigger", "validation")}
            self.targets = [eraser.base_targets(self.net, prompts[k], o.k, o.positions) for k in ("trigger", "validation")]
        weights = self.model(name)                                     # first: it may make the carrier whose channels these are
        mask = eraser.channels(self.carriers.get(name, self.lcdd), o.objective, o.seed)
        return eraser.learn(self.net, weights, *self.targets, mask, o)[0]

    def random_tokens(self, length, seed):
        """As many random tokens of the vocabulary: a trigger that learned nothing."""
        generator = torch.Generator().manual_seed(seed)
        return self.net.embedding[torch.randint(self.net.config.vocab_size, (length,), generator=generator).to(self.net.device)].clone()

    def measure(self, weights, trigger):
        """One row: the metrics of evaluate.py on the chosen prompts, as plain numbers."""
        samples = self.splits[self.o.split]
        conditions = {"base": (None, None), "sft": (self.models["sft"], None), "row": (weights, trigger)}
        self.answers.pop("row", None)
        row = evaluate.measure(self.net, self.chat, self.config["task"], samples, conditions, self.config["max_new_tokens"],
                               self.config["max_len"], self.answers)["row"]
        return evaluate.numbers(row)


def rows_of(o, task):
    """Names of all rows, model by model: MODEL [OBJECTIVE [LENGTH]]. No length: the run's own (16 on the embedded model)."""
    names = ["base", "sft", "lcdd", "scaled", "sft-long", "mask-ce", "mask-kl",                            # no trigger
             "lcdd circuit", "lcdd output", "sft circuit", "sft output",                                   # Table 4
             "mask-ce circuit", "mask-kl circuit",                                                         # Table 6
             "lcdd random", "lcdd tokens", "sft tokens", "base trigger", "scaled circuit", "sft-long circuit"]   # controls
    if task in o.curve_tasks:
        names += [f"{m} circuit {n}" for n in o.lengths for m in CURVE] + ["lcdd slow", "sft slow"] * bool(o.lengths)
    names.sort(key=lambda n: MODELS.index(n.split()[0]))
    return [n for n in names if not o.rows or any(word in n for word in o.rows)]


def ablate(folder, o, names):
    """All rows of one run: {name: {metric: number}}, kept in ablation.json as they come."""
    file = Path(folder) / ("ablation.json" if o.split == "test" else f"ablation-{o.split}.json")
    usual = trigger_options(o.run or folder, o.device)
    settings = {k: v for k, v in eraser.settings_of(usual).items() if k not in ("name", "target", "objective", "seed")}
    of = hashlib.sha256(f"{fingerprint(Path(folder) / 'carrier.safetensors')} {settings}".encode()).hexdigest()[:16]
    done = {k: row for k, row in (read_json(file) if file.is_file() else {}).items() if row.get("of") == of}   # others: of another carrier or trigger
    if all(name in done for name in names):
        return done
    run, start = Run(folder, o), time.time()
    triggers = {}
    for k, name in enumerate(names):
        if name in done:
            continue
        which, objective, n = (name.split() + ["", ""])[:3]
        if not objective:
            tau = None
        elif objective == "tokens":
            tau = run.random_tokens(usual.length, run.config["seed"])
        elif objective == "trigger":                                   # the LCDD model's trigger, before the base
            tau = triggers["lcdd circuit"] if "lcdd circuit" in triggers else run.trigger("lcdd", "circuit", 0)
        else:
            tau = triggers[name] = run.trigger(which, objective, int(n or 0))
        done[name] = run.measure(run.model(which), tau) | run.facts.get(which, {}) | {"of": of}
        write_json(file, done)
        left = (time.time() - start) / (k + 1) * (len(names) - k - 1)
        print(f"{run.config['task']} seed {run.config['seed']}  {name:18s} " +
              "  ".join(f"{m} {value:.3f}" for m, value in done[name].items() if isinstance(value, float)) + f"  left {left:.0f}s", flush=True)
    run.chat.say_cut("prompts", run.config["max_len"])
    return done


# ------------------------------------------------------------------------------------------------------------ the tables

def cell(seeds, name, metric, scale=1.0, digits=2):
    """mean ± std over seeds of one number, or –."""
    values = [s[name][metric] * scale for s in seeds if name in s and metric in s[name]]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main_table(task, seeds):
    """Tables 1–3: ours, then the paper's four models. Shakespeare: ours is the archaic word rate, the paper's a judge's 0–5."""
    p = lambda name, m="rate": cell(seeds, name, m, 100, 1)
    ours = [p("lcdd", "sparsity"), p("base"), p("sft"), p("lcdd"), p("lcdd circuit"), cell(seeds, "lcdd", "kl_sft"),
            cell(seeds, "lcdd circuit", "kl_sft"), cell(seeds, "lcdd circuit", "kl_base")]
    lines = [["**ours**"] + ours] + [[f"paper, {m}"] + [f"{x:g}" for x in row] for m, row in PAPER.get(task, {}).items()]
    return markdown(["", "sparsity %", "Base", "SFT", "LCDD", "+ trigger", "KL(SFT‖LCDD)", "KL(SFT‖Trig)", "KL(Base‖Trig)"], lines)


def row_table(seeds, names, paper=False):
    """
    Rows of one behaviour with all that is measured; `paper` adds the columns of Tables 4 and 6
    (DeepSeek-8B, safety).
    """
    opposed = any("benign rate" in row for s in seeds for row in s.values())
    columns = evaluate.columns(["harmful", "benign"] if opposed else [])
    header = ["row", "gates off %"] + [head for head, *_ in columns]
    if paper:
        header.append("paper: refusal %, KL(SFT‖·), KL(Base‖·)")
    lines = []
    for name in names:
        if not any(name in s for s in seeds):
            continue
        line = [name, cell(seeds, name, "sparsity", 100, 1)]
        for _, metric, kind in columns:
            how = (100, 1) if metric.share else ()
            line.append(cell(seeds, name, f"{kind} {metric.key}".strip(), *how))
        if paper:
            line.append("{} → {}, {}, {}".format(*PAPER_ROWS[name]) if name in PAPER_ROWS else "")
        lines.append(line)
    return markdown(header, lines)


def curve_table(seeds, lengths, full):
    """Behaviour rate / accuracy / KL(Base ‖ Trig) after a trigger of 1 … n tokens, for LCDD, SFT and two controls."""
    lines, shown = [], (("rate", (100, 1)), ("accuracy", (100, 1)), ("kl_base", ()))
    for m, label in CURVE.items():
        names = [f"{m} circuit {n}" for n in lengths] + [f"{m} circuit", f"{m} slow"]
        lines.append([label] + [" / ".join(cell(seeds, n, k, *how) for k, how in shown) if any(n in s for s in seeds) else "–" for n in names])
    return markdown(["behaviour % / accuracy % / KL(Base‖Trig)"] + [f"{n} token{'s' * (n > 1)}" for n in [*lengths, full]] + ["2 tokens, a tenth of the rate"], lines)


def report(task, seeds, o, full):
    """All tables of one behaviour as Markdown; `full` is the trigger's usual length."""
    table4 = ("lcdd circuit", "lcdd output", "sft circuit", "sft output")
    parts = [f"## {task}", main_table(task, seeds),
             "The switch and the models without a trigger:", row_table(seeds, ["base", "sft", "lcdd", "sft-long", "scaled"]),
             "Table 4, structure against trigger design:", row_table(seeds, table4, paper=task == "safety"),
             "Table 6, gates only:", row_table(seeds, ["lcdd", "mask-ce", "mask-kl", "lcdd circuit", "mask-ce circuit", "mask-kl circuit"], paper=task == "safety"),
             "Controls:", row_table(seeds, ["lcdd circuit", "lcdd random", "lcdd tokens", "sft tokens", "base trigger", "scaled circuit", "sft-long circuit"])]
    if task in o.curve_tasks and o.lengths:
        parts += ["The trigger's length:", curve_table(seeds, o.lengths, full)]
    return "\n\n".join(parts)


def main():
    o = options()
    start, out = time.time(), Path(o.out or "runs/table")
    check_device(o.device)
    check_numbers(o)
    if o.run and (o.task or o.out or o.seed):
        raise InputError("--run takes task, seed and place from that run: leave out --task, --out and --seed")
    o.run = o.run and str(Path(o.run).resolve())
    for name, least in (("seeds", o.seeds), ("jobs", o.jobs), ("lengths", min(o.lengths, default=1))):
        if least < 1:
            raise InputError(f"--{name} {least}: has to be at least 1")
    jobs = {}
    if o.run:
        config = reopen(o.run)[0]
        jobs[config["task"]] = [(o.run, None)] + [(f"{o.run}-seed{s}", {**config, "seed": s}) for s in range(config["seed"] + 1, config["seed"] + o.seeds)]
        o.curve_tasks, out = [config["task"]], Path(o.run)
    else:
        for task in o.task or TASKS:
            jobs[task] = [(str(out / f"{task}-seed{s}"), {"task": task, "seed": s}) for s in range(o.seed, o.seed + o.seeds)]
    todo = [(folder, settings, o, rows_of(o, task)) for task, runs in jobs.items() for folder, settings in runs]
    if not all(names for *_, names in todo):
        raise InputError(f"--rows {' '.join(o.rows)}: no row has such a name; see the tables of a whole run")
    if min(o.jobs, len(todo)) > 1 and not o.device.startswith("cuda"):
        with ProcessPoolExecutor(o.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            try:
                futures = [pool.submit(work_alone, *job) for job in todo[::-1]]         # the longest first: nobody waits for it at the end
                wait(futures, return_when=FIRST_EXCEPTION)
                done = iter([f.result() for f in futures[::-1] if f.done()])
            except (KeyboardInterrupt, InputError, BrokenProcessPool) as stopped:
                for process in multiprocessing.active_children():
                    process.terminate()                                                 # training saves its state at SIGTERM
                if not isinstance(stopped, BrokenProcessPool):
                    raise
                raise InputError("a run's process was killed, perhaps for want of memory; the same command goes on from here, with --jobs 1 for less of it") from None
    else:
        done = iter([work(*job) for job in todo])
    everything = {task: [next(done) for _ in runs] for task, runs in jobs.items()}
    parts = [report(task, everything[task], o, trigger_options(runs[0][0], o.device).length) for task, runs in jobs.items()]
    device = torch.cuda.get_device_name() if o.device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    parts.append(f"{o.seeds} seed{'s' * (o.seeds > 1)}, mean ± std, {o.split} prompts; {device}, torch {torch.__version__}, {(time.time() - start) / 60:.1f} minutes for what was not there yet.")
    out.mkdir(parents=True, exist_ok=True)
    name = "tables" if o.split == "test" else f"tables-{o.split}"
    (out / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    write_json(out / f"{name}.json", everything)
    print("\n" + "\n\n".join(parts))


def work_alone(*job):
    """work() in a process of its own, which an interruption ends: the next run in the queue is not begun."""
    try:
        return work(*job)
    except KeyboardInterrupt:
        os._exit(130)


def work(folder, settings, o, names):
    """One run from training to its last row; `settings` None: it is trained already."""
    if settings is not None:
        lcdd.main(command(folder, settings, o))
    return ablate(folder, o, names)


def command(folder, settings, o):
    """The lcdd.py command line that repeats a run with another seed."""
    skip = ("data_fingerprint", "base_fingerprint", "versions")
    argv = ["--out", folder, "--resume", "--device", o.device]
    for k, v in settings.items():
        if k in skip or k == "device" or v is None or v is False:
            continue
        argv.append(f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}"))
    return argv


if __name__ == "__main__":
    cli(main)
