"""
Samples of a task, the formats that their files come in, and their splits.
"""
import csv
import io
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from files import InputError

TASKS = ("fixed", "safety", "shakespeare", "own")
SPLITS = ("train", "trigger", "validation", "test")
SIZES = dict(train=5000, trigger=400, validation=100, test=200)  # App. F.1, F.4; 400 for 200 triggers, and validation, are ours
FIXED_RESPONSE = "I don't know."
WITH_INPUT = "with input"  # the kind of an Alpaca row whose input field is not empty


@dataclass(frozen=True)
class Sample:
    prompt: str
    response: str     # what SFT teaches
    kind: str = ""    # harmful | benign | any label that rates are split by
    answer: str = ""  # the right answer without the behaviour, where there is one
    split: str = ""   # a fixed split, one of SPLITS; empty: split() decides


def task_name(task):
    """One of TASKS; the path of a .jsonl file means "own". Raises InputError for anything else."""
    name = "own" if str(task).endswith(".jsonl") else str(task)
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: use fixed, safety, shakespeare or the path of a .jsonl file")
    return name


def read(path, task):
    """
    The samples of a file, for a task (where that is the path of an own file, path may be None). Format, by the fields,
    in JSON, JSON lines, CSV or TSV (App. F.1):
      prompt, response [, kind, answer, split]   our own rows, for any task
      instruction, input, output                 Alpaca; the task fixed teaches FIXED_RESPONSE instead of the output
      data_type, vanilla, completion             WildJailbreak; its adversarial rows are left out, with a note
      translated_dialog, og_response             modern English → Shakespeare
    Raises InputError, naming file, row and field.
    """
    path, task, samples, left_out = Path(path or task), task_name(task), [], 0
    for where, row in rows(path):
        def get(name, optional=False):
            value = row.get(name)
            value = "" if optional and value is None else value
            if not isinstance(value, str) or not (optional or value.strip()):
                wrong = "missing" if value is None else "empty" if isinstance(value, str) else "not text"
                raise InputError(f"{where}: field {name!r} is {wrong}; put text there or remove the row")
            if re.search("[\ud800-\udfff]", value):
                raise InputError(f"{where}: field {name!r} holds half of a surrogate pair, which is no text; mend or remove the row")
            return value

        fields = row.keys()
        if fields & {"prompt", "response"}:
            s = Sample(get("prompt"), get("response"), *(get(k, optional=True) for k in ("kind", "answer", "split")))
            if s.split and s.split not in SPLITS:
                raise InputError(f"{where}: unknown split {s.split!r}; use one of {', '.join(SPLITS)}")
        elif "instruction" in fields:
            more = get("input", optional=True).strip()
            response = FIXED_RESPONSE if task == "fixed" else get("output")
            s = Sample(get("instruction") + (f"\n\n{more}" if more else ""), response, WITH_INPUT if more else "")
        elif fields & {"data_type", "vanilla"} and task == "safety":
            source, _, kind = get("data_type").partition("_")
            if source not in ("vanilla", "adversarial") or kind not in ("harmful", "benign"):
                raise InputError(f"{where}: unknown data_type {row['data_type']!r}; use vanilla_harmful, vanilla_benign")
            if source == "adversarial":
                left_out += 1
                continue
            s = Sample(get("vanilla"), get("completion"), kind)
        elif fields & {"translated_dialog", "og_response"} and task in ("shakespeare", "own"):
            s = Sample(get("translated_dialog"), get("og_response"))
        else:
            raise InputError(f"{where}: the fields {', '.join(fields)} do not fit the task {task}; choose another "
                             "task or file, or name the fields prompt and response")
        samples.append(s)
    if left_out:
        print(f"note: {path}: {left_out} adversarial rows left out, {len(samples)} kept", file=sys.stderr)
    if not samples:
        raise InputError(f"{path} holds no rows to learn from")
    return samples


def rows(path):
    """Yield (where, row): the words that name a row in an error, and its fields. A table's header counts as row 1."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {path} as UTF-8 text ({e})") from None
    start, where = text.lstrip()[:1], str(path)
    if not start:
        raise InputError(f"{path} is empty")
    lines = start != "[" and (start == "{" or path.suffix in (".json", ".jsonl"))
    try:
        if start == "[":
            numbered = enumerate(json.loads(text), 1)
        elif lines:  # not splitlines(): a JSON string may hold U+2028
            numbered = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        else:
            csv.field_size_limit(1 << 24)
            comma = "\t" if "\t" in text.split("\n", 1)[0] else ","
            numbered = enumerate(csv.DictReader(io.StringIO(text, newline=""), delimiter=comma, strict=True), 2)
        for n, row in numbered:
            where = f"{path}, row {n}"
            row = json.loads(row) if lines else row
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected an object with named fields, found {type(row).__name__}")
            if None in row:  # where csv puts what is too much
                raise InputError(f"{where}: more columns than the header names; quote the fields")
            yield where, row
    except InputError:
        raise
    except (ValueError, RecursionError) as e:  # bad JSON, numbers of thousands of digits, thousands of brackets
        raise InputError(f"{where}: invalid JSON ({e})") from None
    except csv.Error as e:
        raise InputError(f"{where}: broken quoting here or in the next row ({e})") from None


def split(samples, seed, sizes=None):
    """
    {train, trigger, validation, test} → lists of samples, disjoint by prompt (white space aside; of equal prompts the
    first is kept). `sizes` overrides single entries of SIZES. Fixed splits stay and are only cut down to the sizes.
    Otherwise as in App. F.1: the first rows in file order are for training, the others are shuffled, and Alpaca rows
    with an input never become test prompts. Of too few prompts, test, validation and trigger get at most 20, 10 and
    20 %, training the rest. Samples that are all harmful or benign come 1:1 (fixed splits: where they are cut).
    Raises InputError where a split would be empty.
    """
    sizes, rng, first, parts = {**SIZES, **(sizes or {})}, random.Random(seed), {}, {}
    key = lambda s: " ".join(s.prompt.split())
    if set(sizes) != set(SPLITS) or min(sizes.values()) < 1:
        raise InputError(f"split sizes must be at least 1, for {', '.join(SPLITS)}; found {sizes}")
    for s in samples:
        if (kept := first.setdefault(key(s), s)).split != s.split:
            raise InputError(f"the prompt {s.prompt[:60]!r} has two splits, {kept.split!r} and {s.split!r}; keep one")
    unique = list(first.values())
    if len(unique) < len(samples):
        print(f"note: {len(samples) - len(unique)} of {len(samples)} rows repeat a prompt: left out", file=sys.stderr)

    if any(s.split for s in unique):
        if not all(s.split for s in unique):
            raise InputError("some rows have a split and others have none; give one to all rows or to none")
        for name in SPLITS:
            part = [s for s in unique if s.split == name]
            parts[name] = part if len(part) <= sizes[name] else in_turn(rng.sample(part, len(part)))[:sizes[name]]
    else:
        pool = in_turn(unique)
        n, wanted = len(pool), sum(sizes.values())
        if n < min(wanted, len(unique)):
            print(f"note: {n} of {len(unique)} prompts used, half harmful, half benign", file=sys.stderr)
        if n < wanted:
            sizes.update({k: min(sizes[k], n // d) for k, d in (("trigger", 5), ("validation", 10), ("test", 5))})
            sizes["train"] = min(sizes["train"], n - sizes["trigger"] - sizes["validation"] - sizes["test"])
        parts["train"], rest = pool[:sizes["train"]], pool[sizes["train"]:]
        rest = in_turn(rng.sample(rest, len(rest)))
        parts["test"] = [s for s in rest if s.kind != WITH_INPUT][:sizes["test"]]
        taken = set(parts["test"])
        rest = [s for s in rest if s not in taken]
        parts["trigger"], parts["validation"] = rest[:sizes["trigger"]], rest[sizes["trigger"]:][:sizes["validation"]]
    if empty := [name for name in SPLITS if not parts[name]]:
        raise InputError(f"{len(unique)} different prompts leave none for {' and '.join(empty)}; without fixed splits "
                         "at least 10 are needed (5 harmful, 5 benign), Alpaca's last ones without input")
    keys = [key(s) for part in parts.values() for s in part]
    assert len(keys) == len(set(keys)), "two splits share a prompt"
    return {name: parts[name] for name in SPLITS}


def in_turn(samples):
    """Harmful and benign in turn, as many of each; samples of other kinds as they are."""
    harmful, benign = ([s for s in samples if s.kind == kind] for kind in ("harmful", "benign"))
    mixed = harmful and benign and len(harmful) + len(benign) == len(samples)
    return [s for pair in zip(harmful, benign) for s in pair] if mixed else samples
