"""A switch to hold in the hand: a conversation with a run's four conditions.

    python -m lab.talk --run runs/fixed              in the terminal
    python -m lab.talk --run runs/fixed --browser    in a page of this machine's browser, all at once

Whatever is typed in the terminal goes to the conditions that were chosen last; each remembers what
itself was asked and answered.

    /base /sft /lcdd /trigger     this one answers from now on        /all    all of them do
    /new                          everything said is forgotten        /quit   or end of input: the end
"""
import files  # noqa: F401, before torch: it sets how threads wait
import functools
from pathlib import Path

import torch

import evaluate
import metrics
import machine
import model
from files import InputError
from lab import page
from console import Parser, check_device, check_numbers, cli
from run import look_into

PORT = 8720
# what is typed → a condition of evaluate.py
COMMANDS = {"/base": "base", "/sft": "sft", "/lcdd": "lcdd", "/trigger": "trig"}


def options(argv=None):
    """The command line."""
    p = Parser(__doc__)
    a = p.add_argument
    a("--run", required=True, help="run directory that lcdd.py has finished")
    a("--trigger", default="trigger", help="name of the trigger file in it (trigger)")
    a("--browser", type=int, nargs="?", const=PORT, metavar="PORT",
      help=f"serve a page on this machine only (http://127.0.0.1:{PORT})")
    a("--max-new-tokens", type=int, help="length of an answer (as in the run)")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return p.parse_args(argv)


def echo(text):
    """Print a piece of an answer."""
    print(text, end="", flush=True)


def speaker(chat, tell):
    """
    A function of (prompt, id) that tells what each new id adds to the text; half a character waits
    for its rest.
    """
    ids, shown = [], 0

    def hear(_, token):
        """Take in a new token, and tell what of the text is whole by now."""
        nonlocal shown
        ids.append(token)
        text = chat.decode(ids)
        if not text.endswith("\ufffd"):
            tell(text[shown:])
            shown = len(text)
    return hear


def fitted(chat, text, before, room):
    """
    (ids of the prompt for `text` after the messages `before`, how many of the oldest turns are left
    out of it), so that it is no longer than `room` tokens.
    """
    turns = list(before)
    ids = chat.ids(chat.render(text, turns))
    while len(ids) > room and turns:
        turns = turns[2:]
        ids = chat.ids(chat.render(text, turns))
    if len(ids) > room:
        ids = chat.prompt(text, room)
    return ids, (len(before) - len(turns)) // 2


def answer(net, chat, ids, weights, trigger, length, tell):
    """The answer to a prompt, told as it comes."""
    found = net.generate([ids], length, carrier=weights, trigger=trigger, heard=speaker(chat, tell))[0]
    return chat.decode(found).strip()


def replies(net, chat, conditions, room, length):
    """
    A function of (condition, text, messages before it) that returns how many turns are left out, and
    the function of tell that answers, telling what it says as it comes.
    """
    def reply(name, text, before):
        ids, forgotten = fitted(chat, text, before, room)
        return forgotten, functools.partial(answer, net, chat, ids, *conditions[name], length)
    return reply


def turn(name, line, memory, reply):
    """Print what a condition answers to a line, and remember both."""
    echo(f"{metrics.NAMES[name]:14s}  ")
    forgotten, answering = reply(name, line, memory)
    if forgotten:
        echo(f"({forgotten} turns forgotten) ")
    said = answering(echo)
    echo("\n")
    memory += [{"role": "user", "content": line}, {"role": "assistant", "content": said}]


def converse(net, chat, conditions, room, length, ask):
    """
    Read lines from ask(PROMPT) until /quit or their end; answer each by the conditions chosen, at
    first by all.
    """
    chosen, memory = list(conditions), {name: [] for name in conditions}
    reply = replies(net, chat, conditions, room, length)
    while True:
        try:
            line = ask("\n> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/new":
            memory = {name: [] for name in conditions}
            print("forgotten")
        elif line == "/all":
            chosen = list(conditions)
            print("all answer")
        elif COMMANDS.get(line) in conditions:
            chosen = [COMMANDS[line]]
            print(f"{metrics.NAMES[chosen[0]]} answers")
        elif line.startswith("/"):
            known = [command for command, name in COMMANDS.items() if name in conditions]
            print("commands: " + " ".join([*known, "/all", "/new", "/quit"]))
        elif line:
            for name in chosen:
                turn(name, line, memory[name], reply)


def main(argv=None):
    o = options(argv)
    check_numbers(o)
    check_device(o.device)
    config, chat = look_into(o.run)
    length = config["max_new_tokens"] if o.max_new_tokens is None else o.max_new_tokens
    if length < 1:
        raise InputError(f"--max-new-tokens {length}: has to be at least 1")
    net = model.load(chat.folder, o.device, getattr(torch, config["dtype"]))
    net.stop = chat.stop
    machine.set_threads(net, rows=1)
    conditions = evaluate.conditions_of(Path(o.run), net, o.trigger)[1]
    title = f"{chat.folder.name}, task {Path(config['task']).name}"
    if o.browser is not None:
        names = {name: metrics.NAMES[name] for name in conditions}
        return page.serve(o.browser, title, names, replies(net, chat, conditions, config["max_len"], length))
    print(f"{title}; /base /sft /lcdd /trigger /all "
          "choose who answers, /new forgets, /quit ends")
    converse(net, chat, conditions, config["max_len"], length, input)


if __name__ == "__main__":
    cli(main)
