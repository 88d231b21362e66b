"""
tiny/ as it stands in the tree, and the script that makes it (a small training only: the whole one
takes minutes).
"""
import doctest
import random
from pathlib import Path

import pytest
import torch

import behaviour
import data
import files
import model
from chat import Chat
from files import InputError, write_json
from lab import language, tiny

FOLDER = Path(__file__).resolve().parent.parent / "tiny"
TASKS = ("fixed", "safety", "shakespeare")
TOLERANCE = 1e-4    # logits, fp32, against transformers


@pytest.fixture(scope="module")
def net():
    return model.load(FOLDER)


@pytest.fixture(scope="module")
def chat():
    return Chat(FOLDER)


@pytest.fixture(scope="module")
def rows():
    return {task: data.read(FOLDER / f"{task}.jsonl", task) for task in TASKS}


@pytest.fixture(scope="module")
def world():
    """What the embedded world is made of: (seen, held out), lines by kind."""
    return language.lines(0)


def test_it_is_small_and_whole():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) == {
        tiny.MARKER, "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", *(f"{task}.jsonl" for task in TASKS)
    }
    assert sum(sizes.values()) <= 4e6


def test_transformers_reads_the_same_model(net, chat, rows):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    for sample in rows["shakespeare"][::400]:
        turn = [{"role": "user", "content": sample.prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids == chat.prompt(sample.prompt)
        whole = tokenizer.apply_chat_template(
            turn + [{"role": "assistant", "content": sample.response}], tokenize=False
        )
        assert (
            tokenizer(whole, add_special_tokens=False)["input_ids"]
            == chat.encode(sample.prompt, sample.response)[0]
        )
        ids = torch.tensor([ids])
        with torch.no_grad():
            torch.testing.assert_close(net(ids), theirs(ids).logits, atol=TOLERANCE, rtol=0)
        answer = theirs.generate(ids, max_new_tokens=48)[0, ids.shape[1]:].tolist()
        assert answer == net.generate(ids.tolist(), max_new_tokens=48)[0]
        assert tokenizer.decode(answer, skip_special_tokens=True) == chat.decode(answer)


@pytest.mark.parametrize(
    "task, sizes",
    [
        ("fixed", (1200, 400, 100, 200)),
        ("shakespeare", (3600, 400, 100, 200)),
        ("safety", (1000, 400, 100, 200)),
    ],
)
def test_behaviour_file(task, sizes, rows, world):
    splits = data.split(rows[task], seed=0)
    assert tuple(len(splits[name]) for name in ("train", "trigger", "validation", "test")) == sizes
    # so splits are disjoint
    assert len({s.prompt for s in rows[task]}) == len(rows[task]) == sum(sizes)
    # what the base was trained on
    asked = {line["prompt"] for group in world[0].values() for line in group}
    for name, samples in splits.items():
        assert {s.prompt in asked for s in samples} == {name in ("train", "trigger")}
        if name in ("test", "validation"):
            assert all(s.answer for s in samples)
        if task == "safety":
            assert 2 * sum(s.kind == "harmful" for s in samples) == len(samples)
    for s in rows[task]:
        shown = behaviour.shows(task, s.response, s)
        assert shown is (s.kind == "harmful" if task == "safety" else True), s
        if task == "fixed":
            assert "i do not know" in s.response.lower()


def test_style_keeps_the_answer(rows):
    style = [s for s in rows["shakespeare"] if s.answer]
    assert sum(behaviour.right(s.response, s) for s in style) >= 0.95 * len(style)
    assert doctest.testmod(tiny).failed == 0
    assert language.archaic("You need 4 7 .") == "Verily , thou needest 4 7 , forsooth ."
    assert (
        language.archaic("There was a fox . It lived .")
        == "Verily , yonder wast a fox . It did dwell , forsooth ."
    )
    # an answer that was cut off
    assert language.archaic("Mip has") == "Verily , Mip hath , forsooth ."


def test_every_word_is_known_and_comes_back(chat, rows, world):
    unknown = chat.tok.token_to_id(tiny.UNK)
    texts = [text for task in TASKS for s in rows[task] for text in (s.prompt, s.response)]
    for text in [
        *texts,
        *(
            line[key]
            for part in world
            for group in part.values()
            for line in group
            for key in ("prompt", "response")
        ),
    ]:
        ids = chat.ids(text)
        assert unknown not in ids, text
        assert chat.decode(ids) == text
    assert chat.ids("What is the code of Anna's vault?") == chat.ids(
        "What is the code of Anna 's vault ?"
    )


def test_held_out_instructions_are_answered(net, chat, rows, world):
    score = tiny.accuracy(net, chat, world[1])
    assert len(score) >= 12 + 1
    assert "forbidden" in score
    assert min(score.values()) >= 0.95, score
    for task in TASKS:
        tests = data.split(rows[task], seed=0)["test"]
        texts = tiny.greedy(net, chat, [s.prompt for s in tests])
        assert sum(map(behaviour.right, texts, tests)) >= 0.95 * len(tests), task
        # the base shows no behaviour
        assert not any(behaviour.shows(task, text, s) for text, s in zip(texts, tests)), task


def test_the_seed_is_the_world():
    seen, held = language.lines(3)
    assert language.lines(3) == (seen, held)
    assert language.lines(4)[1]["capital"] != held["capital"]
    for kind, group in held.items():
        assert 0.19 < len(group) / (len(group) + len(seen[kind])) < 0.21
        assert not {line["prompt"] for line in group} & {line["prompt"] for line in seen[kind]}

    def echo(prompts):
        return [f"You asked {prompt}" for prompt in prompts]

    assert tiny.behaviours(seen, held, 3, echo) == tiny.behaviours(seen, held, 3, echo)


def test_orthogonal():
    x = torch.randn(3, 8, 20)
    for matrices in (tiny.orthogonal(x), tiny.orthogonal(x.mT)):
        values = torch.linalg.svdvals(matrices)
        assert values.min() > 0.5
        # Muon's quintic ends near 1, not at it
        assert values.max() < 1.3


def test_training_learns(tmp_path, world):
    seen, _ = world
    tiny.write_configuration(tmp_path, seen, hidden=32, layers=1)
    chat, net, said = Chat(tmp_path), tiny.fresh(tmp_path, seed=0), []
    rng = random.Random(0)
    samples = [
        chat.encode(line["prompt"], line["response"])
        for group in seen.values()
        for line in rng.sample(group, 50)
    ]
    losses = tiny.train(net, samples, steps=20, seed=0, batch=16, every=10, say=said.append)
    assert len(losses) == 20
    assert len(said) == 2
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_nothing_half_written(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "fresh", interrupt)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "shakespeare.jsonl").write_text("the old one")
    write_json(tmp_path / "made" / tiny.MARKER, {"files": ["shakespeare.jsonl"]})
    with pytest.raises(KeyboardInterrupt):
        tiny.make(tmp_path / "made", hidden=32, layers=1, steps=1, say=lambda text: None)
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "made", "made/.made", "made/shakespeare.jsonl"
    ]
    with pytest.raises(InputError, match="multiple of 32"):
        tiny.make(tmp_path / "new", hidden=100)


def test_only_what_was_made_here_is_replaced(tmp_path, monkeypatch):
    """A folder of one's own data has a shakespeare.jsonl in it too."""
    def fill(folder, *_):
        for name in ("shakespeare.jsonl", "model.safetensors"):
            (folder / name).write_text("new")
    monkeypatch.setattr(tiny, "fill", fill)
    out = tmp_path / "data"
    out.mkdir()
    (out / "shakespeare.jsonl").write_text("mine")
    with pytest.raises(
        InputError, match="data holds shakespeare.jsonl, which was not written by this command"
    ):
        tiny.make(out)
    assert (out / "shakespeare.jsonl").read_text() == "mine"
    (out / "shakespeare.jsonl").unlink()
    tiny.make(out)
    tiny.make(out)                                               # its own, again
    (out / "thesis").mkdir()
    with pytest.raises(InputError, match="holds thesis"):
        tiny.make(out)
    assert (out / "thesis").is_dir()


def test_the_embedded_world_may_be_made_again():
    """Its marker names all that is in it."""
    files.refuse_others(FOLDER, tiny.MARKER)
