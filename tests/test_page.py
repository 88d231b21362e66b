"""
lab/page.py: what is asked over HTTP and refused there; and the page itself in a real browser, where
there is one.
"""
import fcntl
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time

import pytest

from files import InputError
from lab import page, talk

NAMES = {"base": "Base", "lcdd": "LCDD <b>&"}
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def serving():
    """A function that serves replies; servers end with the test."""
    running = []

    def start(reply, names=NAMES, title="tiny <i>"):
        server = page.Server(0, title, names, reply)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        running.append((server, thread))
        return server
    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join(5)


def saying(*pieces):
    """A reply that tells these pieces."""
    def reply(name, text, before):
        def answer(tell):
            for piece in pieces:
                tell(piece)
        return 0, answer
    return reply


def call(server, method="POST", path="/say", asked=None, body=None, **headers):
    """(status, headers, text) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    content = json.dumps(asked or {"condition": "base", "messages": USER}) if body is None else body
    headers = {
        "Host": f"127.0.0.1:{server.server_port}",
        "Content-Type": "application/json",
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    connection.request(
        method, path, None if method == "GET" else content,
        {k: v for k, v in headers.items() if v is not None}
    )
    response = connection.getresponse()
    found = response.status, dict(response.getheaders()), response.read().decode()
    connection.close()
    return found


def test_the_page(serving):
    """Names are escaped, and nothing but the page's own script runs."""
    server = serving(saying())
    status, headers, text = call(server, "GET", "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert '<section id="base"><h2>Base</h2></section>' in text
    assert "LCDD &lt;b&gt;&amp;" in text
    assert "<title>tiny &lt;i&gt;</title>" in text
    nonce = headers["Content-Security-Policy"].split("script-src 'nonce-")[1].split("'")[0]
    assert f'<script nonce="{nonce}">' in text
    assert f'<style nonce="{nonce}">' in text
    assert text.count("<script") == 1
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert call(server, "GET", "/")[2] != text                           # another nonce
    assert "innerHTML" not in text
    assert "$" not in text


@pytest.mark.parametrize(
    "how, status",
    [
        (dict(Host="evil.example"), 403),
        (dict(Host="evil.example:80"), 403),
        (dict(Host="127.0.0.1"), 403),
        (dict(Host="127.0.0.1.evil.example"), 403),
        (dict(Origin="http://evil.example"), 403),
        (dict(Origin="null"), 403),
        (dict(Content_Type="text/plain"), 415),
        (dict(Content_Type="application/x-www-form-urlencoded"), 415),
        (dict(path="/"), 404),
        (dict(path="/say/../etc/passwd"), 404),
        (dict(method="GET", path="/say"), 404),
        (dict(method="GET", path="/page.py"), 404),
        (dict(method="GET", path="/", Host="evil.example"), 403),
        (dict(method="PUT"), 501),
        (dict(body="{"), 400),
        (dict(body="[]"), 400),
        (dict(body="[" * 10000), 400),
        (dict(body=b"\xff"), 400),
        (dict(Content_Length=str(1 << 30)), 413),
        (dict(Content_Length="-1"), 413),
        (dict(asked={"condition": "sft", "messages": USER}), 400),
        (dict(asked={"condition": ["base"], "messages": USER}), 400),
        (dict(asked={"condition": "base"}), 400),
        (dict(asked={"condition": "base", "messages": []}), 400),
        (dict(asked={"condition": "base", "messages": USER * 2}), 400),
        (dict(asked={"condition": "base", "messages": USER * 3}), 400),
        (dict(asked={"condition": "base", "messages": ["hi"]}), 400),
        (dict(asked={"condition": "base", "messages": [{"role": "user", "content": 3}]}), 400),
        (dict(asked={"condition": "base", "messages": [{"role": "system", "content": "x"}]}), 400),
        (
            dict(
                body='{"condition": "base", "messages": [{"role": "user", "content": "\\ud800"}]}'
            ),
            400,
        ),
    ],
)
def test_refusals(serving, how, status):
    asked = []
    server = serving(lambda *a: asked.append(a))
    found, _, text = call(server, **how)
    assert found == status
    assert not asked
    assert found == 501 or "\n" not in text


def test_what_is_allowed(serving):
    server = serving(saying("a", "", "é🙂\n", "<b>"))
    for host in ("127.0.0.1", "localhost"):
        name = f"{host}:{server.server_port}"
        assert call(server, Host=name, Origin=f"http://{name}")[::2] == (200, "aé🙂\n<b>")
    # both ours, and not the same
    assert call(server, Origin=f"http://localhost:{server.server_port}")[0] == 403


def test_only_this_machine_is_served(serving):
    server = serving(saying())
    assert server.server_address[0] == "127.0.0.1"
    others = {
        info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    } - {"127.0.0.1"}
    for address in others:
        if not address.startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((address, server.server_port), timeout=2)


def test_pieces_arrive_as_they_are_told(serving):
    """The second piece is not told before the first one has been read."""
    read = threading.Event()

    def reply(name, text, before):
        def answer(tell):
            tell("first")
            assert read.wait(20)
            tell(" second")
        return 2, answer
    server = serving(reply)
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(
        "POST", "/say", json.dumps({"condition": "base", "messages": USER}),
        {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    assert response.getheader("X-Turns-Forgotten") == "2"
    assert response.read1(100) == b"first"
    read.set()
    assert response.read() == b" second"


def test_who_leaves_ends_his_answer(serving):
    """The next one is answered; an answer that broke off is known to be no whole one."""
    ended = threading.Event()

    def reply(name, text, before):
        def endless(tell):
            try:
                while True:
                    tell("more " * 1000)
            finally:
                ended.set()

        def broken(tell):
            tell("so far")
            raise ConnectionAbortedError
        return 0, {"base": endless, "lcdd": broken}[name]
    server = serving(reply)
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(
        "POST", "/say", json.dumps({"condition": "base", "messages": USER}),
        {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    response.read1(10)
    response.close()
    connection.close()
    assert ended.wait(20)
    with pytest.raises(http.client.IncompleteRead):
        call(server, asked={"condition": "lcdd", "messages": USER})


def test_answers_come_one_at_a_time(serving):
    busy, most = [], []

    def reply(name, text, before):
        def answer(tell):
            busy.append(name)
            time.sleep(0.05)
            most.append(len(busy))
            busy.pop()
        return 0, answer
    server = serving(reply)
    threads = [threading.Thread(target=call, args=(server,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1] * 5


def test_the_models_answer(run, serving):
    """All are asked at once, with turns before: what generate() says to the same prompt."""
    import evaluate
    import model
    from run import reopen
    _, chat, _ = reopen(run)
    net = model.load(chat.folder)
    net.stop = chat.stop
    conditions = evaluate.conditions_of(run, net)[1]
    server = serving(
        talk.replies(net, chat, conditions, 200, 12), {name: name for name in conditions}
    )
    before = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    found, threads = {}, []

    def ask(name):
        found[name] = call(
            server,
            asked={
                "condition": name,
                "messages": [*before, {"role": "user", "content": "What is 2 plus 3 ?"}],
            },
        )[2]

    for name in conditions:
        threads.append(threading.Thread(target=ask, args=(name,)))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    ids = chat.ids(chat.render("What is 2 plus 3 ?", before))
    for name, (weights, trigger) in conditions.items():
        assert found[name] == chat.decode(
            net.generate([ids], 12, carrier=weights, trigger=trigger)[0]
        )


def test_a_port_that_is_taken(serving):
    port = serving(saying()).server_port
    for bad in (port, -1, 1 << 20):
        with pytest.raises(InputError, match=f"--browser {bad}: this port is not to be had"):
            page.Server(bad, "", {}, None)


# ---- in a real browser

class Browser:
    """Chromium without a window, asked through its own pipe (DevTools protocol)."""

    def __init__(self, program, folder):
        ours, back = os.pipe(), os.pipe()
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={folder}"
        ]

        def fds():                                                       # it reads 3 and writes 4
            read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (ours[0], back[1]))
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(
            [program, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=fds,
            close_fds=False
        )
        os.close(ours[0])
        os.close(back[1])
        self.to, self.back, self.count, self.rest = ours[1], back[0], 0, b""

    def send(self, method, session=None, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                piece = os.read(self.back, 1 << 16)
                assert piece, "the browser has ended"
                self.rest += piece
            line, _, self.rest = self.rest.partition(b"\0")
            found = json.loads(line)
            if found.get("id") == self.count:
                assert "error" not in found, found
                return found["result"]

    def open(self, url):
        target = self.send("Target.createTarget", url=url)["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression):
        found = self.send(
            "Runtime.evaluate", self.session, expression=expression, returnByValue=True,
            awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def type(self, text):
        """Into what has the focus, then Enter, as from a keyboard."""
        self.send("Input.insertText", self.session, text=text)
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", self.session, type=kind, key="Enter", code="Enter",
                windowsVirtualKeyCode=13, text="\r" if kind == "keyDown" else ""
            )

    def wait(self, expression, seconds=60):
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, (expression, self.value("document.body.innerHTML"))
            time.sleep(0.05)

    def close(self):
        self.process.kill()
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)


@pytest.fixture
def browser(tmp_path):
    program = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if program is None:
        pytest.skip("needs chromium, which is not installed: the page is not tried in a browser")
    found = Browser(program, tmp_path / "profile")
    yield found
    found.close()


def test_a_real_browser(serving, browser):
    """
    A question goes to every column; answers stream, are text and no markup, and are remembered by
    the column that gave them.
    """
    asked, go_on = [], threading.Event()
    evil = (
        "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&amp;"
    )

    def reply(name, text, before):
        asked.append((name, text, before))

        def answer(tell):
            if text == "hold":
                tell(" half")
                assert go_on.wait(30)
                tell(" whole ")
            elif text == "break" and name == "lcdd":
                raise ConnectionAbortedError
            else:
                tell(f"{name} says {evil}")
        return 3 if text == "again" else 0, answer
    server = serving(reply)
    browser.open(f"http://127.0.0.1:{server.server_port}/")
    assert (
        browser.value("[...document.querySelectorAll('section h2')].map(h => h.textContent).join()")
        == "Base,LCDD <b>&"
    )
    idle, texts = (
        "!document.querySelector('form button').disabled",
        "[...document.querySelectorAll('#{0} p')].map(p => p.className + ':' + p.textContent)",
    )

    browser.type("hold")
    # before it is whole
    browser.wait("[...document.querySelectorAll('.waiting')].some(p => p.textContent === ' half')")
    assert not browser.value(idle)
    go_on.set()
    browser.wait(idle)
    assert browser.value(texts.format("base")) == ["user:hold", "assistant: half whole "]

    browser.type("again")
    browser.wait(idle)
    for name in NAMES:
        assert browser.value(texts.format(name))[2:] == [
            "user:again", "note:3 turns forgotten", f"assistant:{name} says {evil}"
        ]
    assert (
        browser.value("document.querySelectorAll('section img, section script, section b').length")
        == 0
    )
    assert browser.value("document.title") == "tiny <i>"

    browser.type("break")
    browser.wait(idle)
    assert browser.value(texts.format("lcdd"))[-1].startswith("note: (")
    browser.type("last")
    browser.wait(idle)
    before = {name: [m["content"] for m in turns] for name, text, turns in asked if text == "last"}
    assert before == {
        "base": ["hold", "half whole", "again", f"base says {evil}", "break", f"base says {evil}"],
        "lcdd": ["hold", "half whole", "again", f"lcdd says {evil}"],
    }

    browser.value("document.querySelector('#forget').click()")
    assert browser.value("document.querySelectorAll('section p').length") == 0
    browser.value("document.querySelector('textarea').focus()")
    browser.type("anew")
    browser.wait(idle)
    assert sorted((name, turns) for name, text, turns in asked if text == "anew") == [
        ("base", []),
        ("lcdd", []),
    ]
