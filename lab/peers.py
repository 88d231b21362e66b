"""
Beside transformers and peft, on a real checkpoint and real tokens: python -m lab.bench --model DIR

Every way takes one whole optimizer step of the fixed-response task: forward, backward, clipping,
AdamW at a rate of 0, so that each stays the model that it began as, and their losses agree. What
trains is everywhere the projections' weights, but for LoRA, whose factors stand beside them.

The ways take turns in rounds; a ratio is the median over rounds of the ratio within one. On a CPU
seconds are the processor's own, of all threads, which a busy machine disturbs less than the clock's.
"""
import importlib
import time
from functools import partial
from types import SimpleNamespace

import torch

import eraser
import machine
import model
import training
from carrier import PROJECTIONS, Carrier, penalty
from chat import collate
from files import InputError
from lab import bench
from run import chat_of, prepare

OPEN = (1.0, 0.2, 0.1)  # shares of gates open; a LoRA is compared at the last
# what is aimed at, as a multiple of transformers' own
GOALS = {
    "step_fp32": "LCDD at 10 % open ≤ 0.17 × transformers' plain SFT in fp32",
    "step_bf16": "≤ 0.40 × the same in bf16",
    "memory": "memory ≤ its",
    "generation": "generation ≥ 2 × as fast as its faster dtype",
}


def libraries():
    """(transformers, peft). Raises InputError where one is not installed."""
    found = []
    for name in ("transformers", "peft"):
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            raise InputError(f"--model compares with transformers and peft, and {name} is not "
                             "installed; pip install transformers peft") from None
    found[0].logging.set_verbosity_error()
    found[0].logging.disable_progress_bar()
    return found


# ---- one optimizer step, in every way

def theirs(folder, dtype, device):
    """The transformers library's model; its projections train, as ours do."""
    transformers, _ = libraries()
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    for name, p in net.named_parameters():
        p.requires_grad_(name.split(".")[-2] in PROJECTIONS and name.endswith("weight"))
    return net


def with_lora(net, share):
    """The same with a LoRA of the rank that a carrier with that `share` of its gates open has."""
    _, peft = libraries()
    net.requires_grad_(False)
    ranks = {}
    for name in PROJECTIONS:
        layer = next(m for path, m in net.named_modules() if path.endswith(name))
        ranks[name] = max(1, round(share * min(layer.weight.shape)))
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=list(ranks),
                             r=max(ranks.values()), rank_pattern=ranks)
    return peft.get_peft_model(net, config)


def trained_by(net):
    return [p for p in net.parameters() if p.requires_grad]


def adamw(parameters):
    """AdamW that moves nothing, its moments made already, as they are from the second step on."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def their_step(net, optimizer, batch, pad_id):
    """A step of transformers' or peft's model; the loss."""
    ids, mask = (t.to(net.device) for t in collate(batch, pad_id))
    lengths = torch.tensor([len(row) for row, _ in batch], device=ids.device)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]              # (B, T)
    labels = ids.masked_fill(~mask, -100)
    loss = net(input_ids=ids, attention_mask=real.long(), labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def our_step(net, carrier, rule, density, optimizer, batch, pad_id):
    """
    A step of ours; the loss. density: the share of gates open, or None for phase 1, where all are
    open and none train. rule: None, or a slow definition of bench's in LCDD's place.
    """
    bench.set_density(carrier, density or 1.0)
    carrier.logits.requires_grad_(density is not None)
    if rule is None:
        loss = training.gradients(net, carrier, batch, len(batch), pad_id)
    else:
        ids, mask = (t.to(net.device) for t in collate(batch, pad_id))
        loss = training.task_loss(net, bench.Slow(carrier, rule), ids, mask) / mask[:, 1:].sum()
        loss.backward()
        loss = float(loss.detach())
    if density is not None:
        penalty(carrier.logits).backward()
    training.clip_gradients(carrier, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    carrier.logits.grad = None
    return loss


def steps(folder, net, batch, pad_id):
    """{name: (step, parameters, optimizer)}: what is compared; step() gives the loss."""
    device, found = net.device, {}

    def add(name, their_net):
        optimizer = adamw(trained_by(their_net))
        take = partial(their_step, their_net, optimizer, batch, pad_id)
        found[name] = take, list(their_net.parameters()), optimizer

    add("transformers fp32", theirs(folder, torch.float32, device))
    add("transformers bf16", theirs(folder, torch.bfloat16, device))
    add(f"peft LoRA bf16, rank of {OPEN[-1]:.0%}",
        with_lora(theirs(folder, torch.bfloat16, device), OPEN[-1]))

    carrier = Carrier(net.config, device=device)
    optimizer = adamw(list(carrier.delta.parameters()))
    ours = [("plain SFT", None, None)]
    ours += [(f"LCDD, {density:.0%} open", None, density) for density in OPEN]
    ours.append(("literal Eq. 1", bench.literal, OPEN[-1]))
    for name, rule, density in ours:
        take = partial(our_step, net, carrier, rule, density, optimizer, batch, pad_id)
        found[name] = take, [*net.parameters(), *carrier.parameters()], optimizer
    return found


def footprint(take, parameters, optimizer):
    """(peak bytes of a step, weights, moments and gradients included; its loss)."""
    moments = [t for state in optimizer.state.values() for t in state.values()]
    fixed = sum(t.nbytes for t in [*parameters, *moments])
    if parameters[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - fixed
        loss = take()
        return torch.cuda.max_memory_allocated() - others, loss
    with bench.Live([*parameters, *moments]) as live:
        loss = take()
    return fixed + live.peak, loss


# ---- the figures

def clock(device):
    """Seconds: the processor's own on a CPU, the clock's beside a GPU."""
    return time.process_time if device == "cpu" else bench.now


def bench_steps(folder, net, batch, pad_id, s):
    """Time and memory of an optimizer step."""
    ways = steps(folder, net, batch, pad_id)
    peaks, losses = {}, {}
    for name, way in ways.items():
        peaks[name], losses[name] = footprint(*way)  # the warm-up, too
    first = losses["transformers fp32"]
    far = max(abs(loss / first - 1) for loss in losses.values())
    assert far < 0.05, f"these do not compute the same: {losses}"
    functions = {name: way[0] for name, way in ways.items()}
    times = bench.alternated(functions, s, clock=clock(net.device.type))
    seconds = bench.medians(times)
    fp32, bf16 = (bench.ratios_to(f"transformers {name}", times) for name in ("fp32", "bf16"))
    rows = []
    for name in ways:
        rows.append([name, f"{seconds[name]:.2f}", f"{fp32[name]:.2f}", f"{bf16[name]:.2f}",
                     f"{peaks[name] / 1e9:.2f}"])
    tokens = sum(len(ids) for ids, _ in batch)
    bench.table(f"An optimizer step: {len(batch)} samples, {tokens} tokens, ours in {net.dtype}",
                ["step", "seconds", "× transformers fp32", "× transformers bf16", "GB"], rows)
    print(f"\nLosses differ by {far:.1%} at most, {first:.3f} in fp32.")
    return {"seconds": seconds, "to_fp32": fp32, "to_bf16": bf16, "bytes": peaks,
            "losses": losses, "tokens": tokens}


def bench_trigger(folder, net, prompts, s):
    """A trigger step against peft's prompt tuning on the same rows: the base's own answers."""
    _, peft = libraries()
    carrier = bench.set_density(Carrier(net.config, device=net.device), OPEN[-1])
    weights, aims = carrier.merge(net), eraser.base_targets(net, prompts)
    mask, variance = eraser.channels(carrier, "circuit"), model.wide(aims.stream).var(1)
    tau = model.wide(net.embedding[:16]).clone().requires_grad_(True)
    setting = SimpleNamespace(positions="response", match="prompt", alpha=0.7, beta=0.1)
    rows, dtype = list(range(len(prompts))), net.dtype

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(tau))
    tuned = peft.get_peft_model(theirs(folder, dtype, net.device), config)
    their_adam, our_adam = adamw(trained_by(tuned)), adamw([tau])
    samples = []
    for i, prompt in enumerate(prompts):
        row = aims.ids[i][:int(aims.keep[i].nonzero().max()) + 1].tolist()
        samples.append((row, [False] * len(prompt) + [True] * (len(row) - len(prompt))))

    def ours():
        eraser.trigger_loss(net, weights, tau, aims, rows, mask, setting, 1.0, variance)[0].backward()
        our_adam.step()
        our_adam.zero_grad()

    functions = {"peft prompt tuning": partial(their_step, tuned, their_adam, samples, 0), "ours": ours}
    for f in functions.values():
        f()  # warm-up
    times = bench.alternated(functions, s, clock=clock(net.device.type))
    seconds, ratio = bench.medians(times), bench.ratios_to("peft prompt tuning", times)
    bench.table(f"A step of a trigger of {len(tau)} tokens, {len(prompts)} prompts, both in {dtype}",
                ["step", "seconds", "× peft"],
                [[name, f"{seconds[name]:.2f}", f"{ratio[name]:.2f}"] for name in functions])
    return {"seconds": seconds, "ratio": ratio}


def bench_generation(folder, net, prompts, s):
    """Greedy answers of one length to all prompts in one batch, in tokens a second."""
    transformers, _ = libraries()
    width, n = max(map(len, prompts)), s.new_tokens
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=net.device)
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=net.device)
    greedy = transformers.GenerationConfig(max_new_tokens=n, do_sample=False, pad_token_id=0)
    merged = bench.set_density(Carrier(net.config, device=net.device), OPEN[-1]).merge(net)

    def with_transformers(other):
        return other.generate(ids, attention_mask=real, generation_config=greedy)[:, width:].tolist()

    def ours():
        return net.generate(prompts, n, carrier=merged, stop=frozenset())

    functions, same = {}, {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        other = theirs(folder, dtype, net.device)
        other.generation_config = greedy  # the checkpoint's own may end answers, or sample
        functions[f"transformers {name}"] = partial(with_transformers, other)
    functions["ours"] = ours
    answers = {name: f() for name, f in functions.items()}  # the warm-up, too
    for name, found in answers.items():
        assert all(len(a) == n for a in found), f"{name} ends answers early"
        same[name] = sum(a == b for a, b in zip(found, answers["ours"])) / len(prompts)
    times = bench.alternated(functions, s, clock=clock(net.device.type))
    seconds = bench.medians(times)
    fp32, bf16 = (bench.ratios_to(f"transformers {name}", times) for name in ("fp32", "bf16"))
    rows = []
    for name in functions:
        rate = len(prompts) * n / seconds[name]
        rows.append([name, f"{rate:.0f}", f"{1 / fp32[name]:.2f}", f"{1 / bf16[name]:.2f}",
                     f"{same[name]:.0%}"])
    bench.table(f"Generation: {len(prompts)} prompts, {n} new tokens each",
                ["by", "tokens a second", "× transformers fp32", "× transformers bf16",
                 "answers as ours"], rows)
    return {"seconds": seconds, "to_fp32": fp32, "to_bf16": bf16, "same": same}


def against_goals(step, generation):
    """{goal: what was measured}: multiples of transformers' own, memory against fp32 and bf16."""
    ours = f"LCDD, {OPEN[-1]:.0%} open"
    size, their = step["bytes"][ours], step["bytes"]
    found = {
        "step_fp32": step["to_fp32"][ours],
        "step_bf16": step["to_bf16"][ours],
        "memory": size / their["transformers fp32"],
        "memory_bf16": size / their["transformers bf16"],
        "generation": 1 / max(generation["to_fp32"]["ours"], generation["to_bf16"]["ours"]),
    }
    print()
    for name, goal in GOALS.items():
        print(f"{goal}: {found[name]:.2f}")
    return found


def measure(o):
    """Everything for the options of lab.bench; a dict of what was found."""
    libraries()
    s = SimpleNamespace(samples=4 if o.quick else 16, prompts=4 if o.quick else 32,
                        new_tokens=4 if o.quick else 32, seconds=0, least=o.rounds)
    chat = chat_of(o.model)
    splits, _ = prepare(chat, "fixed", o.data, o.seed, {})
    folder = str(chat.folder)
    net = model.load(folder, o.device, None)
    machine.set_threads(net)
    batch = [chat.encode(x.prompt, x.response, 512) for x in splits["train"][:s.samples]]
    prompts = [chat.prompt(x.prompt, 512) for x in splits["train"][:s.prompts]]
    found = {"step": bench_steps(folder, net, batch, chat.pad_id, s)}
    found["trigger"] = bench_trigger(folder, net, prompts[:s.samples], s)
    found["generation"] = bench_generation(folder, net, prompts, s)
    found["goals"] = against_goals(found["step"], found["generation"])
    return found
