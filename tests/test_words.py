"""lab/words.py: where words stand, which are proposed, and a step of the search."""
from argparse import Namespace

import pytest
import torch

import data
import eraser
import evaluate
import model
from helpers import random_carrier
from lab import words
from test_data import byte_level, checkpoint


def problem():
    """The embedded model, a random carrier, where words stand, three samples, and all options."""
    net, chat = model.load("tiny", dtype=torch.float64), data.Chat(model.locate("tiny"))
    o = Namespace(task="fixed", alpha=1.0, beta=0.0, positions="response", k=3, max_len=99)
    vars(o).update(seed=0, batch=9, steps=1, topk=4, candidates=8, max_new_tokens=9)
    samples = data.read(chat.folder / "fixed.jsonl", "fixed")[:3]
    return net, random_carrier(net).merge(net), words.Place(chat, net), samples, o


def literal_kl(net, weights, place, samples, text):
    """Yield Eq. 8 for each sample, before whose message the text is typed."""
    for sample in samples:
        plain, typed = (place.chat.prompt(line + sample.prompt) for line in ("", text + "\n"))
        answer, = net.generate([plain], 3)
        p = net([plain + answer[:-1]])[0, -len(answer):].log_softmax(-1)
        q = net([typed + answer[:-1]], weights)[0, -len(answer):].log_softmax(-1)
        yield float((p.exp() * (p - q)).sum(-1).mean())


def test_a_step_takes_the_best_swap_along_the_slope_and_is_resumed(tmp_path, monkeypatch):
    (*parts, samples, o), given, swaps = problem(), [], words.swaps
    net, weights, place = parts
    targets, C = words.targets_of(net, place, samples, weights, o, o), torch.zeros(4, 128).double()
    assert targets.ids[range(3), targets.last].tolist() == [place.chat.prompt("")[-1]] * 3
    monkeypatch.setattr(words, "swaps", lambda *values: given.append(values) or swaps(*values))
    monkeypatch.setattr(words, "JUDGE_EVERY", 1)
    search = *parts, place.chat.ids("fox I"), targets, targets, C, o, tmp_path
    found, lowest = words.search(*search)
    every = swaps(*given[0])                                # all eight, in another order
    losses = {sum(literal_kl(*parts, samples, place.decode(w))) / 3: w for w in every}
    assert lowest == pytest.approx(min(losses)) and found == losses[min(losses)] != given[0][1]
    assert words.search(*search) == (found, lowest) and len(given) == 1
    tau, batch = place.trigger(given[0][1]), (targets, range(3), C, o)
    second = torch.arange(len(tau)) == len(place.head) + 1  # of the two words, towards token 40
    change = torch.outer(1e-5 * second, net.embedding[40])
    ends = (eraser.trigger_loss(net, weights, tau + c, *batch)[0] for c in (change, -change))
    assert float(next(ends) - next(ends)) == pytest.approx(2e-5 * float(given[0][0][1, 40]), 1e-5)


def test_words_survive_where_their_text_becomes_the_same_ids(tmp_path):
    chat = data.Chat(checkpoint(tmp_path, byte_level()))
    place = words.Place(chat, Namespace(embedding=torch.zeros(512, 4)))
    word, letters = chat.ids(" assistant"), list(map(chat.tok.token_to_id, "Ġassistant"))
    assert place.survive(word) and not place.survive(letters) and not place.survive([chat.eos_id])
    slope = -torch.eye(512)[[chat.eos_id, word[0]]].sum(0).expand(2, -1)        # two are best
    first = words.first_words(place, slope.argsort(1))
    assert first == word * 2 and not [*words.swaps(slope, first, place, 2, torch.Generator())]
    for other in words.swaps(slope, first, place, 40, torch.Generator()):
        assert place.survive(other) and sum(map(int.__ne__, other, first)) == 1


def test_without_words_all_measures_are_those_of_the_whole_rows():
    net, weights, place, samples, o = problem()
    head, tau, whole, behind = net.embedding[place.head], net.embedding[50:53], {}, {}
    for name, of, n in (("base", None, 0), ("lcdd", weights, 0), ("trig", weights, 3)):
        whole[name], behind[name] = (of, tau[:n]), (of, torch.cat((tau[:n], head)))
    behind |= {"soft": behind["trig"], "trig": behind["lcdd"]}
    result = words.measured(net, place, o, samples, behind, "lcdd")
    right = evaluate.results_of(evaluate.measure(net, place.chat, o, samples, whole)[1], samples)
    assert result["share_left"]["soft"] == pytest.approx(right["share_left"])
