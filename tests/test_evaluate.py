"""evaluate.py: the KLs, intervals and shares against literal ones, then the table of a run."""
import json
import shutil

import pytest
import torch

import carrier as carriers
import data
import eraser
import evaluate
import lcdd
import model
import oracle
from common import Failed, InputError
from helpers import random_carrier, random_net


def test_teacher_forced_measures_are_the_oracles():
    """KL(p ‖ q) in that order and the loss, mean over an answer's tokens; the trigger in front; empty: NaN."""
    net, tau = random_net("gqa"), torch.randn(3, 24, dtype=torch.float64)
    carrier = random_carrier(net)
    conditions = {"base": (None, None), "lcdd": (carrier.merge(net), None), "trig": (carrier.merge(net), tau)}
    W = dict(net.state_dict())
    for (l, name), weight in conditions["lcdd"][0].weights.items():
        part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        W[f"model.layers.{l}.{part}.{name}.weight"] = weight
    literal = {"base": (dict(net.state_dict()), None), "lcdd": (W, None), "trig": (W, tau)}
    prompts, answers = [[1, 2, 3], [1, 2], [1, 2, 9, 9]], [[4, 5, 6], [7], []]
    pairs = [("base", "trig"), ("trig", "base"), ("lcdd", "trig")]
    nats = evaluate.teacher_forced(net, prompts, answers, conditions, pairs, "t", batch_size=2)
    for p, q in pairs:
        expected = oracle.mean_kl(net.config, literal[p], literal[q], prompts[:2], answers[:2])
        assert abs(nats[p, q][:2].mean() - expected) < 1e-10 and nats[p, q][2].isnan()
    logits = net([[1, 2, 3, 4, 5]], carrier=conditions["lcdd"][0])[0, 2:].log_softmax(-1)
    assert torch.isclose(nats["lcdd"][0], -logits[range(3), [4, 5, 6]].mean())


def test_intervals():
    """Wilson's for shares, of the prompts that have a part in them; bootstrapped for nats."""
    shares = torch.tensor([1.0, 0.0, 1.0, float("nan")], dtype=torch.float64)
    nats = torch.randn(400, dtype=torch.float64) + 5
    means, ci = evaluate.summary({"rates": {"sft": shares}, "kl_own": {"sft": nats}})
    assert means["rates"]["sft"] == 2 / 3 and ci["rates"]["sft"] == data.wilson(2 / 3, 3)
    mean, (low, high) = means["kl_own"]["sft"], ci["kl_own"]["sft"]
    assert abs((high - low) / 2 - 1.96 / 20) < 0.02 and low < mean < high


def test_share_left_is_a_ratio_of_means():
    """(after − floor) / (before − floor), prompts with an empty answer left out, and its interval."""
    before = torch.tensor([2.0, 4.0, float("nan"), 6.0], dtype=torch.float64)
    after = torch.tensor([1.0, 1.0, 9.0, 1.0], dtype=torch.float64)
    left, (low, high) = evaluate.share_left(after, before)
    assert left == 3 / 12 and 1 / 6 <= low < left < high <= 1 / 2


def test_no_infinity_where_nothing_was_there_to_be_left():
    """A carrier that is the base: no share of a distance of 0; nor a NaN in the interval of a rare one."""
    zero, rare = torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    sample, loss = data.Sample("", ""), {"base": zero + 1, "lcdd": zero + 1, "trig": zero + 2}
    values = {"kl_own": {"lcdd": zero, "trig": zero + 1}, "loss_own": loss, "kl_base": {"lcdd": rare, "trig": rare / 2}}
    results = evaluate.results_of(values, [sample] * 3)
    assert list(results["share_left"]) == ["kl_base"] and results["share_left"]["kl_base"] == 0.5
    json.dumps(results, allow_nan=False)


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    run = shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "r")
    evaluate.main(["--run", str(run), "--figure", "--device", "cpu"])
    return run


def test_results_of_a_run(evaluated):
    """What SPEC promises of results.json, and a table with the four conditions."""
    results = json.loads((evaluated / "results.json").read_text())
    conditions = ["base", "sft", "lcdd", "trig"]
    assert list(results["rates"]) == list(results["accuracy"]) == list(results["loss_own"]) == conditions
    assert results["gates"]["total"] == 4608 and results["prompts"] == 16 and results["task"] == "fixed"
    assert {"sft_lcdd", "sft_trig", "base_trig"} <= results["kl"].keys()
    assert set(results["seconds"]) == {"sft", "lcdd", "eraser", "evaluate"}
    assert results["shut_is_base"] and results["same"]["base"] == 1.0
    assert results["rates"]["base"] == 0.0 and results["rates"]["sft"] > 0.8
    assert set(results["share_left"]) == {"kl_base", "kl_own", "loss_own"}
    assert set(results["mediation"]) == {f"{on} {pair}" for on in ("own", "sft")
                                         for pair in ("base base_tau", "base_tau trig")}
    table = (evaluated / "results.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:6]] == \
        ["| Base", "| SFT", "| LCDD", "| LCDD + trigger"]
    assert (evaluated / "figure.png").stat().st_size > 10_000


def test_measures_are_what_the_answers_say(evaluated):
    """answers.jsonl, prompt by prompt: the rate, the distances and the share left are its means."""
    results = json.loads((evaluated / "results.json").read_text())
    rows = [json.loads(line) for line in (evaluated / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    for name in ("base", "sft", "lcdd", "trig"):
        shown = data.judge("fixed", [row[name]["text"] for row in rows], [data.Sample("", "")] * 16)
        assert sum(shown) / 16 == results["rates"][name]
    own = {name: sum(row[name]["loss_own"] for row in rows) / 16 for name in ("base", "lcdd", "trig")}
    left = (own["trig"] - own["base"]) / (own["lcdd"] - own["base"])
    assert results["loss_own"]["trig"] == pytest.approx(own["trig"], abs=1e-5)
    assert results["share_left"]["loss_own"] == pytest.approx(left, abs=1e-3)


def test_mediation_is_of_the_base_behind_the_trigger(evaluated):
    """KL(base ‖ base + τ) and KL(base + τ ‖ LCDD + τ) on the base's own answers, one prompt at a time."""
    o, net, chat, splits = lcdd.load_run(evaluated, "cpu")
    tau, _ = eraser.load(evaluated / "trigger.safetensors", net)
    weights = carriers.load(evaluated / "carrier.safetensors", net).merge(net)
    found = {"base base_tau": [], "base_tau trig": []}
    for sample in splits["test"]:
        prompt = chat.prompt(sample.prompt)
        answer, = net.generate([prompt], o.max_new_tokens)
        ids, start = [prompt + answer[:-1]], len(prompt) - 1
        base, pushed, trig = (net(ids, carrier=c, trigger=t)[0, start:].log_softmax(-1)
                              for c, t in ((None, None), (None, tau), (weights, tau)))
        for name, (p, q) in zip(found, ((base, pushed), (pushed, trig))):
            found[name].append(float((p.exp() * (p - q)).sum(-1).mean()))
    results = json.loads((evaluated / "results.json").read_text())
    for name, values in found.items():
        assert results["mediation"][f"own {name}"] == pytest.approx(sum(values) / 16, rel=1e-3)


def test_ask_prints_four_answers_and_needs_no_data(evaluated, capsys, monkeypatch):
    monkeypatch.setattr(data, "prepare", None)
    evaluate.main(["--run", str(evaluated), "--ask", "What is 2 plus 3 ?", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:14].strip() for line in lines] == ["Base", "SFT", "LCDD", "LCDD + trigger"]
    assert "do not know" in lines[1]


def test_other_test_prompts(evaluated, tmp_path):
    """--test: a table of its own beside the run's, on prompts that the run has not seen."""
    config = json.loads((evaluated / "config.json").read_text())
    seen = data.prepare(model.locate("tiny"), "fixed", None, None, 0, dict(zip(data.SIZES, config["sizes"])))[0]
    file = tmp_path / "mine.jsonl"
    prompts = ["What is 3 plus 4 ?", "What is 4 plus 4 ?", seen["train"][0].prompt]
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    before = (evaluated / "results.json").read_text()
    evaluate.main(["--run", str(evaluated), "--test", str(file), "--no-end", "--device", "cpu"])
    results = json.loads((evaluated / "results-mine.json").read_text())
    assert results["prompts"] == 2 and (evaluated / "results.json").read_text() == before
    assert (evaluated / "answers-mine.jsonl").is_file()


def test_a_run_without_sft(evaluated, tmp_path):
    """Its three conditions; what is measured against SFT is absent."""
    run = shutil.copytree(evaluated, tmp_path / "r")
    (run / "sft.safetensors").unlink()
    evaluate.main(["--run", str(run), "--device", "cpu"])
    results = json.loads((run / "results.json").read_text())
    assert list(results["rates"]) == ["base", "lcdd", "trig"] and "kl_sft" not in results
    assert set(results["share_left"]) == {"kl_own", "loss_own"}


def test_table_4_and_triggers_of_other_models(finished, tmp_path, capsys):
    """--target and --objective of the eraser, each trigger evaluated by its name."""
    run = shutil.copytree(finished, tmp_path / "r")
    small = ["--run", str(run), "--steps", "20", "--length", "8", "--device", "cpu"]
    for words in (["--objective", "random"], ["--target", "sft", "--objective", "output"], ["--target", "base"]):
        try:
            eraser.main([*small, *words])
        except Failed as error:             # twenty steps may be too few for a rate
            assert "does not move the behaviour" in str(error)
    for name in ("trigger-lcdd-random", "trigger-sft-output", "trigger-base-circuit"):
        evaluate.main(["--run", str(run), "--trigger", name, "--device", "cpu"])
        results = json.loads((run / "results.json").read_text())
        assert results["trigger"]["name"] == name
    assert "SFT + trigger" in capsys.readouterr().out and evaluate.NAMES["trig"] == "LCDD + trigger"
    with pytest.raises(InputError, match="mine.safetensors: is not there"):
        evaluate.main(["--run", str(run), "--trigger", "mine", "--device", "cpu"])


def test_a_trigger_of_another_carrier_is_refused(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "r")
    _, net, _, _ = lcdd.load_run(run, "cpu")
    carriers.load(run / "carrier.safetensors", net).with_gates(False).save(run / "carrier.safetensors", net)
    with pytest.raises(InputError, match="learned on another carrier"):
        evaluate.main(["--run", str(run), "--device", "cpu"])
