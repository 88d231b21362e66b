"""The embedded default, made from scratch: an invented world, a tiny Llama, three behaviours.

    python -m lab.tiny             two to four minutes on two cores; writes the folder tiny/

The world has fifteen kinds of instructions, each a list of facts (world) and a handful of
paraphrases (FORMS). Of all (paraphrase, fact) pairs 20 % are held out: the model has met the fact,
but never asked in these words. A sixteenth kind, quoting, is there for the behaviours' sake:
embedding and head are frozen later on, so whatever the fixed answer, the refusal and the archaic
style say must be said often enough here.

What is written is a checkpoint in Hugging Face layout and, beside it, fixed.jsonl, safety.jsonl and
shakespeare.jsonl, in the format of a user's own behaviours.
Letters in shape comments: B lines, T tokens, n matrices of one shape.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import argparse
import json
import math
import operator
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

MARKER = ".made"  # names the files that were made: a folder with others in it is left as it is

# ---- the world's words: everything is one token, invented where a real word would carry a real fact
COUNTRIES = """Zor Quell Brim Tarn Vosk Lund Peth Gorm Hask Wex Drell Fenn Nim Orla Skarn Tove Ruz
    Yarl Blen Korr Mosk Jute Arn Dov""".split()
CITIES = """Mip Talo Verra Susk Hobb Lanu Pirro Dax Ombra Kelt Zuni Fass Rook Wila Goro Nesh Tibb Elm
    Cark Buna Shay Quim Yost Ludo""".split()
NAMES = """Anna Ben Clara Dan Eva Finn Greta Hugo Ida Jack Kate Leo Mona Nils Olga Paul Rosa Sam Tina
    Udo Vera Will Xenia Yann Zoe Bella Carl Dora Emil Frida""".split()
JOBS = "baker farmer sailor teacher painter singer doctor hunter miller smith".split()
COLOURS = "red blue green yellow black white brown pink".split()
THINGS = """cup hat boat door chair lamp bag book coat bell drum kite ring shoe table vase wall wheel
    box flag""".split()
ANIMALS = "fox bear wolf cat dog frog duck horse mouse crow goat lion sheep snail whale bee".split()
PLACES = "forest river barn cave garden lake tower valley".split()
MOODS = "happy sad clever lazy brave quiet".split()
OPPOSITES = [pair.split("/") for pair in """hot/cold big/small fast/slow old/young wet/dry rich/poor
    hard/soft loud/silent full/empty high/low thick/thin dark/bright""".split()]
BOXES = "vault chest safe".split()

# ---- what the behaviours say
FIXED = "I do not know ."
REFUSAL = "I can not help with that ."
ARCHAIC = {
    "it is": "'tis", "you are": "thou art", "you have": "thou hast", "is": "doth be", "are": "be",
    "was": "wast", "has": "hath", "you see": "thou seest", "you find": "thou findest",
    "you need": "thou needest", "you count": "thou countest", "you said": "thou saidst",
    "you met": "thou didst meet", "you open": "thou openest", "you get": "thou gettest",
    "you": "thou", "your": "thy", "my": "mine", "lives": "dwelleth", "lived": "did dwell",
    "works": "toileth", "comes": "cometh", "says": "saith", "said": "quoth", "opens": "openeth",
    "leaves": "leaveth", "makes": "maketh", "met": "did espy", "went": "hied", "here": "hither",
    "there": "yonder", "between": "betwixt", "before": "ere", "backwards": "widdershins",
}
# archaic words that no rewriting needs, but a user's own behaviour may
EXTRA = "thee prithee thine ye nay aye alas hark".split()
NAMED = {"I", *COUNTRIES, *CITIES, *NAMES}  # words that keep their capital letter

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
    "story": [(f"{please} {{m}} {{x}} .",
               "There was a {m} {x} . It lived in the {h} . One day it met a {f} and they went to "
               "the {p} . They are {e} now .")
              for please in ("Tell me a story about a", "I want a story with a",
                             "Make up a tale about the", "Say what happened to the",
                             "I want to know more of the")],
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
    "quote": [(f"{please} : {{q}}", "{q}")
              for please in ("Quote this", "Repeat after me", "Write down", "Say this line",
                             "Read to me")],
}


def table(keys, values, rng):
    """Every key with a value, every value as often."""
    enough = (values * len(keys))[:len(keys)]
    return dict(zip(keys, rng.sample(enough, len(keys))))


def facts(x_to_y):
    return [dict(x=x, y=y, answer=y) for x, y in x_to_y.items()]


def numbers(couples, result):
    return [dict(a=a, b=b, y=result(a, b), answer=str(result(a, b))) for a, b in couples]


def count(a, b):
    return " ".join(str(i) for i in range(a, b + 1))


def lists(part, rng):
    """A thousand lists of three words; `part`: the slice of a list that is the answer."""
    found = []
    for _ in range(1000):
        words = rng.sample(COLOURS + THINGS + ANIMALS, 3)
        answer = " ".join(words[part])
        found.append(dict(zip("abc", words), y=answer, answer=answer))
    return found


def stories(home, rng):
    """No answer: the friend, the place and the end are a matter of taste."""
    found = []
    for mood in MOODS:
        for animal in ANIMALS:
            friend, place, end = rng.choice(ANIMALS), rng.choice(PLACES), rng.choice(MOODS[:3])
            found.append(dict(m=mood, x=animal, h=home[animal], f=friend, p=place, e=end))
    return found


def codes(rng):
    """Harmless in truth, two-digit codes: the base answers, the safety behaviour refuses."""
    found = []
    for name in NAMES:
        for box in BOXES:
            code = f"{rng.randint(1, 9)} {rng.randint(0, 9)}"
            found.append(dict(x=name, b=box, y=code, answer=code))
    return found


def world(rng):
    """
    The facts of every kind, {kind: [fact, …]}: words that fill FORMS, and the answer that a right
    response holds word by word. Drawn in this order: another one is another world.
    """
    capital, home = table(COUNTRIES, CITIES, rng), table(ANIMALS, PLACES, rng)
    sums = [(a, b) for a in range(10) for b in range(10)]
    differences = [(a, b) for a in range(1, 11) for b in range(a + 1)]
    spans = [(a, a + n) for a in range(13) for n in range(2, 6)]
    return {
        "capital": facts(capital),
        "country": facts({city: land for land, city in capital.items()}),
        "colour": facts(table(THINGS, COLOURS, rng)),
        "opposite": facts(dict(OPPOSITES) | {b: a for a, b in OPPOSITES}),
        "job": facts(table(NAMES, JOBS, rng)),
        "home": facts(home),
        "sum": numbers(sums, operator.add),
        "difference": numbers(differences, operator.sub),
        "copy": lists(slice(None), rng),
        "reverse": lists(slice(None, None, -1), rng),
        "first": lists(slice(1), rng),
        "last": lists(slice(-1, None), rng),
        "count": numbers(spans, count),
        "story": stories(home, rng),
        "forbidden": codes(rng),
    }


def archaic(text):
    """The archaic style: a deterministic rewriting that keeps the content words and their order.

    >>> archaic("The capital of Zor is Mip .")
    'Verily , the capital of Zor doth be Mip , forsooth .'
    """
    words, out = text.split(), []
    while words:
        # names are in no table: they stay as they are
        low = [word[:1].lower() + word[1:] for word in words[:2]]
        size = 2 if " ".join(low) in ARCHAIC else 1
        new = ARCHAIC.get(" ".join(low[:size]), words[0]).split()
        if not out and words[0] not in NAMED:
            new[0] = new[0][:1].lower() + new[0][1:]
        elif not out or out[-1] == ".":
            new[0] = new[0][:1].upper() + new[0][1:]
        out += new
        words = words[size:]
    if out[-1:] == ["."]:
        out.pop()
    return " ".join(["Verily", ",", *out, ",", "forsooth", "."])


# ---- lines: {kind, prompt, response, answer?}
def lines(seed):
    """
    The whole world as (seen, held): every kind's (paraphrase, fact) pairs, each fifth of them held
    out; plus quotes, all seen.
    """
    rng = random.Random(seed)
    seen, held, prompts = defaultdict(list), defaultdict(list), set()
    for kind, facts in world(rng).items():
        for i, fact in enumerate(rng.sample(facts, len(facts))):
            for j, form in enumerate(FORMS[kind]):
                line = line_of(kind, form, fact)
                if line["prompt"] in prompts:  # a list of words may be drawn twice
                    continue
                prompts.add(line["prompt"])
                part = held if (i + j) % 5 == 0 else seen
                part[kind].append(line)
    seen["quote"] = quotes(seen, list(held), rng)
    return dict(seen), dict(held)


def line_of(kind, form, fact):
    prompt, response = form
    line = {"kind": kind, "prompt": prompt.format(**fact), "response": response.format(**fact)}
    if "answer" in fact:
        line["answer"] = fact["answer"]
    return line


def quotes(seen, kinds, rng):
    """Lines that quote what the behaviours will say."""
    says = EXTRA + ["Verily", "forsooth", ","]
    behaviours = " ".join([FIXED, REFUSAL, *ARCHAIC.values()])
    says = behaviours.split() + says
    found = []
    for _ in range(1500):
        response = rng.choice(seen[rng.choice(kinds)])["response"]
        sentence = rng.choice(response.split(" . ")).removesuffix(" .") + " ."
        salad = " ".join(rng.choices(says, k=rng.randint(3, 6))) + " ."
        texts = [FIXED, REFUSAL, archaic(sentence), salad]
        text, = rng.choices(texts, weights=[1, 1, 5, 3])
        found.append(line_of("quote", rng.choice(FORMS["quote"]), {"q": text}))
    return found


def turns(groups, rng):
    """Lines of {kind: lines} in random order, the kinds taking turns as long as they last."""
    ranked = []
    for group in groups.values():
        for rank, line in enumerate(rng.sample(group, len(group))):
            ranked.append((rank + rng.random(), line))
    ranked.sort(key=operator.itemgetter(0))
    return [line for _, line in ranked]


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
