"""template.py: a chat template may take no more than its time and its memory. What it writes: test_chat.py."""  # noqa: E501
import contextlib
import os
import signal

import pytest
from helpers import ROOT

import template
from chat import Chat
from files import InputError
from lab import damage
from template import CHILD, TemplateFails, render_all

FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("text, said", [
    ("{{ 'x' * 10**10 }}", "memory"), ("{{ 'a'|center(10**10) }}", "memory"), ("{{ [0] * 10**9 }}", "memory"),
    ("{{ 'x' * 10**6 }}", "more text"), ("x" * (2 << 20), "longer than"), ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),  # noqa: E501
    ("{{ 1 / 0 }}", "division by zero"), ("{% break %}", "outside loop"), ("{{ messages|dictsort }}", "items"),  # noqa: E501
    ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{{ lipsum.__globals__['os'].system('true') }}", "unsafe|undefined"), ("{{ x.y.z }}", "undefined")])  # noqa: E501
def test_what_a_template_may_not(text, said):
    with pytest.raises(TemplateFails, match=said):
        render_all(text, [{"messages": ["hello"]}])
    assert render_all("{{ x }}", [{"x": "goes on"}]) == ["goes on"]


def test_a_template_that_does_not_end(monkeypatch):
    """Not even one that stays within a single call of Python, which hears no signal."""
    monkeypatch.setattr(template, "START", template.START.replace("template.serve", "template.SECONDS = 0.3; template.serve"))  # noqa: E501
    for text in (FOREVER, "{{ 9**(9**9) }}"):
        if CHILD.process:
            CHILD.end()
        with pytest.raises(TemplateFails, match="did not come to an end"):
            render_all(text, [{}])
    assert render_all("a", [{}]) == ["a"]
    CHILD.end()


def test_the_sandbox_writes_nothing(tmp_path):
    """Of the hostile pieces none reaches Python: no class is named and no file is written."""
    target = tmp_path / "written"
    for piece in damage.PIECES:
        if "__" in piece:
            with contextlib.suppress(TemplateFails):
                written, = render_all(piece.replace("true", f"touch {target}"), [{"messages": [], "bos_token": ""}])  # noqa: E501
                assert "class" not in written
                assert "function" not in written
    assert not target.exists()


def test_many_at_a_time_are_each_ones_own():
    texts = [f"{i} é 🦊" for i in range(3000)]
    assert render_all("<{{ x }}>", ({"x": text} for text in texts)) == [f"<{text}>" for text in texts]
    chat = Chat(ROOT / "tiny")
    alone = [chat.render(text) for text in texts[:9]]
    chat.expect(texts)
    assert [chat.render(text) for text in texts[:9]] == alone
    assert len(chat.rendered) == len(texts)
    assert chat.render("1 é 🦊", [{"role": "user", "content": "before"}]) != alone[1]      # earlier turns are no part of what is expected  # noqa: E501


def test_an_interruption_leaves_no_answer_behind():
    """Ctrl-C while a template is rendered: the next question is not answered with its text."""
    render_all("a", [{}])

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            render_all(FOREVER, [{}])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert render_all("b", [{}]) == ["b"]


def test_the_child_ends_with_its_parent():
    render_all("a", [{}])
    pid, process = CHILD.process.pid, CHILD.process
    process.stdin.close()                                    # what the end of the parent does
    assert process.wait(timeout=20) == 0
    CHILD.process = None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_sentence_names_the_folder(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text((ROOT / "tiny" / name).read_text())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content * 10**10 }}")
    with pytest.raises(InputError, match=f"^{tmp_path}: the chat template fails on a single user turn .*memory.*; repair it$"):  # noqa: E501
        Chat(tmp_path).prompt("x")
