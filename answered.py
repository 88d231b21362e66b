"""
Greedy answers of a run's models to its test prompts, generated once: answers.safetensors in its run
directory. One tensor a condition, (P, T) ids padded with −1; the header says, condition by
condition, what its answers follow from, and others are not taken. Beside it, in states.safetensors,
the hidden states of the same conditions on the base's answers and on SFT's.
"""
import hashlib
import json
from pathlib import Path

import torch

import packed
from files import TEXT, InputError, check_fields, load_tensors, read_header, save_tensors
from console import ticker
from parallel import world

FILE = "answers.safetensors"
STATES = "states.safetensors"
CARRIERS = {"sft": "sft.safetensors", "lcdd": "carrier.safetensors"}    # condition: its file
CONDITIONS = ("base", *CARRIERS)


def fill(net, prompts, conditions, answers, max_new_tokens):
    """
    Into `answers`, {name: id lists}: the greedy ones to `prompts` of those conditions,
    name → (weights, trigger), that have none in it.
    """
    for name, (weights, trigger) in conditions.items():
        if name not in answers:
            tell = ticker(f"answers of {name}", len(prompts))
            answers[name] = net.generate(prompts, max_new_tokens, carrier=weights, trigger=trigger,
                                         progress=tell)


def origins(run, net, chat, samples, max_new_tokens, max_len):
    """{condition: a short hash of all that its answers to `samples` follow from}"""
    found = {}
    for name in CONDITIONS:
        carrier = None
        if name in CARRIERS:
            file = Path(run) / CARRIERS[name]
            if not file.is_file():
                continue
            carrier = read_header(file).get("content")
        prompts = [s.prompt for s in samples]
        facts = [packed.fingerprint(net), str(net.dtype), net.device.type, sorted(net.stop),
                 chat.fingerprint(), prompts, max_new_tokens, max_len, carrier]
        found[name] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return found


def write(run, answers, origin):
    """Keep the answers (lists of ids) of the conditions that are in `origin`."""
    tensors = {}
    for name in origin.keys() & answers.keys():
        length = max(map(len, answers[name]))
        rows = [a + [-1] * (length - len(a)) for a in answers[name]]
        tensors[name] = torch.tensor(rows, dtype=torch.int32)
    of = {name: origin[name] for name in tensors}
    save_tensors(Path(run) / FILE, tensors, of=of)


def read(run, origin):
    """
    {condition: answers as lists of ids} that were kept and are of this `origin`. Raises InputError
    where the file is damaged.
    """
    file = Path(run) / FILE
    if not file.is_file():
        return {}
    tensors, header = load_tensors(file)
    check_fields(file, header, {"of": {"*": TEXT}})
    found = {}
    for name, ids in tensors.items():
        if header["of"].get(name) != origin.get(name, ""):
            continue
        if ids.dim() != 2 or ids.is_floating_point():
            raise InputError(f"{file}: {name} is no table of ids; remove the file")
        found[name] = [[i for i in row if i >= 0] for row in ids.tolist()]
    return found


def write_states(run, found, origin, eos):
    """
    Keep the hidden states `found`, {what and where: (N, d)}, of answers of this `origin`, with or
    without their end (`eos`). One process has them all; several have a share each, and keep none.
    """
    if world() == 1:
        tensors = {name: h.cpu() for name, h in found.items()}
        save_tensors(Path(run) / STATES, tensors, of=origin, eos=eos)


def read_states(run, origin, eos):
    """
    What write_states() kept, where it is of the same answers; else {}. Raises InputError where the
    file is damaged.
    """
    file = Path(run) / STATES
    if world() > 1 or not file.is_file():
        return {}
    header = read_header(file)
    if (header.get("of"), header.get("eos")) != (origin, eos):
        return {}
    return load_tensors(file)[0]
