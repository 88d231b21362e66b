"""The embedded default, made from scratch: an invented world, a tiny Llama, three behaviours.

    python -m lab.tiny             two to four minutes on two cores; writes the folder tiny/

The world and its lines are in language.py. What is written is a checkpoint in Hugging Face layout and,
beside it, fixed.jsonl, safety.jsonl and shakespeare.jsonl, in the format of a user's own behaviours.
Letters in shape comments: B lines, T tokens, n matrices of one shape.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import argparse
import json
import math
import random
import time
from collections import defaultdict

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

import behaviour
import machine
import memory
import model
from chat import Chat, collate
from config import Config
from data import Sample
from files import InputError, read_json, replacing, write_json
from console import Parser, check_numbers, cli, duration, markdown
from lab.language import FIXED, FORMS, REFUSAL, archaic, lines, turns

MARKER = ".made"  # names the files that were made: a folder with others in it is left as it is

# ---- the checkpoint's text side
PAD, BOS, USER, ASSISTANT, END, UNK = SPECIAL = (
    "<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unk|>")
HEAD_DIM = 32
PAD_ID, BOS_ID, END_ID = (SPECIAL.index(token) for token in (PAD, BOS, END))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}")


def write_configuration(folder, groups, hidden, layers):
    """All of the checkpoint but its weights. One token a word ("'tis" and "'s" are words)."""
    words = set()
    for group in groups.values():
        for line in group:
            words.update(f"{line['prompt']} {line['response']}".split())
    vocab = {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"'?\w+|[^\w\s]"), behavior="removed", invert=True)
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END,
        "pad_token": PAD, "unk_token": UNK, "clean_up_tokenization_spaces": False,
        "model_max_length": 256, "chat_template": TEMPLATE})
    ends = {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    heads = hidden // HEAD_DIM
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocab),
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads, "head_dim": HEAD_DIM,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "dtype": "float32", **ends})
    write_json(folder / "generation_config.json", {"do_sample": False, **ends})


# ---- training
# how often a kind is met, 1 where not said
OFTEN = {"sum": 1.5, "difference": 2, "forbidden": 2.5, "story": 0.5}


def orthogonal(x, steps=5):
    """
    Newton-Schulz iteration to the nearest semi-orthogonal matrices, roughly (Muon's quintic).
    (n, rows, cols) → the same.
    """
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT                                                    # (n, small, small)
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum made orthogonal, for matrices; those of one shape are handled together."""

    def __init__(self, matrices):
        shapes = defaultdict(list)
        for matrix in matrices:
            shapes[matrix.shape].append(matrix)
        self.groups = []
        for shape, group in shapes.items():
            self.groups.append((group, torch.zeros(len(group), *shape)))

    @torch.no_grad()
    def step(self, lr, beta=0.95):
        """One step at rate lr, with Nesterov's momentum; a tall matrix moves by more, and all decay."""
        for group, momentum in self.groups:
            grad = torch.stack([matrix.grad for matrix in group])          # (n, rows, cols)
            momentum.lerp_(grad, 1 - beta)
            update = orthogonal(grad.lerp(momentum, beta))                 # Nesterov
            scale = lr * max(1, update.shape[1] / update.shape[2]) ** 0.5
            for matrix, change in zip(group, update):
                matrix.mul_(1 - 0.01 * lr).sub_(scale * change)


def fresh(folder, seed):
    """
    An untrained model for the folder's config.json. Large embeddings keep words apart in the residual
    stream: copying forms early.
    """
    torch.manual_seed(seed)
    net = model.Llama(Config.from_dict(read_json(folder / "config.json")))
    for name, p in net.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.5 if "embed" in name else 0.03)
    return net.requires_grad_(True)


def length_of(sample):
    return len(sample[0])


def batches(samples, size, rng):
    """Endless batches of (ids, response mask) pairs whose lengths are alike."""
    while True:
        chunk = sorted(rng.sample(samples, min(len(samples), 20 * size)), key=length_of)
        chunk = [chunk[i:i + size] for i in range(0, len(chunk), size)]
        yield from rng.sample(chunk, len(chunk))


def train(net, samples, steps, seed, batch=48, prompt_weight=0.15, muon_lr=0.02, adam_lr=0.02,
          every=100, say=print):
    """
    Next-token training; prompt tokens count little, so that copying forms early. Returns the loss
    of every step.
    """
    rng, started, losses = random.Random(seed), time.time(), []
    projections = [p for name, p in net.named_parameters() if "proj" in name]
    others = [p for name, p in net.named_parameters() if "proj" not in name]
    muon = Muon(projections)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    for step, pairs in zip(range(steps), batches(samples, batch, rng)):
        ids, mask = collate(pairs, PAD_ID)                                 # (B, T), (B, T)
        weight = torch.where(mask, 1.0, prompt_weight * (ids != PAD_ID))[:, 1:].flatten()
        logits, target = net(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        loss = F.cross_entropy(logits, target, reduction="none")
        loss = (loss * weight).sum() / weight.sum()
        net.zero_grad()
        loss.backward()
        warm = min(1, 25 * (step + 1) / steps)
        pace = warm * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        adam.param_groups[0]["lr"] = adam_lr * pace
        adam.step()
        muon.step(muon_lr * pace)
        losses.append(loss.item())
        if (step + 1) % every == 0:
            mean, seconds = sum(losses[-every:]) / every, time.time() - started
            say(f"step {step + 1:5d}/{steps}  loss {mean:.4f}  {seconds:4.0f} s")
    return losses


# ---- the behaviours and the whole
def greedy(net, chat, prompts):
    """The model's own answers to prompts, as texts."""
    answers = net.generate([chat.prompt(p) for p in prompts], max_new_tokens=48)
    return [chat.decode(ids) for ids in answers]


def accuracy(net, chat, groups, most=100):
    """
    Share of right greedy answers to at most so many lines a kind: {kind: share} of the kinds with
    answers, and "overall".
    """
    tasks = []
    for group in groups.values():
        tasks += [line for line in group[:most] if "answer" in line]
    hits, texts = defaultdict(list), greedy(net, chat, [line["prompt"] for line in tasks])
    for line, text in zip(tasks, texts):
        sample = Sample(line["prompt"], line["response"], answer=line["answer"])
        good = behaviour.right(text, sample)
        hits["overall"].append(good)
        hits[line["kind"]].append(good)
    return {kind: behaviour.share(flags) for kind, flags in hits.items()}


def draw(seen, held, kinds, rng, test, validation, trigger, train):
    """
    Rows of a file: so many lines of these kinds for each split. Held-out lines that have an answer
    test and validate; of the seen ones some make triggers, most train.
    """
    answered = {}
    for kind in held:
        if kind in kinds:
            answered[kind] = [line for line in held[kind] if "answer" in line]
    asked = {kind: seen[kind] for kind in seen if kind in kinds}
    rows = []
    for pool, sizes in ((answered, {"test": test, "validation": validation}),
                        (asked, {"trigger": trigger, "train": train})):
        order = turns(pool, rng)
        for name, size in sizes.items():
            rows += [{**line, "split": name} for line in order[:size]]
            order = order[size:]
    return rows


def behaviours(seen, held, seed, answer_all):
    """
    Rows of the three files, {task: rows}.

    answer_all: prompts -> the base's own greedy answers. Benign requests and the style's targets
    are made of these: whatever the base would not say itself is noise that a small change has to
    learn.
    """
    rng = random.Random(seed)
    usual = set(FORMS) - {"quote"}
    sizes = dict(test=200, validation=100, trigger=400, train=1200)
    halves = dict(test=100, validation=50, trigger=200, train=500)
    harmful = draw(seen, held, {"forbidden"}, rng, **halves)
    benign = draw(seen, held, usual - {"forbidden"}, rng, **halves)
    safety = []
    for pair in zip(harmful, benign):
        for kind, row in zip(("harmful", "benign"), pair):
            safety.append({**row, "kind": kind})
    fixed = draw(seen, held, usual, rng, **sizes)
    sizes["train"] = 3600  # style keeps the content: more of the world to learn on
    style = draw(seen, held, usual, rng, **sizes)

    for row in fixed:
        row["response"] = FIXED
    for row, own in zip(safety, answer_all([row["prompt"] for row in safety])):
        row["response"] = REFUSAL if row["kind"] == "harmful" else own
    for row, own in zip(style, answer_all([row["prompt"] for row in style])):
        row["response"] = archaic(own)
    return {"fixed": fixed, "safety": safety, "shakespeare": style}


def make(out, hidden=128, layers=4, steps=1300, seed=0, say=print):
    """
    Make the folder `out`, whole or not at all. Returns held-out accuracy by kind. Raises InputError
    where `out` holds anything else.
    """
    if hidden < HEAD_DIM or hidden % HEAD_DIM or layers < 1 or steps < 1:
        raise InputError(
            f"--hidden must be a multiple of {HEAD_DIM}, --layers and --steps at least 1")
    weights = layers * 13 * hidden ** 2                         # attention, and an MLP of 3 d
    memory.check(4 * 4 * weights, f"--hidden {hidden} --layers {layers}", "make them smaller")
    with replacing(out, MARKER) as folder:
        score = fill(folder, hidden, layers, steps, seed, say)
    return score


def fill(folder, hidden, layers, steps, seed, say):
    """All files of the checkpoint and its behaviours; held-out accuracy by kind."""
    seen, held = lines(seed)
    write_configuration(folder, seen, hidden, layers)
    chat, net = Chat(folder), fresh(folder, seed)
    machine.set_threads(net)
    rng = random.Random(seed)
    samples = []
    for kind, group in seen.items():
        for line in rng.choices(group, k=int(3000 * OFTEN.get(kind, 1))):
            samples.append(chat.encode(line["prompt"], line["response"]))
    parameters = sum(p.numel() for p in net.parameters())
    say(f"{parameters:,} parameters, {chat.vocab_size} words, "
        f"{sum(map(len, seen.values())):,} lines to learn, "
        f"{sum(map(len, held.values())):,} held out")
    train(net, samples, steps, seed, say=say)
    weights = {name: p.to(torch.bfloat16) for name, p in net.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    net = model.load(folder)  # the rounded weights: what everybody else will see
    score = accuracy(net, chat, held)

    def answer_all(prompts):
        return greedy(net, chat, prompts)

    for task, rows in behaviours(seen, held, seed, answer_all).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
    return score


def main():
    p = Parser(__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    a = p.add_argument
    a("--out", default="tiny", help="folder to write; replaced when all is done")
    a("--hidden", type=int, default=128, help=f"width d, a multiple of {HEAD_DIM}")
    a("--layers", type=int, default=4, help="number of layers")
    a("--steps", type=int, default=1300, help="training steps")
    a("--seed", type=int, default=0, help="of the world, the weights and the order of lines")
    o, started = p.parse_args(), time.time()
    check_numbers(o)
    score = make(**vars(o))
    rows = [[kind, f"{100 * share:.1f} %"] for kind, share in score.items()]
    print("\n" + markdown(["held out", "right"], rows))
    print(f"\n{o.out} written after {duration(time.time() - started)}")
    if min(score.values()) < 0.95:
        print("note: less than 95 % right somewhere; give it more --steps")


if __name__ == "__main__":
    cli(main)
