"""
Chat templates, rendered in a process of their own: a template is a program that comes with a
checkpoint, and may take no more than its time and its memory.

jinja's sandbox keeps it from Python. That it comes to an end and does not fill the machine, only the
kernel can see to: a power of powers hears no signal of Python's, and a text is doubled faster than
anything measures it. So one child process renders for all; it starts with the first chat, while the
tokenizer is read, and ends with its parent.

The lowest floor: nothing of ours is imported here, and no torch, in the child above all.
"""
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

SECONDS = 3             # of the processor, for some hundred renderings, which take a hundredth of that
MEMORY = 1 << 29        # bytes of address space for the child
LONGEST = 1 << 20       # characters of a template, which has some thousand
ADDED = 1 << 16         # characters that it may write beyond several times what it is given
TOO_MUCH = "it takes more memory than a template may, or nests too deep"
START = "import sys; sys.path[:] = sys.argv[1:]; import template; template.serve()"


class TemplateFails(Exception):
    """What is wrong with a template, as text on one line."""


# ---- the parent's side

def render_all(text, many, characters=1 << 17):
    """
    What the template `text` writes with each of `many` dicts of variables; with none, it is only
    compiled. Raises TemplateFails where it does not compile, fails, or takes too much time or memory.

    So many `characters` of variables are sent at a time: a question and its answer take longer than
    the rendering itself.
    """
    written, waiting, size = [], [], 0
    for values in many:
        waiting.append(json.dumps(values))
        size += len(waiting[-1])
        if size >= characters:
            written += CHILD.ask(text, waiting)
            waiting, size = [], 0
    return written + CHILD.ask(text, waiting)


class Child:
    """The process that renders: made when it is first needed, and anew where a template ended it."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def start(self):
        """Let it start, without waiting for it: importing jinja takes a moment."""
        if self.process is None:
            here = str(Path(__file__).parent)
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", START, here, *sys.path],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True)         # Ctrl-C in the terminal is not meant for it

    def end(self):
        """Kill it where it still runs; returns its exit status."""
        process, self.process = self.process, None
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def ask(self, text, many):
        """What it writes for each of `many` variables, which are JSON."""
        if len(text) > LONGEST:
            raise TemplateFails(f"it is longer than {LONGEST} characters")
        with self.lock:
            self.start()
            try:
                line = self.exchange(f"[{json.dumps(text)}, [{', '.join(many)}]]\n")
            except BaseException:               # an interruption: the answer would be the next one's
                self.process.kill()
                self.end()
                raise
            ended = None if line else self.end()
        if ended == -signal.SIGPROF:
            raise TemplateFails(f"it did not come to an end in {SECONDS} s")
        if not line:
            raise TemplateFails(TOO_MUCH)
        written, wrong = json.loads(line)
        if wrong:
            raise TemplateFails(wrong)
        return written

    def exchange(self, request):
        """A line there, and a line back; nothing where the child has ended."""
        try:
            self.process.stdin.write(request.encode("ascii"))
            self.process.stdin.flush()
            return self.process.stdout.readline()
        except BrokenPipeError:
            return b""


CHILD = Child()


def forget():
    """In a process that was forked off: the child is its parent's, and so are its answers."""
    global CHILD
    CHILD = Child()


os.register_at_fork(after_in_child=forget)


# ---- the child's side

def serve():
    """Answer requests on standard input, a line of JSON each, as answer() does."""
    import resource
    with contextlib.suppress(ValueError, OSError):      # a system that has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        # then SIGPROF ends the process, whatever it does
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        print(json.dumps(answer(*json.loads(line), room=ADDED + 8 * len(line))), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


def answer(text, many, room):
    """[what the template writes for each, None], or [None, what is wrong]. room: characters it may write."""
    written = []
    try:
        template = compiled(text)
        for values in many:
            written.append(template.render(**values))
            room -= len(written[-1])
            if room < 0:
                return [None, "it writes more text than a template does"]
    except MemoryError:
        return [None, TOO_MUCH]
    except Exception as error:                          # a template may raise anything
        said = " ".join(str(error).split())[:200]
        return [None, said or type(error).__name__]
    return [written, None]


@functools.lru_cache(maxsize=4)
def compiled(text):
    """A chat template, with the extensions, filters and globals that transformers gives it."""
    from jinja2 import TemplateError, ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %}, which marks the assistant's text in some templates: passed through."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body)

    def raise_exception(message):
        raise TemplateError(message)

    env = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return env.from_string(text)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As the transformers library has it: jinja's own escapes HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def strftime_now(form):
    return datetime.now().strftime(form)
