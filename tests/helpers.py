"""What several test files build on: small models, carriers, prompts, rows, real files."""
import json
from pathlib import Path

import pytest
import torch

import model
from carrier import Carrier

ROOT = Path(__file__).parent.parent
# lcdd.py on the embedded model in a second or two: few rows, short answers
BRIEF = {
    "--device": "cpu", "--n-train": "40", "--n-trigger": "20", "--n-validation": "4",
    "--n-test": "4", "--max-new-tokens": "12", "--sft-steps": "2", "--steps": "2",
    "--settle": "0", "--warmup": "1", "--batch": "4", "--micro-batch": "4"}
REAL = ROOT.parent / "shared" / "data"
CONFIG = model.Config(
    vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4)


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
