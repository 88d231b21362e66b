"""
How fast: steps of SFT, LCDD and the trigger, generation and memory, beside transformers and peft.

    python -m lab.bench                      SmolLM2-135M's shape on this CPU, some ten minutes
    python -m lab.bench --device cuda        every ratio and peak in under four minutes
    python -m lab.bench --layers 2 --dtypes float32 --rounds 1      a stand-in, seconds

Weights are random: only shapes matter to the time. All cases of a dtype take turns, round after
round, after one that is not counted, so that a machine that slows down slows all of them; medians
are shown, and a line of JSON comes last, which lab.tables reads. Every batch is 16 rows of
chat-like lengths that begin with the same 24 tokens, with six tokens of response.
"""
from common import parse, run_command, usual_device
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import data
import eraser
import lcdd
import model
from carrier import Carrier, penalty

OPTIONS = {
    "device": (usual_device(), "cpu or cuda"),
    "dtypes": (
        "bfloat16" if usual_device() == "cuda" else "float32,bfloat16", "of the models, in turn"),
    "rounds": (3, "counted rounds"),
    "layers": (30, "SmolLM2-135M has 30"),
    "width": (576, "hidden size: SmolLM2-135M has 576"),
    "rows": (16, "rows of a batch"),
    "one": (str, "only measure the memory of this case, DTYPE/NAME"),
}
OPEN = (1.0, 0.2, 0.1)          # parts of the gates that are open
PROMPTS, NEW = 32, 32           # of the generation: prompts, and new tokens for each
WORDS = 49152                   # of the vocabulary
SAME, RESPONSE = 24, 6          # of a row: tokens that all begin with, tokens of response
LENGTH = 34                     # tokens of the trigger, eraser.py's default at width 576


# ---- random models, carriers and batches

def random_net(o, dtype, layers=None, width=None):
    """A model of SmolLM2-135M's proportions with random weights."""
    width, layers = width or o.width, layers or o.layers
    config = model.Config(
        vocab_size=WORDS, hidden_size=width, intermediate_size=width * 8 // 3,
        num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 192, head_dim=64, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device("meta"):
        net = model.Llama(config)
    net = net.to_empty(device=o.device).to(dtype).requires_grad_(False)
    for p in net.parameters():
        if p.ndim > 1:
            p.normal_(0, 0.02)
        else:
            p.fill_(1.0)
    return net


def random_carrier(net, density):
    """A carrier with small random deltas, and about that part of the gates open."""
    carrier = Carrier(net.config, device=net.device)
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(carrier.logits.shape, generator=generator)
    opened = size.to(net.device) < density
    with torch.no_grad():
        carrier.logits.copy_(torch.where(opened, 1.0, -1.0))
        for delta in carrier.delta.parameters():
            delta.normal_(0, 1e-3)
    return carrier


def random_batch(rows, longer=1):
    """[(ids, mask)] as the docstring says; longer: a factor on what differs between rows."""
    generator = torch.Generator().manual_seed(2)

    def ids(n, words=WORDS):
        return torch.randint(words, (n,), generator=generator).tolist()

    first, examples = ids(SAME, WORDS), []
    for _ in range(rows):
        n = int(torch.randint(8, 44, (1,), generator=generator)) * longer
        mask = [False] * (SAME + n) + [True] * RESPONSE
        examples.append((first + ids(n + RESPONSE), mask))
    return examples


def prompts_of(rows):
    """[(prompt, response)] of a batch, as ids."""
    return [(ids[:-RESPONSE], ids[-RESPONSE:]) for ids, _ in random_batch(rows)]


def seconds_of(step, device):
    """The seconds that a function takes, until the device has done all that it was asked for."""
    start = synchronised(device)
    step()
    return synchronised(device) - start


def synchronised(device):
    """The time, once the device is idle."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- the cases: each makes what it needs, and returns the function that is timed

def lcdd_step(net, o, density, kind="lcdd", longer=1):
    """
    One optimizer step of Alg. 1, or of SFT, or by Eq. 1 as it stands and autograd (literal):
    gradients, penalty, clipping, AdamW and SGD.
    """
    carrier, examples = random_carrier(net, density), random_batch(o.rows, longer)
    options = ["--batch", str(o.rows), "--device", o.device]
    settings = lcdd.fit(lcdd.options(options), o.width, 1000)
    ids, mask = (t.to(net.device) for t in data.collate(examples))
    carrier.logits.requires_grad_(kind != "sft")
    optimizer = lcdd.adamw(carrier, 1e-5)
    gates = torch.optim.SGD([carrier.logits], lr=1e-3)

    def step():
        if kind == "literal":
            carrier.delta.zero_grad()
            lcdd.task_loss(net, carrier, ids, mask).backward()
        else:
            lcdd.gradients(net, carrier, examples, settings)
        if kind != "sft":
            (0.01 * penalty(carrier.logits)).backward()
            gates.step()
            gates.zero_grad()
        lcdd.move(carrier, optimizer, 1e-5, settings)
    return step


def trigger_step(net, o):
    """One step of SFT-Eraser on eight prompts, on merged weights of a sparse carrier."""
    carrier = random_carrier(net, 0.1)
    settings = eraser.options(["--run", "none", "--k", str(RESPONSE)])
    targets = eraser.base_targets(net, prompts_of(8), settings)
    weights, C, rows = carrier.merge(net), carrier.write_channels(), list(range(8))
    tau = torch.randn(LENGTH, net.config.hidden_size, device=net.device)
    tau.mul_(0.02).requires_grad_(True)
    optimizer = torch.optim.Adam([tau], lr=1e-3)

    def step():
        loss, *_ = eraser.trigger_loss(net, weights, tau, targets, rows, C, settings)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def reference(net):
    """The same model in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
    config = LlamaConfig(**{name: getattr(net.config, name) for name in names})
    theirs = LlamaForCausalLM(config).to(net.device, net.dtype)
    theirs.load_state_dict(net.state_dict(), strict=False)
    return theirs


def padded(examples, device):
    """What transformers takes: ids, attention mask and labels."""
    ids, mask = data.collate(examples)
    _, real = data.collate([(row, [True] * len(row)) for row, _ in examples])
    batch = dict(input_ids=ids, attention_mask=real.long(), labels=ids.where(mask, -100))
    return {name: t.to(device) for name, t in batch.items()}


def transformers_step(net, o):
    """Plain SFT of all layers; the embedding stays, as in ours."""
    theirs, batch = reference(net), padded(random_batch(o.rows), net.device)
    theirs.model.embed_tokens.requires_grad_(False)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def step():
        theirs(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def peft_step(net, o):
    """Prompt tuning with as many tokens on the same eight prompts."""
    from peft import PromptTuningConfig, get_peft_model
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs, batch = get_peft_model(reference(net), config), padded(random_batch(8), net.device)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)

    def step():
        theirs(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def generation(net, o):
    """Greedy answers to PROMPTS prompts, none of which ends early."""
    weights = random_carrier(net, 0.1).merge(net)
    prompts = [prompt for prompt, _ in prompts_of(PROMPTS)]

    def generate():
        net.generate(prompts, NEW, weights, stop=())
    return generate


def transformers_generation(net, o):
    """The same prompts, padded on the left."""
    theirs, ids, mask = reference(net).eval(), [], []
    prompts = [prompt for prompt, _ in prompts_of(PROMPTS)]
    longest = max(map(len, prompts))
    for prompt in prompts:
        padding = [0] * (longest - len(prompt))
        ids.append(padding + prompt)
        mask.append(padding + [1] * len(prompt))
    ids, mask = (torch.tensor(rows, device=net.device) for rows in (ids, mask))
    how = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    def generate():
        with torch.no_grad():
            theirs.generate(ids, attention_mask=mask, **how)
    return generate


OTHERS = {
    "transformers sft": transformers_step, "trigger": trigger_step, "peft trigger": peft_step,
    "generate": generation, "transformers generate": transformers_generation}
CASES = "sft 1.0", *(f"lcdd {density}" for density in OPEN), "literal 1.0", *OTHERS


def make(case, net, o):
    """The function of a case that is timed."""
    name, _, density = case.partition(" ")
    if name in ("sft", "lcdd", "literal"):
        return lcdd_step(net, o, float(density), name)
    return OTHERS[case](net, o)


# ---- time, memory, growth

def medians(steps, o):
    """{name: median seconds} of functions that take turns, one round not counted."""
    seconds = {name: [] for name in steps}
    for _ in range(o.rounds + 1):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, o.device))
    return {name: round(statistics.median(times[1:]), 4) for name, times in seconds.items()}


def peak(o, case):
    """Peak bytes of a case in a process of its own; on a GPU of what torch allocated."""
    words = [sys.executable, "-m", "lab.bench", "--one", case]
    for name in ("device", "layers", "width", "rows"):
        words += [f"--{name}", str(getattr(o, name))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def one(o):
    """Run a case twice and print its peak."""
    dtype, _, case = o.one.partition("/")
    step = make(case, random_net(o, getattr(torch, dtype)), o)
    for _ in range(2):
        step()
    if torch.device(o.device).type == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        status = Path("/proc/self/status").read_text()          # ru_maxrss begins with the parent's
        print(1024 * int(status.partition("VmHWM:")[2].split()[0]))


def growth(o, dtype):
    """{what is doubled: by how much a step of LCDD at 20 % open takes longer}."""
    base = random_net(o, dtype, layers=o.layers // 2)
    wide = random_net(o, dtype, o.layers // 2, o.width * 4 // 3)
    deep = random_net(o, dtype)
    seconds = medians({
        "base": lcdd_step(base, o, 0.2),
        "tokens behind the prefix × 2": lcdd_step(base, o, 0.2, longer=2),
        "layers × 2": lcdd_step(deep, o, 0.2),
        "width × 4/3": lcdd_step(wide, o, 0.2)}, o)
    unit = seconds.pop("base")
    return {name: round(spent / unit, 2) for name, spent in seconds.items()}


def processor(device):
    """What computes, in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    cpu = names[0] if names else platform.processor()
    return f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"


def main(argv=None):
    """Measure every dtype, print its tables, and all of it as JSON."""
    o = parse(__doc__, OPTIONS, {}, argv)
    if o.one:
        return one(o)
    result = {
        "machine": processor(o.device), "torch": torch.__version__, "options": vars(o),
        "seconds": {}, "bytes": {}, "growth": {}}
    for name in o.dtypes.split(","):
        dtype = getattr(torch, name)
        net = random_net(o, dtype)
        seconds = medians({case: make(case, net, o) for case in CASES}, o)
        del net
        gc.collect()
        memory = {case: peak(o, f"{name}/{case}") for case in CASES if "generate" not in case}
        ratios = growth(o, dtype)
        print(f"\n{name} on {result['machine']}\n\n| case | seconds | GB |\n|---|---|---|")
        for case, spent in seconds.items():
            print(f"| {case} | {spent:.2f} | {memory.get(case, 0) / 1e9:.2f} |")
        told = ", ".join(f"{what}: {ratio} ×" for what, ratio in ratios.items())
        print(f"\n{told}", flush=True)
        for key, values in (("seconds", seconds), ("bytes", memory), ("growth", ratios)):
            result[key][name] = values
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
