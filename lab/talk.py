"""A switch to hold in the hand: a conversation with a run's four conditions in the terminal.

    python -m lab.talk --run runs/fixed

Whatever is typed goes to the conditions that were chosen last; each remembers what itself was asked
and answered.

    /base /sft /lcdd /trigger     this one answers from now on        /all    all of them do
    /new                          everything said is forgotten        /quit   or end of input: the end
"""
import files  # noqa: F401, before torch: it sets how threads wait
from pathlib import Path

import torch

import evaluate
import model
from files import InputError
from run import Parser, check_device, check_numbers, cli, reopen

# what is typed → a condition of evaluate.py
COMMANDS = {"/base": "base", "/sft": "sft", "/lcdd": "lcdd", "/trigger": "trig"}


def options(argv=None):
    """The command line."""
    p = Parser(__doc__)
    a = p.add_argument
    a("--run", required=True, help="run directory that lcdd.py has finished")
    a("--trigger", default="trigger", help="name of the trigger file in it (trigger)")
    a("--max-new-tokens", type=int, help="length of an answer (as in the run)")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return p.parse_args(argv)


def printer(chat):
    """
    A function of (prompt, id) that prints what each new id adds to the text; half a character waits
    for its rest.
    """
    ids, shown = [], 0

    def hear(_, token):
        nonlocal shown
        ids.append(token)
        text = chat.decode(ids)
        if not text.endswith("\ufffd"):
            print(text[shown:], end="", flush=True)
            shown = len(text)
    return hear


def answer(net, chat, text, before, weights, trigger, room, length):
    """
    The answer to `text` after the messages `before`, printed as it comes. The oldest turns are left
    out where the prompt would be longer than `room` tokens.
    """
    turns = list(before)
    ids = chat.ids(chat.render(text, turns))
    while len(ids) > room and turns:
        turns = turns[2:]
        ids = chat.ids(chat.render(text, turns))
    if len(turns) < len(before):
        print(f"({(len(before) - len(turns)) // 2} turns forgotten) ", end="")
    if len(ids) > room:
        ids = chat.prompt(text, room)
    found = net.generate([ids], length, carrier=weights, trigger=trigger, heard=printer(chat))[0]
    print(flush=True)
    return chat.decode(found).strip()


def converse(net, chat, conditions, room, length, ask):
    """
    Read lines from ask(PROMPT) until /quit or their end; answer each by the conditions chosen, at
    first by all.
    """
    chosen, memory = list(conditions), {name: [] for name in conditions}
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
            print(f"{evaluate.NAMES[chosen[0]]} answers")
        elif line.startswith("/"):
            known = [command for command, name in COMMANDS.items() if name in conditions]
            print("commands: " + " ".join([*known, "/all", "/new", "/quit"]))
        elif line:
            for name in chosen:
                print(f"{evaluate.NAMES[name]:14s}  ", end="", flush=True)
                said = answer(net, chat, line, memory[name], *conditions[name], room, length)
                memory[name] += [{"role": "user", "content": line},
                                 {"role": "assistant", "content": said}]


def main(argv=None):
    o = options(argv)
    check_numbers(o)
    check_device(o.device)
    config, chat, _ = reopen(o.run)
    length = config["max_new_tokens"] if o.max_new_tokens is None else o.max_new_tokens
    if length < 1:
        raise InputError(f"--max-new-tokens {length}: has to be at least 1")
    net = model.load(chat.folder, o.device, getattr(torch, config["dtype"]))
    net.stop = chat.stop
    model.set_threads(net, rows=1)
    conditions = evaluate.conditions_of(Path(o.run), net, o.trigger)[1]
    print(f"{chat.folder.name}, task {Path(config['task']).name}; /base /sft /lcdd /trigger /all "
          "choose who answers, /new forgets, /quit ends")
    converse(net, chat, conditions, config["max_len"], length, input)


if __name__ == "__main__":
    cli(main)
