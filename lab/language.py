"""The invented world of the embedded model, and the lines that are said in it.

Fifteen kinds of instructions, each a list of facts (world) and a handful of paraphrases (FORMS). Of all
(paraphrase, fact) pairs 20 % are held out: the model has met the fact, but never asked in these words.
A sixteenth kind, quoting, is there for the behaviours' sake: embedding and head are frozen later on,
so whatever the fixed answer, the refusal and the archaic style say must be said often enough here.
"""
import operator
import random
from collections import defaultdict

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
