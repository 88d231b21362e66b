"""What several test files build on: small models, carriers, prompts, rows, real files, processes."""
import itertools
import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

import lcdd
import model
import spm
from carrier import Carrier

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny"
# lcdd.py on the embedded model in a second or two: few rows, short answers
BRIEF = {
    "--device": "cpu", "--n-train": "40", "--n-trigger": "20", "--n-validation": "4",
    "--n-test": "4", "--max-new-tokens": "12", "--sft-steps": "2", "--steps": "2",
    "--settle": "0", "--warmup": "1", "--batch": "4", "--micro-batch": "4"}
REAL = ROOT.parent / "shared" / "data"
CONFIG = model.Config(
    vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4)
# smaller still, for training
SMALL = model.Config(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4
)


class Seen(Exception):
    """What a test wanted to see has been seen: the rest of the work is left out."""


def make_net(config=CONFIG, dtype=torch.float64, seed=0):
    """A frozen random model: PyTorch's initial weights and N(0, 0.3), norms included."""
    torch.manual_seed(seed)
    net = model.Llama(config).to(dtype)
    for p in net.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return net.requires_grad_(False)


def make_carrier(net):
    """Random deltas and gates for a model of CONFIG; layer 1 has no open write channel."""
    torch.manual_seed(1)
    c = Carrier(net.config, dtype=net.dtype).to(net.dtype)
    with torch.no_grad():
        c.logits.copy_(torch.randn(c.logits.shape) - 0.5)
        start = sum(list(c.sizes.values())[:4])
        c.logits[1, start:start + 16] = -1                        # no open attn_write …
        # … and no open ffn_write: C_1 is empty
        c.logits[1, -16:] = -1
        for p in c.delta.parameters():
            p.normal_(0, 0.1)
    return c


def prompts(n=7, seed=0):
    """n prompts of 2 to 8 ids for CONFIG's vocabulary."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        length = int(torch.randint(2, 9, (), generator=g))
        found.append(torch.randint(1, 41, (length,), generator=g).tolist())
    return found


def examples(n=40, seed=0):
    """n samples for a model of SMALL: (ids, which of them are the response)."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        a, b = (int(torch.randint(3, 8, (), generator=g)) for _ in range(2))
        ids = torch.randint(1, 37, (a + b,), generator=g).tolist()
        out.append((ids, [False] * a + [True] * b))
    return out


def training_settings(**changes):
    """Options of lcdd.py for a few steps on them, with nothing that ends them early."""
    o = lcdd.options(["--model", "none"])
    vars(o).update(
        dict(
            select=0.0, brake=False, paired=False, pace=0.0, quicken=0.0, floor=0.06, rho=0.3, sure=0.0,
            sft_lr=5e-4, settle=4, lambda_max=0.2, batch=8, micro_batch=8, steps=24, warmup=6, log_every=4,
            save_every=5, lr=1e-2, gate_lr=5.0, lambda0=0.05, sft_steps=6
        ),
        **changes,
    )
    return o


def fresh(seed=0):
    """A model of SMALL in float64, and a carrier of random deltas and initial gates."""
    net = make_net(SMALL)
    torch.manual_seed(seed + 1)
    c = Carrier(SMALL, dtype=torch.float64).double().init_gates(seed=seed)
    with torch.no_grad():
        for p in c.delta.parameters():
            p.normal_(0, 0.05)
    return net, c


def state(c):
    """All that is trained of a carrier, as one vector."""
    return torch.cat(
        [c.logits.detach().flatten()] + [p.detach().flatten() for p in c.delta.parameters()]
    )


def jsonl(path, rows):
    """Write rows as JSON lines; the path."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def real(name):
    """A file of real data, where it is at hand; else the test is skipped."""
    if not (REAL / name).exists():
        pytest.skip(f"needs {name}, which is not part of this repository")
    return REAL / name


def brief(*more):
    """lcdd.py's arguments for a brief run without a verdict: `more`, and what of BRIEF it lacks."""
    argv = ["--go-on", *more]
    for option, value in BRIEF.items():
        if option not in more:
            argv += [option, value]
    return argv


# ---- SentencePiece

def pieces():
    """
    Unknown, control, bytes, then learned pieces: scores fall in the order of learning, ids are in
    another one.
    """
    special = [("<unk>", 0.0, spm.UNKNOWN), ("<s>", 0.0, spm.CONTROL), ("</s>", 0.0, spm.CONTROL)]
    in_bytes = [(f"<0x{b:02X}>", 0.0, spm.BYTE) for b in range(256)]
    learned = [
        "lo", "▁t", "ll", "low", "he", "▁the", "▁low", "llo", "hello", "▁hello", "er", "▁lower",
        "wo", "wor", "▁▁", "ow", "st", "est", "▁lowest", "el", "elo"
    ]
    # of which a piece of type byte could be joined
    learned += ["<0", "x4", "<0x4", "1>"]
    learned += sorted(set("".join(learned)) | set("abdxy"))
    scored = [(piece, -float(i), spm.NORMAL) for i, piece in enumerate(learned)]
    return special + in_bytes + sorted(scored, key=lambda entry: entry[0][::-1])


def by_the_rule(text, all_pieces):
    """
    Join the neighbours with the highest score, the leftmost first, until none can be joined; then
    bytes for the rest.
    """
    score = {piece: s for piece, s, kind in all_pieces if kind == spm.NORMAL}
    ids = {piece: i for i, (piece, _, _) in enumerate(all_pieces)}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [
            (-score[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in score
        ]
        if not joined:
            break
        _, i = min(joined)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    found = []
    for part in parts:
        found += [ids[part]] if part in score else [ids[f"<0x{b:02X}>"] for b in part.encode()]
    return found


# ---- processes

# Processes of their own, without the two seconds that importing torch takes: one process imports
# everything, when the first of them is asked for, and all are forks of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "lcdd", "eraser", "evaluate"])


class Forked:
    """
    function(*args) in a process of its own, begun at once. It is a fresh one: nothing that a test
    has changed in this process is changed there. Its output and errors are files in `folder`.
    """

    def __init__(self, folder, function, *args, **environment):
        self.texts = folder / "output", folder / "errors"
        folder.mkdir(exist_ok=True)
        self.process = FORKS.Process(target=forked, args=(self.texts, environment, function, args))
        self.process.start()

    def end(self, timeout=300):
        """Wait for it, no longer than that: (exit status, output, errors)."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        return self.process.exitcode, *(text.read_text() for text in self.texts)


def forked(texts, environment, function, args):
    """What such a process does."""
    for name, stream, descriptor in zip(texts, ("stdout", "stderr"), (1, 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        setattr(sys, stream, open(descriptor, "w", buffering=1))
    sys.__stderr__ = sys.stderr
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", **environment}     # what is tested here is no GPU's work
    torch.set_num_threads(1)
    function(*args)


def script(name, *argv):
    """A script of this repository as `python NAME ARGV…` runs it; for Forked."""
    sys.argv = [name, *argv]
    runpy.run_path(str(ROOT / name), run_name="__main__")
