"""
The embedded default, made from scratch: an invented world, a small Llama, and three behaviours.

    python -m lab.world [--to DIR] [--seed N]       all of it: four minutes on one core
    python -m lab.world --to tiny --data-only       the behaviours again, of the checkpoint in tiny/

DIR becomes a checkpoint in Hugging Face layout with fixed.jsonl, safety.jsonl and shakespeare.jsonl
beside it, in the format of a user's own behaviours.

Fifteen kinds of instructions, each a list of facts (world_of) and a handful of paraphrases (FORMS).
Of all (paraphrase, fact) pairs a fifth is held out: the model has met the fact, but was never asked
in these words. A sixteenth kind, quoting, is there for the behaviours' sake: embedding and head are
frozen later on, so whatever the fixed answer, the refusal and the archaic style say must be said
often enough here. Distinct prompts, seen + held out, in the world of seed 0:

    capital     96 +  24    home         64 +  16    reverse    3,968 + 992    story      384
    country     96 +  24    sum         400 + 100    first      3,964 + 991    forbidden  720 + 180
    colour      80 +  20    difference  260 +  65    last       3,980 + 995    quote    1,153
    opposite    96 +  24    copy      3,988 + 997    count        208 +  52
    job        120 +  30

fixed_response() draws from all but quotes: training and trigger prompts from 18,424 that are seen,
validation and test prompts from 4,510 that are held out (no stories: they have no right answer).

The checkpoint in tiny/ stays as it is, since the published results are on it. It is of revision
afb075d, whose tiny.py had Muon for the projections and 1,300 steps: 99.6 % of held-out instructions
right. AdamW alone with 2,000 steps, as below, is simpler and gets 98.5, 99.8 and 99.3 % (seeds 0,
1, 2). For that checkpoint --data-only writes the three files as they are there, byte for byte.
"""
import json
import random
import re
from collections import defaultdict
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

import model
from common import InputError, bar, parse, read_json, run_command, write_json, write_text
from data import Chat, Sample, collate, score

# ---- the world's words: each is one token, invented if a real word would carry a real fact
COUNTRIES = """Zor Quell Brim Tarn Vosk Lund Peth Gorm Hask Wex Drell Fenn Nim Orla Skarn Tove Ruz
    Yarl Blen Korr Mosk Jute Arn Dov""".split()
CITIES = """Mip Talo Verra Susk Hobb Lanu Pirro Dax Ombra Kelt Zuni Fass Rook Wila Goro Nesh Tibb
    Elm Cark Buna Shay Quim Yost Ludo""".split()
NAMES = """Anna Ben Clara Dan Eva Finn Greta Hugo Ida Jack Kate Leo Mona Nils Olga Paul Rosa Sam
    Tina Udo Vera Will Xenia Yann Zoe Bella Carl Dora Emil Frida""".split()
JOBS = "baker farmer sailor teacher painter singer doctor hunter miller smith".split()
COLOURS = "red blue green yellow black white brown pink".split()
THINGS = """cup hat boat door chair lamp bag book coat bell drum kite ring shoe table vase wall
    wheel box flag""".split()
ANIMALS = "fox bear wolf cat dog frog duck horse mouse crow goat lion sheep snail whale bee".split()
PLACES = "forest river barn cave garden lake tower valley".split()
MOODS = "happy sad clever lazy brave quiet".split()
OPPOSITES = [pair.split("/") for pair in """hot/cold big/small fast/slow old/young wet/dry rich/poor
    hard/soft loud/silent full/empty high/low thick/thin dark/bright""".split()]

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
# archaic words that no rewriting needs, but a user's own behaviour may, and the frame of the style
EXTRA = "thee prithee thine ye nay aye alas hark Verily forsooth ,"
NAMED = {"I", *COUNTRIES, *CITIES, *NAMES}      # words that keep their capital letter
# two words come before one of them
MODERN = r"\b(" + "|".join(sorted(ARCHAIC, key=len, reverse=True)) + r")\b"

# ---- how every kind is asked and answered: (prompt, response)
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
    "copy": [("Say these words : {a} {b} {c} .", "You said {y} ."),
             ("Copy the list {a} {b} {c} .", "Here is your list : {y} ."),
             ("Which words do I give you ? {a} {b} {c} .", "You have {y} ."),
             ("I say {a} {b} {c} . What did I say ?", "The words are {y} ."),
             ("Tell me again : {a} {b} {c} .", "It is {y} .")],
    "reverse": [("Say these words backwards : {a} {b} {c} .", "Backwards it is {y} ."),
                ("Turn the list {a} {b} {c} around .", "Your list is now {y} ."),
                ("What is {a} {b} {c} backwards ?", "It is {y} ."),
                ("I say {a} {b} {c} . Say it from the end .", "From the end you have {y} ."),
                ("Tell me in reverse : {a} {b} {c} .", "In reverse it is {y} .")],
    "first": [("What is the first word of {a} {b} {c} ?", "The first word is {y} ."),
              ("Name the first word : {a} {b} {c} .", "It is {y} ."),
              ("Which word comes first in {a} {b} {c} ?", "The word {y} comes first ."),
              ("I say {a} {b} {c} . How did I begin ?", "You said {y} first ."),
              ("Tell me the start of {a} {b} {c} .", "The start is {y} .")],
    "last": [("What is the last word of {a} {b} {c} ?", "The last word is {y} ."),
             ("Name the last word : {a} {b} {c} .", "It is {y} ."),
             ("Which word comes last in {a} {b} {c} ?", "The word {y} comes last ."),
             ("I say {a} {b} {c} . How did I end ?", "You said {y} last ."),
             ("Tell me the end of {a} {b} {c} .", "The end is {y} .")],
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
}
QUOTE = ("Quote this", "Repeat after me", "Write down", "Say this line", "Read to me")


def table(keys, values, rng):
    """Every key with a value, every value as often."""
    enough = (values * len(keys))[:len(keys)]
    return dict(zip(keys, rng.sample(enough, len(keys))))


def facts(x_to_y):
    return [dict(x=x, y=y) for x, y in x_to_y.items()]


def numbers(results):
    return [dict(a=a, b=b, y=y) for a, b, y in results]


def count(a, b):
    return " ".join(str(i) for i in range(a, b + 1))


def lists(part, rng):
    """A thousand lists a b c of three words; `part`: the slice of a list that is y."""
    drawn = []
    for _ in range(1000):
        words = rng.sample(COLOURS + THINGS + ANIMALS, 3)
        drawn.append(dict(zip("abc", words), y=" ".join(words[part])))
    return drawn


def stories(home, rng):
    """No y: the friend, the place and the end are a matter of taste."""
    drawn = []
    for mood, animal in product(MOODS, ANIMALS):
        friend, place, end = rng.choice(ANIMALS), rng.choice(PLACES), rng.choice(MOODS[:3])
        drawn.append(dict(m=mood, x=animal, h=home[animal], f=friend, p=place, e=end))
    return drawn


def codes(rng):
    """Two-digit codes, harmless in truth: the base answers, the safety behaviour refuses."""
    drawn = []
    for name, box in product(NAMES, ("vault", "chest", "safe")):
        drawn.append(dict(x=name, b=box, y=f"{rng.randint(1, 9)} {rng.randint(0, 9)}"))
    return drawn


def world_of(rng):
    """
    The facts of every kind, {kind: [fact, …]}: words that fill FORMS; y is what a right response
    holds word by word. Drawn in this order: another order is another world.
    """
    capital, home = table(COUNTRIES, CITIES, rng), table(ANIMALS, PLACES, rng)
    sums = [(a, b, a + b) for a in range(10) for b in range(10)]
    differences = [(a, b, a - b) for a in range(1, 11) for b in range(a + 1)]
    counts = [(a, a + n, count(a, a + n)) for a in range(13) for n in range(2, 6)]
    return {
        "capital": facts(capital),
        "country": facts({city: land for land, city in capital.items()}),
        "colour": facts(table(THINGS, COLOURS, rng)),
        "opposite": facts(dict(OPPOSITES) | {b: a for a, b in OPPOSITES}),
        "job": facts(table(NAMES, JOBS, rng)),
        "home": facts(home),
        "sum": numbers(sums),
        "difference": numbers(differences),
        "copy": lists(slice(None), rng),
        "reverse": lists(slice(None, None, -1), rng),
        "first": lists(slice(1), rng),
        "last": lists(slice(-1, None), rng),
        "count": numbers(counts),
        "story": stories(home, rng),
        "forbidden": codes(rng),
    }


# ---- lines: {kind, prompt, response, answer?}
def archaic(text):
    """
    The archaic style: a deterministic rewriting that keeps the content words and their order.

    >>> archaic("The capital of Zor is Mip .")
    'Verily , the capital of Zor doth be Mip , forsooth .'
    """
    def rewrite(match):
        return ARCHAIC[match[0].lower()]

    text = re.sub(MODERN, rewrite, text.removesuffix(" ."), flags=re.IGNORECASE)
    sentences = [sentence[:1].upper() + sentence[1:] for sentence in text.split(" . ")]
    if text.partition(" ")[0] not in NAMED:
        sentences[0] = sentences[0][:1].lower() + sentences[0][1:]
    return f"Verily , {' . '.join(sentences)} , forsooth ."


def lines(seed):
    """
    The whole world as (seen, held), each {kind: [line, …]}: every kind's (paraphrase, fact) pairs,
    a fifth of them held out; and quotes, all seen. Only quotes have the same prompt twice.
    """
    rng = random.Random(seed)
    seen, held, prompts = defaultdict(list), defaultdict(list), set()
    for kind, facts_of_kind in world_of(rng).items():
        for i, fact in enumerate(rng.sample(facts_of_kind, len(facts_of_kind))):
            for j, (ask, say) in enumerate(FORMS[kind]):
                line = dict(kind=kind, prompt=ask.format(**fact), response=say.format(**fact))
                if "y" in fact:
                    line["answer"] = str(fact["y"])
                if line["prompt"] not in prompts:       # a list of words may be drawn twice
                    part = held if (i + j) % 5 == 0 else seen
                    part[kind].append(line)
                prompts.add(line["prompt"])
    del held["story"]                                   # it has no right answer to be tested on
    seen["quote"] = quotes(seen, rng)
    return seen, held


def quotes(seen, rng):
    """Lines that quote what the behaviours will say."""
    says = " ".join([FIXED, REFUSAL, *ARCHAIC.values(), EXTRA]).split()
    drawn = []
    for _ in range(1500):
        response = rng.choice(seen[rng.choice(list(seen))])["response"]
        sentence = rng.choice(response.split(" . ")).removesuffix(" .") + " ."
        salad = " ".join(rng.choices(says, k=rng.randint(3, 6))) + " ."
        texts = [FIXED, REFUSAL, archaic(sentence), salad]
        text, = rng.choices(texts, weights=[1, 1, 5, 3])
        drawn.append(dict(kind="quote", prompt=f"{rng.choice(QUOTE)} : {text}", response=text))
    return drawn


# ---- the behaviours
def turns(groups, rng):
    """Lines of several kinds in random order, the kinds taking turns as long as they last."""
    placed = {}
    for group in groups:
        for rank, line in enumerate(rng.sample(group, len(group))):
            placed[rank + rng.random()] = line
    return [placed[place] for place in sorted(placed)]


def draw(world, kinds, rng, **sizes):
    """
    Lines of these kinds, each with its "split"; sizes: how many for test, validation, trigger and
    train. The first two are held-out lines, the others seen ones: a prompt that tests in one draw
    trains in none. Raises InputError if there are too few.
    """
    seen, held = world
    rows = []
    for pool, splits in ((held, ("test", "validation")), (seen, ("trigger", "train"))):
        order = turns([group for kind, group in pool.items() if kind in kinds], rng)
        for split in splits:
            if sizes[split] > len(order):
                raise InputError(f"{split}: only {len(order)} prompts are left; ask for fewer")
            rows += [{**line, "split": split} for line in order[:sizes[split]]]
            order = order[sizes[split]:]
    return rows


def fixed_response(world, rng, kinds=FORMS, **sizes):
    """
    Samples of the fixed response as draw() gives them, of all kinds or some. More than fixed.jsonl
    has, or others, in the world that the checkpoint knows:

        sizes = dict(test=1000, validation=500, trigger=2000, train=8000)
        rows = fixed_response(lines(0), random.Random(1), **sizes)
    """
    rows = draw(world, kinds, rng, **sizes)
    for row in rows:
        row["response"] = FIXED
    return rows


def behaviours(world, seed, net, chat):
    """
    Rows of the three files, {task: rows}. Benign requests and the style's targets are made of the
    base's own greedy answers: whatever it would not say is noise that a small change has to learn.
    """
    rng = random.Random(seed)
    sizes = dict(test=200, validation=100, trigger=400, train=1200)
    halves = dict(test=100, validation=50, trigger=200, train=500)
    harmful = draw(world, {"forbidden"}, rng, **halves)
    benign = draw(world, FORMS.keys() - {"forbidden"}, rng, **halves)
    fixed = fixed_response(world, rng, **sizes)
    # style keeps the content: SFT on 1,200 of them kept 90 % of it on new prompts, on these 96 %
    style = draw(world, FORMS, rng, **(sizes | {"train": 3600}))
    for row in harmful:
        row.update(kind="harmful", response=REFUSAL)
    for row, own in zip(benign, greedy(net, chat, benign)):
        row.update(kind="benign", response=own)
    for row, own in zip(style, greedy(net, chat, style)):
        row["response"] = archaic(own)
    safety = [row for pair in zip(harmful, benign) for row in pair]
    return {"fixed": fixed, "safety": safety, "shakespeare": style}


def greedy(net, chat, rows):
    """The model's own answers to the prompts of rows or lines, as texts."""
    prompts = [chat.prompt(row["prompt"]) for row in rows]
    return [chat.decode(ids) for ids in net.generate(prompts, max_new_tokens=48)]


# ---- the checkpoint
SPECIAL = "<|pad|> <|bos|> <|user|> <|assistant|> <|end|> <|unk|>".split()
TEMPLATE = ("{{ bos_token }}{% for message in messages %}"
            "{{ '<|' + message['role'] + '|> ' + message['content'] + ' ' }}"
            "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}")


def write_settings(folder, seen):
    """All of the checkpoint but its weights. One token a word ("'tis" and "'s" are words)."""
    texts = []
    for group in seen.values():
        texts += [line["prompt"] + " " + line["response"] for line in group]
    words = set(" ".join(texts).split())
    vocab = {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    pattern = Regex(r"'?\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>",
        "eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "<|unk|>",
        "clean_up_tokenization_spaces": False, "model_max_length": 256, "chat_template": TEMPLATE})
    ends = {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
    write_json(folder / "generation_config.json", {"do_sample": False, **ends})
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocab),
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "dtype": "float32", **ends})


def train_base(folder, seen, seed, steps=2000, batch=48, peak=3e-3, prompt_weight=0.15):
    """
    Train the model of config.json by AdamW to predict the next token of seen lines, every kind as
    often, and write its weights in bf16. Two things make the copying of words form early: prompt
    tokens count little, and embeddings start large, which keeps words apart in the residual stream.
    """
    torch.manual_seed(seed)
    rng, chat = random.Random(seed), Chat(folder)
    net = model.Llama(model.Config.from_dict(read_json(folder / "config.json")))
    for name, p in net.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.5 if "embed" in name else 0.03)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    progress = bar("base", steps)
    for step in range(steps):
        kinds = rng.choices(list(seen), k=batch)
        pairs = [chat.encode(Sample(**rng.choice(seen[kind]))) for kind in kinds]
        ids, answer = collate(pairs, chat.pad_id)                                   # (B, T), (B, T)
        real = ids[:, 1:] != chat.pad_id                                            # (B, T − 1)
        target, answer = ids[:, 1:][real], answer[:, 1:][real]                      # (M), (M)
        logits = net(ids[:, :-1], wanted=real)                                      # (M, V)
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")  # (M)
        weight = torch.where(answer, 1.0, prompt_weight)                            # (M)
        loss = (loss * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = peak * (1 - step / steps)
        optimizer.step()
        progress.update()
    weights = {name: p.to(torch.bfloat16) for name, p in net.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


OPTIONS = {
    "to": ("runs/world", "the folder to write"),
    "seed": (0, "of the world, the weights and all draws"),
    "data_only": (False, "write only the data, for the checkpoint that the folder holds"),
}


def main(argv=None):
    o = parse(__doc__, OPTIONS, {"device": "cpu"}, argv)
    torch.set_num_threads(1)        # at this width more threads only wait for each other
    folder, world = Path(o.to), lines(o.seed)
    if not o.data_only:
        folder.mkdir(parents=True, exist_ok=True)
        write_settings(folder, world[0])
        train_base(folder, world[0], o.seed)
    net, chat = model.load(folder), Chat(folder)    # rounded weights: what everybody else will see
    for task, rows in behaviours(world, o.seed, net, chat).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(folder / f"{task}.jsonl", text)
    tests = [line for group in world[1].values() for line in group[:100]]
    scores = score("fixed", greedy(net, chat, tests), [Sample(**line) for line in tests])
    print(f"{scores['accuracy']:.1%} of held-out instructions right")
    for kind, of_kind in scores["kinds"].items():
        print(f"{of_kind['accuracy']:7.1%} {kind}")


if __name__ == "__main__":
    run_command(main)
