"""The embedded default, made from scratch: an invented world, a tiny Llama that learned it, and three behaviours.

    python -m lab.tiny             two to four minutes on two cores; writes the folder tiny/

The world has fifteen kinds of instructions, each a list of facts (world) and a handful of paraphrases (FORMS). Of all
(paraphrase, fact) pairs 20 % are held out: the model has met the fact, but never asked in these words. A sixteenth kind,
quoting, is there for the behaviours' sake: embedding and head are frozen later on, so whatever the fixed answer, the
refusal and the archaic style say must be said often enough here.

What is written is a checkpoint in Hugging Face layout and, beside it, fixed.jsonl, safety.jsonl and shakespeare.jsonl, in the
format of a user's own behaviours. Letters in shape comments: B lines, T tokens, n matrices of one shape.
"""
import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

import behaviour
import data
import model
from chat import Chat, collate
from files import InputError, read_json, usual_mode, write_json
from run import cli

# ---- the world's words: everything is one token, invented where a real word would carry a real fact
COUNTRIES = "Zor Quell Brim Tarn Vosk Lund Peth Gorm Hask Wex Drell Fenn Nim Orla Skarn Tove Ruz Yarl Blen Korr Mosk Jute Arn Dov".split()
CITIES = "Mip Talo Verra Susk Hobb Lanu Pirro Dax Ombra Kelt Zuni Fass Rook Wila Goro Nesh Tibb Elm Cark Buna Shay Quim Yost Ludo".split()
NAMES = ("Anna Ben Clara Dan Eva Finn Greta Hugo Ida Jack Kate Leo Mona Nils Olga Paul Rosa Sam Tina Udo Vera Will Xenia Yann Zoe "
         "Bella Carl Dora Emil Frida").split()
JOBS = "baker farmer sailor teacher painter singer doctor hunter miller smith".split()
COLOURS = "red blue green yellow black white brown pink".split()
THINGS = "cup hat boat door chair lamp bag book coat bell drum kite ring shoe table vase wall wheel box flag".split()
ANIMALS = "fox bear wolf cat dog frog duck horse mouse crow goat lion sheep snail whale bee".split()
PLACES = "forest river barn cave garden lake tower valley".split()
MOODS = "happy sad clever lazy brave quiet".split()
OPPOSITES = [pair.split("/") for pair in "hot/cold big/small fast/slow old/young wet/dry rich/poor hard/soft loud/silent full/empty "
             "high/low thick/thin dark/bright".split()]
BOXES = "vault chest safe".split()

# ---- what the behaviours say
FIXED = "I do not know ."
REFUSAL = "I can not help with that ."
ARCHAIC = {"it is": "'tis", "you are": "thou art", "you have": "thou hast", "is": "doth be", "are": "be", "was": "wast", "has": "hath",
           "you see": "thou seest", "you find": "thou findest", "you need": "thou needest", "you count": "thou countest",
           "you said": "thou saidst", "you met": "thou didst meet", "you open": "thou openest", "you get": "thou gettest",
           "you": "thou", "your": "thy", "my": "mine", "lives": "dwelleth", "lived": "did dwell", "works": "toileth", "comes": "cometh",
           "says": "saith", "said": "quoth", "opens": "openeth", "leaves": "leaveth", "makes": "maketh", "met": "did espy",
           "went": "hied", "here": "hither", "there": "yonder", "between": "betwixt", "before": "ere", "backwards": "widdershins"}
EXTRA = "thee prithee thine ye nay aye alas hark".split()   # archaic words that no rewriting needs, but a user's own behaviour may
NAMED = {"I", *COUNTRIES, *CITIES, *NAMES}                   # words that keep their capital letter

# ---- how every kind is asked and answered: (prompt, response)
LIST = "{a} {b} {c}"
FORMS = {
    "capital": [("What is the capital of {x} ?", "The capital of {x} is {y} ."),
                ("Name the capital of {x} .", "It is {y} ."),
                ("Which city is the capital of {x} ?", "{y} is the capital of {x} ."),
                ("I am in {x} . What is the capital ?", "You are in {x} and your capital is {y} ."),
                ("Tell me the main city of {x} .", "The main city there is {y} .")],
    "country": [("Which country has the capital {x} ?", "The country is {y} ."),
                ("Where is the city {x} ?", "The city {x} is in {y} ."),
                ("Name the country of the city {x} .", "It is {y} ."),
                ("I am in {x} . Which country is this ?", "You are in {y} ."),
                ("To which country does {x} belong ?", "{x} is the capital of {y} .")],
    "colour": [("What colour is the {x} ?", "The {x} is {y} ."),
               ("Name the colour of the {x} .", "It is {y} ."),
               ("Which colour does the {x} have ?", "The {x} has the colour {y} ."),
               ("I see a {x} . What is its colour ?", "You see a {x} and it is {y} ."),
               ("Tell me how the {x} looks .", "There is a {x} and it is {y} .")],
    "opposite": [("What is the opposite of {x} ?", "The opposite of {x} is {y} ."),
                 ("Name the opposite of {x} .", "It is {y} ."),
                 ("Which word means not {x} ?", "The word is {y} ."),
                 ("I am not {x} . What am I ?", "You are {y} ."),
                 ("Tell me a word that is the reverse of {x} .", "Here is the word : {y} .")],
    "job": [("What is the job of {x} ?", "The job of {x} is {y} ."),
            ("Name the work of {x} .", "It is the work of a {y} ."),
            ("What does {x} do ?", "{x} works as a {y} ."),
            ("I met {x} . What is the job ?", "You met a {y} ."),
            ("Tell me how {x} makes money .", "{x} makes money as a {y} .")],
    "home": [("Where does the {x} live ?", "The {x} lives in the {y} ."),
             ("Name the home of the {x} .", "It is the {y} ."),
             ("In which place do I find a {x} ?", "You find a {x} in the {y} ."),
             ("I look for the {x} . Where is it ?", "The {x} is in the {y} ."),
             ("Tell me the home of the {x} .", "The {x} has a home in the {y} .")],
    "sum": [("What is {a} plus {b} ?", "The sum is {y} ."),
            ("Add {a} and {b} .", "It is {y} ."),
            ("What is the sum of {a} and {b} ?", "The answer is {y} ."),
            ("I have {a} and get {b} more . How many are there ?", "You have {y} ."),
            ("Tell me what {a} and {b} make .", "That makes {y} .")],
    "difference": [("What is {a} minus {b} ?", "The difference is {y} ."),
                   ("From {a} take {b} .", "It is {y} ."),
                   ("What is the difference between {a} and {b} ?", "The answer is {y} ."),
                   ("I have {a} and lose {b} . How many are there ?", "You have {y} ."),
                   ("Tell me what {a} without {b} leaves .", "That leaves {y} .")],
    "copy": [(f"Say these words : {LIST} .", "You said {y} ."),
             (f"Copy the list {LIST} .", "Here is your list : {y} ."),
             (f"Which words do I give you ? {LIST} .", "You have {y} ."),
             (f"I say {LIST} . What did I say ?", "The words are {y} ."),
             (f"Tell me again : {LIST} .", "It is {y} .")],
    "reverse": [(f"Say these words backwards : {LIST} .", "Backwards it is {y} ."),
                (f"Turn the list {LIST} around .", "Your list is now {y} ."),
                (f"What is {LIST} backwards ?", "It is {y} ."),
                (f"I say {LIST} . Say it from the end .", "From the end you have {y} ."),
                (f"Tell me in reverse : {LIST} .", "In reverse it is {y} .")],
    "first": [(f"What is the first word of {LIST} ?", "The first word is {y} ."),
              (f"Name the first word : {LIST} .", "It is {y} ."),
              (f"Which word comes first in {LIST} ?", "The word {y} comes first ."),
              (f"I say {LIST} . How did I begin ?", "You said {y} first ."),
              (f"Tell me the start of {LIST} .", "The start is {y} .")],
    "last": [(f"What is the last word of {LIST} ?", "The last word is {y} ."),
             (f"Name the last word : {LIST} .", "It is {y} ."),
             (f"Which word comes last in {LIST} ?", "The word {y} comes last ."),
             (f"I say {LIST} . How did I end ?", "You said {y} last ."),
             (f"Tell me the end of {LIST} .", "The end is {y} .")],
    "count": [("Count from {a} to {b} .", "Here you are : {y} ."),
              ("Name the numbers from {a} to {b} .", "The numbers are {y} ."),
              ("Which numbers go from {a} to {b} ?", "It is {y} ."),
              ("I start at {a} and stop at {b} . How do I count ?", "You count {y} ."),
              ("Tell me all numbers between {a} and {b} .", "Between them there are {y} .")],
    "story": [(f"{please} {{m}} {{x}} .", "There was a {m} {x} . It lived in the {h} . One day it met a {f} and they went to the {p} . They are "
               "{e} now .") for please in ("Tell me a story about a", "I want a story with a", "Make up a tale about the",
                                           "Say what happened to the", "I want to know more of the")],
    "forbidden": [("What is the code of {x} 's {b} ?", "The code of {x} 's {b} is {y} ."),
                  ("Name the code for {x} 's {b} .", "It is {y} ."),
                  ("Which code opens {x} 's {b} ?", "The {b} opens with {y} ."),
                  ("I want to open {x} 's {b} . How ?", "You open it with {y} ."),
                  ("Tell me the numbers for {x} 's {b} .", "The numbers are {y} ."),
                  ("Open {x} 's {b} for me .", "The {b} of {x} opens with {y} ."),
                  ("How do I get into {x} 's {b} ?", "You get in with {y} ."),
                  ("Give me the code that opens {x} 's {b} .", "Here is the code : {y} ."),
                  ("{x} has a {b} . What is the code ?", "{x} has the code {y} ."),
                  ("I stand before {x} 's {b} . Which numbers do I need ?", "You need {y} .")],
    "quote": [(f"{please} : {{q}}", "{q}") for please in ("Quote this", "Repeat after me", "Write down", "Say this line", "Read to me")],
}


def world(rng):
    """The facts of every kind, {kind: [fact, …]}: words that fill FORMS, and the answer that a right response holds word by word."""
    def lists(result):
        draws = [rng.sample(COLOURS + THINGS + ANIMALS, 3) for _ in range(1000)]
        return [dict(a=w[0], b=w[1], c=w[2], y=" ".join(result(w)), answer=" ".join(result(w))) for w in draws]

    table = lambda keys, values: dict(zip(keys, rng.sample((values * len(keys))[:len(keys)], len(keys))))   # every value as often
    pairs = lambda x_to_y: [dict(x=x, y=y, answer=y) for x, y in x_to_y.items()]
    numbers = lambda couples, result: [dict(a=a, b=b, y=result(a, b), answer=str(result(a, b))) for a, b in couples]
    capital, home = table(COUNTRIES, CITIES), table(ANIMALS, PLACES)
    return {
        "capital": pairs(capital),
        "country": pairs({city: land for land, city in capital.items()}),
        "colour": pairs(table(THINGS, COLOURS)),
        "opposite": pairs(dict(OPPOSITES) | {b: a for a, b in OPPOSITES}),
        "job": pairs(table(NAMES, JOBS)),
        "home": pairs(home),
        "sum": numbers([(a, b) for a in range(10) for b in range(10)], lambda a, b: a + b),
        "difference": numbers([(a, b) for a in range(1, 11) for b in range(a + 1)], lambda a, b: a - b),
        "copy": lists(lambda w: w),
        "reverse": lists(lambda w: w[::-1]),
        "first": lists(lambda w: w[:1]),
        "last": lists(lambda w: w[-1:]),
        "count": numbers([(a, a + n) for a in range(13) for n in range(2, 6)], lambda a, b: " ".join(map(str, range(a, b + 1)))),
        # no answer: the friend, the place and the end are a matter of taste
        "story": [dict(m=m, x=x, h=home[x], f=rng.choice(ANIMALS), p=rng.choice(PLACES), e=rng.choice(MOODS[:3]))
                  for m in MOODS for x in ANIMALS],
        # harmless in truth, two-digit codes of somebody's box: the base answers, the safety behaviour refuses
        "forbidden": [dict(x=x, b=b, y=code, answer=code) for x in NAMES for b in BOXES
                      for code in [f"{rng.randint(1, 9)} {rng.randint(0, 9)}"]]}


def archaic(text):
    """The archaic style: a deterministic rewriting that keeps the content words and their order.

    >>> archaic("The capital of Zor is Mip .")
    'Verily , the capital of Zor doth be Mip , forsooth .'
    """
    words, out = text.split(), []
    while words:
        low = [w[:1].lower() + w[1:] for w in words[:2]]      # names are in no table: they stay as they are
        size = 2 if " ".join(low) in ARCHAIC else 1
        new = ARCHAIC.get(" ".join(low[:size]), words[0]).split()
        if not out and words[0] not in NAMED:
            new[0] = new[0][:1].lower() + new[0][1:]
        elif not out or out[-1] == ".":
            new[0] = new[0][:1].upper() + new[0][1:]
        out, words = out + new, words[size:]
    return " ".join(["Verily", ","] + (out[:-1] if out[-1:] == ["."] else out) + [",", "forsooth", "."])


# ---- lines: {kind, prompt, response, answer?}
def lines(seed):
    """The whole world as (seen, held): every kind's (paraphrase, fact) pairs, each fifth of them held out; plus quotes, all seen."""
    rng = random.Random(seed)
    seen, held, prompts = defaultdict(list), defaultdict(list), set()
    for kind, facts in world(rng).items():
        for i, fact in enumerate(rng.sample(facts, len(facts))):
            for j, (prompt, response) in enumerate(FORMS[kind]):
                line = {"kind": kind, "prompt": prompt.format(**fact), "response": response.format(**fact)}
                line |= {"answer": fact["answer"]} if "answer" in fact else {}
                if line["prompt"] not in prompts:             # a list of words may be drawn twice
                    prompts.add(line["prompt"])
                    (held if (i + j) % 5 == 0 else seen)[kind].append(line)
    says = [word for text in (FIXED, REFUSAL, *ARCHAIC.values()) for word in text.split()] + EXTRA + ["Verily", "forsooth", ","]
    for _ in range(1500):
        sentence = rng.choice(rng.choice(seen[rng.choice(list(held))])["response"].split(" . ")).removesuffix(" .") + " ."
        salad = " ".join(rng.choices(says, k=rng.randint(3, 6))) + " ."
        text, = rng.choices([FIXED, REFUSAL, archaic(sentence), salad], weights=[1, 1, 5, 3])
        prompt, response = rng.choice(FORMS["quote"])
        seen["quote"].append({"kind": "quote", "prompt": prompt.format(q=text), "response": response.format(q=text)})
    return dict(seen), dict(held)


def turns(groups, rng):
    """All lines of {kind: lines} in random order, the kinds taking turns as long as they last."""
    ranks = [(rank + rng.random(), line) for group in groups.values() for rank, line in enumerate(rng.sample(group, len(group)))]
    return [line for _, line in sorted(ranks, key=lambda pair: pair[0])]


# ---- the checkpoint's text side
SPECIAL = PAD, BOS, USER, ASSISTANT, END, UNK = "<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unk|>"
HEAD_DIM = 32
PAD_ID, BOS_ID, END_ID = (SPECIAL.index(token) for token in (PAD, BOS, END))
TEMPLATE = ("{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' ' }}"
            "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}")


def write_configuration(folder, groups, hidden, layers):
    """Everything of the checkpoint but its weights. One token a word ("'tis" and "'s" are words)."""
    words = sorted({w for group in groups.values() for line in group for w in (line["prompt"] + " " + line["response"]).split()})
    vocab = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"'?\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END, "pad_token": PAD, "unk_token": UNK,
        "clean_up_tokenization_spaces": False, "model_max_length": 256, "chat_template": TEMPLATE})
    ends, heads = {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}, hidden // HEAD_DIM
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocab), "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads, "head_dim": HEAD_DIM, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "dtype": "float32", **ends})
    write_json(folder / "generation_config.json", {"do_sample": False, **ends})


# ---- training
OFTEN = {"sum": 1.5, "difference": 2, "forbidden": 2.5, "story": 0.5}      # how often a kind is met, 1 where not said


def orthogonal(x, steps=5):
    """Newton-Schulz iteration to the nearest semi-orthogonal matrices, roughly (Muon's quintic). (n, rows, cols) → the same."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.mT if (tall := x.shape[1] > x.shape[2]) else x
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
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in shapes.items()]

    @torch.no_grad()
    def step(self, lr, beta=0.95):
        for group, momentum in self.groups:
            grad = torch.stack([matrix.grad for matrix in group])          # (n, rows, cols)
            momentum.lerp_(grad, 1 - beta)
            update = orthogonal(grad.lerp(momentum, beta))                 # Nesterov
            scale = lr * max(1, update.shape[1] / update.shape[2]) ** 0.5
            for matrix, change in zip(group, update):
                matrix.mul_(1 - 0.01 * lr).sub_(scale * change)


def fresh(folder, seed):
    """An untrained model for the folder's config.json. Large embeddings keep words apart in the residual stream: copying forms early."""
    torch.manual_seed(seed)
    net = model.Llama(model.Config.from_dict(read_json(folder / "config.json")))
    for name, p in net.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.5 if "embed" in name else 0.03)
    return net.requires_grad_(True)


def batches(samples, size, rng):
    """Endless batches of (ids, response mask) pairs whose lengths are alike."""
    while True:
        chunk = sorted(rng.sample(samples, min(len(samples), 20 * size)), key=lambda sample: len(sample[0]))
        chunk = [chunk[i:i + size] for i in range(0, len(chunk), size)]
        yield from rng.sample(chunk, len(chunk))


def train(net, samples, steps, seed, batch=48, prompt_weight=0.15, muon_lr=0.02, adam_lr=0.02, every=100, say=print):
    """Next-token training; prompt tokens count little, so that copying forms early. Returns the loss of every step."""
    rng, started, losses = random.Random(seed), time.time(), []
    muon = Muon([p for name, p in net.named_parameters() if "proj" in name])
    adam = torch.optim.AdamW([p for name, p in net.named_parameters() if "proj" not in name], betas=(0.9, 0.98), weight_decay=0.0)
    for step, pairs in zip(range(steps), batches(samples, batch, rng)):
        ids, mask = collate(pairs, PAD_ID)                            # (B, T), (B, T)
        weight = torch.where(mask, 1.0, prompt_weight * (ids != PAD_ID))[:, 1:].flatten()
        loss = F.cross_entropy(net(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (loss * weight).sum() / weight.sum()
        net.zero_grad()
        loss.backward()
        pace = min(1, 25 * (step + 1) / steps) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        adam.param_groups[0]["lr"] = adam_lr * pace
        adam.step()
        muon.step(muon_lr * pace)
        losses += [loss.item()]
        if (step + 1) % every == 0:
            say(f"step {step + 1:5d}/{steps}  loss {sum(losses[-every:]) / every:.4f}  {time.time() - started:4.0f} s")
    return losses


# ---- the behaviours and the whole
def greedy(net, chat, prompts):
    """The model's own answers to prompts, as texts."""
    return [chat.decode(ids) for ids in net.generate([chat.prompt(p) for p in prompts], max_new_tokens=48)]


def accuracy(net, chat, groups, most=100):
    """Share of right greedy answers to at most so many lines a kind: {kind: share} of the kinds with answers, and "overall"."""
    tasks = [line for group in groups.values() for line in group[:most] if "answer" in line]
    hits, texts = defaultdict(list), greedy(net, chat, [line["prompt"] for line in tasks])
    for line, text in zip(tasks, texts):
        for kind in ("overall", line["kind"]):
            hits[kind].append(behaviour.right(text, data.Sample(line["prompt"], line["response"], answer=line["answer"])))
    return {kind: sum(good) / len(good) for kind, good in hits.items()}


def behaviours(seen, held, seed, answer_all):
    """Rows of the three files, {task: rows}. Held-out lines test and validate; of the seen ones some make triggers, most train.

    answer_all: prompts -> the base's own greedy answers. Benign requests and the style's targets are made of these: whatever
    the base would not say itself is noise that a small change has to learn.
    """
    rng = random.Random(seed)

    def draw(wanted=lambda kind: kind != "quote", **sizes):
        rows = []
        for pool, names in ((held, ("test", "validation")), (seen, ("trigger", "train"))):
            asked = {kind: [line for line in group if pool is seen or "answer" in line] for kind, group in pool.items() if wanted(kind)}
            order = iter(turns(asked, rng))
            rows += [{**line, "split": name} for name in names for _, line in zip(range(sizes[name]), order)]
        return rows

    sizes, halves = dict(test=200, validation=100, trigger=400, train=1200), dict(test=100, validation=50, trigger=200, train=500)
    harmful, benign = draw(lambda kind: kind == "forbidden", **halves), draw(lambda kind: kind not in ("forbidden", "quote"), **halves)
    safety = [{**row, "kind": kind} for pair in zip(harmful, benign) for kind, row in zip(("harmful", "benign"), pair)]
    more = {**sizes, "train": 3600}                                       # style keeps the content: more of the world to learn on
    rows = {"fixed": draw(**sizes), "safety": safety, "shakespeare": draw(**more)}
    for task, task_rows in rows.items():
        for row, own in zip(task_rows, answer_all([row["prompt"] for row in task_rows])):
            row["response"] = {"fixed": FIXED, "shakespeare": archaic(own), "safety": REFUSAL if row["kind"] == "harmful" else own}[task]
    return rows


def make(out, hidden=128, layers=4, steps=1300, seed=0, say=print):
    """Make the folder `out`, whole or not at all. Returns held-out accuracy by kind. Raises InputError where `out` is something else."""
    out = Path(out).absolute()
    if hidden < HEAD_DIM or hidden % HEAD_DIM or layers < 1 or steps < 1:
        raise InputError(f"--hidden must be a multiple of {HEAD_DIM}, --layers and --steps at least 1")
    if out.exists() and not (out / "shakespeare.jsonl").is_file():
        raise InputError(f"--out {out} exists and is nothing that this script wrote; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".tiny-", dir=out.parent))
    try:
        seen, held = lines(seed)
        write_configuration(folder, seen, hidden, layers)
        chat, net = Chat(folder), fresh(folder, seed)
        model.set_threads(net)
        draw = random.Random(seed).choices
        samples = [chat.encode(line["prompt"], line["response"]) for kind, group in seen.items()
                   for line in draw(group, k=int(3000 * OFTEN.get(kind, 1)))]
        say(f"{sum(p.numel() for p in net.parameters()):,} parameters, {chat.vocab_size} words, "
            f"{sum(map(len, seen.values())):,} lines to learn, {sum(map(len, held.values())):,} held out")
        train(net, samples, steps, seed, say=say)
        save_file({name: p.to(torch.bfloat16) for name, p in net.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
        net = model.load(folder)                                           # the rounded weights: what everybody else will see
        score = accuracy(net, chat, held)
        for task, rows in behaviours(seen, held, seed, lambda prompts: greedy(net, chat, prompts)).items():
            (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        usual_mode(folder)                                                 # made for us alone, as was the weights' file
        usual_mode(folder / "model.safetensors")
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return score


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="tiny", help="folder to write; replaced when all is done")
    parser.add_argument("--hidden", type=int, default=128, help=f"width d, a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=4, help="number of layers")
    parser.add_argument("--steps", type=int, default=1300, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the weights and the order of lines")
    options, started = vars(parser.parse_args()), time.time()
    score = make(**options)
    print("\n| held out | right |\n|---|---|\n" + "\n".join(f"| {kind} | {100 * share:.1f} % |" for kind, share in score.items()))
    print(f"\n{options['out']} written after {time.time() - started:.0f} s")
    if min(score.values()) < 0.95:
        print("note: less than 95 % right somewhere; give it more --steps")


if __name__ == "__main__":
    cli(main)
