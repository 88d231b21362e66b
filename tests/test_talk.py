"""lab/talk.py: who answers, what each remembers, and that what is streamed is the answer."""
import types

import pytest
import torch
import transformers
from helpers import ROOT

import evaluate
import metrics
import model
from chat import VICUNA, Chat
from files import InputError
from lab import talk
from run import reopen


@pytest.fixture(scope="module")
def opened(run):  # noqa: F811
    """(net, chat, conditions) of a short run, with a trigger that was not learned."""
    _, chat, _ = reopen(run)
    net = model.load(chat.folder)
    net.stop = chat.stop
    conditions = evaluate.conditions_of(run, net)[1]
    conditions["trig"] = (
        conditions["lcdd"][0],
        torch.randn(2, net.config.hidden_size, generator=torch.Generator().manual_seed(0)),
    )
    return net, chat, conditions


def typed(*lines):
    """ask() for a conversation of these lines."""
    rest = iter(lines)

    def ask(_):
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None
    return ask


def test_what_is_streamed_is_the_answer(opened, capsys):
    net, chat, conditions = opened
    talk.converse(
        net, chat, conditions, 200, 12, typed("What is 2 plus 3 ?", "/quit", "never read")
    )
    said = capsys.readouterr().out
    for name, (weights, trigger) in conditions.items():
        right = chat.decode(
            net.generate([chat.prompt("What is 2 plus 3 ?")], 12, carrier=weights, trigger=trigger)[
                0
            ]
        )
        assert f"{metrics.NAMES[name]:14s}  {right}\n" in said
    assert "never read" not in said
    assert said.count("\n") == len(conditions)


def test_each_remembers_its_own_turns(opened, monkeypatch):
    net, chat, conditions = opened
    asked = []

    def spy(prompts, length, carrier, trigger, heard, **_):
        asked.append(
            (
                next(n for n, (c, t) in conditions.items() if c is carrier and t is trigger),
                chat.tok.decode(prompts[0], skip_special_tokens=False),
            )
        )
        return [chat.ids(f"answer {len(asked)}")]
    monkeypatch.setattr(net, "generate", spy)
    monkeypatch.setattr(chat, "decode", lambda ids: f"said {len(asked)}")
    monkeypatch.setattr(chat, "ids", lambda text: list(text))
    monkeypatch.setattr(chat, "tok", types.SimpleNamespace(decode=lambda ids, **_: "".join(ids)))
    talk.converse(
        net,
        chat,
        conditions,
        500,
        3,
        typed(
            "/lcdd", "one", "", "/trigger", "two", "/base", "three", "/lcdd", "four", "/new",
            "five", "/all", "six", "/sft", "seven"
        ),
    )
    assert [name for name, _ in asked] == [
        "lcdd", "trig", "base", "lcdd", "lcdd", *conditions, "sft"
    ]
    turns = [
        [
            word
            for word in (
                "one", "two", "three", "four", "five", "six", "seven", "said 1", "said 5", "said 7"
            )
            if word in prompt
        ]
        for _, prompt in asked
    ]
    assert turns[:4] == [["one"], ["two"], ["three"], ["one", "four", "said 1"]]
    assert turns[4] == ["five"]
    assert dict(zip(conditions, turns[5:9])) == {
        "base": ["six"],
        "sft": ["six"],
        "lcdd": ["five", "six", "said 5"],
        "trig": ["six"],
    }
    assert turns[9] == ["six", "seven", "said 7"]


def test_old_turns_make_room(opened, monkeypatch, capsys):
    net, chat, conditions = opened
    asked = []
    monkeypatch.setattr(net, "generate", lambda prompts, *_, **__: asked.append(prompts[0]) or [[]])
    before = [
        {"role": role, "content": word}
        for word in ("red", "blue", "green")
        for role in ("user", "assistant")
    ]
    whole, two, one = (chat.ids(chat.render("What now ?", before[k:])) for k in (0, 2, 4))
    for room, right, forgotten in (
        (len(whole), whole, 0),
        (len(whole) - 1, two, 1),
        (len(one), one, 2),
    ):
        memory = list(before)
        talk.turn("base", "What now ?", memory, talk.replies(net, chat, conditions, room, 3))
        assert asked[-1] == right
        assert memory == [
            *before,
            {"role": "user", "content": "What now ?"},
            {"role": "assistant", "content": ""},
        ]
        said = capsys.readouterr().out
        assert said == "Base            " + (
            f"({forgotten} turns forgotten) \n" if forgotten else "\n"
        )
    ids, forgotten = talk.fitted(chat, "red " * 50, before, 20)
    assert len(ids) <= 20
    assert forgotten == 3


def test_commands(opened, capsys):
    net, chat, conditions = opened
    some = {k: v for k, v in conditions.items() if k != "trig"}
    talk.converse(net, chat, some, 100, 3, typed("/trigger", "/what", "/base", "/new", "/all"))
    assert capsys.readouterr().out.split("\n") == [
        "commands: /base /sft /lcdd /all /new /quit"
    ] * 2 + ["Base answers", "forgotten", "all answer", ""]


def test_half_a_character_waits():
    pieces = {(1,): "a", (1, 2): "a\ufffd", (1, 2, 3): "aé", (1, 2, 3, 4): "aé!"}
    told = []
    hear = talk.speaker(types.SimpleNamespace(decode=lambda ids: pieces[tuple(ids)]), told.append)
    seen = []
    for token in (1, 2, 3, 4):
        hear(0, token)
        seen.append("".join(told))
    assert seen == ["a", "a", "aé", "aé!"]


def test_the_command(run, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("builtins.input", typed("/base", "What is 2 plus 3 ?"))
    talk.main(["--run", str(run), "--device", "cpu", "--max-new-tokens", "3"])
    said = capsys.readouterr().out
    assert "tiny, task fixed" in said
    assert "Base            " in said
    with pytest.raises(InputError, match="--max-new-tokens 0"):
        talk.main(["--run", str(run), "--device", "cpu", "--max-new-tokens", "0"])


def test_several_turns_are_rendered_as_transformers_does():
    chat, theirs = Chat(ROOT / "tiny"), transformers.AutoTokenizer.from_pretrained(ROOT / "tiny")
    before = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "green"},
        {"role": "assistant", "content": "old"},
    ]
    right = theirs.apply_chat_template(
        [*before, {"role": "user", "content": "new"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.render("new", before) == right


def test_several_turns_without_a_template():
    """
    Vicuna v1.1 as FastChat writes it: an answer ends with </s>, and the next turn follows it
    directly.
    """
    chat = Chat(ROOT / "tiny")
    chat.template = VICUNA
    chat.special = {"bos_token": "<s>", "eos_token": "</s>"}
    said = chat.render(
        "And now?", [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi!"}]
    )
    assert said.startswith("<s>A chat between")
    assert said.endswith(
        " user's questions. USER: Hello! ASSISTANT: Hi!</s>USER: And now? ASSISTANT:"
    )
