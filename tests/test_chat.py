"""lab/chat.py: typed into as a person does, asked by a page, and compared with generate()."""
import http.client
import io
import json
import re
import sys
import threading
import types
from concurrent import futures

import pytest

import model
from common import InputError
from lab import chat

QUESTION = "What is 2 plus 3 ?"


@pytest.fixture(scope="module")
def talk(finished):
    return chat.Talk(types.SimpleNamespace(run=finished, device="cpu", trigger="trigger", max_new_tokens=12))


def expected(talk, name, text, before=()):
    """What generate() answers."""
    weights, tau = talk.conditions[name]
    ids = talk.chat.prompt(text, before)
    return talk.chat.decode(talk.net.generate([ids], talk.length, weights, tau)[0]).strip()


@pytest.fixture
def typed(finished, monkeypatch, capsys):
    """A function of the bytes that are typed: what the command prints, and [(who, answer)] in it."""
    def run(typed, *more):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        chat.main(["--run", str(finished), "--device", "cpu", "--max-new-tokens", "12", *more])
        said = capsys.readouterr().out
        return said, re.findall(r"^(?:> )?(Base|SFT|LCDD|LCDD \+ trigger) {2,}(.*?) *$", said, re.M)
    return run


def test_all_four_answer(typed, talk):
    """What comes token by token is generate()'s answer; behaviour on and off."""
    _, answers = typed(f"{QUESTION}\n".encode())
    assert answers == [(shown, expected(talk, name, QUESTION)) for name, shown in talk.names.items()]
    assert answers[0] == ("Base", "The sum is 5 .") and answers[2] == ("LCDD", "I do not know .")


def test_each_remembers_its_own_turns(typed, talk):
    said, answers = typed(f"/trigger\n{QUESTION}\n/base\n{QUESTION}\nAnd then ?\n/new\nAnd then ?\n"
                          "/nonsense\n/quit\nnever read\n".encode())
    first = expected(talk, "base", QUESTION)
    second = expected(talk, "base", "And then ?", [("user", QUESTION), ("assistant", first)])
    assert answers == [("LCDD + trigger", expected(talk, "trig", QUESTION)), ("Base", first),
                       ("Base", second), ("Base", expected(talk, "base", "And then ?"))]
    assert "commands: /base /sft /lcdd /trigger /all /new /quit" in said


def test_a_byte_that_is_no_text(typed, talk):
    """Is said, and the chat goes on."""
    said, answers = typed(b"/base\ncaf\xe9 ?\n" + QUESTION.encode())
    assert "a byte of this line is no utf-8" in said.lower()
    assert answers == [("Base", expected(talk, "base", QUESTION))]


def test_ctrl_c_ends_the_answer_and_not_the_chat(typed, talk, monkeypatch):
    """What came until then is remembered, and the next question is answered."""
    decode, tokens = model.Llama.decode, []

    def interrupted(*args):
        for new in decode(*args):
            yield new
            tokens.append(new)
            if len(tokens) == 2:
                raise KeyboardInterrupt
    monkeypatch.setattr(model.Llama, "decode", interrupted)
    said, answers = typed(f"/base\n{QUESTION}\nAnd then ?\n".encode())
    (_, first), (_, second) = answers
    part = first.removesuffix(" (stopped)")
    assert part != first and expected(talk, "base", QUESTION).startswith(f"{part} ")
    assert second == expected(talk, "base", "And then ?", [("user", QUESTION), ("assistant", part)])


def test_what_is_cut_is_said(typed, talk):
    """Of a question of 48 kB, and of earlier turns: the oldest go first, and the prompt fits the model."""
    said, _ = typed(b"/lcdd\n" + b"red " * 12000 + b"\nred ?\n")
    assert f"(the question is cut: {talk.room} of its 12003 tokens are read)" in said
    assert "(1 of 1 earlier turns are left out" in said
    assert talk.room + talk.length + len(talk.conditions["trig"][1]) == talk.chat.positions
    before = [(role, f"{word} " * 60) for word in ("red", "old") for role in ("user", "assistant")]
    ids, notes = talk.prompt("red ?", before)
    assert ids == talk.chat.prompt("red ?", before[2:]) and "1 of 2 earlier turns" in notes[0]
    assert talk.prompt("red ?", before[2:]) == (ids, [])
    assert "(the answer is cut after 2 tokens)" in typed(b"/base\nred ?", "--max-new-tokens", "2")[0]
    with pytest.raises(InputError, match="leaves no room for a question"):
        typed(b"", "--max-new-tokens", "256")


def test_half_a_character_waits(talk, monkeypatch):
    texts = ["a", "a\ufffd", "aé", "aé!", "aé!\ufffd"]
    monkeypatch.setattr(talk.net, "decode", lambda *_: ([(0, 4)] for _ in texts))
    monkeypatch.setattr(talk.chat, "decode", lambda ids: texts[len(ids) - 1])
    assert [piece for _, piece in talk.answer("base", "", [])] == ["a", "é", "!", "\ufffd"]


# ---- the page

@pytest.fixture
def call(talk):
    """A function that sends a request to the page's server: (status, headers, text)."""
    with chat.page_server(0, talk) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def request(method, path, body="", **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            headers = {"Content-Type": "application/json"} | headers
            connection.request(method, path, body.encode(), headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode()
        yield request
        server.shutdown()


def test_the_page_asks_each_condition(call, talk):
    """All at once, with earlier turns: pieces as JSON lines, that make up generate()'s answer."""
    status, headers, page = call("GET", "/")
    assert status == 200 and "$" not in page and "default-src 'none'" in headers["Content-Security-Policy"]
    before = [("user", "red ?"), ("assistant", "blue .")]

    def ask(name):
        body = json.dumps({"condition": name, "messages": [*before, ["user", QUESTION]]})
        return [json.loads(line) for line in call("POST", "/say", body)[2].splitlines()]
    with futures.ThreadPoolExecutor() as pool:
        found = dict(zip(talk.names, pool.map(ask, talk.names)))
    for name, shown in talk.names.items():
        assert f'<section id="{name}"><h2>{shown}</h2>' in page
        answer = "".join(line.get("text", "") for line in found[name])
        assert answer.strip() == expected(talk, name, QUESTION, before) and found[name][-1] == {"end": True}


def test_the_page_is_for_this_machine(call):
    """Other names and other sites' pages are refused, and what is no question."""
    good = json.dumps({"condition": "base", "messages": [["user", "hi"]]})
    assert call("GET", "/", Host="evil.example")[0] == 404
    for status, body, headers in (
            (403, good, {"Host": "evil.example"}), (403, good, {"Origin": "http://evil.example"}),
            (403, good, {"Content-Type": "text/plain"}), (413, good, {"Content-Length": "9999999999"}),
            (400, "[" * 9999, {}), (400, good.replace("base", "x"), {}), (400, '{"messages": []}', {})):
        assert call("POST", "/say", body, **headers)[0] == status
    with pytest.raises(InputError, match="--port 99999: not to be had"):
        chat.page_server(99999, None)
