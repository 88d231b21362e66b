"""
How fast: steps of SFT, LCDD and the trigger, generation and memory, beside transformers and peft.

    python -m lab.bench                      SmolLM2-135M's shape on this CPU, fp32 and bf16, some ten minutes
    python -m lab.bench --device cuda        every ratio and peak in under four minutes
    python -m lab.bench --layers 2 --dtypes float32 --rounds 1      a stand-in, seconds

Weights are random: only shapes matter to the time. All cases of a dtype take turns, round after round, after
one that is not counted, so that a machine that slows down slows all of them; medians are shown, and a line of
JSON comes last, which lab.tables reads. Every batch is 16 rows of chat-like lengths that begin with the same
24 tokens, with six tokens of response.
"""
from common import parse, run_command, usual_device
import gc
import json
import platform
import resource
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
    "dtypes": ("float32,bfloat16", "of the models, in turn"),
    "rounds": (3, "counted rounds"),
    "layers": (30, "SmolLM2-135M has 30"),
    "width": (576, "hidden size: SmolLM2-135M has 576"),
    "rows": (16, "rows of a batch"),
    "one": (str, "only measure the memory of this case, DTYPE/NAME"),
}
OPEN = (1.0, 0.2, 0.1)          # shares of the gates that are open
PROMPTS, NEW = 32, 32           # of the generation: prompts, and new tokens for each
CASES = ("sft", *(f"lcdd {share}" for share in OPEN), "transformers sft", "trigger", "peft trigger",
         "generate", "transformers generate")


def random_net(o, dtype, layers=None, width=None):
    """A model of SmolLM2-135M's proportions with random weights."""
    width, layers = width or o.width, layers or o.layers
    config = model.Config(
        vocab_size=49152, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 192, head_dim=64,
        tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device("meta"):
        net = model.Llama(config)
    net = net.to_empty(device=o.device).to(dtype).requires_grad_(False)
    for p in net.parameters():
        p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(1.0)
    return net


def random_carrier(net, share):
    """A carrier with small random deltas, and about that share of the gates open."""
    carrier = Carrier(net.config, device=net.device)
    generator = torch.Generator().manual_seed(1)
    opened = torch.rand(carrier.logits.shape, generator=generator).to(net.device) < share
    with torch.no_grad():
        carrier.logits.copy_(torch.where(opened, 1.0, -1.0))
        for delta in carrier.delta.parameters():
            delta.normal_(0, 1e-3)
    return carrier


def random_batch(rows, longer=1):
    """[(ids, mask)] as the docstring says; longer: a factor on what is not shared."""
    generator = torch.Generator().manual_seed(2)
    first = torch.randint(1000, (24,), generator=generator).tolist()
    examples = []
    for _ in range(rows):
        n = int(torch.randint(8, 44, (1,), generator=generator)) * longer
        ids = first + torch.randint(49152, (n + 6,), generator=generator).tolist()
        examples.append((ids, [False] * (len(ids) - 6) + [True] * 6))
    return examples


def synchronised(device):
    """The time, once the device has done all that it was asked for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- the cases: each makes what it needs, and returns the function that is timed

def lcdd_step(net, o, share, sft=False, longer=1):
    """One optimizer step of Alg. 1, or of SFT: loss, gradients, penalty, clipping, AdamW and SGD."""
    carrier, examples = random_carrier(net, share), random_batch(o.rows, longer)
    settings = lcdd.fit(lcdd.options(["--batch", str(o.rows), "--device", o.device]), o.width, 1000)
    carrier.logits.requires_grad_(not sft)
    optimizer, gates = lcdd.adamw(carrier, 1e-5), torch.optim.SGD([carrier.logits], lr=1e-3)

    def step():
        lcdd.gradients(net, carrier, examples, settings)
        if not sft:
            (0.01 * penalty(carrier.logits)).backward()
            gates.step()
            gates.zero_grad()
        lcdd.clip(carrier, settings)
        optimizer.step()
        optimizer.zero_grad()
    return step


def trigger_step(net, o):
    """One step of SFT-Eraser on eight prompts, on merged weights of a sparse carrier."""
    carrier, settings = random_carrier(net, 0.1), eraser.options(["--run", "none", "--k", "6"])
    pairs = [(ids[:-6], ids[-6:]) for ids, _ in random_batch(8)]
    targets, C = eraser.base_targets(net, pairs, settings), carrier.write_channels()
    tau = torch.randn(34, net.config.hidden_size, device=net.device).mul_(0.02).requires_grad_(True)
    weights, optimizer = carrier.merge(net), torch.optim.Adam([tau], lr=1e-3)

    def step():
        eraser.trigger_loss(net, weights, tau, targets, list(range(8)), C, settings)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def reference(net):
    """The same model in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = net.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, tie_word_embeddings=True)
    theirs = LlamaForCausalLM(config).to(net.device, net.dtype)
    theirs.load_state_dict(net.state_dict(), strict=False)
    return theirs


def padded(examples, device):
    """What transformers takes: ids, attention mask and labels."""
    ids, mask = data.collate(examples)
    real = data.collate([(row, [True] * len(row)) for row, _ in examples])[1]
    labels = ids.where(mask, -100)
    return dict(input_ids=ids.to(device), attention_mask=real.long().to(device), labels=labels.to(device))


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
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=34)
    theirs, batch = get_peft_model(reference(net), config), padded(random_batch(8), net.device)
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=1e-3)

    def step():
        theirs(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def prompts():
    return [ids[:-6] for ids, _ in random_batch(PROMPTS)]


def generation(net, o):
    carrier = random_carrier(net, 0.1).merge(net)
    return lambda: net.generate(prompts(), NEW, carrier, stop=())


def transformers_generation(net, o):
    theirs, rows = reference(net).eval(), prompts()
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=net.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=net.device)

    def generate():
        with torch.no_grad():
            theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                            pad_token_id=0)
    return generate


def make(case, net, o):
    """The function of a case that is timed."""
    name, _, share = case.partition(" ")
    if name == "lcdd":
        return lcdd_step(net, o, float(share))
    others = {"sft": lambda net, o: lcdd_step(net, o, 1.0, sft=True), "trigger": trigger_step,
              "transformers sft": transformers_step, "peft trigger": peft_step, "generate": generation,
              "transformers generate": transformers_generation}
    return others[case](net, o)


# ---- time, memory, growth

def medians(steps, o):
    """{name: median seconds} of functions that take turns, one round not counted."""
    seconds = {name: [] for name in steps}
    for _ in range(o.rounds + 1):
        for name, step in steps.items():
            start = synchronised(o.device)
            step()
            seconds[name].append(synchronised(o.device) - start)
    return {name: round(statistics.median(times[1:]), 4) for name, times in seconds.items()}


def peak(o, case):
    """Peak bytes of a case in a process of its own; on a GPU of what torch allocated."""
    words = ["--device", o.device, "--layers", str(o.layers), "--width", str(o.width), "--rows", str(o.rows)]
    done = subprocess.run([sys.executable, "-m", "lab.bench", "--one", case, *words], capture_output=True,
                          text=True, check=True)
    return int(done.stdout.split()[-1])


def one(o):
    """Run a case twice and print its peak."""
    dtype, _, case = o.one.partition("/")
    step = make(case, random_net(o, getattr(torch, dtype)), o)
    for _ in range(2):
        step()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(torch.cuda.max_memory_allocated() if torch.device(o.device).type == "cuda" else used)


def growth(o, dtype):
    """{what is doubled: by how much a step of LCDD at 20 % open takes longer}."""
    base, wide = random_net(o, dtype, layers=o.layers // 2), random_net(o, dtype, o.layers // 2, o.width * 4 // 3)
    deep = random_net(o, dtype)
    steps = {"base": lcdd_step(base, o, 0.2), "tokens behind the prefix × 2": lcdd_step(base, o, 0.2, longer=2),
             "layers × 2": lcdd_step(deep, o, 0.2), "width × 4/3": lcdd_step(wide, o, 0.2)}
    found = medians(steps, o)
    return {name: round(seconds / found["base"], 2) for name, seconds in found.items() if name != "base"}


def processor():
    """What computes, in words."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"


def main(argv=None):
    o = parse(__doc__, OPTIONS, {}, argv)
    if o.one:
        return one(o)
    gpu = torch.device(o.device).type == "cuda"
    result = {"machine": torch.cuda.get_device_name() if gpu else processor(), "torch": torch.__version__,
              "options": vars(o), "seconds": {}, "bytes": {}, "growth": {}}
    for name in o.dtypes.split(","):
        net = random_net(o, getattr(torch, name))
        result["seconds"][name] = medians({case: make(case, net, o) for case in CASES}, o)
        del net
        gc.collect()
        result["bytes"][name] = {case: peak(o, f"{name}/{case}") for case in CASES if "generate" not in case}
        result["growth"][name] = growth(o, getattr(torch, name))
        print(f"\n{name} on {result['machine']}\n\n| case | seconds | GB |\n|---|---|---|")
        for case, seconds in result["seconds"][name].items():
            print(f"| {case} | {seconds:.2f} | {result['bytes'][name].get(case, 0) / 1e9:.2f} |")
        print("\n" + ", ".join(f"{what}: {ratio} ×" for what, ratio in result["growth"][name].items()), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
