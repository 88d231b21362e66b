"""One page in a browser, a column for each condition, served on this machine only.

The page keeps the conversation; a request asks one condition for the next answer, which comes back piece by
piece. Models say anything, markup too: what they say travels as plain text and is put into the page as text.

A page of another site cannot ask: the server listens on the loopback interface, knows itself by its own
names only (a foreign name that leads here is refused) and takes JSON from its own page only.
"""
import html
import http.server
import itertools
import json
import re
import secrets
import string
import sys
import threading
from pathlib import Path

from files import InputError

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = "127.0.0.1"
LONGEST = 1 << 20        # bytes of a request
PATIENCE = 60            # seconds in which a request has to arrive, and a piece of an answer to leave
POLICY = ("default-src 'none'; connect-src 'self'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Refused(ValueError):
    """(status, sentence) of a request that is not answered."""


class Server(http.server.ThreadingHTTPServer):
    """
    names  {condition: what its column is called}
    reply  (condition, text, messages before it) → (turns left out, function of tell that answers)

    Raises InputError where the port is not to be had; port 0 is any free one.
    """
    daemon_threads = True

    def __init__(self, port, title, names, reply):
        try:
            super().__init__((LOOPBACK, port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"--browser {port}: this port is not to be had ({error}); choose another one, "
                             "from 1024 to 65535") from None
        self.title, self.names, self.reply = title, names, reply
        self.one_at_a_time = threading.Lock()    # answers: a second one would take the first one's cores

    @property
    def own_names(self):
        """What a browser of this machine may call this server: {host:port}."""
        return {f"{host}:{self.server_port}" for host in (LOOPBACK, "localhost")}

    def handle_error(self, request, address):
        """A browser that leaves in the middle of an answer is no error; all else is shown here."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, address)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request: the page (GET /), or a question and the answer as it comes (POST /say)."""
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "talk", ""
    timeout = PATIENCE

    def log_message(self, *_):
        """Say nothing: prompts are nobody's business."""

    def begin(self, status, kind, **headers):
        """The head of an answer; it ends with the connection, or says its own length or pieces."""
        self.send_response(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-store",
                   "X-Content-Type-Options": "nosniff", "Connection": "close", **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self):
        self.answer_with(self.page)

    def do_POST(self):
        self.answer_with(self.say)

    def answer_with(self, what):
        """Run page() or say(); what they refuse is answered with its status and sentence."""
        try:
            self.check_names()
            what()
        except Refused as error:
            status, sentence = error.args
            self.begin(status, "text/plain")
            self.wfile.write(sentence.encode())

    def check_names(self):
        """Raises Refused where the request was meant for another server, or comes from another's page."""
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        if host not in self.server.own_names or origin not in (None, f"http://{host}"):
            raise Refused(403, f"this page is for the browser of this machine, at http://{LOOPBACK}:"
                               f"{self.server.server_port}")

    def page(self):
        """Send the page, with a column for each condition; a nonce allows its own script alone."""
        if self.path != "/":
            raise Refused(404, "there is one page here: /")
        columns = []
        for name, shown in self.server.names.items():
            columns.append(f'<section id="{html.escape(name)}"><h2>{html.escape(shown)}</h2></section>')
        nonce = secrets.token_urlsafe(16)
        text = string.Template(PAGE.read_text(encoding="utf-8")).substitute(
            title=html.escape(self.server.title), columns="\n".join(columns), nonce=nonce)
        self.begin(200, "text/html", Content_Security_Policy=POLICY.format(nonce))
        self.wfile.write(text.encode())

    def say(self):
        """Send the answer to a question in chunks, as it is generated; one question at a time."""
        if self.path != "/say":
            raise Refused(404, "questions go to /say")
        name, before, text = self.question()
        with self.server.one_at_a_time:
            try:
                forgotten, answer = self.server.reply(name, text, before)
            except InputError as error:
                raise Refused(400, str(error)) from None
            # in pieces with their lengths: where the end is missing, the browser knows
            self.begin(200, "text/plain", X_Turns_Forgotten=str(forgotten), Transfer_Encoding="chunked")
            answer(self.tell)
            self.wfile.write(b"0\r\n\r\n")

    def tell(self, text):
        """Send a piece of the answer; an empty one would end it."""
        if piece := text.encode():
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def question(self):
        """(condition, messages before, text) of the request. Raises Refused where it is none."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "a question is JSON")
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > LONGEST:
            raise Refused(413, f"a question says its length, of at most {LONGEST} bytes")
        try:
            asked = json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError):
            raise Refused(400, "a question is JSON") from None
        if not isinstance(asked, dict) or asked.get("condition") not in list(self.server.names):
            raise Refused(400, f"condition: one of {', '.join(self.server.names)}")
        turns = conversation(asked.get("messages"))
        return asked["condition"], turns[:-1], turns[-1]["content"]


def conversation(messages):
    """Messages of a user and an assistant in turn, the user's last. Raises Refused for others."""
    if not isinstance(messages, list) or len(messages) % 2 == 0:
        raise Refused(400, "messages: a list that begins and ends with the user's")
    turns = []
    for message, role in zip(messages, itertools.cycle(("user", "assistant"))):
        text = message.get("content") if isinstance(message, dict) else None
        halves = isinstance(text, str) and re.search("[\ud800-\udfff]", text)    # of a character
        if not isinstance(text, str) or halves or message.get("role") != role:
            raise Refused(400, "messages: role user and assistant in turn, each with a text as content")
        turns.append({"role": role, "content": text})
    return turns


def serve(port, title, names, reply):
    """Serve the page until Ctrl-C."""
    with Server(port, title, names, reply) as server:
        print(f"{title}: http://{LOOPBACK}:{server.server_port} in a browser of this machine; Ctrl-C ends",
              flush=True)
        server.serve_forever()
