"""
A trigger that is text: is there a switch for a person who can type, and reaches no embedding?

    python -m lab.words --run runs/fixed --length 8 --start nearest
    python -m lab.words --run runs/fixed --trigger trigger-sft-circuit      for plain SFT

Greedy coordinate gradient (Zou et al. 2023, arXiv:2307.15043) on the eraser's loss (Eq. 6 without
R): its slope by the one-hot vectors proposes swaps of one token, and the exact loss of each on the
same batch decides. The words stand on a line of their own at the beginning of the user's message,
where anybody may put them; a soft trigger stands before the whole row, where text cannot. They are
held to what the base answers without them. Words are taken only if their text, typed in that place,
is encoded to the same ids again; where each piece of text begins with a mark of its own (Llama 2),
none is, which is said.

results.json in --out holds the words and what evaluate.py measures on test prompts: of the base, of
the carrier (or plain SFT), of either with the words ("base_words", "trig"), and of the latter with
the soft trigger and with random words ("soft", "random").

Shapes: n words, which are tokens of any kind, V vocabulary, d hidden size.
"""
from common import (
    InputError, Phase, note, open_run, parse, resumable, run_command, timed, usual_device)
from pathlib import Path

import torch

import data
import eraser
import evaluate
import lcdd
import model

OPTIONS = {
    "run": (str, "run directory that lcdd.py and eraser.py have finished"),
    "trigger": ("trigger", "name of its soft trigger; the words are for the same target"),
    "length": (8, "n, tokens of the words"),
    "start": (("random", "nearest"), "random words, or those nearest to the soft trigger (random)"),
    "steps": (60, "swaps, one each"),
    "batch": (16, "pairs of prompt and answer per step"),
    "topk": (32, "tokens for each place that the slope proposes"),
    "candidates": (64, "of these swaps so many, drawn by chance, have their loss computed"),
    "prompts": (400, "at most so many of the trigger, the validation and the test prompts each"),
    "seed": (0, "of the random words, the batches and the candidates"),
    "out": (str, "folder of the results (runs/words, numbered)"),
    "resume": (False, "go on with the search in --out; start it if there is none"),
    "device": (usual_device(), "cpu or cuda"),
}
SETTINGS = dict(            # eraser.py's, but for R, which keeps vectors small: these are tokens
    task="words", positions="both", beta=0.0,
    alpha=eraser.OPTIONS["alpha"][0], k=eraser.OPTIONS["k"][0])
FREE = "run", "task", "out", "resume", "device"         # may change when it is resumed
# ends the words' line: after a space most tokenizers make another token of a message's first word
LINE = "\n"
JUDGE_EVERY = 5         # steps between judgements on the validation prompts
MEASURES = ("rates", "accuracy", "same", "kl_own", "loss_own", "mediation", "ci")


# ---- where the words stand

class Place:
    """
    The beginning of the user's message. A row is head ⊕ words ⊕ joint ⊕ tail: `head` the ids that
    the template writes before the message, `joint` those of LINE, and what is before the tail is
    handed on as a trigger. So whatever takes a trigger takes words; prompt() and decode() are what
    evaluate.measure() asks of a Chat.
    """

    def __init__(self, chat, net):
        self.chat, self.decode, self.embedding = chat, chat.decode, net.embedding
        self.head = chat.ids(chat.render(data.MARK).partition(data.MARK)[0])
        self.joint = chat.ids(LINE)

    def prompt(self, text, before=(), max_len=None):
        """Ids of the tail. Raises InputError if something else than the head is before it."""
        ids, n = self.chat.prompt(text, before, max_len), len(self.head)
        if before or ids[:n] != self.head:
            raise InputError(f"{self.chat.folder}: words need a template that writes the same ids "
                             "before every message, and prompts without earlier messages")
        return ids[n:]

    def survive(self, words, text=data.MARK):
        """
        Are these words (n ids), decoded and typed before a message, encoded to the same ids?
        Special tokens never are, as decode() leaves them out.
        """
        row = self.chat.prompt(self.decode(words) + LINE + text)
        return row == self.head + words + self.joint + self.prompt(text)

    def trigger(self, words):
        """What stands before the tail with these words (n ids): (number of these tokens, d)."""
        return self.embedding[self.head + words + self.joint]


def targets_of(net, place, samples, weights, config, o):
    """Targets of the base on prompts without words, in rows that begin at the tail."""
    prompts = [place.head + place.prompt(s.prompt, s.before, config.max_len) for s in samples]
    pairs = eraser.base_answers(net, prompts, o, weights, "base's answers")
    whole, n = eraser.base_targets(net, pairs, o), len(place.head)
    return whole._replace(ids=whole.ids[:, n:], last=whole.last - n, wanted=whole.wanted[:, n:])


# ---- the search

def first_words(place, order):
    """n ids: in each place the first of order (n, V) with which all survive."""
    words = []
    for ids in order.tolist():
        fit = (i for i in ids if place.survive([*words, i]))
        words.append(next(fit, None))
        if words[-1] is None:
            raise InputError(f"{place.chat.path}: no text before a message keeps its tokens")
    return words


def nearest(place, tau, length):
    """(length, V) ids by distance from the tokens of τ, which are left out or repeated evenly."""
    rows = torch.arange(length) * len(tau) // length
    return torch.cdist(model.wide(tau[rows]), model.wide(place.embedding)).argsort(1)


def swaps(slope, words, place, topk, generator):
    """
    Yield, in an order by chance, words (n ids) that survive and differ from `words` in one place,
    by one of the topk tokens towards which the loss falls most by its slope (n, V).
    """
    top = slope.argsort(1)[:, :topk]                                                # (n, topk)
    for at in torch.randperm(top.numel(), generator=generator).tolist():
        i, j = divmod(at, top.shape[1])
        other = [*words[:i], int(top[i, j]), *words[i + 1:]]
        if other != words and place.survive(other):
            yield other


def search(net, weights, place, first, train, judge, C, o, run):
    """
    The words (n ids) that were judged best, and their loss; from `first`, for a model with frozen
    `weights`. train, judge: Targets of targets_of(). C (L, d): the channels of Eq. 7.
    """
    weight = eraser.channel_weights(C, model.wide(train.stream).var(1))             # (L, d)
    E, kept = model.wide(net.embedding), eraser.Best(torch.tensor(first))
    with Phase(run, "words", o.steps, JUDGE_EVERY, kept=kept) as loop:
        for t in range(loop.start, o.steps + 1):
            loop.pause(t)
            words = kept.tau.tolist()
            tau = place.trigger(words).requires_grad_()                             # (n', d)
            if t % JUDGE_EVERY == 0 or t == o.steps:
                value = eraser.judged(net, weights, tau, judge, weight, o)[0]
                if value < kept.lowest:
                    kept.lowest, kept.best = value, kept.tau
                loop.row(t, loss=value, best=kept.lowest)
            if t == o.steps:
                break

            # by the one-hot vectors the loss has the slope ∂L/∂τ Eᵀ; on a batch that depends on
            # nothing but its number
            generator = torch.Generator().manual_seed(o.seed * 10007 + t)
            rows = torch.randperm(len(train.ids), generator=generator)[:o.batch]
            batch = train, rows, weight, o
            loss = eraser.trigger_loss(net, weights, tau, *batch)[0]
            slope, = torch.autograd.grad(loss, tau)
            slope = model.wide(slope[len(place.head):][:len(words)]) @ E.t()        # (n, V)

            # the exact loss of each swap, one after another, so that the rows of a batch share what
            # is before the tail: half the work; the words stay if none is better
            lowest, proposed = loss.item(), swaps(slope, words, place, o.topk, generator)
            for _, other in zip(range(o.candidates), proposed):
                with torch.no_grad():
                    loss = eraser.trigger_loss(net, weights, place.trigger(other), *batch)[0].item()
                if loss < lowest:
                    lowest, kept.tau = loss, torch.tensor(other)
            loop.done(t, lowest)
    return kept.best.tolist(), kept.lowest


# ---- what the words do

def measured(net, place, config, samples, conditions, target):
    """What results.json holds of evaluate.py's results, and the share that each trigger leaves."""
    _, values = evaluate.measure(net, place, config, samples, conditions)
    results, shares = evaluate.results_of(values, samples, target), {}
    for name in conditions.keys() - {"base", target}:
        as_trig = {metric: of | {"trig": of[name]} for metric, of in values.items() if name in of}
        shares[name] = evaluate.results_of(as_trig, samples, target)["share_left"]
    return {key: results[key] for key in MEASURES if key in results} | {"share_left": shares}


def main(argv=None):
    """Search for words, and measure them."""
    o = parse(__doc__, OPTIONS, SETTINGS, argv)
    config, net, chat, splits = lcdd.load_run(o.run, o.device)
    carrier, conditions, target = evaluate.conditions_of(o.run, net, o.trigger)
    if "trig" not in conditions:
        raise InputError(f"{o.run}: has no trigger; learn one with eraser.py")
    weights, soft = conditions["trig"]
    settings = {name: value for name, value in vars(o).items() if name not in FREE}
    settings |= {"source": Path(o.run).name, "target": target}
    run, place = open_run(o, settings), Place(chat, net)
    *parts, samples = (splits[name][:o.prompts] for name in ("trigger", "validation", "test"))

    generator = torch.Generator().manual_seed(o.seed)
    chance = torch.rand(o.length, len(net.embedding), generator=generator)
    first = random = first_words(place, chance.argsort(1))
    if o.start == "nearest":
        first = first_words(place, nearest(place, soft, o.length))
    with resumable(f"the same command with --out {run} --resume"), timed(run, "search"):
        targets = [targets_of(net, place, part, weights, config, o) for part in parts]
        C = carrier.write_channels()
        words, lowest = search(net, weights, place, first, *targets, C, o, run)
    chat.say_cut("prompts", config.max_len)

    head, tau = net.embedding[place.head], place.trigger(words)
    conditions = {"base": (None, head), target: (weights, head), "base_words": (None, tau)}
    conditions |= {"trig": (weights, tau), "random": (weights, place.trigger(random))}
    conditions["soft"] = weights, torch.cat((soft, head))
    results = measured(net, place, config, samples, conditions, target)
    survived = sum(place.survive(words, s.prompt) for s in samples) / len(samples)
    note(run, **settings, text=chat.decode(words), survived=survived, loss=lowest, **results)
    print(f"\n{chat.decode(words)!r} stays as it is before {survived:.1%} of the test prompts")
    for name, rate in results["rates"].items():
        print(f"{name:10s} behaviour {rate:6.1%}, own loss {results['loss_own'][name]:.3f}")


if __name__ == "__main__":
    run_command(main)
