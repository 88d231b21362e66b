"""
Samples of a task, the formats that their files come in, and their splits (App. F.1, F.4).
"""
import csv
import io
import json
import random
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import patterns
from behaviour import BEHAVIOURS, judge, task_name
from files import InputError, read_text

TASKS = tuple(BEHAVIOURS)
SPLITS = ("train", "trigger", "validation", "test")
# the paper's, but for 400 trigger prompts in the place of 200; it gives no number for validation
SIZES = dict(train=5000, trigger=400, validation=100, test=200)
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")  # of files that hold rows
LARGEST = 1 << 30          # bytes of a file of samples
WITH_INPUT = "with input"  # the kind of an Alpaca row whose input field is not empty


@dataclass(frozen=True)
class Sample:
    """A prompt and its response, and what decides where it goes and how answers are judged."""
    prompt: str
    response: str     # what SFT teaches
    kind: str = ""    # harmful | benign | any label that rates are split by
    answer: str = ""  # the right answer without the behaviour, where there is one
    split: str = ""   # a fixed split, one of SPLITS; empty: split() decides
    pattern: str = ""  # a regular expression that judges answers, in place of the task's own judge


# ---- rows of a file

class Empty(InputError):
    """A row whose field has no text, which read() leaves out; the message names row and field."""


@dataclass
class Row:
    """The named fields of one row of a file, checked as they are asked for."""
    where: str    # names the row in an error
    fields: dict

    def text(self, name, optional=False):
        """
        The text of a field; "" where there is none and it is optional. Raises Empty where it should
        have text and has none, InputError where it is missing or no text.
        """
        value = self.fields.get(name)
        if optional and value in (None, ""):
            return ""
        if name not in self.fields:
            self.refuse(name, "is missing; put text there or remove the row")
        if value is not None and not isinstance(value, str):
            self.refuse(name, "is not text; put text there or remove the row")
        if not optional and not (value or "").strip():
            raise Empty(f"{self.where}: field {name!r} is empty")
        if re.search("[\ud800-\udfff]", value):
            self.refuse(name, "holds half of a surrogate pair, which is no text; "
                              "correct or remove the row")
        return value

    def refuse(self, name, why):
        """Raises InputError that names the row and the field."""
        raise InputError(f"{self.where}: field {name!r} {why}")


def rows(path):
    """
    Yield the Row after Row of a JSON, JSON lines, CSV, TSV or Parquet file. A table's header counts
    as row 1. Raises InputError where the file, or a row, cannot be read.
    """
    parsed = parquet_rows(path) if path.suffix == ".parquet" else text_rows(path)
    for n, fields in parsed:
        where = f"{path}, row {n}"
        if not isinstance(fields, dict):
            kind = type(fields).__name__
            raise InputError(f"{where}: expected an object with named fields, found {kind}")
        if None in fields:  # where csv puts what is too much
            raise InputError(f"{where}: more columns than the header names; quote the fields")
        yield Row(where, fields)


def text_rows(path):
    """(number, fields) of each row of a file of text; its first character and its name say which."""
    try:
        text = read_text(path, LARGEST)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror or e}; name a file that can be read") from None
    except ValueError as e:
        raise InputError(f"cannot read {path} as UTF-8 text ({e})") from None
    start = text.lstrip()[:1]
    if not start:
        raise InputError(f"{path} is empty")
    if start == "[":
        return json_array(path, text)
    if start == "{" or path.suffix in (".json", ".jsonl"):
        return json_lines(path, text)
    return table_rows(path, text)


def parquet_rows(path):
    """(number, fields) of each row of a Parquet file, from 1; pyarrow is imported here only."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path} is a Parquet file, which pyarrow reads: pip install pyarrow, "
                         "or save its rows as JSON lines") from None
    try:
        if not path.is_file():
            raise OSError("it is no file")
        found = parquet.read_table(path).to_pylist()    # a text that is no UTF-8 shows itself here
    except (OSError, ValueError, ArrowException) as e:
        raise InputError(f"cannot read {path} as a Parquet file ({e})") from None
    return enumerate(found, 1)


def parse_json(where, text):
    """json.loads(), whose errors become an InputError that begins with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # thousands of digits, or of brackets, are errors too
        raise InputError(f"{where}: invalid JSON ({e})") from None


def json_array(path, text):
    """(number, object) of one JSON list of objects, from 1."""
    return enumerate(parse_json(path, text), 1)


def json_lines(path, text):
    """Yield (line, object) of JSON lines, from 1; empty lines count, and give nothing."""
    for n, line in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand in a string
        if line.strip():
            yield n, parse_json(f"{path}, row {n}", line)


def table_rows(path, text):
    """Yield (row, fields) of a CSV or TSV table from 2 on; a tab in the header makes it TSV."""
    csv.field_size_limit(1 << 24)
    comma = "\t" if "\t" in text.split("\n", 1)[0] else ","
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=comma, strict=True)
    n = 1
    try:
        for n, fields in enumerate(table, 2):
            short = [name for name, value in fields.items() if value is None]
            for name in short:  # a row with fewer columns than the header lacks the last fields
                del fields[name]
            yield n, fields
    except csv.Error as e:
        where = f"{path}, row {n}"
        raise InputError(f"{where}: broken quoting here or in the next row ({e})") from None


# ---- samples

def read(path, task, prompts_only=False):
    """
    The samples of a file for a task; where the task is a file of one's own, path may be None.
    The fields decide the format:

      prompt, response [, kind, answer, split, pattern]   our own rows, for any task
      instruction, input, output                          Alpaca, for any task
      the columns of a Behaviour     its published data, for that task and for own ones
      Behavior, FunctionalCategory   HarmBench's standard behaviours: prompts only

    prompts_only: for test prompts, which need no response. Rows without text where some is needed
    are counted and left out. Raises InputError, naming file, row and field.
    """
    path, task = Path(path or task), task_name(task)
    samples, other_kinds, empty = [], 0, []
    for row in rows(path):
        try:
            sample = sample_of(row, task, prompts_only)
        except Empty as e:
            empty.append(e)
            continue
        if sample is None:
            other_kinds += 1
        else:
            samples.append(sample)
    if not samples:
        why = f": {empty[0]}, as the needed text is in all rows" if empty else ""
        raise InputError(f"{path} holds no rows to learn from{why}")
    if other_kinds:
        print(f"note: {path}: {other_kinds} rows left out by their kind, {len(samples)} kept",
              file=sys.stderr)
    if empty:
        print(f"note: {len(empty)} rows left out for want of text, {len(samples)} kept; {empty[0]}",
              file=sys.stderr)
    return samples


def sample_of(row, task, prompts_only):
    """The sample of a row; None: its kind is left out. Raises Empty where text is wanting."""
    names = row.fields.keys()
    if names & {"prompt", "response"}:
        return own_sample(row, prompts_only)
    if "instruction" in names:
        return alpaca_sample(row, BEHAVIOURS[task].teaches, prompts_only)
    if names >= {"Behavior", "FunctionalCategory"}:
        return harmbench_sample(row, prompts_only)
    behaviours = BEHAVIOURS.values() if task == "own" else [BEHAVIOURS[task]]
    for behaviour in behaviours:
        if names & set(behaviour.columns.values()):
            return published_sample(row, behaviour, prompts_only)
    raise InputError(f"{row.where}: the fields {', '.join(names)} do not fit the task {task}; "
                     "choose another task or file, or name the fields prompt and response")


def own_sample(row, prompts_only):
    """A row of our own format. Raises InputError for an unknown split or a bad pattern."""
    taught = row.text("prompt"), row.text("response", optional=prompts_only)
    more = [row.text(name, optional=True) for name in ("kind", "answer", "split", "pattern")]
    sample = Sample(*taught, *more)
    if sample.split and sample.split not in SPLITS:
        known = ", ".join(SPLITS)
        raise InputError(f"{row.where}: unknown split {sample.split!r}; use one of {known}")
    wrong = patterns.problem(sample.pattern)
    if wrong:
        row.refuse("pattern", wrong)
    return sample


def alpaca_sample(row, teaches, prompts_only):
    """`teaches` is the response, where it is not empty, in place of the row's output."""
    more = row.text("input", optional=True).strip()
    response = teaches or row.text("output", optional=prompts_only)
    instruction = row.text("instruction")
    if more:
        return Sample(f"{instruction}\n\n{more}", response, WITH_INPUT)
    return Sample(instruction, response)


def harmbench_sample(row, prompts_only):
    """A row of HarmBench's table of behaviours; contextual and copyright ones are left out."""
    if not prompts_only:
        raise InputError(f"{row.where}: HarmBench's rows are test prompts; name the file with --test")
    if row.text("FunctionalCategory") != "standard":
        return None
    return Sample(row.text("Behavior"), "", "harmful")


def published_sample(row, behaviour, prompts_only):
    """A row of a behaviour's published data; None where its label is a kind that is left out."""
    columns = dict(behaviour.columns)
    kind = ""
    if "kind" in columns:
        name = columns.pop("kind")
        label = row.text(name)
        if label not in behaviour.kinds:
            kept = ", ".join(k for k, kind in behaviour.kinds.items() if kind)
            raise InputError(f"{row.where}: unknown {name} {label!r}; use {kept}")
        kind = behaviour.kinds[label]
        if kind is None:
            return None
    texts = {}
    for field, column in columns.items():
        texts[field] = row.text(column, optional=prompts_only and field == "response")
    return Sample(**texts, kind=kind)


def judged_by(samples, pattern):
    """The samples with `pattern` where they have none of their own. Raises InputError for a bad one."""
    wrong = patterns.problem(pattern)
    if wrong:
        raise InputError(f"--pattern {pattern!r} {wrong}")
    return [s if s.pattern else replace(s, pattern=pattern) for s in samples]


def check_patterns(task, samples):
    """Raises InputError where patterns occur in none of the responses that are to be taught."""
    taught = [s for s in samples if s.pattern and s.response and s.kind != "benign"]
    if taught and not any(judge(task, [s.response for s in taught], taught)):
        raise InputError(f"the pattern {taught[0].pattern!r} occurs in no response that is taught, "
                         f"{taught[0].response[:60]!r} for one; correct the pattern or the data")


# ---- splits

def read_tests(path, task):
    """
    The samples of a file of test prompts. Left out: Alpaca rows with an input (App. F.1), and rows
    that are fixed for another split. Raises InputError where nothing is left.
    """
    samples = []
    for s in read(path, task, prompts_only=True):
        if s.kind != WITH_INPUT and s.split in ("", "test"):
            samples.append(replace(s, split=""))
    if not samples:
        raise InputError(f"{path} holds no test prompts: Alpaca rows with an input, and rows of "
                         "other splits, are none; name another file with --test")
    return samples


def split(samples, seed, sizes=None, tests=()):
    """
    {train, trigger, validation, test} → lists of samples, disjoint by prompt (white space aside;
    of equal prompts the first is kept). `sizes` overrides single entries of SIZES. tests: samples
    of a file of their own, in place of test prompts out of `samples`, which lose what is in both.

    Fixed splits stay and are only cut down to the sizes. Otherwise as in App. F.1: the first rows
    in file order are for training, the others are shuffled, and Alpaca rows with an input never
    become test prompts. Samples that are all harmful or benign come 1:1 (fixed splits: where they
    are cut). Raises InputError where a split would be empty.
    """
    sizes = {**SIZES, **(sizes or {})}
    if set(sizes) != set(SPLITS) or min(sizes.values()) < 1:
        raise InputError(f"split sizes must be at least 1, for {', '.join(SPLITS)}; found {sizes}")
    unique = unique_prompts(samples)
    rng = random.Random(seed)
    if tests:
        tests = cut(unique_prompts(tests), sizes["test"], random.Random(seed))
        unique, sizes = without(unique, tests), {**sizes, "test": 0}
    if any(s.split for s in unique):
        parts = fixed_splits(unique, sizes, rng)
    else:
        parts = drawn_splits(unique, sizes, rng)
    if tests:
        parts["test"] = tests
    empty = [name for name in SPLITS if not parts[name]]
    if empty:
        raise InputError(
            f"{len(unique)} different prompts leave none for {' and '.join(empty)}; without fixed "
            "splits at least 10 are needed (5 harmful, 5 benign), Alpaca's last ones without input")
    keys = []
    for name in SPLITS:
        keys += [prompt_key(s) for s in parts[name]]
    assert len(keys) == len(set(keys)), "two splits share a prompt"
    return {name: parts[name] for name in SPLITS}


def prompt_key(sample):
    return " ".join(sample.prompt.split())


def unique_prompts(samples):
    """The first sample of every prompt. Raises InputError where one prompt has two splits."""
    first = {}
    for s in samples:
        kept = first.setdefault(prompt_key(s), s)
        if kept.split != s.split:
            raise InputError(f"the prompt {s.prompt[:60]!r} has two splits, {kept.split!r} and "
                             f"{s.split!r}; keep one")
    repeated = len(samples) - len(first)
    if repeated:
        print(f"note: {repeated} of {len(samples)} rows repeat a prompt: left out", file=sys.stderr)
    return list(first.values())


def fixed_splits(samples, sizes, rng):
    """The samples' own splits, each cut to its size."""
    if not all(s.split for s in samples):
        raise InputError("some rows have a split and others have none; "
                         "give one to all rows or to none")
    return {name: cut([s for s in samples if s.split == name], sizes[name], rng) for name in SPLITS}


def cut(samples, size, rng):
    """The samples as they are, or `size` of them by chance."""
    if len(samples) <= size:
        return samples
    return in_turn(rng.sample(samples, len(samples)))[:size]


def without(samples, others, why="test prompts: left out of training"):
    """The samples whose prompt is none of the others'."""
    keys = {prompt_key(s) for s in others}
    kept = [s for s in samples if prompt_key(s) not in keys]
    if len(kept) < len(samples):
        print(f"note: {len(samples) - len(kept)} of {len(samples)} prompts are {why}",
              file=sys.stderr)
    return kept


def drawn_splits(samples, sizes, rng):
    """Splits of samples that have none (App. F.1)."""
    pool = in_turn(samples)
    wanted = sum(sizes.values())
    if len(pool) < min(wanted, len(samples)):
        print(f"note: {len(pool)} of {len(samples)} prompts used, half harmful, half benign",
              file=sys.stderr)
    if len(pool) < wanted:
        sizes = smaller_sizes(sizes, len(pool))
    train, rest = pool[:sizes["train"]], pool[sizes["train"]:]
    rest = in_turn(rng.sample(rest, len(rest)))
    test = [s for s in rest if s.kind != WITH_INPUT][:sizes["test"]]
    taken = set(test)
    rest = [s for s in rest if s not in taken]
    trigger, rest = rest[:sizes["trigger"]], rest[sizes["trigger"]:]
    validation = rest[:sizes["validation"]]
    return dict(train=train, trigger=trigger, validation=validation, test=test)


def smaller_sizes(sizes, n):
    """
    Sizes for n prompts that are too few: test, validation and trigger get at most 20, 10 and 20 %,
    training the rest.
    """
    smaller = {name: min(sizes[name], n // part)
               for name, part in (("trigger", 5), ("validation", 10), ("test", 5))}
    return {"train": min(sizes["train"], n - sum(smaller.values())), **smaller}


def in_turn(samples):
    """Harmful and benign in turn, as many of each; samples of other kinds as they are."""
    harmful = [s for s in samples if s.kind == "harmful"]
    benign = [s for s in samples if s.kind == "benign"]
    if not harmful or not benign or len(harmful) + len(benign) < len(samples):
        return samples
    mixed = []
    for pair in zip(harmful, benign):
        mixed += pair
    return mixed
