"""
Talk to a run: base, SFT, LCDD and LCDD + trigger, side by side.

    python -m lab.chat --run runs/fixed                in the terminal
    python -m lab.chat --run runs/fixed --browser      in a page for this machine's browser

In the terminal a line is a question to whoever was chosen last, at first to all; each remembers its
own conversation.

    /base /sft /lcdd /trigger     this one answers from now on        /all    all of them do
    /new                          forget what was said                /quit   the end, as Ctrl-D

Ctrl-C ends the answer that is being given; if there is none, the chat.
"""
from common import InputError, parse, run_command, usual_device
import contextlib
import html
import http.server
import json
import re
import secrets
import signal
import string
import sys
import threading
from pathlib import Path

import evaluate
import lcdd

# what is typed → a condition of evaluate.py
COMMANDS = {"/base": "base", "/sft": "sft", "/lcdd": "lcdd", "/trigger": "trig"}
OPTIONS = {     # name: (default, help)
    "run": (str, "run directory that lcdd.py has finished"),
    "trigger": ("trigger", "name of the trigger file in it"),
    "browser": (False, "serve a page to this machine alone, at http://127.0.0.1:PORT"),
    "port": (8720, "of that page"),
    "max_new_tokens": (int, "length of an answer (as in the run)"),
    "device": (usual_device(), "cpu or cuda"),
}
PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; connect-src 'self'; script-src 'nonce-{0}'; style-src 'nonce-{0}'"
LARGEST = 1 << 22       # bytes of a request


# ---- an answer

class Talk:
    """
    A run that answers. conditions: {name: (weights, τ)}; names: {name: what people call it}; room:
    tokens of a prompt; length: tokens of an answer. Raises InputError if that leaves no room.
    """

    def __init__(self, o):
        config, self.net, self.chat, _ = lcdd.load_run(o.run, o.device, with_data=False)
        _, self.conditions, target = evaluate.conditions_of(o.run, self.net, o.trigger)
        trig = f"{evaluate.NAMES[target]} + trigger"
        self.names = {name: evaluate.NAMES[name] for name in self.conditions}
        self.names |= {"trig": trig} if "trig" in self.names else {}
        self.title = f"{self.chat.folder.name}, task {Path(config.task).name}"
        self.length = o.max_new_tokens or config.max_new_tokens
        limits = [limit for limit in (self.chat.positions, self.net.config.window) if limit]
        taus = [len(tau) for _, tau in self.conditions.values() if tau is not None]
        self.room = min(limits, default=8192) - self.length - max(taus, default=0)
        if self.room < 1:
            raise InputError(f"--max-new-tokens {self.length}: a text has at most {min(limits)} "
                             "tokens here, which leaves no room for a question")

    def prompt(self, text, before):
        """
        (ids, notes) of a question after the messages `before`, (role, content) each. The oldest
        turns make room first, then the end of the question; the notes say so.
        """
        turns, notes = list(before), []
        ids = self.chat.prompt(text, turns)
        while len(ids) > self.room and turns:
            turns = turns[2:]
            ids = self.chat.prompt(text, turns)
        if len(turns) < len(before):
            left_out = (len(before) - len(turns)) // 2
            notes.append(f"{left_out} of {len(before) // 2} earlier turns are left out: there is "
                         f"room for {self.room} tokens")
        if len(ids) > self.room:
            asked, ids = len(ids), self.chat.prompt(text, max_len=self.room)
            notes.append(f"the question is cut: {len(ids)} of its {asked} tokens are read")
        return ids, notes

    def answer(self, name, text, before):
        """
        Yield ("note", what was cut) and ("text", piece) token by token; the pieces make up the
        answer of a condition. Half a character waits for its rest.
        """
        ids, notes = self.prompt(text, before)
        for note in notes:
            yield "note", note
        weights, tau = self.conditions[name]
        new, shown, so_far = [], 0, ""
        for step in self.net.decode([ids], self.length, weights, [tau]):
            new += [token for _, token in step]
            so_far = self.chat.decode(new)
            if not so_far.endswith("\ufffd"):
                yield "text", so_far[shown:]
                shown = len(so_far)
        yield "text", so_far[shown:]
        if new[-1] not in self.net.stop:
            yield "note", f"the answer is cut after {self.length} tokens"


# ---- in the terminal

def say(talk, name, line, memory):
    """Print what a condition answers, and remember it; if it is stopped, what came until then."""
    said = ""
    print(f"{talk.names[name]:14s}  ", end="", flush=True)
    try:
        for kind, piece in talk.answer(name, line, memory):
            said += piece if kind == "text" else ""
            print(piece if kind == "text" else f" ({piece}) ", end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    except InputError as error:
        print(f"({error})", end="")
    print(flush=True)
    if said.strip():
        memory += [("user", line), ("assistant", said.strip())]


def ask():
    """The next line that is typed, "/quit" at the end. If one is no text, that is said instead."""
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            return "/quit"
        if not re.search("[\ud800-\udfff]", line):      # where surrogateescape puts stray bytes
            return line
        print(f"(a byte of this line is no {sys.stdin.encoding}: it was not asked, type it again)")


def converse(talk):
    """Answer line after line until /quit."""
    known = [command for command, name in COMMANDS.items() if name in talk.names]
    chosen, memory = list(talk.names), {name: [] for name in talk.names}
    while (line := ask()) != "/quit":
        if line == "/new":
            memory = {name: [] for name in talk.names}
            print("forgotten")
        elif line in ("/all", *known):
            chosen = list(talk.names) if line == "/all" else [COMMANDS[line]]
            print("from now on:", ", ".join(talk.names[name] for name in chosen))
        elif line.startswith("/"):
            print("commands:", *known, "/all /new /quit")
        elif line:
            for name in chosen:
                say(talk, name, line, memory[name])


# ---- in a page

class Handler(http.server.BaseHTTPRequestHandler):
    """
    The page (GET /) and answers as they come (POST /say): a JSON line for each note and piece, then
    {"end": true}. The page keeps the conversations. Another site's page cannot ask: the server goes
    by its own names only, and takes JSON from its own page only.
    """
    talk = None                     # set by page_server()
    turn = threading.Lock()         # one answer at a time: a second would take its cores
    timeout = 60                    # seconds in which a request has to arrive

    def log_message(self, *_):
        """Say nothing: questions are nobody's business."""

    def is_own(self):
        """Is the request meant for this server, and from its own page?"""
        port, host = self.server.server_port, self.headers.get("Host")
        own = host in (f"127.0.0.1:{port}", f"localhost:{port}")
        return own and self.headers.get("Origin") in (None, f"http://{host}")

    def begin(self, kind, policy):
        """The head of a response, which ends with the connection."""
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()

    def do_GET(self):
        """The page, a column for each condition. A nonce lets its own script run and no other."""
        if self.path != "/" or not self.is_own():
            return self.send_error(404, "there is one page, for the browser of this machine")
        nonce, columns = secrets.token_urlsafe(16), ""
        for name, shown in self.talk.names.items():
            columns += f'<section id="{name}"><h2>{html.escape(shown)}</h2></section>\n'
        text = string.Template(PAGE.read_text(encoding="utf-8")).substitute(
            title=html.escape(self.talk.title), columns=columns, nonce=nonce)
        self.begin("text/html", POLICY.format(nonce))
        self.wfile.write(text.encode())

    def do_POST(self):
        """An answer as it comes."""
        size, kind = self.headers.get("Content-Length", ""), self.headers.get_content_type()
        if self.path != "/say" or not self.is_own() or kind != "application/json":
            return self.send_error(403, "questions are JSON, from the page of this server")
        if not size.isdecimal() or int(size) > LARGEST:
            return self.send_error(413, f"a question has at most {LARGEST} bytes")
        try:
            asked = json.loads(self.rfile.read(int(size)))
            *before, (_, text) = [(role, str(content)) for role, content in asked["messages"]]
            name = asked["condition"]
            self.talk.conditions[name]
        except (ValueError, KeyError, TypeError, RecursionError):
            return self.send_error(400, "a question: a condition, and messages of [role, text]")
        with self.turn, contextlib.suppress(ConnectionError, TimeoutError):     # who asked has left
            self.begin("application/x-ndjson", "default-src 'none'")
            try:
                for kind, piece in self.talk.answer(name, text, before):
                    self.tell(**{kind: piece})
            except InputError as error:
                self.tell(note=str(error))
            self.tell(end=True)

    def tell(self, **found):
        """Send a JSON line at once."""
        self.wfile.write(json.dumps(found).encode() + b"\n")


def page_server(port, talk):
    """A server of the page, not started yet. Raises InputError if the port is not to be had."""
    Handler.talk = talk
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port}: not to be had ({error}); choose another") from None


def main(argv=None):
    """Open the run and talk."""
    o = parse(__doc__, OPTIONS, {}, argv)
    talk = Talk(o)
    if o.browser:
        with page_server(o.port, talk) as server:
            address = f"http://127.0.0.1:{server.server_port}"
            print(f"{talk.title}: {address} on this machine; Ctrl-C ends", flush=True)
            return server.serve_forever()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)       # ends the chat, not an answer
    sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, without it a terminal gives 4,095 bytes of a line
    print(f"{talk.title}; /base /sft /lcdd /trigger /all choose who answers, /quit ends")
    converse(talk)


if __name__ == "__main__":
    run_command(main)
