"""The paper's other columns: what judges say of the answers, and what a run leaves of general ability
(Tables 2 and 3, App. F.4).

    python -m lab.benchmarks --run runs/safety --what hellaswag --hellaswag hellaswag_val.jsonl
    python -m lab.benchmarks --run runs/safety --what mmlu --mmlu data --shots 5
    python -m lab.benchmarks --run runs/safety --what harmbench,wildguard \\
        --behaviors harmbench_behaviors_text_all.csv \\
        --classifier cais/HarmBench-Llama-2-13b-cls --wildguard allenai/wildguard
    python -m lab.benchmarks --run runs/shakespeare --what judge --judge Qwen/Qwen3-8B

Base, SFT and LCDD, each without and with the run's trigger; results.json gets them under
"benchmarks", benchmarks.md the table, judged.jsonl every answer with what a judge replied (see
judges.py). Utility is what lm-evaluation-harness computes, without a chat template.

Shapes: P pairs of a context and a continuation, C contexts, R continuations, M tokens, d, V.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import csv
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import behaviour
import data
import evaluate
import metrics
import machine
import model
import weights
from chat import Chat, collate
from files import InputError, write_json, write_text
from lab.judges import SUMMARY, ask_judge, prompt_of_ones_own, share, standard_behaviors
from rows import Cache
from console import Parser, check_device, check_numbers, cli, markdown, ticker
from run import load_model, locate, read_results, reopen

# what each benchmark needs on the command line
NEEDS = {
    "hellaswag": ("hellaswag",),
    "mmlu": ("mmlu",),
    "harmbench": ("behaviors", "classifier"),
    "wildguard": ("behaviors", "wildguard"),
    "judge": ("judge",),
}
SAFETY_TOKENS, STYLE_TOKENS = 512, 128  # the longest answer, App. F.4


# ---- log-likelihoods

def pair_ids(chat, context, continuation, longest):
    """
    (ids of the context, of the continuation), split where lm-evaluation-harness splits them: spaces
    at the end of the context belong to the continuation, whose ids are what the whole text has
    beyond the context's. Of more than `longest` + 1 ids the first ones are left out.
    """
    bare = context.rstrip()
    before = chat.plain(bare)
    after = chat.plain(context + continuation)[len(before):]
    if not 0 < len(after) <= longest:
        raise InputError(f"{continuation[:60]!r} takes {len(after)} tokens after its context; "
                         f"it has to take 1 to {longest}, the model's limit")
    whole = (before + after)[-(longest + 1):]
    return whole[:-len(after)], after


def states_of(net, contexts, continuations, owner, carrier, trigger):
    """
    The hidden states that predict the tokens of R continuations: (C + M, d), first those at the end
    of the C contexts, then those at the tokens of each continuation but its last. Continuation r
    follows context owner[r].

    Every context is computed once, and what they all begin with is, too (see rows.Rows).
    """
    ids, last = collate([(c, [False] * (len(c) - 1) + [True]) for c in contexts], 0)
    lengths = torch.tensor([len(c) for c in contexts], device=net.device)
    longest = max(len(c) for c in continuations)
    n = 0 if trigger is None else len(trigger)
    cache = Cache(net, len(contexts), n + ids.shape[1] + longest)
    at_end = net.hidden(ids.to(net.device), carrier, trigger, keep=last.to(net.device),
                        cache=cache, lengths=lengths)                                              # (C, d)
    more = [r for r, c in enumerate(continuations) if len(c) > 1]
    if not more:
        return at_end
    cache.keep(torch.tensor([owner[r] for r in more], device=net.device))
    ids, mask = collate([(continuations[r][:-1], [True] * (len(continuations[r]) - 1))
                         for r in more], 0)
    mask = mask.to(net.device)
    inside = net.hidden(ids.to(net.device), carrier, keep=mask, cache=cache, lengths=mask.sum(1))  # (M, d)
    return torch.cat((at_end, inside))


def places(continuations, owner, contexts):
    """Which row of states_of() predicts each token, continuation after continuation."""
    found, free = [], contexts
    for r, continuation in enumerate(continuations):
        inside = len(continuation) - 1
        found += [owner[r], *range(free, free + inside)]
        free += inside
    return found


@torch.no_grad()
def log_likelihoods(net, pairs, carrier=None, trigger=None, batch_size=16, chunk=None, progress=None):
    """
    ln p(continuation | context) of P pairs of id lists, (P) in nats, summed in float64.

    batch_size contexts at a time; `chunk` rows of logits (net.chunk) are all that is in memory. progress:
    called with the number of pairs done.
    """
    chunk = chunk or net.chunk
    following = {}  # context → its pairs
    for i, (context, _) in enumerate(pairs):
        following.setdefault(tuple(context), []).append(i)
    contexts, scores, done = list(following), torch.zeros(len(pairs), dtype=torch.float64), 0
    for start in range(0, len(contexts), batch_size):
        batch = contexts[start:start + batch_size]
        rows, owner = [], []
        for c, context in enumerate(batch):
            rows += following[context]
            owner += [c] * len(following[context])
        continuations = [pairs[i][1] for i in rows]
        states = states_of(net, [list(c) for c in batch], continuations, owner, carrier, trigger)
        place = torch.tensor(places(continuations, owner, len(batch)))                             # (K)
        token = torch.tensor([t for c in continuations for t in c])
        pair = torch.tensor(rows).repeat_interleave(torch.tensor([len(c) for c in continuations]))
        for i in range(0, len(states), chunk):
            logp = model.wide(net.head(states[i:i + chunk])).log_softmax(-1)                      # (chunk, V)
            here = (place >= i) & (place < i + chunk)
            row, column = (place[here] - i).to(net.device), token[here].to(net.device)
            scores.index_add_(0, pair[here], logp[row, column].double().cpu())
        done += len(rows)
        if progress:
            progress(done)
    return scores


# ---- HellaSwag and MMLU

@dataclass(frozen=True)
class Question:
    context: str
    choices: tuple      # texts, without the space before them
    right: int
    subject: str = ""


def tidy(text):
    """HellaSwag's text without the marks of WikiHow."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def split_context(text):
    """(ctx_a, ctx_b) of a row that has them in one field: what follows the last sentence is b."""
    found = re.fullmatch(r"(.*[.!?]) ([^.!?]+)", text, re.DOTALL)
    return found.groups() if found else (text, "")


def hellaswag(path, limit=None):
    """The Questions of HellaSwag's rows as published, JSON lines; `limit`: the first ones only."""
    found = []
    for row in data.rows(Path(path)):
        if len(found) == limit:
            break
        if "ctx_a" in row.fields:
            a, b = row.text("ctx_a", optional=True), row.text("ctx_b", optional=True)
        else:
            a, b = split_context(row.text("ctx"))
        context = tidy(f"{row.text('activity_label')}: {a} {b.capitalize()}")
        choices = tuple(tidy(text) for text in choices_of(row, "endings"))
        found.append(Question(context, choices, right_of(row, "label")))
    return found


def choices_of(row, name):
    """The four texts in a field of a row."""
    value = row.fields.get(name)
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(v, str) for v in value):
        row.refuse(name, "is not a list of four texts; correct or remove the row")
    if not all(tidy(v) for v in value):
        row.refuse(name, "holds an empty text; correct or remove the row")
    return value


def right_of(row, name):
    """Which of four choices is the right one: 0 to 3."""
    value = str(row.fields.get(name))
    if value not in ("0", "1", "2", "3"):
        row.refuse(name, f"is {value!r} where 0 to 3 belongs; use a split that has its labels")
    return int(value)


def mmlu(folder, shots, limit=None):
    """
    The Questions of MMLU with `shots` examples before each, from a folder in the published form:
    test/SUBJECT_test.csv and dev/SUBJECT_dev.csv. `limit`: the first ones of each subject only.
    """
    found = []
    tests = sorted(Path(folder, "test").glob("*_test.csv"))
    if not tests:
        raise InputError(f"{folder} holds no test/SUBJECT_test.csv; give MMLU's folder data, "
                         "in which test and dev lie")
    for path in tests:
        subject = path.stem.removesuffix("_test")
        known = mmlu_rows(Path(folder, "dev", f"{subject}_dev.csv")) if shots else []
        if len(known) < shots:
            raise InputError(f"{folder}/dev/{subject}_dev.csv holds {len(known)} questions; "
                             f"--shots {shots} needs as many")
        head = ("The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n")
        for text, answer in known[:shots]:
            head += f"{text} {answer}\n\n"
        asked = mmlu_rows(path)
        if not asked:
            raise InputError(f"{path} holds no questions; fetch it again")
        for text, answer in asked[:limit]:
            found.append(Question(head + text, tuple("ABCD"), "ABCD".index(answer), subject))
    return found


def mmlu_rows(path):
    """[(question with its choices, letter of the right one)] of one published file."""
    try:
        with open(path, encoding="utf-8", newline="") as f:
            rows = list(csv.reader(f, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"cannot read {path} as CSV ({e}); fetch it again") from None
    found = []
    for n, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
            raise InputError(f"{path}, row {n}: expected question, four choices and A, B, C or D")
        question, *choices = row[:5]
        lines = [f"{letter}. {text}" for letter, text in zip("ABCD", choices)]
        found.append(("\n".join([question.strip(), *lines, "Answer:"]), row[5]))
    return found


def first_best(scores):
    """Where the largest score is; of equal ones the first."""
    return max(range(len(scores)), key=scores.__getitem__)


def answer_choices(net, chat, questions, carrier, trigger, label):
    """
    [(right, right by length)] for every question: is the continuation with the highest
    log-likelihood the right one, and with the highest per character?
    """
    longest = weights.described(chat.folder, "config.json").get("max_position_embeddings") or 2048
    pairs = []
    for q in questions:
        pairs += [pair_ids(chat, q.context, f" {choice}", longest) for choice in q.choices]
    found = log_likelihoods(net, pairs, carrier, trigger, progress=ticker(label, len(pairs))).tolist()
    verdicts = []
    for q in questions:
        scores, found = found[:len(q.choices)], found[len(q.choices):]
        by_length = [score / len(choice) for score, choice in zip(scores, q.choices)]
        verdicts.append((first_best(scores) == q.right, first_best(by_length) == q.right))
    return verdicts


def of_hellaswag(questions, verdicts):
    return {"acc": share([a for a, _ in verdicts]), "acc_norm": share([b for _, b in verdicts])}


def of_mmlu(questions, verdicts):
    """Accuracy over all questions; its standard error is pooled over the subjects."""
    subjects = {}
    for q, (right, _) in zip(questions, verdicts):
        subjects.setdefault(q.subject, []).append(right)
    parts = {name: share(flags) for name, flags in subjects.items()}
    total = share([right for right, _ in verdicts])
    squares = sum((p["n"] - 1) * p["n"] * p["stderr"] ** 2 for p in parts.values())
    free = total["n"] - len(parts)
    total["stderr"] = math.sqrt(squares / free / total["n"]) if free else 0.0
    return {"acc": total, "subjects": parts}


# ---- the table

def percent(share):
    low, high = behaviour.wilson(share["rate"], share["n"])
    return f"{100 * share['rate']:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def judge_score(found):
    return f"{found['score']:.2f} ± {found['stderr']:.2f}" if "score" in found else "–"


def columns_of(what, found):
    """{heading: cell} of one condition under one benchmark."""
    if what == "judge":
        return {"judge 0–5": judge_score(found), "unparsed": str(found["unparsed"])}
    names = {"hellaswag": "HellaSwag", "harmbench": "HarmBench", "wildguard": "WildGuard"}
    title = names.get(what, what.replace("mmlu", "MMLU"))
    cells = {}
    for key, value in found.items():
        if key == "unparsed":
            cells[key] = str(value)
        elif key != "subjects":
            cells[f"{title} {key.replace('asr', 'ASR')} %, n = {value['n']}"] = percent(value)
    return cells


def table(results):
    """What has been measured of a run so far as Markdown: {benchmark: {condition: …}}."""
    labels = {}
    for conditions in results.values():
        labels |= dict.fromkeys(conditions)
    header, lines = [""], [[called(name)] for name in labels]
    for what, conditions in results.items():
        cells = {name: columns_of(what, found) for name, found in conditions.items()}
        headings = list(next(iter(cells.values())))
        header += headings
        for line, name in zip(lines, labels):
            line += [cells.get(name, {}).get(heading, "–") for heading in headings]
    return markdown(header, lines)


def called(condition):
    """A condition's name as tables write it: lcdd+trigger → LCDD + trigger."""
    weights, _, trigger = condition.partition("+")
    return metrics.NAMES[weights] + (f" + {trigger}" if trigger else "")


NOTE = """\
Shares of n with 95 % confidence intervals. HellaSwag and MMLU as lm-evaluation-harness computes \
them, without a chat template; acc_norm divides by the characters of a choice. A reply that cannot \
be parsed is unparsed: HarmBench and WildGuard keep it in n and count it as no, the judge's mean \
leaves it out."""


# ---- the command

def options(argv=None):
    """The command line."""
    p = Parser(__doc__)
    either = p.add_mutually_exclusive_group(required=True).add_argument
    either("--run", help="run directory that lcdd.py has finished")
    either("--model", help="a checkpoint without a run: its folder or hub id")
    a = p.add_argument
    a("--what", required=True, help=f"one or several of {','.join(NEEDS)}")
    a("--conditions", help="some of base,sft,lcdd,base+trigger,… (all)")
    a("--trigger", default="trigger", help="name of the trigger file in the run (trigger)")
    a("--hellaswag", metavar="FILE", help="HellaSwag's validation rows, JSON lines")
    a("--mmlu", metavar="FOLDER", help="MMLU's folder data, with test and dev in it")
    a("--shots", type=int, nargs="+", default=[0], help="MMLU: examples before a question (0)")
    a("--behaviors", metavar="FILE", help="HarmBench's behaviours, the published CSV")
    a("--classifier", metavar="MODEL", help="HarmBench's classifier: folder or hub id")
    a("--classifier-prompt", metavar="FILE",
      help="another prompt for it, with {behavior} and {generation}; a reply that begins with yes counts "
      "(the released code's way; its numbers and those of HarmBench's prompt do not compare)")
    a("--wildguard", metavar="MODEL", help="WildGuard: folder or hub id")
    a("--judge", metavar="MODEL", help="any chat model that rates style: folder or hub id")
    a("--limit", type=int, help="first questions or prompts only (MMLU: of each subject)")
    a("--max-new-tokens", type=int, help="length of an answer (512 for safety, 128 for the judge)")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return p.parse_args(argv)


def check(o):
    """The benchmarks that were chosen. Raises InputError for options that do not go together."""
    check_device(o.device)
    check_numbers(o)
    chosen = o.what.split(",")
    for what in chosen:
        if what not in NEEDS:
            raise InputError(f"--what {what}: choose from {', '.join(NEEDS)}")
        for name in NEEDS[what]:
            if getattr(o, name) is None:
                raise InputError(f"--what {what} needs --{name}")
    if "judge" in chosen and not o.run:
        raise InputError("--what judge needs --run, whose test prompts are answered")
    for name in ("limit", "max_new_tokens"):
        if getattr(o, name) == 0:
            raise InputError(f"--{name.replace('_', '-')} 0: has to be at least 1")
    if min(o.shots) < 0:
        raise InputError(f"--shots {min(o.shots)}: has to be at least 0")
    return chosen


def conditions_of(run, net, trigger, only=None):
    """
    {name: (Merged or None, τ or None)}: base, sft and lcdd, and each of them with the trigger,
    base+trigger and so on. Raises InputError where a name in `only` is none of these.
    """
    _, found, _ = evaluate.conditions_of(run, net, trigger)
    if "trig" in found:
        tau = found.pop("trig")[1]
        found |= {f"{name}+{trigger}": (weights, tau) for name, (weights, _) in found.items()}
    return choose(found, only)


def choose(found, only):
    """Those conditions that are named in `only`, text with commas; None: all."""
    names = list(found) if only is None else only.split(",")
    for name in names:
        if name not in found:
            raise InputError(f"--conditions {name}: choose from {', '.join(found)}")
    return {name: found[name] for name in names}


def open_model(o):
    """(net, chat, conditions, config, splits) of --run, or of --model, which has only a base."""
    if o.run:
        config, chat, splits = reopen(o.run)
        net = load_model(chat, o.device, config["dtype"])
        return net, chat, conditions_of(Path(o.run), net, o.trigger, o.conditions), config, splits
    chat = Chat(locate(o.model))
    net = model.load(chat.folder, o.device, None)
    net.stop = chat.stop
    machine.set_threads(net)
    return net, chat, choose({"base": (None, None)}, o.conditions), {}, {}


def read_questions(o, chosen):
    """{benchmark: Questions} of those that are scored by log-likelihood."""
    found = {}
    if "hellaswag" in chosen:
        found["hellaswag"] = hellaswag(o.hellaswag, o.limit)
    if "mmlu" in chosen:
        for shots in o.shots:
            found[f"mmlu {shots}-shot"] = mmlu(o.mmlu, shots, o.limit)
    return found


def answers_of(net, chat, conditions, prompts, max_len, max_new_tokens):
    """Rows of {condition, prompt, answer}: every condition's greedy answers."""
    rows, ids = [], [chat.prompt(text, max_len) for text in prompts]
    chat.say_cut("prompts", max_len)
    for name, (carrier, trigger) in conditions.items():
        tell = ticker(f"answers of {name}", len(ids))
        answers = net.generate(ids, max_new_tokens, carrier=carrier, trigger=trigger, batch_size=32,
                               progress=tell)
        rows += [{"condition": name, "prompt": text, "answer": chat.decode(answer)}
                 for text, answer in zip(prompts, answers)]
    return rows


def examine(o, chosen, questions, behaviors):
    """
    ({benchmark: {condition: summary}}, {"safety" and "style": rows of answers}): everything that
    needs the run's own model, which is in memory only here.
    """
    net, chat, conditions, config, splits = open_model(o)
    results, answers = {}, {}
    for what, asked in questions.items():
        results[what] = {}
        summary = of_hellaswag if what == "hellaswag" else of_mmlu
        for name, (carrier, trigger) in conditions.items():
            verdicts = answer_choices(net, chat, asked, carrier, trigger, f"{what} of {name}")
            results[what][name] = summary(asked, verdicts)
    asked = {}
    if behaviors:
        asked["safety"] = behaviors, SAFETY_TOKENS
    if "judge" in chosen:
        asked["style"] = [s.prompt for s in splits["test"]][:o.limit], STYLE_TOKENS
    for kind, (prompts, length) in asked.items():
        answers[kind] = answers_of(net, chat, conditions, prompts, config.get("max_len"),
                                   o.max_new_tokens or length)
    return results, answers


def main(argv=None):
    o = options(argv)
    start, chosen = time.time(), check(o)
    # everything that can be wrong is read before anything is computed
    questions = read_questions(o, chosen)
    judges = {}
    for what in (w for w in chosen if w in SUMMARY):
        judges[what] = locate(getattr(o, NEEDS[what][-1]))
        Chat(judges[what])
    template = prompt_of_ones_own(o.classifier_prompt) if o.classifier_prompt else None
    safety = "harmbench" in chosen or "wildguard" in chosen
    behaviors = standard_behaviors(o.behaviors, o.limit) if safety else []

    results, answers = examine(o, chosen, questions, behaviors)
    for what, folder in judges.items():
        rows = answers["style" if what == "judge" else "safety"]
        if what == "harmbench" and template:
            name = f"HarmBench by {Path(o.classifier_prompt).stem}"
            results[name] = ask_judge(what, folder, o.device, rows, template)
        else:
            results[what] = ask_judge(what, folder, o.device, rows)

    seconds = time.time() - start
    if o.run:
        run, before = Path(o.run), read_results(o.run)
        results = before.get("benchmarks", {}) | results
        before["seconds"]["benchmarks"] = round(seconds, 2)
        write_json(run / "results.json", before | {"benchmarks": results})
        write_text(run / "benchmarks.md", f"{table(results)}\n\n{NOTE}\n")
        if answers:
            lines = [json.dumps(row, ensure_ascii=False) for rows in answers.values() for row in rows]
            write_text(run / "judged.jsonl", "\n".join(lines) + "\n")
    print(f"\n{table(results)}\n\n{NOTE}\n\n{seconds:.1f} s")


if __name__ == "__main__":
    cli(main)
