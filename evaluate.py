"""
What a run gives: base, SFT, LCDD and LCDD + trigger side by side (Sec. 4, App. F.4).

    python evaluate.py --run runs/fixed               table, results.json, results.md, figure.png
    python evaluate.py --run runs/fixed --ask "What is 2 plus 3 ?"      all four conditions answer
    python evaluate.py --run runs/fixed --dose        the behaviour against the size of the delta
    python evaluate.py --compare runs/a runs/b        two evaluated runs in one table

One greedy generate() and one scoring path serve every condition; the KLs are exact over the
vocabulary, on given ids. Shapes: P prompts, N response tokens, d hidden size, V vocabulary.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import copy
import sys
import time
from functools import partial
from pathlib import Path

import torch

import behaviour
import carrier as carriers
import eraser
import answered
import figure
import model
from chat import collate
from files import InputError, write_json, write_text
from metrics import METRICS, NAMES, NOTES, called, compare, table
from parallel import add_up, share
from console import Parser, check_device, check_numbers, cli, markdown, ticker
from run import load_model, look_into, other_tests, read_results, reopen

# ---- teacher-forced measures

class States:
    """
    Hidden states that are made once: those of the conditions `keep`, which many measurements on the
    same prompts and answers have in common. d numbers a token and condition. found: those that a
    file has already.
    """

    def __init__(self, keep=(), found=()):
        self.keep, self.found = keep, dict(found)

    def of(self, name, label, start, shape, make):
        """A batch's states under a condition: kept ones of this shape, (N, d), else make()'s."""
        if name not in self.keep:
            return make()
        key = f"{name}, {label}, {start}"
        kept = self.found.get(key)
        if kept is None or kept.shape != shape or not kept.is_floating_point():
            self.found[key] = make()
        return self.found[key]


@torch.no_grad()
def log_probabilities(net, prompts, answers, conditions, batch_size=32, chunk=None, label="KLs",
                      states=None):
    """
    Yields (prompt, token, {condition: log p}) for the tokens of `answers`, `chunk` of them at a
    time: the prompt's number (N), the token's id (N), log-probabilities in its place (N, V).

    prompts, answers: lists of ids. conditions: name → (carrier, trigger). A batch's hidden states
    and a chunk's logits are all that is in memory, but for what `states` keeps, a States of other
    measurements on these answers; the net says how many where `chunk` does not. label: what the
    progress is called.
    """
    chunk, states = chunk or net.chunk, states or States()
    order = [i for i in range(len(prompts)) if answers[i]]
    order.sort(key=lambda i: len(prompts[i]) + len(answers[i]))
    order = share(order)
    tell = ticker(label, len(order))
    for start in range(0, len(order), batch_size):
        tell(start)
        rows = order[start:start + batch_size]
        texts = []
        for i in rows:
            mask = [False] * len(prompts[i]) + [True] * len(answers[i])
            texts.append((prompts[i] + answers[i], mask))
        ids, mask = collate(texts, 0)                                        # (B, T)
        owner = torch.tensor(rows).repeat_interleave(mask.sum(1))            # (N)
        token = ids[mask]                                                    # (N)
        keep = mask[:, 1:].to(net.device)        # position t predicts token t + 1
        seen = ids[:, :-1].to(net.device)
        hidden = {}
        for name, (weights, trigger) in conditions.items():
            make = partial(net.hidden, seen, weights, trigger, keep=keep)
            shape = len(owner), net.config.hidden_size
            hidden[name] = states.of(name, label, start, shape, make).to(net.device)    # (N, d)
        for i in range(0, len(owner), chunk):
            piece = slice(i, i + chunk)
            logp = {}
            for name, h in hidden.items():
                logp[name] = model.wide(net.head(h[piece])).log_softmax(-1)  # (chunk, V)
            yield owner[piece], token[piece], logp


def divergence(log_p, log_q):
    """KL(p ‖ q) token by token, exact over the vocabulary. (N, V), (N, V) → (N)"""
    return (log_p.exp() * (log_p - log_q)).sum(-1).double().cpu()


def kl_divergences(net, prompts, answers, conditions, pairs, batch_size=32, chunk=None, states=None):
    """
    KL(p ‖ q) for pairs (p, q) of conditions, teacher-forced on `answers` (App. F.4):
    {pair: (P) means over a prompt's tokens}, NaN where an answer has none.
    """
    totals = {pair: torch.zeros(len(prompts), dtype=torch.float64) for pair in pairs}
    used = {name: conditions[name] for pair in pairs for name in pair}
    stream = log_probabilities(net, prompts, answers, used, batch_size, chunk, "KLs on answers", states)
    for owner, _, logp in stream:
        for p, q in pairs:
            totals[p, q].index_add_(0, owner, divergence(logp[p], logp[q]))
    add_up(totals.values())
    lengths = torch.tensor([len(a) for a in answers])
    return {pair: total / lengths for pair, total in totals.items()}


def own_answers(net, prompts, answers, conditions, batch_size=32, chunk=None, states=None):
    """
    What every condition makes of the base's own `answers`: ({name: KL(Base ‖ ·)}, {name: loss}),
    (P) means over a prompt's tokens, NaN where an answer has none. No KL of the base's own.
    """
    kl = {name: torch.zeros(len(prompts), dtype=torch.float64) for name in conditions}
    loss = {name: torch.zeros(len(prompts), dtype=torch.float64) for name in conditions}
    stream = log_probabilities(net, prompts, answers, conditions, batch_size, chunk,
                               "loss on the base's answers", states)
    for owner, token, logp in stream:
        for name, q in logp.items():
            kl[name].index_add_(0, owner, divergence(logp["base"], q))
            nll = -q.gather(1, token[:, None].to(q.device)).squeeze(1)       # (N)
            loss[name].index_add_(0, owner, nll.double().cpu())
    add_up([*kl.values(), *loss.values()])
    lengths = torch.tensor([len(a) for a in answers])
    kl.pop("base")
    return ({name: total / lengths for name, total in kl.items()},
            {name: total / lengths for name, total in loss.items()})


def without_end(answers, stop):
    """Answers without the end-of-text token that they may end in."""
    return [a[:-1] if a and a[-1] in stop else a for a in answers]


def measured(values):
    """Those prompts' values of a 1-D tensor that are not NaN."""
    return values[~values.isnan()]


def bootstrap(values, resamples=2000, seed=0):
    """
    95 % interval of the mean of `values` (P): of the means of P values drawn from them with
    replacement, again and again.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[rows].mean(1).double()                                    # (resamples)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


# ---- one row a condition

def teacher_forced(net, prompts, answers, conditions, states):
    """The METRICS in nats: {metric: {condition: (P)}}."""
    kl_own, loss_own = own_answers(net, prompts, answers["base"], conditions, states=states)
    nats = {"kl_sft": {}, "kl_base": {}, "kl_own": kl_own, "loss_own": loss_own}
    if "sft" in conditions:
        pairs = [(p, q) for p in ("sft", "base") for q in conditions if p != q]
        found = kl_divergences(net, prompts, answers["sft"], conditions, pairs, states=states)
        for (p, name), values in found.items():
            nats[f"kl_{p}"][name] = values
    return nats


def measure(net, chat, task, samples, conditions, max_new_tokens, max_len=None, answers=None,
            eos=True, states=None):
    """
    Every condition on the same prompts: {name: score() and the other METRICS}, (P) where they are
    nats. A divergence of a model from itself is left out.

    conditions: name → (Merged or None, trigger or None), "base" among them; what is measured against
    SFT is left out without it. answers: {name: id lists} already generated; new ones are added to
    it. eos: whether the end-of-text token counts in what is teacher-forced. states: a States, of other
    calls with the same prompts and answers.
    """
    prompts = [chat.prompt(s.prompt, max_len) for s in samples]
    answers = {} if answers is None else answers
    answered.fill(net, prompts, conditions, answers, max_new_tokens)
    said = answers if eos else {name: without_end(a, net.stop) for name, a in answers.items()}
    nats = teacher_forced(net, prompts, said, conditions, states)
    rows = {}
    for name in conditions:
        row = behaviour.score(task, [chat.decode(a) for a in answers[name]], samples)
        equal = [a == b for a, b in zip(answers[name], answers["base"])]
        row["same"] = sum(equal) / len(samples)
        row |= {key: values[name] for key, values in nats.items() if name in values}
        add_kinds(row, samples)
        rows[name] = row
    return rows


def add_kinds(row, samples):
    """Into row["kinds"], beside the rates: the means of what is nats and shown apart."""
    for kind, found in row["kinds"].items():
        of_kind = torch.tensor([s.kind == kind for s in samples])
        for metric in METRICS:
            if metric.apart and not metric.share and metric.key in row:
                values = measured(row[metric.key][of_kind])
                if len(values):
                    found[metric.key] = float(values.mean())


def numbers(row):
    """A row of measure() as {metric: number}, with `KIND METRIC` for what is shown apart."""
    found = {}
    for metric in METRICS:
        if metric.key in row:
            value = row[metric.key]
            if metric.share:
                found[metric.key] = value
            elif len(measured(value)):
                found[metric.key] = float(measured(value).mean())
        for kind, of_kind in row["kinds"].items():
            if metric.apart and metric.key in of_kind:
                found[f"{kind} {metric.key}"] = of_kind[metric.key]
    return found


def interval(metric, row, samples):
    """95 % confidence interval of a metric over prompts."""
    if not metric.share:
        return bootstrap(measured(row[metric.key]))
    counts = {"rate": row["n"], "accuracy": sum(bool(s.answer) for s in samples)}
    return behaviour.wilson(row[metric.key], counts.get(metric.key, len(samples)))


def results_of(rows, samples):
    """measure()'s rows as entries of results.json, with 95 % intervals under `ci`."""
    out = behaviour.by_condition(rows) | {"prompts": len(samples), "ci": {}}
    for metric in METRICS:
        values, intervals = {}, {}
        for name, row in rows.items():
            found = numbers(row)
            if metric.key in found:
                values[metric.prefix + name] = found[metric.key]
                intervals[metric.prefix + name] = interval(metric, row, samples)
        if values:
            out.setdefault(metric.entry, {}).update(values)
            out["ci"].setdefault(metric.entry, {}).update(intervals)
    return out


# ---- the script

def options(argv=None):
    """The command line."""
    p = Parser(__doc__)
    a = p.add_argument
    a("--run", help="run directory that lcdd.py has finished")
    a("--trigger", default="trigger", help="name of the trigger file in it (trigger)")
    either = p.add_mutually_exclusive_group().add_argument
    either("--ask", action="append",
           help="only print the conditions' answers to this prompt; may be given several times")
    either("--dose", action="store_true",
           help="only the dose-response: the carrier's delta times 0, 0.25, …, 1")
    either("--compare", nargs="+", metavar="RUN", help="only print evaluated runs in one table")
    a("--test", help="a file of other test prompts than the run's; its table is results-FILE.md")
    a("--no-eos", action="store_true",
      help="leave the end-of-text token out of the KLs and losses (it counts)")
    a("--seed", type=int,
      help="of the splits; only the run's own is accepted, so that test prompts stay held out")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    o = p.parse_args(argv)
    if o.ask and not all(isinstance(text, str) for text in o.ask):
        raise InputError("--ask -- names no text; put a text that begins with a dash as --ask=-…")
    if bool(o.run) == bool(o.compare):
        raise InputError("give either --run or --compare")
    if o.test and (o.ask or o.compare):
        raise InputError("--test names prompts to measure on; leave it out beside --ask and --compare")
    check_numbers(o)
    check_device(o.device)
    return o


def conditions_of(run, net, name="trigger"):
    """
    (LCDD carrier, {condition: (Merged or None, trigger or None)}, {"trigger": facts about it}) of a
    run directory, with its trigger file of that name where there is one. Raises InputError where
    another name than "trigger" is not there.
    """
    carrier, conditions = carriers.load(run / "carrier.safetensors", net), {"base": (None, None)}
    if (run / "sft.safetensors").is_file():
        conditions["sft"] = carriers.load(run / "sft.safetensors", net).merge(net), None
    else:
        print(f"note: {run} holds no sft.safetensors, and SFT is left out; where its data are, lcdd.py "
              "--resume makes it again", file=sys.stderr)
    conditions["lcdd"] = carrier.merge(net), None
    file = run / f"{name}.safetensors"
    if file.is_file():
        tau, settings = eraser.load(file, net)
        target = settings.get("target", "lcdd")
        if target not in conditions:
            raise InputError(f"{file}: was learned for {NAMES[target]}, which is not there")
        conditions["trig"] = (conditions[target][0], tau)
        found = {"trigger": {"name": name, "target": target, "length": len(tau)}}
        return carrier, conditions, found
    if name != "trigger":
        raise InputError(f"{file}: no such trigger; learn it with eraser.py --name {name}")
    print(f"no trigger yet: python eraser.py --run {run}")
    return carrier, conditions, {}


def ask(run, o):
    """Print every condition's answer to every text of --ask."""
    config, chat = look_into(run)
    net = load_model(chat, o.device, config["dtype"])
    _, conditions, found = conditions_of(run, net, o.trigger)
    prompts, answers = [chat.prompt(text, config["max_len"]) for text in o.ask], {}
    chat.say_cut("prompts", config["max_len"])
    for name, (weights, trigger) in conditions.items():
        answers[name] = net.generate(prompts, config["max_new_tokens"], carrier=weights,
                                     trigger=trigger)
    for i, text in enumerate(o.ask):
        print(f"\n{text}")
        for name in conditions:
            print(f"  {called(name, found):14s}  {chat.decode(answers[name][i]).strip()}")


def dose_response(net, chat, config, samples, carrier, doses=(0.0, 0.25, 0.5, 0.75, 1.0)):
    """
    {dose: score()} with Δ times each dose; one batch serves them all, a scale per row.
    """
    prompts = [chat.prompt(s.prompt, config["max_len"]) for s in samples]
    scale = [dose for dose in doses for _ in prompts]
    answers = net.generate(prompts * len(doses), config["max_new_tokens"], carrier=carrier,
                           scale=scale)
    texts = [chat.decode(a) for a in answers]
    scores = {}
    for i, dose in enumerate(doses):
        piece = texts[i * len(prompts):(i + 1) * len(prompts)]
        scores[dose] = behaviour.score(config["task"], piece, samples)
    return scores


def show_doses(net, chat, config, samples, carrier):
    """Print dose_response() as a table."""
    scores = dose_response(net, chat, config, samples, carrier)
    lines = [[f"{dose}", *behaviour.cells(score)] for dose, score in scores.items()]
    print(markdown(["Δ ×", "behaviour", "accuracy"], lines))
    chat.say_cut("prompts", config["max_len"])


def as_base(row, samples):
    """The row of measure() for a model that is the base bit for bit, out of the base's own."""
    row = copy.deepcopy(row)
    row["kl_own"] = torch.zeros_like(row["loss_own"])
    if "kl_sft" in row:
        row["kl_base"] = row["kl_own"]
    add_kinds(row, samples)
    return row


@torch.no_grad()
def is_base(net, chat, config, samples, shut):
    """Is `shut` the base bit for bit: every weight, and the logits of some prompts?"""
    for layer, merged in zip(net.projections, shut.weights):
        if not all(torch.equal(merged[name], linear.weight) for name, linear in layer.items()):
            return False
    rows = [(chat.prompt(s.prompt, config["max_len"]), []) for s in samples]
    ids = collate(rows, chat.pad_id)[0].to(net.device)
    return torch.equal(net(ids), net(ids, carrier=shut))


def below_the_table(results):
    """What the numbers are, and the run's other ones."""
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    eos = "counts" if results["eos"] else "is left out"
    of = f" of {results['test']}" if "test" in results else ""
    return NOTES.format(eos=eos) + (
        f"\n\n{results['prompts']} held-out prompts{of}, 95 % confidence intervals in brackets; "
        f"gates off {results['sparsity']:.3f}, entries of Δ off {results['entries_off']:.3f}; "
        f"gates shut is the base bit for bit: {'yes' if results['shut_is_base'] else 'NO'}; "
        f"seconds: {seconds}")


def all_rows(run, o, net, chat, config, samples, carrier, conditions):
    """
    measure() of the conditions and of the gates shut, and whether those are the base bit for bit.
    Answers to the run's own test prompts are kept in its directory, and what base, SFT and LCDD make
    of them.
    """
    length, answers, states = config["max_new_tokens"], {}, None
    if not o.test:
        origin = answered.origins(run, net, chat, samples, length, config["max_len"])
        answers = answered.read(run, origin)
        states = States(answered.CONDITIONS, answered.read_states(run, origin, not o.no_eos))
    # the switch: gates shut is the base
    shut = carrier.with_gates(False).merge(net)
    same = is_base(net, chat, config, samples[:32], shut)
    if not same:
        conditions["shut"] = (shut, None)
    rows = measure(net, chat, config["task"], samples, conditions, length, config["max_len"], answers,
                   eos=not o.no_eos, states=states)
    if not o.test:
        answered.write(run, answers, origin)
        answered.write_states(run, states.found, origin, not o.no_eos)
    if same:
        rows["shut"] = as_base(rows["base"], samples)
    chat.say_cut("prompts", config["max_len"])
    return rows, same


def main(argv=None):
    o = options(argv)
    if o.compare:
        return print(compare(o.compare))
    run, start = Path(o.run), time.time()
    if o.ask:
        return ask(run, o)
    config, chat, splits = reopen(run)
    if o.seed not in (None, config["seed"]):
        raise InputError(f"--seed {o.seed}: this run was split with seed {config['seed']}; "
                         "another one would test on training prompts")
    samples, name = splits["test"], "results"
    if o.test:
        samples, name = other_tests(o.test, config, chat, splits), f"results-{Path(o.test).stem}"
    net = load_model(chat, o.device, config["dtype"])
    carrier, conditions, found = conditions_of(run, net, o.trigger)
    if o.dose:
        return show_doses(net, chat, config, samples, carrier)
    before = read_results(run)
    rows, same = all_rows(run, o, net, chat, config, samples, carrier, conditions)
    for entry in ("trigger", *(metric.entry for metric in METRICS)):    # of an evaluation before
        before.pop(entry, None)
    results = {"task": config["task"]} | before | found | carrier.stats() | results_of(rows, samples)
    results["shut_is_base"] = same
    results["eos"] = not o.no_eos
    if o.test:
        results["test"] = Path(o.test).name
    results["seconds"]["evaluate"] = round(time.time() - start, 2)
    text = table(results, config["task"]) + "\n\n" + below_the_table(results)
    write_json(run / f"{name}.json", results)
    write_text(run / f"{name}.md", text + "\n")
    print("\n" + text)
    if not o.test:
        figure.draw(run, results, carrier, run / "figure.png")


if __name__ == "__main__":
    cli(main, together=True)
