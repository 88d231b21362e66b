"""lab/chat.py: typed into as a person does, asked by a page, and compared with generate()."""
import http.client
import io
import json
import re
import signal
import sys
import threading
import types

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
    """A function of the bytes that are typed: what the command prints, {name of a condition: [answer]}."""
    def run(typed, *more):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        chat.main(["--run", str(finished), "--device", "cpu", "--max-new-tokens", "12", *more])
        said, answers = capsys.readouterr().out, {}
        for name, answer in re.findall(r"^(?:> )?(Base|SFT|LCDD|LCDD \+ trigger) {2,}(.*)$", said, re.M):
            answers.setdefault(name, []).append(answer.strip())
        return said, answers
    return run


def test_all_four_answer(typed, talk):
    """What comes token by token is generate()'s answer; behaviour on and off."""
    said, answers = typed(f"{QUESTION}\n".encode())
    assert answers == {talk.names[name]: [expected(talk, name, QUESTION)] for name in talk.names}
    assert answers["LCDD"] == ["I do not know ."] and answers["Base"] == ["The sum is 5 ."]


def test_each_remembers_its_own_turns(typed, talk):
    said, answers = typed(f"/trigger\n{QUESTION}\n/base\n{QUESTION}\nAnd then ?\n/new\nAnd then ?\n"
                          "/nonsense\n/quit\nnever read\n".encode())
    first = expected(talk, "base", QUESTION)
    second = expected(talk, "base", "And then ?", [("user", QUESTION), ("assistant", first)])
    assert answers == {"LCDD + trigger": [expected(talk, "trig", QUESTION)],
                       "Base": [first, second, expected(talk, "base", "And then ?")]}
    assert "commands: /base /sft /lcdd /trigger /all /new /quit" in said


def test_a_byte_that_is_no_text(typed, talk):
    """Is said, and the chat goes on."""
    said, answers = typed(b"/base\ncaf\xe9 ?\n" + QUESTION.encode())
    assert "a byte of this line is no utf-8" in said.lower()
    assert answers["Base"] == [expected(talk, "base", QUESTION)]


def test_ctrl_c_ends_the_answer_and_not_the_chat(typed, talk, monkeypatch):
    """What came until then is remembered; at the prompt it ends the chat."""
    decode, calls = model.Llama.decode, []

    def interrupted(*args):
        calls.append(args)
        for step, new in enumerate(decode(*args)):
            yield new
            if len(calls) == 1 and step == 1:
                signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(model.Llama, "decode", interrupted)
    said, answers = typed(f"/base\n{QUESTION}\nAnd then ?\n".encode())
    whole = expected(talk, "base", QUESTION)
    part = answers["Base"][0].removesuffix(" (stopped)")
    assert whole.startswith(part) and part != whole and answers["Base"][0].endswith("(stopped)")
    assert answers["Base"][1] == expected(talk, "base", "And then ?", [("user", QUESTION), ("assistant", part)])
    monkeypatch.setattr("builtins.input", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        chat.converse(talk)


def test_what_is_cut_is_said(typed, talk):
    """Of a question of 48 kB, and of earlier turns: the oldest go first, and the prompt fits the model."""
    said, answers = typed(b"/lcdd\n" + b"red " * 12000 + b"\nred ?\n")
    assert f"({talk.room} of its 12003 tokens are read)" in said.replace("the question is cut: ", "")
    assert "(1 of 1 earlier turns are left out" in said
    assert talk.room + talk.length + len(talk.conditions["trig"][1]) == talk.chat.positions
    before = [("user", "blue " * 60), ("assistant", "green " * 60)] * 2
    ids, notes = talk.prompt("red ?", before)
    assert ids == talk.chat.prompt("red ?", before[2:]) and "1 of 2 earlier turns" in notes[0]
    assert talk.prompt("red ?", before[2:]) == (ids, [])
    assert "(the answer is cut after 2 tokens)" in typed(f"/base\n{QUESTION}".encode(), "--max-new-tokens", "2")[0]
    with pytest.raises(InputError, match="leaves no room for a question"):
        typed(b"", "--max-new-tokens", "256")


def test_half_a_character_waits(talk):
    pieces = {1: "a", 2: "a\ufffd", 3: "aé", 4: "aé!", 5: "aé!\ufffd"}
    stub = types.SimpleNamespace(
        chat=types.SimpleNamespace(decode=lambda ids: pieces[len(ids)]), length=5, conditions={"base": (None, None)},
        prompt=lambda text, before: ([1], []),
        net=types.SimpleNamespace(decode=lambda *_: ([(0, t)] for t in range(1, 6)), stop={5}))
    told = [piece for _, piece in chat.Talk.answer(stub, "base", "", [])]
    assert told == ["a", "é", "!", "\ufffd"]


# ---- the page

@pytest.fixture
def call(talk):
    """A function that sends a request to the page's server: (status, headers, text)."""
    with chat.page_server(0, talk) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def request(method, path, body="", **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            own = {"Host": f"127.0.0.1:{server.server_port}", "Content-Type": "application/json"}
            headers = own | {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body.encode(), headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read().decode()
        yield request
        server.shutdown()


def test_the_page_asks_each_condition(call, talk):
    """All at once, with earlier turns: notes and pieces as JSON lines, the pieces are generate()'s answer."""
    status, headers, page = call("GET", "/")
    nonce = re.search(r"script-src 'nonce-(.+?)'", headers["Content-Security-Policy"])[1]
    assert status == 200 and f'<script nonce="{nonce}">' in page and "$" not in page
    before = [["user", "red ?"], ["assistant", "blue ."]]
    found = {}

    def ask(name, text):
        body = json.dumps({"condition": name, "messages": [*before, ["user", text]]})
        found[name] = [json.loads(line) for line in call("POST", "/say", body)[2].splitlines()]
    threads = [threading.Thread(target=ask, args=(name, QUESTION)) for name in talk.names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, shown in talk.names.items():
        assert f'<section id="{name}"><h2>{shown}</h2>' in page
        answer = "".join(line.get("text", "") for line in found[name])
        assert answer.strip() == expected(talk, name, QUESTION, before) and found[name][-1] == {"end": True}
    ask("base", "red " * 999)
    assert "earlier turns are left out" in found["base"][0]["note"] and "is cut" in found["base"][1]["note"]


def test_the_page_is_for_this_machine(call):
    """Other sites and other names are refused, and what is no question."""
    good = json.dumps({"condition": "base", "messages": [["user", "hi"]]})
    for status, method, path, body, headers in (
            (404, "GET", "/", "", dict(Host="evil.example")), (404, "GET", "/etc/passwd", "", {}),
            (403, "POST", "/say", good, dict(Host="evil.example")),
            (403, "POST", "/say", good, dict(Origin="http://evil.example")),
            (403, "POST", "/say", good, dict(Content_Type="text/plain")),
            (413, "POST", "/say", good, dict(Content_Length="9999999999")),
            (400, "POST", "/say", "[" * 9999, {}), (400, "POST", "/say", good.replace("base", "x"), {}),
            (400, "POST", "/say", '{"condition": "base", "messages": []}', {})):
        assert call(method, path, body, **headers)[0] == status
    with pytest.raises(InputError, match="--port 99999: not to be had"):
        chat.page_server(99999, None)
