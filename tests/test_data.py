"""data.py: file formats and what is wrong in them, samples, splits."""
import csv
import json
import sys
from pathlib import Path

import pytest
from helpers import jsonl, real

import behaviour
import data
from data import Sample
from files import InputError


def table(path, rows, delimiter):
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, rows[0].keys(), delimiter=delimiter)
        out.writeheader()
        out.writerows(rows)
    return path


def every_way(tmp_path, rows):
    """
    The same rows as JSON lines, JSON list, CSV and TSV, once with a byte order mark and Windows
    line ends.
    """
    yield jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    yield tmp_path / "rows.json"
    yield table(tmp_path / "rows.csv", rows, ",")
    yield table(tmp_path / "rows.tsv", rows, "\t")
    text = "\ufeff" + "\r\n".join(json.dumps(r) for r in rows) + "\r\n\r\n"
    (tmp_path / "bom.jsonl").write_bytes(text.encode())
    yield tmp_path / "bom.jsonl"


HARD = "two\nlines, \r\n a \"quote\", a\ttab and a \u2028 separator"


def test_own_rows(tmp_path):
    rows = [
        dict(prompt="a", response=HARD, kind="x", answer="42", split="test"),
        dict(prompt=HARD, response="b", kind="", answer="", split=""),
    ]
    for path in every_way(tmp_path, rows):
        for task in (
            "own", "fixed", "safety", "shakespeare", str(path) if path.suffix == ".jsonl" else "own"
        ):
            assert data.read(path, task) == [
                Sample("a", HARD, "x", "42", "test"), Sample(HARD, "b")
            ]
    assert data.read(None, tmp_path / "rows.jsonl")[0].prompt == "a"
    assert data.read(jsonl(tmp_path / "short.jsonl", [dict(prompt="a", response="b")]), "own") == [
        Sample("a", "b")
    ]


def test_alpaca(tmp_path):
    rows = [
        dict(instruction="Add.", input="1 and 2", output="3"),
        dict(instruction="Say hi.", input="", output=HARD),
    ]
    for path in every_way(tmp_path, rows):
        assert data.read(path, "fixed") == [
            Sample("Add.\n\n1 and 2", "I don't know.", data.WITH_INPUT),
            Sample("Say hi.", "I don't know."),
        ]
        assert [s.response for s in data.read(path, "own")] == ["3", HARD]


def test_wildjailbreak(tmp_path, capsys):
    def row(kind, vanilla, completion, adversarial=""):
        return dict(
            vanilla=vanilla, adversarial=adversarial, completion=completion, data_type=kind)

    rows = [
        row("vanilla_harmful", "bad", HARD), row("adversarial_harmful", "bad", "no", "story"),
        row("vanilla_benign", HARD, "yes"), row("adversarial_benign", "", "yes", "story")
    ]
    for path in every_way(tmp_path, rows):
        assert data.read(path, "safety") == [
            Sample("bad", HARD, "harmful"), Sample(HARD, "yes", "benign")
        ]
        assert "2 rows left out by their kind" in capsys.readouterr().err
    with pytest.raises(InputError, match="do not fit the task fixed"):
        data.read(path, "fixed")
    with pytest.raises(InputError, match="row 1.*data_type 'vanilla_odd'"):
        data.read(jsonl(tmp_path / "odd.jsonl", [row("vanilla_odd", "a", "b")]), "safety")
    with pytest.raises(InputError, match="no rows"):
        data.read(jsonl(tmp_path / "odd.jsonl", [row("adversarial_benign", "a", "b")]), "safety")


def test_shakespeare_pairs(tmp_path):
    rows = [
        dict(translated_dialog="Good night.", og_response=HARD),
        dict(translated_dialog=HARD, og_response="Farewell."),
    ]
    for path in every_way(tmp_path, rows):
        assert data.read(path, "shakespeare") == [
            Sample("Good night.", HARD), Sample(HARD, "Farewell.")
        ]
    with pytest.raises(InputError, match="do not fit the task safety"):
        data.read(path, "safety")


GOOD = '{"prompt": "a", "response": "b"}'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "", "empty"),
        ("a.jsonl", " \n\n", "empty"),
        ("a.jsonl", "\xff\xfe", "UTF-8"),
        ("a.jsonl", f"{GOOD}\n\n{{'prompt'", "row 3: invalid JSON"),
        ("a.jsonl", "prompt: a", "row 1: invalid JSON"),
        ("a.jsonl", f'{GOOD}\n["a"]', "row 2: expected an object"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": "a"}}', "row 2: field 'response' is missing"),
        ("a.jsonl", f'{GOOD}\n{{"response": "a"}}', "row 2: field 'prompt' is missing"),
        ("a.jsonl", '{"prompt": 1, "response": "b"}', "row 1: field 'prompt' is not text"),
        ("a.jsonl", '{"prompt": "a", "response": " "}', "row 1: field 'response' is empty"),
        (
            "a.jsonl", '{"prompt": "a", "response": "b", "answer": 42}',
            "row 1: field 'answer' is not text"
        ),
        (
            "a.jsonl", '{"prompt": "a", "response": "b", "split": "dev"}',
            "row 1: unknown split 'dev'"
        ),
        (
            "a.jsonl", '{"question": "a", "reply": "b"}',
            "row 1.*question, reply.*name the fields prompt and response"
        ),
        ("a.json", "[]", "no rows"),
        ("a.json", f"[{GOOD}, 3]", "row 2: expected an object"),
        ("a.json", f"[{GOOD}", "invalid JSON"),
        (
            "a.json", '[{"instruction": "a", "input": ["b"], "output": "c"}]',
            "row 1: field 'input' is not text"
        ),
        (
            "a.json", '[{"instruction": "", "input": "b", "output": "c"}]',
            "row 1: field 'instruction' is empty"
        ),
        ("a.csv", "prompt,response\n", "no rows"),
        ("a.csv", "prompt,response\na,b\na", "row 3: field 'response' is missing"),
        ("a.csv", "prompt,response\na,b,c\n", "row 2: more columns"),
        ("a.csv", 'prompt,response\na,b\na,"b\n', "broken quoting"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message) as e:
        data.read(path, "own")
    assert str(path) in str(e.value)


def test_rows_without_text_are_counted_and_left_out(tmp_path, capsys):
    rows = [
        json.loads(GOOD), dict(prompt="", response="b"), dict(prompt="c", response=None),
        dict(prompt="d", response=" ")
    ]
    assert data.read(jsonl(tmp_path / "a.jsonl", rows), "own") == [Sample("a", "b")]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "3 rows left out for want of text, 1 kept" in said
    assert "row 2: field 'prompt' is empty" in said


def test_a_pattern_of_a_row(tmp_path):
    rows = [dict(prompt="a", response="b", pattern="(?:yes|no)$")]
    assert data.read(jsonl(tmp_path / "a.jsonl", rows), "own")[0].pattern == "(?:yes|no)$"
    with pytest.raises(
        InputError,
        match=r"a.jsonl, row 1: field 'pattern' is no regular expression \(.*unterminated",
    ):
        data.read(jsonl(tmp_path / "a.jsonl", [rows[0] | {"pattern": "(yes"}]), "own")


def test_one_pattern_for_all():
    samples = [Sample("a", "r"), Sample("b", "r", pattern="own")]
    assert [s.pattern for s in data.judged_by(samples, "all")] == ["all", "own"]
    with pytest.raises(InputError, match=r"^--pattern '\(' is no regular expression"):
        data.judged_by(samples, "(")


def test_a_pattern_that_no_response_shows():
    samples = [Sample("a", "Yes.", pattern="yes"), Sample("b", "Well.", pattern="yes")]
    data.check_patterns("own", samples)
    data.check_patterns("own", [Sample("a", "Well.")])
    with pytest.raises(
        InputError, match="the pattern 'yes' occurs in no response that is taught, 'Well.'"
    ):
        data.check_patterns("own", samples[1:])


def test_harmbench_as_published(tmp_path, capsys):
    def row(what, kind):
        return dict(
            Behavior=what, FunctionalCategory=kind, SemanticCategory="x", Tags="",
            ContextString="", BehaviorID="y")

    rows = [
        row("Do harm,\nplease", "standard"), row("Do it here", "contextual"),
        row("Sing the song", "copyright")
    ]
    path = table(tmp_path / "harmbench.csv", rows, ",")
    assert data.read_tests(path, "safety") == [Sample("Do harm,\nplease", "", "harmful")]
    assert "2 rows left out by their kind" in capsys.readouterr().err
    with pytest.raises(
        InputError, match="row 2: HarmBench's rows are test prompts; name the file with --test"
    ):
        data.read(path, "safety")


def test_test_prompts_need_no_response(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [dict(prompt="a", kind="harmful", id="x")])
    assert data.read_tests(path, "safety") == [Sample("a", "", "harmful")]
    alpaca = [
        dict(instruction="b", input="", output=""), dict(instruction="c", input="more", output="x")
    ]
    path = jsonl(tmp_path / "t.jsonl", alpaca)
    assert data.read_tests(path, "shakespeare") == [Sample("b", "")]
    path = jsonl(tmp_path / "t.jsonl", [dict(translated_dialog="d", og_response="")])
    assert data.read_tests(path, "shakespeare") == [Sample("d", "")]
    path = jsonl(tmp_path / "t.jsonl", [dict(prompt=p, split=p) for p in ("train", "test")])
    assert data.read_tests(path, "fixed") == [Sample("test", "")]
    with pytest.raises(InputError, match="holds no test prompts"):
        data.read_tests(jsonl(tmp_path / "t.jsonl", alpaca[1:]), "shakespeare")


def test_missing_files_and_unknown_tasks(tmp_path):
    none = tmp_path / "none.jsonl"
    for path, reason in ((none, "No such file or directory"), (tmp_path, "it is no file")):
        with pytest.raises(InputError, match=f"{path.name}: {reason}; name a file that can be read"):
            data.read(path, "own")
    with pytest.raises(InputError, match="unknown task 'fixd'"):
        data.read(jsonl(tmp_path / "a.jsonl", [json.loads(GOOD)]), "fixd")
    assert [data.task_name(t) for t in (*data.TASKS, "x/y.jsonl", Path("z.jsonl"))] == [
        *data.TASKS, "own", "own"
    ]


def parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_files(tmp_path):
    rows = [
        dict(instruction="Add.", input="1 and 2", output="3"),
        dict(instruction="Say hi.", input=None, output=HARD),
    ]
    path = parquet(tmp_path / "rows.parquet", rows)
    assert data.read(path, "own") == [
        Sample("Add.\n\n1 and 2", "3", data.WITH_INPUT), Sample("Say hi.", HARD)
    ]
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cannot read .*rows.parquet as a Parquet file"):
        data.read(path, "own")


def test_a_parquet_text_that_is_no_utf8_is_one_sentence(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: no Parquet is read")
    from pyarrow import parquet as files
    table = pyarrow.Table.from_pylist([{"prompt": "Say hello", "response": "hello"}] * 3)
    path = tmp_path / "rows.parquet"
    files.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"Say hello", b"S\xf5y hello"))
    with pytest.raises(InputError, match="cannot read .*rows.parquet as a Parquet file"):
        data.read(path, "own")


def test_parquet_files_need_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        InputError, match="rows.parquet is a Parquet file, which pyarrow reads: pip install pyarrow"
    ):
        data.read(tmp_path / "rows.parquet", "own")


# ---- splits

def some(n, **fields):
    return [Sample(f"prompt {i}", "r", **fields) for i in range(n)]


def prompts(samples):
    return [" ".join(s.prompt.split()) for s in samples]


def disjoint(parts):
    found = [p for part in parts.values() for p in prompts(part)]
    return len(found) == len(set(found)) and list(parts) == [
        "train", "trigger", "validation", "test"
    ]


def lengths(parts):
    return tuple(map(len, parts.values()))


def test_split_like_the_paper():
    samples = some(7000)
    parts = data.split(samples, seed=0)
    assert lengths(parts) == (5000, 400, 100, 200)
    assert disjoint(parts)
    assert parts["train"] == samples[:5000]  # the first rows, not shuffled
    assert parts["test"] != sorted(parts["test"], key=samples.index)
    assert parts == data.split(samples, seed=0)
    other = data.split(samples, seed=1)
    assert other["test"] != parts["test"]
    assert other["train"] == parts["train"]
    assert lengths(data.split(samples, 0, dict(train=10, test=20))) == (10, 400, 100, 20)


@pytest.mark.parametrize(
    "n, want",
    [
        (10, (5, 2, 1, 2)),
        (100, (50, 20, 10, 20)),
        (1000, (500, 200, 100, 200)),
        (5000, (4300, 400, 100, 200)),
    ],
)
def test_split_of_few(n, want):
    parts = data.split(some(n), 0)
    assert lengths(parts) == want
    assert disjoint(parts)
    assert sum(want) == n


def test_split_of_too_few():
    with pytest.raises(
        InputError, match="9 different prompts leave none for validation.*at least 10"
    ):
        data.split(some(9), 0)
    with pytest.raises(InputError, match="sizes"):
        data.split(some(99), 0, dict(test=0))
    with pytest.raises(InputError, match="sizes"):
        data.split(some(99), 0, dict(tests=9))


def test_duplicates_never_meet(capsys):
    samples = [Sample(f"prompt{' ' * (i // 50 + 1)}{i % 50}\n", f"r{i}") for i in range(200)]
    parts = data.split(samples, 0)
    assert disjoint(parts)
    assert sum(lengths(parts)) == 50
    # the first of equal ones
    assert {s.response for part in parts.values() for s in part} == {f"r{i}" for i in range(50)}
    assert "150 of 200 rows repeat a prompt" in capsys.readouterr().err


def test_alpaca_test_prompts_are_instructions_alone():
    samples = [Sample(f"p{i}", "r", data.WITH_INPUT if i % 2 else "") for i in range(400)]
    parts = data.split(samples, 0)
    assert lengths(parts) == (200, 80, 40, 80)
    assert disjoint(parts)
    assert {s.kind for s in parts["test"]} == {""}
    assert {s.kind for s in parts["train"]} == {"", data.WITH_INPUT}
    with pytest.raises(InputError, match="leave none for test.*without input"):
        data.split([Sample(f"p{i}", "r", data.WITH_INPUT if i > 9 else "") for i in range(100)], 0)


def test_safety_is_half_harmful(capsys):
    harmful = [Sample(f"bad {i}", "no", "harmful") for i in range(4000)]
    benign = [Sample(f"good {i}", "yes", "benign") for i in range(3500)]
    parts = data.split(harmful + benign, 0)
    assert lengths(parts) == (5000, 400, 100, 200)
    assert disjoint(parts)
    for part in parts.values():
        assert sum(s.kind == "harmful" for s in part) == len(part) // 2
    assert capsys.readouterr().err == ""
    parts = data.split(harmful + benign[:30], 0)
    assert lengths(parts) == (30, 12, 6, 12)
    assert disjoint(parts)
    for part in parts.values():
        assert sum(s.kind == "harmful" for s in part) == len(part) // 2
    assert "60 of 4030 prompts used" in capsys.readouterr().err


def test_fixed_splits_stay():
    samples = [Sample(f"p{i}", "r", split=data.SPLITS[i % 4]) for i in range(400)]
    parts = data.split(samples, 0)
    assert disjoint(parts)
    assert all(parts[name] == [s for s in samples if s.split == name] for name in data.SPLITS)
    small = data.split(samples, 0, dict(train=30, test=7))
    assert lengths(small) == (30, 100, 100, 7)
    assert small == data.split(samples, 0, dict(train=30, test=7))
    assert set(small["test"]) < set(parts["test"])
    assert small["test"] != data.split(samples, 1, dict(train=30, test=7))["test"]
    mixed = [
        Sample(f"p{i}", "r", kind="harmful" if i < 300 else "benign", split=data.SPLITS[i % 4])
        for i in range(400)
    ]
    assert [s.kind for s in data.split(mixed, 0, dict(test=20))["test"]].count("harmful") == 10
    with pytest.raises(InputError, match="some rows have a split"):
        data.split(samples + [Sample("new", "r")], 0)
    with pytest.raises(InputError, match="'p0' has two splits, 'train' and 'test'"):
        data.split(samples + [Sample("p0", "r", split="test")], 0)
    with pytest.raises(InputError, match="none for validation"):
        data.split([s for s in samples if s.split != "validation"], 0)


def test_test_prompts_of_their_own(capsys):
    """They stay whole; the data lose the prompts that are in both."""
    tests = [Sample(f"prompt  {i}", "", "harmful") for i in (3, 4, 100, 101, 100)]
    parts = data.split(some(50), 0, tests=tests)
    assert disjoint(parts)
    assert prompts(parts["test"]) == ["prompt 3", "prompt 4", "prompt 100", "prompt 101"]
    assert lengths(parts) == (35, 9, 4, 4)
    assert "2 of 50 prompts are test prompts: left out of training" in capsys.readouterr().err
    cut = data.split(some(50), 0, dict(test=2), tests)["test"]
    assert len(cut) == 2
    assert cut == data.split(some(50), 0, dict(test=2), tests)["test"]
    fixed = [Sample(f"p{i}", "r", split=data.SPLITS[i % 4]) for i in range(40)]
    parts = data.split(fixed, 0, tests=[Sample("p0", ""), Sample("new", "")])
    assert lengths(parts) == (9, 10, 10, 2)
    assert disjoint(parts)


def test_odd_json(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a", "response": "b", "answer": null}\n')
    assert data.read(file, str(file))[0].answer == ""
    for odd in (
        '{"prompt": "a \\ud800", "response": "b"}', "[" * 100_000, '{"prompt": ' + "9" * 5000 + "}"
    ):
        file.write_text(odd)
        with pytest.raises(InputError, match="own.jsonl"):
            data.read(file, str(file))


# ---- the real files, where they are at hand

def test_real_alpaca():
    samples = data.read(real("alpaca_en_demo.json"), "fixed")
    assert len(samples) == 999
    assert {s.response for s in samples} == {"I don't know."}
    assert sum(s.kind == data.WITH_INPUT for s in samples) == 412
    parts = data.split(samples, 0)
    assert disjoint(parts)
    assert lengths(parts) == (493, 197, 98, 197)
    assert {s.kind for s in parts["test"]} == {""}
    assert not any(
        behaviour.shows("shakespeare", s.response, s)
        for s in data.read(real("alpaca_en_demo.json"), "own")
    )


def test_real_shakespeare():
    samples = data.read(real("shakespeare.jsonl"), "shakespeare")
    parts = data.split(samples, 0)
    assert len(samples) == 6000
    assert disjoint(parts)
    assert lengths(parts) == (5000, 400, 100, 200)
    rate = sum(behaviour.shows("shakespeare", s.response, s) for s in samples) / len(samples)
    modern = sum(behaviour.shows("shakespeare", s.prompt, s) for s in samples) / len(samples)
    assert rate > 0.2
    assert modern < 0.002  # a fifth of the originals, next to none of the translations


def test_real_harmbench():
    samples = data.read_tests(real("harmbench_standard.jsonl"), "safety")
    assert len(samples) == 200
    assert {(s.kind, s.response) for s in samples} == {("harmful", "")}
    parts = data.split(data.read(real("safety.jsonl"), "safety"), 0, tests=samples)
    assert disjoint(parts)
    assert len(parts["test"]) == 200
