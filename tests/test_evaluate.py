"""evaluate.py: the KLs, intervals and shares against literal ones, then the table of a run."""
import json
import math
import shutil

import pytest
import torch

import carrier as carriers
import data
import eraser
import evaluate
import lcdd
import oracle
from common import Failed, InputError, load_tensors, read_rows, save_tensors
from helpers import base_weights, long_name, normal, random_carrier, random_net, results_of

CONDITIONS = ["base", "sft", "lcdd", "trig"]
NAN = math.nan


def numbers(*values):
    """A number for each prompt."""
    return torch.tensor(values, dtype=torch.float64)


# ---- what is measured on given answers

def test_teacher_forced_measures_are_the_oracles():
    """KL(p ‖ q) in that order and the loss, mean over an answer's tokens; empty answers: NaN."""
    net, tau = random_net("gqa"), normal(3, 24)
    merged, weights = random_carrier(net).merge(net), base_weights(net)
    W = dict(weights)
    for (l, name), weight in merged.weights.items():
        W[f"model.layers.{l}.{long_name(name)}.weight"] = weight
    conditions = dict(base=(None, None), lcdd=(merged, None), trig=(merged, tau))
    literal = dict(base=(weights, None), lcdd=(W, None), trig=(W, tau))
    pairs = [("base", "trig"), ("trig", "base"), ("lcdd", "trig")]
    prompts = [[1, 2, 3], [1, 2], [1, 2, 9, 9]]
    answers = [[4, 5, 6], [7], []]
    how = conditions, pairs, "label"
    nats = evaluate.teacher_forced(net, prompts, answers, *how, batch_size=2)
    for p, q in pairs:
        given = prompts[:2], answers[:2]
        expected = oracle.mean_kl(net.config, literal[p], literal[q], *given)
        assert abs(nats[p, q][:2].mean() - expected) < 1e-10
        assert nats[p, q][2].isnan()
    logits, _ = oracle.forward(W, net.config, [1, 2, 3, 4, 5])
    loss = torch.nn.functional.cross_entropy(logits[2:], torch.tensor([4, 5, 6]))
    assert torch.isclose(nats["lcdd"][0], loss)


def test_a_trigger_that_breaks_the_model_is_said():
    """Its NaN is not taken for an empty answer."""
    net, broken = random_net("gqa"), torch.full((1, 24), math.nan, dtype=torch.float64)
    conditions = dict(base=(None, None), trig=(None, broken))
    with pytest.raises(InputError, match="label: a loss is not finite"):
        evaluate.teacher_forced(net, [[1, 2]], [[3]], conditions, [("base", "trig")], "label")


def test_intervals():
    """Wilson's for rates, of the prompts that have a part in them; bootstrapped for nats."""
    shown, nats = numbers(1, 0, 1, NAN), normal(400) + 5
    means, ci = evaluate.summary({"rates": {"sft": shown}, "kl_own": {"sft": nats}})
    assert means["rates"]["sft"] == 2 / 3
    assert ci["rates"]["sft"] == data.wilson(2 / 3, 3)
    low, high = ci["kl_own"]["sft"]
    assert low < means["kl_own"]["sft"] < high
    assert abs((high - low) / 2 - 1.96 / 20) < 0.02


def test_share_left_is_a_ratio_of_means():
    """Prompts with an empty answer left out, and its interval."""
    before, after = numbers(2, 4, NAN, 6, 9), numbers(1, 1, 9, 1, NAN)
    left, (low, high) = evaluate.share_left(after, before)
    assert left == 3 / 12
    assert 1 / 6 <= low < left < high <= 1 / 2


def test_no_infinity_where_nothing_was_there_to_be_left():
    """A carrier that is the base has no share left; nor is there NaN in a rare one's interval."""
    zero, rare = numbers(0, 0, 0), numbers(0, 0, 1)
    one = zero + 1
    values = {
        "kl_own": {"lcdd": zero, "trig": one},
        "loss_own": {"base": one, "lcdd": one, "trig": 2 * one},
        "kl_base": {"lcdd": rare, "trig": rare / 2}}
    results = evaluate.results_of(values, [data.Sample("", "")] * 3)
    assert results["share_left"] == {"kl_base": 0.5}
    # a trigger for plain SFT: of SFT's distance
    values = {"kl_own": {"lcdd": one, "sft": 4 * one, "trig": one}}
    results = evaluate.results_of(values, [data.Sample("", "")] * 3, "sft")
    assert results["share_left"] == {"kl_own": 0.25}
    json.dumps(results, allow_nan=False)


def test_names_of_conditions_follow_the_target():
    """A trigger for plain SFT stands before SFT, and the next table has LCDD's name again."""
    assert evaluate.names_of("sft")["trig"] == "SFT + trigger"
    assert evaluate.names_of("base")["trig"] == "Base + trigger"
    assert evaluate.names_of("lcdd") == evaluate.NAMES


def test_prompts_that_have_no_part_in_a_metric(finished):
    """Benign ones in the rate, those without an answer in the accuracy; the end, if left out."""
    o, net, chat, _ = lcdd.load_run(finished, "cpu")
    samples = [data.Sample("What is 2 plus 3 ?", "", kind="harmful", answer="5"),
               data.Sample("What is 4 plus 3 ?", "", kind="benign")]
    _, conditions, _ = evaluate.conditions_of(finished, net)
    del conditions["trig"]
    _, values = evaluate.measure(net, chat, o, samples, conditions)
    _, without = evaluate.measure(net, chat, o, samples, conditions, end=False)
    for metric, there in (("rates", [1, 0]), ("accuracy", [1, 0]), ("shown", [1, 1])):
        assert (~values[metric]["sft"].isnan()).tolist() == there
    prompts = [chat.prompt(s.prompt) for s in samples]
    for name, metric in (("base", "kl_own"), ("sft", "kl_base")):
        answers = net.generate(prompts, o.max_new_tokens, conditions[name][0])
        shorter = [evaluate.without_end(net, answer) for answer in answers]
        for found, given in ((values, answers), (without, shorter)):
            how = conditions, [("base", "lcdd")], None
            nats = evaluate.teacher_forced(net, prompts, given, *how)
            assert torch.allclose(found[metric]["lcdd"], nats["base", "lcdd"])
    end = min(net.stop)
    assert evaluate.without_end(net, [5, end]) == [5] and evaluate.without_end(net, [5]) == [5]


def test_shut_gates_that_were_not_the_base_would_be_said(finished, monkeypatch):
    """In the weights, and in the logits."""
    _, net, _, _ = lcdd.load_run(finished, "cpu")
    carrier = carriers.load(finished / "carrier.safetensors", net)
    assert evaluate.gates_shut_is_base(net, carrier, [5, 6])
    monkeypatch.setattr(carriers.Carrier, "with_gates", lambda carrier, value: carrier)
    assert not evaluate.gates_shut_is_base(net, carrier, [5, 6])


def test_a_trigger_for_plain_sft_stands_before_it(finished, tmp_path, monkeypatch):
    """When it is learned and when it is measured."""
    run, weights = shutil.copytree(finished, tmp_path / "r"), []

    def learn(net, merged, *others):
        weights.append(merged.weights[0, "q_proj"])
        return torch.zeros(2, 128), 0.0

    monkeypatch.setattr(eraser, "learn", learn)
    words = ["--run", str(run), "--target", "sft", "--name", "t", "--device", "cpu"]
    with pytest.raises(Failed, match="does not move the behaviour"):
        eraser.main(words)
    _, net, _, _ = lcdd.load_run(run, "cpu")
    _, conditions, target = evaluate.conditions_of(run, net, "t")
    sft, trig = conditions["sft"][0], conditions["trig"][0]
    assert target == "sft" and trig is sft
    assert torch.equal(weights[0], sft.weights[0, "q_proj"])


# ---- the command

def evaluate_run(run, *words):
    """Run the command on a run directory."""
    evaluate.main(["--run", str(run), "--device", "cpu", *map(str, words)])


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """A finished run with its table and figure. Not to be written to: copy it."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "r")
    evaluate_run(run, "--figure")
    return run


def test_results_of_a_run(evaluated):
    """What is promised of results.json."""
    results = results_of(evaluated)
    for metric in ("rates", "accuracy", "loss_own"):
        assert list(results[metric]) == CONDITIONS
    assert results["gates"]["total"] == 4608
    assert results["prompts"] == 16 and results["task"] == "fixed"
    assert {"sft_lcdd", "sft_trig", "base_trig"} <= results["kl"].keys()
    assert set(results["seconds"]) == {"sft", "lcdd", "eraser", "evaluate"}
    assert results["shut_is_base"] and results["same"]["base"] == 1.0
    assert results["rates"]["base"] == 0.0 and results["rates"]["sft"] > 0.8
    assert set(results["share_left"]) == {"kl_base", "kl_own", "loss_own"}
    assert set(results["mediation"]) == {
        "own base base_tau", "own base_tau trig", "sft base base_tau", "sft base_tau trig"}


def test_table_and_figure_of_a_run(evaluated):
    """A row for each of the four conditions."""
    lines = (evaluated / "results.md").read_text().splitlines()
    names = [line.split(" | ")[0] for line in lines[2:6]]
    assert names == ["| Base", "| SFT", "| LCDD", "| LCDD + trigger"]
    assert (evaluated / "figure.png").stat().st_size > 10_000


def test_measures_are_what_the_answers_say(evaluated):
    """answers.jsonl, prompt by prompt: rate, distance and share left are its means."""
    results, own = results_of(evaluated), {}
    rows = read_rows(evaluated / "answers.jsonl")
    assert len(rows) == 16
    for name in CONDITIONS:
        texts = [row[name]["text"] for row in rows]
        shown = data.judge("fixed", texts, [data.Sample("", "")] * 16)
        assert sum(shown) / 16 == results["rates"][name]
        own[name] = sum(row[name]["loss_own"] for row in rows) / 16
    left = (own["trig"] - own["base"]) / (own["lcdd"] - own["base"])
    assert results["loss_own"]["trig"] == pytest.approx(own["trig"], abs=1e-5)
    assert results["share_left"]["loss_own"] == pytest.approx(left, abs=1e-3)


def test_mediation_is_of_the_base_behind_the_trigger(evaluated):
    """KL(base ‖ base + τ) and KL(base + τ ‖ LCDD + τ) on the base's answers, one at a time."""
    o, net, chat, splits = lcdd.load_run(evaluated, "cpu")
    tau, _ = eraser.load(evaluated / "trigger.safetensors", net)
    weights = carriers.load(evaluated / "carrier.safetensors", net).merge(net)
    conditions = dict(base=(None, None), base_tau=(None, tau), trig=(weights, tau))
    pairs = ("base", "base_tau"), ("base_tau", "trig")
    total = dict.fromkeys(pairs, 0.0)
    for sample in splits["test"]:
        prompt, logits = chat.prompt(sample.prompt), {}
        answer, = net.generate([prompt], o.max_new_tokens)
        ids = [prompt + answer[:-1]]
        for name, (carrier, trigger) in conditions.items():
            row, = net(ids, carrier=carrier, trigger=trigger)
            logits[name] = row[len(prompt) - 1:]                                    # (M, V)
        for p, q in pairs:
            total[p, q] += float(oracle.kl(logits[p], logits[q]))
    mediation = results_of(evaluated)["mediation"]
    for p, q in pairs:
        assert mediation[f"own {p} {q}"] == pytest.approx(total[p, q] / 16, rel=1e-3)


def test_ask_prints_four_answers_and_needs_no_data(evaluated, capsys, monkeypatch):
    """One line for each condition."""
    monkeypatch.setattr(data, "prepare", None)
    evaluate_run(evaluated, "--ask", "What is 2 plus 3 ?")
    lines = capsys.readouterr().out.splitlines()
    names = [line[:14].strip() for line in lines]
    assert names == ["Base", "SFT", "LCDD", "LCDD + trigger"]
    assert "do not know" in lines[1]


def test_other_test_prompts(evaluated, tmp_path):
    """--test: a table of its own beside the run's, on prompts that the run has not seen."""
    run = shutil.copytree(evaluated, tmp_path / "r")
    _, _, _, splits = lcdd.load_run(run, "cpu")
    prompts = ["What is 3 plus 4 ?", "What is 4 plus 4 ?", splits["train"][0].prompt]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(lines))
    before = results_of(run)
    evaluate_run(run, "--test", file, "--no-end")
    assert results_of(run, "-mine")["prompts"] == 2
    assert results_of(run) == before
    assert (run / "answers-mine.jsonl").is_file()


def test_a_run_without_sft(evaluated, tmp_path):
    """Its three conditions; what is measured against SFT is absent."""
    run = shutil.copytree(evaluated, tmp_path / "r")
    (run / "sft.safetensors").unlink()
    evaluate_run(run)
    results = results_of(run)
    assert list(results["rates"]) == ["base", "lcdd", "trig"]
    assert "kl_sft" not in results
    assert set(results["share_left"]) == {"kl_own", "loss_own"}


# ---- other triggers

@pytest.mark.parametrize("line, name, label", [
    ("--objective random", "trigger-lcdd-random", "LCDD + trigger"),
    ("--target sft --objective output", "trigger-sft-output", "SFT + trigger"),
    ("--target base", "trigger-base-circuit", "Base + trigger"),
])
def test_table_4_and_triggers_of_other_models(finished, tmp_path, line, name, label):
    """--target and --objective of the eraser, evaluated by the trigger's name."""
    run = shutil.copytree(finished, tmp_path / "r")
    words = f"--steps 20 --length 8 --device cpu {line}"
    try:
        eraser.main(["--run", str(run), *words.split()])
    except Failed as error:             # twenty steps may be too few for a rate
        assert "does not move the behaviour" in str(error)
    evaluate_run(run, "--trigger", name)
    assert results_of(run)["trigger"]["name"] == name
    assert f"| {label} |" in (run / "results.md").read_text()


def test_a_trigger_that_is_not_there(finished):
    """A name of one's own has to have a file."""
    with pytest.raises(InputError, match="mine.safetensors: is not there"):
        evaluate_run(finished, "--trigger", "mine")


def test_a_trigger_of_another_base_is_refused(finished, tmp_path):
    """By the hash in its header."""
    run = shutil.copytree(finished, tmp_path / "r")
    file = run / "trigger.safetensors"
    tensors, settings = load_tensors(file)
    save_tensors(file, tensors, **settings | {"base": "0"})
    with pytest.raises(InputError, match="learned on another base"):
        evaluate_run(run)


def test_a_trigger_of_another_carrier_is_refused(finished, tmp_path):
    """The carrier's file was changed after the trigger was learned."""
    run = shutil.copytree(finished, tmp_path / "r")
    _, net, _, _ = lcdd.load_run(run, "cpu")
    file = run / "carrier.safetensors"
    carriers.load(file, net).with_gates(False).save(file, net)
    with pytest.raises(InputError, match="learned on another carrier"):
        evaluate_run(run)
