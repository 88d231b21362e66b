"""The paper's tables in miniature, and the controls it lacks: runs of runs, repeated over seeds.

    python -m lab.ablate --seeds 3        all three behaviours of the embedded model: Tables 1–4 and 6
    python -m lab.ablate --run runs/mine  the same rows for a run of your own

A fallen rate proves little by itself (a prefix that learned nothing may move it too), so every row also says
how often the answer is right again, how often it is the base's own to the last token, and how far
the distributions are. Every finished row is kept in ablation.json beside the run; the command
resumes where it stopped.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import argparse
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

import carrier as carriers
import eraser
import evaluate
import metrics
import lcdd
import model
import training
from behaviour import BEHAVIOURS
from files import (
    NUMBER, InputError, check_fields, fingerprint, load_tensors, read_header, read_json, save_tensors,
    write_json)
from lab import curve
from lab.tables import CHOICES, CONTROLS, CURVE, F_3, TABLE_4, TABLE_6, report
from console import Parser, check_device, check_numbers, cli, duration, fields_of
from run import alone, load_model, locate, read_config, read_results, reopen
from settings import check as check_training
from settings import check_bounds
from settings import options as settings_of_lcdd
from settings import parser as training_parser

# options that are fitted where they are not given: numbers in every config.json
FITTED = ("steps", "sft_steps", "lr", "sft_lr", "gate_lr", "micro_batch", "lambda_max", "eta_grow",
          "pace")
TASKS = tuple(name for name in BEHAVIOURS if name != "own")
# the order of work: "base trigger" is LCDD's, and so comes after it
MODELS = ("lcdd", "sft", "base", "scaled", "sft-long", "mask-ce", "mask-kl", "noise", "blind", "floor-0")
PLAIN = ("base", "sft", "lcdd", "scaled", "sft-long", "mask-ce", "mask-kl",  # without a trigger
         "noise", "blind", "floor-0")
# LCDD once more with other settings: the paper's gates, whose initial noise decides; gates that see
# the penalty and not the task; no floor under the budget
VARIANTS = {
    "noise": dict(select=0.0, gate_std=0.5),
    "blind": dict(select=1e-9, gate_std=0.5),
    "floor-0": dict(floor=0.0),
}


def options(argv=None):
    """The command line."""
    p = Parser(__doc__)
    a = p.add_argument
    a("--run", help="a finished run of your own instead of the embedded behaviours")
    a("--task", action="append", choices=TASKS,
      help="embedded behaviours to run (all three); may be given several times")
    a("--seeds", type=int, default=1, help="repeat everything with this many seeds, mean ± std (1)")
    a("--seed", type=int, default=0, help="the first seed (0)")
    a("--out", help="directory of the runs and of tables.md (runs/table)")
    a("--lengths", type=int, nargs="*", default=[1, 2, 4],
      help="trigger lengths of the curve beside the full one (1 2 4)")
    a("--curve-tasks", nargs="*", choices=TASKS, default=list(TASKS),
      help="behaviours that get the length curve (all)")
    a("--jobs", type=int, default=os.cpu_count() or 1,
      help="runs at a time, each on one core; small matrices gain more so than from threads "
           "(all cores)")
    a("--paper-trigger", action=argparse.BooleanOptionalAction, default=True,
      help="rows whose triggers have the paper's settings, 2,000 steps each (on)")
    a("--rows", nargs="*",
      help="only rows whose name holds one of these words, for a quick look")
    a("--split", choices=("validation", "test"), default="test",
      help="prompts to measure on; settings are chosen on validation (test)")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return p.parse_args(argv)


# ---- the models of a row

BATCH = 64  # samples a forward pass where only a loss is wanted


def scaled_down(net, sft, loss, examples, pad_id, steps=10):
    """
    The dense SFT delta times the factor at which its loss is `loss`, by bisection: a model that
    gave up as much loss as LCDD did, without sparsity. Returns (Merged, factor).
    """
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        if training.mean_loss(net, sft.merge(net, middle), examples, pad_id, BATCH) > loss:
            low = middle
        else:
            high = middle
    return sft.merge(net, high), high


def trigger_options(folder, device):
    """What eraser.py was given for the run's own trigger; without one, its preset."""
    o = eraser.options(["--run", str(folder), "--device", device])
    config = model.configuration(locate(read_config(folder)["model"], weights=False))
    eraser.fit(o, config.hidden_size)
    file = Path(folder) / "trigger.safetensors"
    if file.is_file():
        _, header = load_tensors(file)
        for key in eraser.settings_of(o):
            if key in header:
                setattr(o, key, header[key])
    return o


def check_settings(file, config, device):
    """Raises InputError where the settings in config.json are none that lcdd.py trains with."""
    table = fields_of(training_parser(), complete=True) | dict.fromkeys(FITTED, NUMBER)
    for name in ("out", "resume", "go_on", "dry_run"):          # not kept in the file
        del table[name]
    for name in sorted(table.keys() - config.keys()):
        if table[name][0] is not None:
            raise InputError(f"{file}: has no {name}, which an older version did not write; add it with the "
                             "value that the run was trained with, or train the run again")
    check_fields(file, config, table)
    try:
        absent = dict.fromkeys(table.keys() - config.keys())        # those that may be
        o = argparse.Namespace(**{**absent, **config, "device": device})
        check_training(o)
        check_bounds(o)
    except InputError as e:
        raise InputError(f"{file}: {e}") from None


class Run:
    """One trained run directory with what its rows need; models are made when a row first asks."""

    def __init__(self, folder, o):
        self.folder, self.o = Path(folder), o
        self.config, self.chat, self.splits = reopen(self.folder)
        check_settings(self.folder / "config.json", self.config, o.device)
        self.net = load_model(self.chat, o.device, self.config["dtype"])
        self.net.checkpoint = self.config["checkpoint"]
        self.lcdd = carriers.load(self.folder / "carrier.safetensors", self.net)
        self.models = {
            "base": None,
            "sft": self.sft().merge(self.net),
            "lcdd": self.lcdd.merge(self.net),
        }
        self.carriers = {}    # of rows that have gates of their own
        self.facts = {
            "sft": {"sparsity": 0.0},
            "lcdd": {
                "sparsity": self.lcdd.stats()["sparsity"],
                "dice": self.lcdd.dice(*(self.config[k] for k in ("gate_mean", "gate_std", "seed")))["share"],
            },
        }
        self.targets = {}     # of the trigger, once a row asks: (k, positions) → Targets
        # of base and SFT, which every row is compared with
        self.answers, self.states = {}, evaluate.States(keep=("base", "sft"))
        self.keep_gates("lcdd", self.lcdd)

    def sft(self):
        return carriers.load(self.folder / "sft.safetensors", self.net)

    def prompts(self, split):
        """Ids of a split's prompts."""
        return [self.chat.prompt(s.prompt, self.config["max_len"]) for s in self.splits[split]]

    def examples(self, samples=None):
        """Samples, all for training by default, as (ids, mask)."""
        max_len, samples = self.config["max_len"], samples or self.splits["train"]
        found = [self.chat.encode(s.prompt, s.response, max_len) for s in samples]
        return training.supervised(found, self.config["loss"])

    def held_out(self):
        """
        The validation rows as (ids, mask): {name: …}, harmful and benign ones apart in this order,
        for they are taught different things.
        """
        kinds = {}
        for s in sorted(self.splits["validation"], key=lambda s: s.kind, reverse=True):
            kind = s.kind if s.kind in ("harmful", "benign") else ""
            kinds.setdefault(f"held-out {kind}".strip(), []).append(s)
        return {kind: self.examples(samples) for kind, samples in kinds.items()}

    def keep_gates(self, name, carrier):
        """Write which gates are open, group by group, for the overlap of seeds."""
        groups = carrier.by_group(carrier.logits.detach() > 0)
        file = gates_file(self.folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, {g: groups[g].cpu().contiguous() for g in carriers.GROUPS})

    def model(self, name):
        """Merged weights: sft, lcdd, base, and one at a time of the others in MODELS."""
        if name not in self.models:
            for old in self.models.keys() - {"base", "sft", "lcdd"}:
                del self.models[old]
                self.carriers.pop(old, None)
            self.models[name] = self.make(name)
        return self.models[name]

    def make(self, name):
        """
        A model that starts from SFT's deltas, and its entry in `facts`. What was trained is kept beside
        the row, so that a row which is asked for later trains nothing again.
        """
        if name == "scaled":
            return self.make_scaled()
        # a row is no phase of the run: it has a state and metrics of its own
        folder = self.folder / "rows" / name
        folder.mkdir(parents=True, exist_ok=True)
        file, of = folder / "carrier.safetensors", fingerprint(self.folder / "carrier.safetensors")
        header = read_header(file) if file.is_file() else {}
        if header.get("of") == of and isinstance(header.get("facts"), dict):
            other, facts = carriers.load(file, self.net), header["facts"]
        else:
            other, facts = self.train(name, folder)
            other.save(file, self.net, of=of, facts=facts)
            (folder / "state.safetensors").unlink(missing_ok=True)
        self.facts[name] = facts
        if name != "sft-long":                      # whose gates are all open
            self.carriers[name] = other
            self.keep_gates(name, other)
        return other.merge(self.net)

    def train(self, name, folder):
        """(Carrier, facts) of sft-long, of LCDD with other settings or of gates alone."""
        common = dict(examples=self.examples(), run=folder, pad_id=self.chat.pad_id)
        usual = vars(settings_of_lcdd(["--device", self.o.device]))     # for what an older run did not know
        settings = argparse.Namespace(**usual | self.config)
        other = self.sft()
        if name == "sft-long":
            self.train_longer(other, settings, common)
            return other, {}
        if name in VARIANTS:
            vars(settings).update(VARIANTS[name])
        else:                                       # gates alone, with SFT's deltas frozen (App. E)
            settings.train = name
        other.init_gates(settings.gate_mean, settings.gate_std, settings.seed)
        teacher = self.models["sft"] if name == "mask-kl" else None
        facts = lcdd.train_lcdd(self.net, other, o=settings, teacher=teacher, **common)
        dice = other.dice(settings.gate_mean, settings.gate_std, settings.seed)
        return other, facts | {"sparsity": other.stats()["sparsity"], "dice": dice["share"]}

    def make_scaled(self):
        """
        SFT's delta scaled to LCDD's loss on held-out rows, harmful ones where there are kinds: on
        benign ones nothing is taught that a factor could take away.
        """
        kinds = self.held_out()
        kind, some = next(iter(kinds.items()))
        loss = training.mean_loss(self.net, self.models["lcdd"], some, self.chat.pad_id, BATCH)
        merged, factor = scaled_down(self.net, self.sft(), loss, some, self.chat.pad_id)
        self.facts["scaled"] = {"factor": factor}
        for name, weights in (*self.models.items(), ("scaled", merged)):
            for kind, some in kinds.items():
                loss = training.mean_loss(self.net, weights, some, self.chat.pad_id, BATCH)
                self.facts["scaled"][f"{kind} loss of {name}"] = loss
        return merged

    def train_longer(self, sft, settings, common):
        """SFT continued for as many steps as LCDD took, at LCDD's rate."""
        stopped = read_results(self.folder).get("stopped")
        if not stopped:
            raise InputError(f"{self.folder}/results.json does not say how many steps LCDD took; "
                             "let lcdd.py --resume finish the run")
        settings.sft_steps = stopped["steps"]
        if settings.train == "joint":
            settings.sft_steps += settings.settle
        settings.sft_lr, settings.sure = settings.lr, 0.0
        settings.seed += 1
        lcdd.train_sft(self.net, sft, o=settings, **common)

    def trigger(self, name, objective, length):
        """τ for a model; those without gates of their own take the LCDD carrier's channels."""
        o = trigger_options(self.o.run or self.folder, self.o.device)  # the same for every seed
        o.seed, o.objective, o.length = self.config["seed"], objective, length or o.length
        if objective == "slow":  # two tokens that learn at a tenth of the rate
            o.objective, o.length, o.lr = "circuit", 2, o.lr / 10
        if objective in ("paper", "paper-output"):
            o = eraser.options(["--run", str(self.folder), "--device", self.o.device, "--preset", "paper"])
            o.seed = self.config["seed"]
            o.objective = "output" if objective == "paper-output" else "circuit"
        if name == "lcdd" and (own := self.own_trigger(o)) is not None:
            return own
        weights = self.model(name)  # first: it may make the carrier whose channels these are
        mask = eraser.channels(self.carriers.get(name, self.lcdd), o.objective, o.seed)
        return eraser.learn(self.net, weights, *self.base_targets(o, name, weights), mask, o)[0]

    def own_trigger(self, o):
        """The run's own trigger, where it was learned with just these options; else None."""
        file = self.folder / "trigger.safetensors"
        if not file.is_file():
            return None
        _, header = load_tensors(file)
        asked = eraser.settings_of(o) | {"name": "trigger", "target": "lcdd"}
        asked |= eraser.made_for(self.folder, self.net)
        if any(header.get(key) != value for key, value in asked.items()):
            return None
        return eraser.load(file, self.net)[0]

    def base_targets(self, o, name, weights):
        """
        What triggers for the model `name` are pulled to, on the trigger prompts and on the
        validation prompts.
        """
        asked = o.k, o.positions, name if o.positions == "both" else None
        if asked not in self.targets:
            self.targets[asked] = [
                eraser.base_targets(self.net, self.prompts(split), o.k, o.positions, weights)
                for split in ("trigger", "validation")]
        return self.targets[asked]

    def random_tokens(self, length, seed):
        """As many random tokens of the vocabulary: a trigger that learned nothing."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.net.config.vocab_size, (length,), generator=generator)
        return self.net.embedding[ids.to(self.net.device)].clone()

    def measure(self, weights, trigger):
        """One row: the metrics of evaluate.py on the chosen prompts, as plain numbers."""
        conditions = {
            "base": (None, None),
            "sft": (self.models["sft"], None),
            "row": (weights, trigger),
        }
        self.answers.pop("row", None)
        config, samples = self.config, self.splits[self.o.split]
        measured = evaluate.measure(self.net, self.chat, config["task"], samples, conditions,
                                    config["max_new_tokens"], config["max_len"], self.answers,
                                    states=self.states)
        return evaluate.numbers(measured["row"])


# ---- the rows of a run

def rows_of(o, task):
    """Names of all rows, model by model: MODEL [OBJECTIVE [LENGTH]]; no length: the run's own."""
    names = [*PLAIN, *TABLE_4, *TABLE_6, *CONTROLS, *CHOICES]
    if o.paper_trigger:
        names += F_3
    if task in o.curve_tasks:
        for length in o.lengths:
            names += [f"{name} circuit {length}" for name in CURVE]
        names = list(dict.fromkeys(names))
        if o.lengths:
            names += ["lcdd slow", "sft slow"]
    names.sort(key=model_rank)
    if o.rows:
        names = [name for name in names if any(word in name for word in o.rows)]
    return names


def gates_file(folder, name):
    """Where a run keeps which gates of a row's model are open."""
    return Path(folder) / "rows" / name / "gates.safetensors"


def model_rank(name):
    return MODELS.index(name.split()[0])


def stamp(folder, trigger):
    """What a row belongs to: the carrier, and the trigger's settings. A changed one outdates it."""
    other = ("name", "target", "objective", "seed")
    settings = {k: v for k, v in eraser.settings_of(trigger).items() if k not in other}
    text = f"{fingerprint(Path(folder) / 'carrier.safetensors')} {settings}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_row(row, of):
    """Is it a finished row of the run as it is now, with numbers where tables show them?"""
    if not isinstance(row, dict) or row.get("of") != of:
        return False
    shown = {"sparsity", "dice", *(metric.key for metric in metrics.METRICS)}
    numbers = [value for key, value in row.items() if key.split(" ")[-1] in shown]
    return bool(numbers) and all(type(x) in (int, float) and abs(x) < 1e300 for x in numbers)


def ablate(folder, o, names):
    """All rows of one run: {name: {metric: number}}, kept in ablation.json as they come."""
    suffix = "" if o.split == "test" else f"-{o.split}"
    file = Path(folder) / f"ablation{suffix}.json"
    usual = trigger_options(o.run or folder, o.device)
    of = stamp(folder, usual)
    found = read_json(file) if file.is_file() else {}
    done = {name: row for name, row in found.items() if is_row(row, of)}
    if all(name in done for name in names):
        return done
    run, start, triggers = Run(folder, o), time.time(), {}
    for k, name in enumerate(names):
        if name in done:
            continue
        which, objective, length = (name.split() + ["", ""])[:3]
        if not objective:
            tau = None
        elif objective == "tokens":
            tau = run.random_tokens(usual.length, run.config["seed"])
        elif objective == "trigger":  # the LCDD model's, before the base
            tau = triggers.get("lcdd circuit")
            if tau is None:
                tau = run.trigger("lcdd", "circuit", 0)
        else:
            tau = triggers[name] = run.trigger(which, objective, int(length or 0))
        row = run.measure(run.model(which), tau)
        done[name] = row | run.facts.get(which, {}) | {"of": of}
        write_json(file, done)
        left = (time.time() - start) / (k + 1) * (len(names) - k - 1)
        numbers = "  ".join(f"{m} {x:.3f}" for m, x in done[name].items()
                            if isinstance(x, float) and " " not in m)
        label = f"{run.config['task']} seed {run.config['seed']}"
        print(f"{label}  {name:18s} {numbers}  left {duration(left)}", flush=True)
    run.chat.say_cut("prompts", run.config["max_len"])
    return done


# ---- the command

def check(o):
    """Raises InputError for options that do not go together, or make no sense."""
    check_device(o.device)
    check_numbers(o)
    if o.rows is not None and not o.rows:
        raise InputError("--rows names no row; give words of their names, or leave it out for all")
    if o.run and (o.task or o.out or o.seed):
        raise InputError("--run takes task, seed and place from that run: "
                         "leave out --task, --out and --seed")
    for name, least in (("seeds", o.seeds), ("jobs", o.jobs),
                        ("lengths", min(o.lengths, default=1))):
        if least < 1:
            raise InputError(f"--{name} {least}: has to be at least 1")


def check_finished(run):
    """Raises InputError where lcdd.py has not made a run's carrier."""
    file = Path(run) / "carrier.safetensors"
    if not file.is_file():
        raise InputError(f"{file}: is not there; lcdd.py --out {run} --resume has to finish first")


def jobs_of(o, out):
    """{task: [(folder, settings)]}; settings None: the run is trained already."""
    if o.run:
        config, _, _ = reopen(o.run)
        check_finished(o.run)
        first, runs = config["seed"], [(o.run, None)]
        for seed in range(first + 1, first + o.seeds):
            runs.append((f"{o.run}-seed{seed}", {**config, "seed": seed}))
        return {config["task"]: runs}
    jobs = {}
    for task in o.task or TASKS:
        jobs[task] = []
        for seed in range(o.seed, o.seed + o.seeds):
            jobs[task].append((str(out / f"{task}-seed{seed}"), {"task": task, "seed": seed}))
    return jobs


def work_in_processes(todo, jobs):
    """work() for each of `todo`, several at a time; results in the order of `todo`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, start_worker, (os.getpid(),)) as pool:
        try:
            # the longest first: nobody waits for it at the end
            futures = [pool.submit(work_alone, *job) for job in reversed(todo)]
            wait(futures, return_when=FIRST_EXCEPTION)
            return [f.result() for f in reversed(futures) if f.done()]
        except BaseException as stopped:    # whatever it is: the other runs would take hours to their end
            end(multiprocessing.active_children())
            if not isinstance(stopped, BrokenProcessPool):
                raise
            raise InputError(
                "a run's process was killed, perhaps for want of memory; the same command resumes "
                "here, with --jobs 1 for less of it") from None


def end(processes, patience=2):
    """
    Terminate processes, in which training saves its state first. Again every `patience` seconds: what
    a signal raises is lost where it arrives in a destructor.
    """
    while processes := [p for p in processes if p.is_alive()]:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(patience)


def start_worker(parent):
    """One thread, and an end where the parent is gone, even killed: nobody would take the result."""
    os.environ["OMP_NUM_THREADS"] = "1"         # no phase chooses otherwise
    torch.set_num_threads(1)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)  # training saves its state

    threading.Thread(target=watch, daemon=True).start()


def work_alone(*job):
    """work() in a process that an interruption ends: the next run in the queue is not begun."""
    try:
        return work(*job)
    except KeyboardInterrupt:
        os._exit(130)


def work(folder, settings, o, names):
    """One run from training to its last row; `settings` None: it is trained already."""
    if settings is not None:
        lcdd.main(command(folder, settings, o))
    with alone(folder):
        return ablate(folder, o, names)


def command(folder, settings, o):
    """The lcdd.py command line that repeats a run with another seed."""
    skipped = ("data_fingerprint", "base_fingerprint", "chat_fingerprint", "versions", "made",
               "device")
    argv = ["--out", folder, "--resume", "--go-on", "--device", o.device]
    argv += [f"--no-{name}" for name in ("brake", "paired") if settings.get(name) is False]
    for name, value in settings.items():
        if name in skipped or value is None or value is False:
            continue
        option = f"--{name.replace('_', '-')}"
        argv.append(option if value is True else f"{option}={value}")
    return argv


def gates_of(folders):
    """{row: [{group: (L, n) bool}, one a seed]} of the models whose gates every seed has kept."""
    found = {}
    for name in ("lcdd", "mask-ce", "mask-kl", *VARIANTS):
        files_ = [gates_file(folder, name) for folder in folders]
        if all(file.is_file() for file in files_):
            found[name] = [load_tensors(file)[0] for file in files_]
    return found


def work_of(o, jobs):
    """What work() takes, run by run. Raises InputError where --rows names none."""
    todo = []
    for task, runs in jobs.items():
        names = rows_of(o, task)
        if not names:
            raise InputError(f"--rows {' '.join(o.rows)}: no row has such a name; "
                             "see the tables of a whole run")
        todo += [(folder, settings, o, names) for folder, settings in runs]
    return todo


def done_by(o, start):
    """The last line of the tables: how many seeds, on which machine, in what time."""
    device = f"{os.cpu_count()} CPU cores"
    if o.device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    return (f"{o.seeds} seed{'s' * (o.seeds > 1)}, mean ± std, {o.split} prompts; {device}, "
            f"torch {torch.__version__}, {(time.time() - start) / 60:.1f} minutes for what was not "
            "there yet.")


def main(argv=None):
    o = options(argv)
    start, out = time.time(), Path(o.run or o.out or "runs/table")
    check(o)
    o.run = o.run and str(Path(o.run).resolve())
    jobs = jobs_of(o, out)
    if o.run:
        o.curve_tasks = list(jobs)
    todo = work_of(o, jobs)
    if min(o.jobs, len(todo)) > 1 and not o.device.startswith("cuda"):
        done = iter(work_in_processes(todo, o.jobs))
    else:
        done = iter([work(*job) for job in todo])
    everything, parts = {}, []
    for task, runs in jobs.items():
        everything[task] = [next(done) for _ in runs]
        length = trigger_options(runs[0][0], o.device).length
        gates = gates_of([folder for folder, _ in runs])
        parts.append(report(task, everything[task], o, length, gates))
    text = "\n\n".join([*parts, done_by(o, start)])
    out.mkdir(parents=True, exist_ok=True)
    name = "tables" if o.split == "test" else f"tables-{o.split}"
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    write_json(out / f"{name}.json", everything)
    curve.draw(everything, out / f"{name}.png", length)
    print("\n" + text)


if __name__ == "__main__":
    cli(main)
