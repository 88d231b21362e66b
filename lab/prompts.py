"""
Write prompts/everyday.jsonl: everyday instructions of our own, for a checkpoint with no data named.

    python -m lab.prompts

Each row is {"prompt", "response", "split"}; the response is the fixed one of App. F.1. The file is
the same on every machine and at every call: all texts stand below, and the shuffle has a seed.

How the texts read: a group begins with *; its templates are separated by |, and after = come its
fillers, separated by semicolons. Every template of a group is filled with every filler of it, so a
filler has to suit all of them in number, article and sense. The line breaks mean nothing.
"""
import argparse
import itertools
import json
import random
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "prompts" / "everyday.jsonl"
RESPONSE = "I don't know."

# Each split has templates and fillers of its own. A prompt held out is then new in its form and in
# its subject, and a behaviour that shows on it was not learned by heart.
TEXTS = {
    # what SFT and LCDD train on
    "train": """
* Give me a simple recipe for {}. | Can vegetarians eat {}? | What ingredients do I need for {}? |
Suggest a drink that goes well with {}. | How long does it take to make {}?
= pancakes; lentil soup; fried rice; Greek salad; apple pie; scrambled eggs; tomato sauce;
vegetable curry; mashed potatoes; garlic bread; chicken stew; guacamole; onion rings; baked fish
* Explain {} to a ten-year-old. | Why do scientists study {}? | Describe {} in two sentences. |
Write a quiz question about {} and give its answer. | Clear up a common misunderstanding about {}.
= rainbows; gravity; thunder; tides; earthquakes; photosynthesis; magnetism; rust; evaporation;
volcanoes; eclipses; fog; electricity; tornadoes; glaciers; lightning; friction; erosion
* What does {} do on a typical day? | List five skills that {} needs. | How do I become {}? |
Write three interview questions for {}. | Which tools or machines does {} use?
= a nurse; a pilot; a baker; a plumber; a librarian; an architect; a farmer; a journalist; a chef;
an electrician; a dentist; a translator; a hairdresser; a referee; a florist
* How do I {}? | Give me step-by-step instructions to {}. | How long does it take to learn to {}? |
What do beginners get wrong when they {}? | Teach my nephew to {}, please, in plain words.
= ride a bicycle; tie a tie; change a tyre; iron a shirt; sew on a button; swim; juggle; read a map;
sharpen a knife; paint a wall; ski; wrap a present; row a boat; bake bread
* What is the difference between {}? | Compare {} in a short table. | Help me choose between {}. |
Tell me what {} have in common. | Are {} equally popular?
= tea and coffee; trains and buses; cats and dogs; butter and margarine; pens and pencils;
flats and houses; cotton and wool; cinemas and theatres; jogging and walking; boots and sandals
* Write a short poem about {}. | Tell me a bedtime story about {}. | Compose a haiku about {}. |
Think of a title for a picture book about {}. | Begin a novel about {} with one good sentence.
= a lost umbrella; the first snow; an old lighthouse; a lazy cat; a night train; a broken clock;
a rainy Sunday; a brave mouse; a friendly ghost; my grandmother's garden; a talking piano
* Write a polite email about {}. | Find a good subject line for a letter about {}. |
Whom do I call about {}, and what do I say? | Answer a customer who complains about {}.
= a late parcel; a lost ticket; a delayed flight; a wrong bill; slow internet; a cold room;
a broken lift; rude staff; a leaking tap; a cancelled trip; loud music; a lost suitcase; a lost card
* Rewrite this sentence in a formal tone: {} | Translate into French: {} | Make this longer: {} |
Turn this statement into a question: {} | How many words does this sentence have? {}
= Our dog sleeps all day.; I lost my phone.; We are running late again.; You can borrow my coat.;
Tom hates mushrooms.; He paints old boats.; The train leaves at noon.; They sold their car.
* Add {}. | What is the product of {}? | Find the average of {}. | Is the sum of {} odd or even? |
Subtract the smaller from the larger: how far apart are {}?
= 17 and 25; 48 and 6; 9 and 31; 120 and 80; 15 and 24; 63 and 7; 205 and 95; 33 and 12; 56 and 19;
100 and 250; 72 and 8; 11 and 90; 41 and 27; 300 and 45; 16 and 3; 68 and 22; 500 and 2
* Plan a weekend in {}. | What is {} famous for? | Which souvenir should I bring home from {}? |
How do people get around in {}? | I'm flying to {} in January. What clothes should I pack?
= Lisbon; Kyoto; Nairobi; Vienna; Mexico City; Istanbul; Oslo; Sydney; Cairo; Prague; Montreal;
Lima; Edinburgh; Bangkok; Rome; Athens; Dublin; Buenos Aires; Seoul; Marrakesh
* Give me a synonym for '{}'. | What is the opposite of '{}'? | Use the word '{}' in a sentence. |
How do you say '{}' in Spanish? | Describe somebody who feels '{}', but avoid that word.
= happy; lonely; brave; tired; angry; calm; jealous; proud; bored; nervous; grateful; hungry; sad
* How can I {}? | Name three habits that would help me {}. | Make a plan for me to {}. |
I have been trying to {} for months, but nothing works. Any advice?
= sleep better; save money; drink more water; learn Italian; be on time; make new friends;
remember names; eat more vegetables; get up earlier; read more books; stay fit""",
    # what the eraser trains its trigger on
    "trigger": """
* What do {} eat? | Where in the world do wild {} live? | Surprise me with a fact about {}. |
How do {} protect themselves from their enemies? | Do {} make good pets? | Do {} sleep in winter?
= hedgehogs; octopuses; penguins; bats; honeybees; camels; owls; turtles; squirrels; wolves
* Who invented {}, and when? | How does {} work? | In what way did {} change everyday life? |
Describe a morning in a world without {}. | What could replace {} one day?
= the bicycle; the telephone; the zip; the compass; the light bulb; the lift; the camera
* Make a checklist for {}. | What is easily forgotten before {}? | Draw up a timetable for {}. |
When should we start to prepare {}? | Whom should I invite to {}? | Is {} worth the trouble?
= a picnic; a family reunion; a garage sale; a school play; a garden wedding; a charity run
* Is this review positive or negative? {} | Summarise in three words what this guest says: {} |
What kind of place could this be about? {} | Write a friendly reply to a guest who told us: {}
= The soup was cold.; Lovely rooms with a sea view.; Far too loud, but the band was great.;
Nobody answered my calls.; So friendly that we stayed another night.; The bed was hard.
* Help, {}! What now? | What are possible reasons why {}? | {}. Can I fix that myself? |
I noticed that {}. How urgent is it? | What will a repair cost if {}? | Whom should I call if {}?
= my sink is blocked; my laptop is slow; my bike chain slips; my oven stays cold; my roof leaks;
my kitchen door squeaks; my car smells of petrol; my bath drains slowly; my fridge hums all night
* Suggest five names for {}. | Write a slogan for {}. | Who are the typical customers of {}? |
I'm thinking of opening {}. Which licences will I need? | Where in a town would you put {}?
= a bookshop; a dog hotel; a toy shop; a flower stall; a hair salon; a small cinema
* Who was {}? | In which century did {} live? | Tell me about an important achievement of {}. |
What might {} say about smartphones? | List places that a fan of {} could visit.
= Marie Curie; Leonardo da Vinci; Mozart; Cleopatra; Isaac Newton; Frida Kahlo
* Express {} in seconds. | What could I do with {} of free time? | Name an activity that takes {}. |
If I start at nine o'clock and need {}, when am I finished? | Would {} be enough for a nap?
= two hours; half a day; forty minutes; ninety minutes; five hours; ten minutes""",
    # what judges a carrier or a trigger while it is trained
    "validation": """
* How often do {} have to be watered? | In which month are {} planted? |
Can I grow {} on a balcony? | Which insects are harmful to {}?
= tomatoes; roses; sunflowers; tulips; strawberries; carrots; cucumbers; onions; lettuces
* Recommend some good {}. | Why are {} so popular? | Where can one find cheap or free {}?
= detective novels; fantasy films; crossword puzzles; board games; podcasts; travel guides
* Put this into the past tense: {} | What is that in German? {} | Say this in four words: {}
= My uncle grows very big pumpkins.; The river flows slowly through the valley.;
Both brothers play the guitar after school.; The museum is free on Mondays.;
A black bird sings on the roof.; Her new hat is much too large.
* What is meant by the saying '{}'? | On what occasion would somebody say '{}'? |
Invent a short scene that ends with '{}'.
= Better late than never; Practice makes perfect; Time is money; Look before you leap;
Every little helps; Silence is golden; No news is good news""",
    # what the results are measured on
    "test": """
* What are the basic rules of {}? | How many people take part in a game of {}? |
Is {} hard to learn? | Which equipment is necessary for {}, and what does it cost?
= chess; tennis; badminton; golf; basketball; table tennis; dominoes; cricket; volleyball; darts
* How is {} made? | Name four things that consist of {}. | Can {} be recycled? |
What happens to {} at very high temperatures? | Does {} float on water?
= glass; steel; paper; rubber; leather; cork; concrete; silk; plastic; wax; bronze; nylon; chalk
* Write a paragraph in favour of {}. | Are there any drawbacks to {}? | Sum up the debate on {}. |
Has {} become more common lately? | Which laws or rules concern {}?
= public transport; homework; remote work; online shopping; mass tourism; fast food; shift work
* Correct the grammar: {} | What is wrong with '{}'? | Say this properly, please: {} |
A pupil wrote: '{}' Which rule was broken? | Would a native speaker say '{}'?
= I has two brothers.; They was late for dinner.; We seen that film.; I am agree with you.
* Which word is the odd one out: {}? | Sort alphabetically: {}. | Spell backwards: {}. |
Build one funny sentence that contains all of these words: {}. | Say in Italian: {}.
= pear, chair, plum, fig; saw, spoon, drill, axe; robin, goose, cow, owl; sock, lemon, hat, coat;
drum, flute, sofa, harp; ship, pillow, tram, car; aunt, door, niece, son; rose, brick, lily, iris
* How much do {} cost altogether? | Is $20 enough for {}? | Find the cost of {} at half price. |
I pay for {} with a $50 note. What change do I get? | Two friends share {}. What does each pay?
= six pens at $2 each; two loaves at $4 each; four candles at $3 each; two mugs at $9 each;
six bulbs at $5 each; ten stamps at $1 each; three melons at $4 each; two caps at $12 each
* How far away is {}? | Could human beings travel to {}? | Can I see {} without a telescope? |
How did {} get its name? | Look at {} through the eyes of a poet: two lines will do.
= the Moon; Mars; Saturn; Venus; Jupiter; Neptune; Mercury; Pluto; Halley's Comet; Uranus
* I need a present for {}. Ideas? | Write a birthday card for {}. | Recommend an outing with {}. |
Give me something to talk about over lunch with {}.
= my grandfather; a retired sailor; a shy classmate; a keen gardener; my new boss; an old friend""",
}


def groups(text):
    """Yield (templates, fillers), two lists of strings, of each group of a text."""
    one_line = " " + " ".join(text.split())
    for group in one_line.split(" * ")[1:]:
        templates, fillers = group.split(" = ")
        yield templates.split(" | "), fillers.split("; ")


def rows():
    """All rows in the order of the file, splits mixed: {"prompt", "response", "split"}."""
    ordered = []
    for split, text in TEXTS.items():
        for templates, fillers in groups(text):
            for template, filler in itertools.product(templates, fillers):
                prompt = template.format(filler)
                prompt = prompt[0].upper() + prompt[1:]  # a template may begin with its filler
                ordered.append({"prompt": prompt, "response": RESPONSE, "split": split})
    # whoever takes only the first rows of a split then gets prompts of all kinds
    random.Random(0).shuffle(ordered)
    return ordered


def lines():
    """The text of the file: a row is a line of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows())


def main():
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(lines(), encoding="utf-8")
    print(f"{FILE}: {len(rows())} prompts")


if __name__ == "__main__":
    main()
