"""evaluate.py and ablate.py: KLs against a closed form and a loop, intervals, the scaled delta."""
import argparse
import contextlib
import dataclasses
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from helpers import CONFIG, ROOT, Forked, Seen, brief, make_carrier, make_net, prompts

import behaviour
import carrier as carriers
import eraser
import evaluate
import metrics
import export
import figure
import lcdd
import model
import training
from chat import collate
from data import Sample
from files import (
    InputError, load_tensors, read_header, read_json, read_jsonl, save_tensors, write_json)
from lab import ablate, curve, significance, tables, talk
from rows import rotary
from console import cli
from run import alone, reopen


class Chat:
    """Prompts and answers are their ids, written out."""
    prompt = staticmethod(lambda text, max_len: [int(x) for x in text.split()])
    decode = staticmethod(lambda ids: " ".join(map(str, ids)))


def answers(n=7):
    return [p[:5] for p in prompts(n, seed=9)]


def test_kl_against_a_loop():
    net = make_net()
    c = make_carrier(net)
    tau = torch.randn(3, 16, dtype=torch.float64)
    conditions = {"base": (None, None), "lcdd": (c.merge(net), None), "trig": (c.merge(net), tau)}
    got = evaluate.kl_divergences(
        net, prompts(), answers(), conditions,
        [("base", "lcdd"), ("base", "trig"), ("lcdd", "trig")], batch_size=3, chunk=4
    )
    for (p, q), values in got.items():
        for i, (x, y) in enumerate(zip(prompts(), answers())):
            total = 0.0
            # each token given the prompt and the tokens before it
            for t in range(len(y)):
                seen = torch.tensor([x + y[:t]])
                a, b = (
                    net(seen, carrier=conditions[k][0], trigger=conditions[k][1])[0, -1].softmax(-1)
                    for k in (p, q)
                )
                total += sum(float(a[v] * (a[v] / b[v]).log()) for v in range(CONFIG.vocab_size))
            assert float(values[i]) == pytest.approx(total / len(y), abs=1e-10)
        assert values.min() > 0


def test_kl_against_a_closed_form():
    """
    Hidden states that do not matter: with a head of two known rows the KL is that of two
    categorical distributions.
    """
    class Fixed:
        device, config, chunk = torch.device("cpu"), CONFIG, 8
        head = staticmethod(lambda h: h)

        def hidden(self, ids, carrier, trigger, keep):
            return torch.tensor(carrier).log().expand(int(keep.sum()), -1)
    p, q = [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]
    got = evaluate.kl_divergences(
        Fixed(),
        [[1, 2], [3]],
        [[4], [5, 6]],
        {"p": (p, None), "q": (q, None)},
        [("p", "q"), ("q", "p")],
    )
    want = [sum(a * math.log(a / b) for a, b in zip(*pair)) for pair in ((p, q), (q, p))]
    assert got["p", "q"].tolist() == pytest.approx([want[0]] * 2, abs=1e-6)
    assert got["q", "p"].tolist() == pytest.approx([want[1]] * 2, abs=1e-6)


def test_kl_is_zero_for_equal_models_and_ignores_batches_and_padding():
    net = make_net()
    c = make_carrier(net)
    conditions = {"a": (c.merge(net), None), "b": (c.merge(net), None), "base": (None, None)}
    runs = [
        evaluate.kl_divergences(
            net, prompts(), answers(), conditions, [("a", "b"), ("a", "base")], batch_size=n,
            chunk=k
        )
        for n, k in ((1, 1024), (4, 3), (64, 1024))
    ]
    assert all(r["a", "b"].abs().max() == 0 for r in runs)
    assert all(torch.allclose(r["a", "base"], runs[0]["a", "base"], atol=1e-12) for r in runs)


def test_wilson_interval():
    # published tables
    assert behaviour.wilson(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    low, high = behaviour.wilson(0.0, 200)
    assert low == 0
    assert high == pytest.approx(0.0188, abs=1e-4)


def test_dose_response_ends_are_the_base_and_the_carrier():
    net = make_net(dtype=torch.float32)
    c = make_carrier(net)
    samples = [Sample(" ".join(map(str, p)), "x") for p in prompts()]
    plain = [net.generate(prompts(), 6, carrier=x) for x in (None, c)]
    assert plain[0] != plain[1]
    for i, dose in enumerate((0.0, 1.0)):
        told = [Sample(s.prompt, Chat.decode(a)) for s, a in zip(samples, plain[i])]
        rates = evaluate.dose_response(
            net, Chat, {"max_len": 64, "max_new_tokens": 6, "task": "x.jsonl"}, told, c
        )
        assert rates[dose]["rate"] == 1
        assert rates[1.0 - dose]["rate"] < 1


def test_scaled_down_delta_has_the_loss_asked_for():
    net = make_net()
    c = make_carrier(net).with_gates(True)
    examples = [
        (p + a, [False] * len(p) + [True] * len(a))
        for p, a in zip(prompts(), net.generate(prompts(), 5, carrier=c, stop=()))
    ]
    full, none = (training.mean_loss(net, w, examples, 0, 64) for w in (c.merge(net), None))
    assert full < none
    weights, factor = ablate.scaled_down(net, c, (full + none) / 2, examples, 0, steps=16)
    assert training.mean_loss(net, weights, examples, 0, 64) == pytest.approx(
        (full + none) / 2, abs=1e-3 * none
    )
    assert 0 < factor < 1


def test_mean_loss_is_lcdds_own():
    net = make_net()
    c = make_carrier(net)
    examples = [(p + a, [False] * len(p) + [True] * len(a)) for p, a in zip(prompts(), answers())]
    want = training.gradients(net, c, examples, 4, 0)
    assert training.mean_loss(net, c.merge(net), examples, 0, 2) == pytest.approx(want, rel=1e-10)


# ---- the rows of a short run

def learn_briefly(patch):
    """The rows' triggers: 4 tokens, three steps."""
    options = eraser.options

    def few_steps(argv=None):
        o = options(argv)
        o.length, o.steps, o.judge_every, o.batch = 4, 3, 3, 4
        return o
    patch.setattr(eraser, "options", few_steps)


def watch_triggers(patch):
    """A list that fills with (length, rate, objective) of every trigger that is learned."""
    learn, learned = eraser.learn, []

    def watched(*args):
        o = args[-1]
        learned.append((o.length, o.lr, o.objective))
        return learn(*args)
    patch.setattr(eraser, "learn", watched)
    return learned


def watch_training(patch):
    """A list that fills with (what is trained, has it a teacher) of every run of Alg. 1."""
    train, trained = lcdd.train_lcdd, []

    def watched(net, carrier, o, teacher, **rest):
        trained.append((o.train, teacher is not None))
        return train(net, carrier, o=o, teacher=teacher, **rest)
    patch.setattr(lcdd, "train_lcdd", watched)
    return trained


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """All rows of a run of a few steps, once: its folder, its rows, what they trained and learned."""
    out = tmp_path_factory.mktemp("ablated")
    run = out / "fixed-seed0"
    argv = brief(
        "--out", str(run), "--resume", "--sft-steps", "6", "--steps", "5", "--settle", "1",
        "--n-trigger", "8", "--max-new-tokens", "4")
    lcdd.main(argv)
    logged = read_jsonl(run / "metrics.jsonl")
    words = ["--task", "fixed", "--out", str(out), "--lengths", "2", "--device", "cpu", "--jobs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "command", lambda *_: argv)
        learn_briefly(patch)
        learned, trained = watch_triggers(patch), watch_training(patch)
        usual = eraser.options(["--run", str(run)]).lr
        ablate.main(words)
        written = (run / "ablation.json").stat().st_mtime_ns
        ablate.main(words)
    return argparse.Namespace(
        run=run, rows=read_json(run / "ablation.json"), tables=(out / "tables.md").read_text(),
        logged=logged, learned=learned, trained=trained, usual=usual, written=written)


@pytest.fixture
def own_trigger(ablated, tmp_path, monkeypatch):
    """A copy of that run, which has a trigger of its own since: of seven tokens, at a rate of 0.5."""
    run = shutil.copytree(ablated.run, tmp_path / "fixed-seed0")
    save_tensors(
        run / "trigger.safetensors", {"trigger": torch.zeros(7, 128)}, length=7, lr=0.5, loss=1.0)
    learn_briefly(monkeypatch)
    return run


def test_the_length_curve_is_drawn(ablated):
    assert (ablated.run.parent / "tables.png").stat().st_size > 1000


def test_points_of_the_length_curve():
    """Every length once, the run's own among them; of safety the harmful prompts."""
    seeds = [
        {"lcdd circuit": {"rate": 0.0}, "lcdd circuit 2": {"rate": a}, "lcdd circuit 10": {"rate": 0.1}}
        for a in (0.2, 0.4)
    ]
    found = curve.points(curve.with_full(seeds, "lcdd", 16), "lcdd")
    assert [n for n, *_ in found] == [2, 10, 16]
    assert [mean for _, mean, _ in found] == pytest.approx([30.0, 10.0, 0.0])
    assert found[0][2] == pytest.approx(statistics.stdev([20, 40]))
    assert curve.points(seeds, "sft") == []
    harmful = [{"lcdd circuit 2": {"rate": 0.1, "harmful rate": 0.2}}]
    assert curve.points(harmful, "lcdd") == [(2, 20.0, 0.0)]


def test_a_file_without_tables_is_no_curve(tmp_path):
    (tmp_path / "t.json").write_text('{"fixed": [{"lcdd circuit 2": {"rate": "x"}}]}')
    with pytest.raises(InputError, match="t.json: fixed"):
        curve.main([str(tmp_path / "t.json"), str(tmp_path / "l.png")])


def test_every_row_of_the_tables_is_measured(ablated):
    curve = {f"{name} circuit 2" for name in tables.CURVE}
    assert len(ablated.rows) == 24 + len(tables.F_3) + len(curve | set(tables.CHOICES))
    for row in ablated.rows.values():
        assert {"rate", "accuracy", "same", "kl_sft", "kl_base"} <= row.keys()


def test_rows_are_of_one_carrier_and_trigger(ablated):
    assert len({row["of"] for row in ablated.rows.values()}) == 1


def test_rows_of_the_base_and_of_sft_are_at_no_distance_from_themselves(ablated):
    rows = ablated.rows
    assert rows["base"]["kl_base"] == 0
    assert rows["base"]["same"] == 1
    assert rows["sft"]["kl_sft"] == 0
    assert rows["base trigger"]["kl_base"] > 0
    assert rows["sft-long"]["kl_sft"] > 0


def test_mask_ce_is_trained_on_the_data_and_mask_kl_on_the_sft_model(ablated):
    assert ablated.trained == [("mask-ce", False), ("mask-kl", True), *[("joint", False)] * 3]


def test_triggers_of_the_rows_have_their_lengths_rates_and_objectives(ablated):
    assert ablated.learned.count((2, ablated.usual / 10, "circuit")) == 2
    assert ablated.learned.count((4, ablated.usual, "random")) == 1
    assert ablated.learned.count((4, ablated.usual, "output")) == 2


def test_rows_are_trained_on_what_the_run_was_trained_on(ablated):
    whole = ablate.Run(ablated.run, ablate.options(["--device", "cpu"]))
    assert not all(all(mask) for _, mask in whole.examples())
    whole.config["loss"] = "all"
    assert all(all(mask) for _, mask in whole.examples())


def test_each_line_of_the_curve_has_its_own_models_numbers(ablated):
    for name, label in tables.CURVE.items():
        row = ablated.rows[f"{name} circuit 2"]
        assert f"| {label} | {100 * row['rate']:.1f} / " in ablated.tables
        assert f" / {row['kl_base']:.2f} | " in ablated.tables
    assert list(tables.CURVE.items())[1:3] == [
        ("sft", "plain SFT"),
        ("sft-long", "SFT for as many steps as LCDD"),
    ]


def test_the_tables_have_the_papers_numbers_beside_ours(ablated):
    assert "Table 4" in ablated.tables
    assert "paper, Qwen3-0.6B" in ablated.tables
    assert "2 tokens" in ablated.tables


def test_a_row_is_no_phase_of_the_run(ablated):
    assert read_jsonl(ablated.run / "metrics.jsonl") == ablated.logged
    assert (ablated.run / "rows" / "mask-ce" / "metrics.jsonl").is_file()


def test_rows_that_are_there_are_not_measured_again(ablated):
    assert (ablated.run / "ablation.json").stat().st_mtime_ns == ablated.written


def test_a_runs_own_trigger_says_how_the_rows_are_learned(own_trigger):
    own = ablate.trigger_options(own_trigger, "cpu")
    assert own.length == 7
    assert own.lr == 0.5
    assert own.steps == 3
    assert not hasattr(own, "loss")


def test_rows_of_another_trigger_are_measured_anew(own_trigger, monkeypatch):
    learned = watch_triggers(monkeypatch)
    ablate.main(
        ["--run", str(own_trigger), "--rows", "lcdd circuit", "--lengths", "--device", "cpu"])
    assert learned == [(7, 0.5, "circuit"), (2, 0.5, "circuit")]
    rows = read_json(own_trigger / "ablation.json")
    assert rows.keys() == {"lcdd circuit", "lcdd circuit 2"}


def test_a_row_alone_has_its_own_gates_and_channels(own_trigger, monkeypatch):
    """As after an interruption: nothing that other rows have made is at hand."""
    (own_trigger / "ablation.json").unlink()
    channels, asked = eraser.channels, []

    def watched(carrier, objective, *rest):
        asked.append(carrier.stats()["gates"]["open"])
        return channels(carrier, objective, *rest)
    monkeypatch.setattr(eraser, "channels", watched)
    learned = watch_triggers(monkeypatch)
    ablate.main(["--run", str(own_trigger), "--rows", "mask-ce circuit", "--device", "cpu"])
    row = read_json(own_trigger / "ablation.json")["mask-ce circuit"]
    assert asked[0] == round((1 - row["sparsity"]) * 4608)
    assert learned == [(7, 0.5, "circuit")]


def test_other_seeds_learn_their_triggers_as_the_run_does(own_trigger, tmp_path, monkeypatch):
    other = shutil.copytree(own_trigger, tmp_path / "fixed-seed1")
    (other / "trigger.safetensors").unlink()
    learned = watch_triggers(monkeypatch)
    ablate.Run(other, ablate.options(["--run", str(own_trigger)])).trigger("lcdd", "circuit", 0)
    assert learned == [(7, 0.5, "circuit")]


@pytest.mark.parametrize("wrong, said", [
    (["--run", "x", "--task", "fixed"], "leave out --task"),
    (["--run", "x", "--out", "y"], "leave out --task"),
    (["--seed", "-1"], "--seed -1")])
def test_options_that_do_not_go_together(wrong, said):
    with pytest.raises(InputError, match=said):
        ablate.main(["--device", "cpu", *wrong])


# ---- runs in processes of their own

def long_run(folder, run):
    """The command line that repeats a run without an end with two other seeds, two at a time."""
    folder.mkdir()
    config = read_json(run / "config.json")
    endless = {"steps": 10 ** 6, "log_every": 1, "sft_steps": 1}
    write_json(folder / "config.json", config | endless)
    tensors, header = load_tensors(run / "carrier.safetensors")
    header["settings"] |= endless
    save_tensors(folder / "carrier.safetensors", tensors, **header)
    return ["--run", str(folder), "--seeds", "3", "--jobs", "2", "--device", "cpu"]


def prunes(run):
    """Whether a run has come as far as LCDD's first step."""
    log = run / "metrics.jsonl"
    return log.is_file() and any(row["phase"] == "lcdd" for row in read_jsonl(log))


def table(words):
    """lab/ablate.py as a command. Its runs are forks, which need not import everything again."""
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda _: context("fork")
    cli(lambda: ablate.main(words))


def test_interrupted_jobs_save_their_states(tmp_path, run):
    """
    SIGTERM to the command alone: the processes of its runs save and end, and nothing new is begun.
    """
    command = Forked(tmp_path, table, long_run(tmp_path / "r", run))
    runs = [tmp_path / f"r-seed{n}" for n in (1, 2)]
    while command.process.is_alive() and not all(prunes(run) for run in runs):
        time.sleep(0.05)
    command.process.terminate()
    status, _, errors = command.end()
    assert status == 130
    assert errors == "interrupted\n"
    for run in runs:
        assert read_header(run / "state.safetensors")["phase"] == "lcdd"
        with alone(run):                                          # nobody works there any more
            pass
    assert not (tmp_path / "r" / "ablation.json").exists()


def test_an_error_in_one_job_ends_the_others(tmp_path, run):
    """
    Whatever it is: not when the other runs are through. (Settings that are no settings raise what
    nobody expects.) In processes as the command itself starts them.
    """
    o = ablate.options(long_run(tmp_path / "r", run))
    settings = read_json(tmp_path / "r" / "config.json")
    endless = (str(tmp_path / "endless"), settings, o, ["lcdd"])
    wrong = (str(tmp_path / "wrong"), 5, o, ["lcdd"])
    with pytest.raises(AttributeError):
        ablate.work_in_processes([endless, wrong], 2)
    assert not multiprocessing.active_children()


def test_a_run_without_its_carrier_is_no_run_yet(tmp_path, run):
    unfinished = tmp_path / "r"
    unfinished.mkdir()
    write_json(unfinished / "config.json", read_json(run / "config.json"))
    with pytest.raises(InputError, match="r/carrier.safetensors: is not there; lcdd.py --out .*r --resume"):
        ablate.main(["--run", str(unfinished), "--device", "cpu"])


def deaf(heard):
    """A process that loses the first signal that ends it."""
    def lose(*_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lose)
    heard.set()
    while True:
        time.sleep(0.01)


def test_a_process_that_lost_its_signal_is_told_again():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=deaf, args=(ready,), daemon=True)
    process.start()
    assert ready.wait(10)
    ablate.end([process], patience=0.2)
    assert process.exitcode == -signal.SIGTERM


def test_measure_tells_what_is_the_bases_own():
    """
    Answers handed in: `same` compares with the base's, not with SFT's; the KLs are those of
    kl_divergences.
    """
    net = make_net()
    c = make_carrier(net)
    samples = [Sample(" ".join(map(str, p)), "x") for p in prompts(4)]
    conditions = {
        "base": (None, None),
        "sft": (c.with_gates(True).merge(net), None),
        "lcdd": (c.merge(net), None),
    }
    told = {"base": [[1], [2], [3], [4]], "sft": [[9], [9], [9], [9]], "lcdd": [[1], [2], [3], [9]]}
    rows = evaluate.measure(net, Chat, "x.jsonl", samples, conditions, 1, None, told)
    assert [rows[k]["same"] for k in conditions] == [1, 0, 3 / 4]
    kl = evaluate.kl_divergences(
        net, prompts(4), told["sft"], conditions, [("sft", "lcdd"), ("base", "lcdd")]
    )
    assert torch.equal(rows["lcdd"]["kl_sft"], kl["sft", "lcdd"])
    assert torch.equal(rows["lcdd"]["kl_base"], kl["base", "lcdd"])


def alike(a, b):
    return all(
        torch.equal(a.weights[l][n], w)
        for l, layer in enumerate(b.weights)
        for n, w in layer.items()
    )


def test_bootstrap_against_all_draws():
    """Of three values every draw can be counted: 27 of them, and their quantiles are known."""
    values = torch.tensor([0.0, 0.0, 1.0])
    draws = [(a + b + c) / 3 for a in (0, 0, 1) for b in (0, 0, 1) for c in (0, 0, 1)]
    assert draws.count(0) / 27 > 0.025
    assert draws.count(1) / 27 > 0.025       # 8 and 1 of 27
    assert evaluate.bootstrap(values) == [0.0, 1.0]


def test_bootstrap_against_the_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3))
    half = 1.96 * float(values.std()) / 20
    low, high = evaluate.bootstrap(values)
    assert (low, high) == pytest.approx(
        (float(values.mean()) - half, float(values.mean()) + half), abs=0.02
    )


def test_bootstrap_stays_where_the_values_are():
    # the z-interval of these begins at -0.28
    values = torch.tensor([0.0] * 30 + [9.0])
    low, high = evaluate.bootstrap(values)
    assert low >= 0
    assert high > float(values.mean())
    assert evaluate.bootstrap(values) == [low, high]
    assert evaluate.bootstrap(torch.full((5,), 2.0)) == [2.0, 2.0]


def test_a_metrics_interval_is_the_bootstraps():
    values = torch.tensor([0.0] * 30 + [9.0])
    metric = next(m for m in evaluate.METRICS if m.key == "kl_own")
    assert evaluate.interval(metric, {"kl_own": values}, []) == evaluate.bootstrap(values)


def test_accuracys_interval_counts_prompts_with_an_answer():
    samples = [
        Sample("a", "x", answer="1"), Sample("b", "x", answer="2"), Sample("c", "x"),
        Sample("d", "x")
    ]
    row = {
        "rate": 0.5,
        "n": 4,
        "accuracy": 0.5,
        "kinds": {},
        "same": 0.25,
        "kl_sft": torch.ones(4),
        "kl_base": torch.zeros(4),
    }
    out = evaluate.results_of({"base": row, "sft": row}, samples)
    assert out["ci"]["same_as_base"]["sft"] == behaviour.wilson(0.25, 4)
    assert out["ci"]["accuracy"]["base"] == behaviour.wilson(0.5, 2)
    assert out["ci"]["rates"]["base"] == behaviour.wilson(0.5, 4)


RESULTS = {
    "rates": {"base": 0.1, "lcdd": 0.2},
    "accuracy": {"base": 0.3, "lcdd": 0.4},
    "same_as_base": {"base": 0.5, "lcdd": 0.6},
    "kl": {"sft_base": 1.0, "sft_lcdd": 2.0, "base_lcdd": 3.0},
    "kl_own": {"lcdd": 4.0},
    "loss_own": {"base": 5.0, "lcdd": 6.0},
    "ci": {
        k: {"base": [0.0, 1.0], "lcdd": [0.0, 1.0]} for k in ("rates", "accuracy", "same_as_base")
    },
}


def rows_of_table(text):
    head, _, *lines = (
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.replace("‖", "→").split("\n")
    )
    return [dict(zip(head, line)) for line in lines]


def test_the_table_has_each_number_under_its_name():
    base, lcdd_ = rows_of_table(metrics.table(RESULTS, "t"))
    assert base == {
        "t": "Base",
        "behaviour %": "10.0 (0–100)",
        "accuracy %": "30.0 (0–100)",
        "base's answer %": "50.0 (0–100)",
        "KL(SFT→·)": "1.000",
        "KL(Base→·)": "–",
        "own KL(Base→·)": "–",
        "own loss": "5.000",
    }
    assert lcdd_ == {
        "t": "LCDD",
        "behaviour %": "20.0 (0–100)",
        "accuracy %": "40.0 (0–100)",
        "base's answer %": "60.0 (0–100)",
        "KL(SFT→·)": "2.000",
        "KL(Base→·)": "3.000",
        "own KL(Base→·)": "4.000",
        "own loss": "6.000",
    }


def test_the_table_has_harmful_and_benign_apart():
    of = {
        "harmful": {"rate": 0.7, "n": 2, "kl_sft": 1.5, "kl_base": 2.5},
        "benign": {"rate": 0.8, "n": 2, "kl_sft": 3.5},
    }
    row = rows_of_table(metrics.table(RESULTS | {"kinds": {"base": of, "lcdd": of}}, "t"))[1]
    assert row["behaviour, harmful %"] == "70.0"
    assert row["behaviour, benign %"] == "80.0"
    assert row["KL(SFT→·), harmful"] == "1.500"
    assert row["KL(SFT→·), benign"] == "3.500"
    assert row["KL(Base→·), harmful"] == "2.500"
    assert row["KL(Base→·), benign"] == "–"
    assert row["own KL(Base→·)"] == "4.000"
    assert "KL(SFT→·)" not in row


def test_other_kinds_stand_beside_the_whole():
    of = {"short": {"rate": 0.7, "n": 2, "kl_sft": 1.5}}
    row = rows_of_table(metrics.table(RESULTS | {"kinds": {"lcdd": of}}, "t"))[1]
    assert row["behaviour %"] == "20.0 (0–100)"
    assert row["behaviour, short %"] == "70.0"


def test_two_runs_side_by_side(tmp_path, capsys):
    for name, rate in (("a", 0.25), ("b", 0.75)):
        (tmp_path / name).mkdir()
        write_json(
            tmp_path / name / "results.json",
            RESULTS | {"task": "fixed", "rates": {"base": 0.0, "lcdd": rate}},
        )
    runs = [str(tmp_path / name) for name in "ab"]
    evaluate.main(["--compare", *runs])
    rows = rows_of_table(capsys.readouterr().out.strip())
    assert [row["fixed"] for row in rows] == [
        f"{name}, {run_}" for name in ("Base", "LCDD") for run_ in runs
    ]
    assert [row["behaviour %"] for row in rows] == [
        "0.0 (0–100)", "0.0 (0–100)", "25.0 (0–100)", "75.0 (0–100)"
    ]
    (tmp_path / "b" / "results.json").unlink()
    with pytest.raises(InputError, match="b/results.json holds no evaluation"):
        evaluate.main(["--compare", *runs])
    for argv in ([], ["--run", "x", "--compare", "y"]):
        with pytest.raises(InputError, match="either --run or --compare"):
            evaluate.main(argv)


@pytest.mark.parametrize("options, more", [
    (evaluate.options, []), (eraser.options, []), (ablate.options, []), (talk.options, []),
    (export.options, ["--to", "x", "--as", "lora"])])
def test_a_second_run_is_refused(options, more):
    assert options(["--run", "a", *more]).run == "a"
    with pytest.raises(InputError, match="--run b: --run a is given already; give it once"):
        options(["--run", "a", "--run", "b", *more])


def test_own_answers_against_a_loop():
    net = make_net()
    c = make_carrier(net)
    tau = torch.randn(3, 16, dtype=torch.float64)
    conditions = {"base": (None, None), "lcdd": (c.merge(net), None), "trig": (c.merge(net), tau)}
    kl, loss = evaluate.own_answers(net, prompts(), answers(), conditions, batch_size=3, chunk=4)
    assert set(kl) == {"lcdd", "trig"}
    assert set(loss) == set(conditions)
    for name, (weights, trigger) in conditions.items():
        for i, (x, y) in enumerate(zip(prompts(), answers())):
            want_kl = want_loss = 0.0
            for t in range(len(y)):
                seen = torch.tensor([x + y[:t]])
                p = net(seen)[0, -1].softmax(-1)
                q = net(seen, carrier=weights, trigger=trigger)[0, -1].softmax(-1)
                want_kl += sum(
                    float(p[v] * (p[v] / q[v]).log()) for v in range(CONFIG.vocab_size)
                ) / len(y)
                want_loss -= float(q[y[t]].log()) / len(y)
            assert float(loss[name][i]) == pytest.approx(want_loss, abs=1e-10)
            if name != "base":
                assert float(kl[name][i]) == pytest.approx(want_kl, abs=1e-10)


def test_own_metrics_are_on_the_bases_answers():
    net = make_net()
    c = make_carrier(net)
    samples = [Sample(" ".join(map(str, p)), "x") for p in prompts(4)]
    conditions = {
        "base": (None, None),
        "sft": (c.with_gates(True).merge(net), None),
        "lcdd": (c.merge(net), None),
    }
    told = {"base": [[1, 2, 3]] * 4, "sft": [[9, 8, 7]] * 4, "lcdd": [[4]] * 4}
    rows = evaluate.measure(net, Chat, "x.jsonl", samples, conditions, 3, None, told)
    kl, loss = evaluate.own_answers(net, prompts(4), told["base"], conditions)
    for name in conditions:
        assert torch.equal(rows[name]["loss_own"], loss[name])
    assert torch.equal(rows["lcdd"]["kl_own"], kl["lcdd"])
    out = evaluate.results_of(rows, samples)
    assert set(out["kl_own"]) == {"sft", "lcdd"}
    assert set(out["loss_own"]) == {"base", "sft", "lcdd"}
    assert set(out["kl"]) == {"sft_base", "sft_lcdd", "base_sft", "base_lcdd"}
    assert out["loss_own"]["lcdd"] == pytest.approx(float(loss["lcdd"].mean()))
    low, high = out["ci"]["kl_own"]["lcdd"]
    assert 0 <= low < out["kl_own"]["lcdd"] < high


def test_the_end_of_text_token_may_be_left_out():
    net = make_net()
    net.stop = (3,)
    c = make_carrier(net)
    samples = [Sample(" ".join(map(str, p)), "x") for p in prompts(4)]
    conditions = {"base": (None, None), "sft": (c.merge(net), None)}
    told = {"base": [[1, 2, 3], [3], [5, 6], [7, 3]], "sft": [[9, 8], [9, 3], [8, 3], [3]]}
    rows = evaluate.measure(net, Chat, "x.jsonl", samples, conditions, 3, None, told, eos=False)
    cut = [[1, 2], [], [5, 6], [7]]
    kl, loss = evaluate.own_answers(net, prompts(4), cut, conditions)
    for key, want in (("kl_own", kl["sft"]), ("loss_own", loss["sft"])):
        assert torch.equal(rows["sft"][key].nan_to_num(-1), want.nan_to_num(-1))
        assert rows["sft"][key].isnan().tolist() == [False, True, False, False]
    assert rows["sft"]["kl_base"].isnan().tolist() == [False, False, False, True]
    have = [0, 2, 3]
    assert evaluate.numbers(rows["sft"])["loss_own"] == pytest.approx(
        float(loss["sft"][have].mean())
    )
    whole = evaluate.own_answers(net, prompts(4), told["base"], conditions)[1]["sft"]
    assert not torch.allclose(whole[have], loss["sft"][have])


def test_kls_of_harmful_and_benign_prompts():
    net = make_net()
    c = make_carrier(net)
    kinds = ["harmful", "benign", "benign", "harmful"]
    samples = [Sample(" ".join(map(str, p)), "x", kind=k) for p, k in zip(prompts(4), kinds)]
    conditions = {
        "base": (None, None),
        "sft": (c.with_gates(True).merge(net), None),
        "lcdd": (c.merge(net), None),
    }
    told = {name: [[1, 2, 3]] * 4 for name in conditions}
    rows = evaluate.measure(net, Chat, "safety", samples, conditions, 3, None, told)
    found = evaluate.results_of(rows, samples)["kinds"]["lcdd"]
    each = rows["lcdd"]["kl_sft"]
    assert found["harmful"]["kl_sft"] == pytest.approx(float(each[0] + each[3]) / 2)
    assert found["benign"]["kl_sft"] == pytest.approx(float(each[1] + each[2]) / 2)
    plain = evaluate.numbers(rows["lcdd"])
    assert plain["benign kl_sft"] == found["benign"]["kl_sft"]
    assert plain["benign rate"] == found["benign"]["rate"]


def test_the_conditions_are_those_of_the_table(run, monkeypatch):
    net = model.load(ROOT / "tiny")
    save_tensors(
        run / "other.safetensors", {"trigger": torch.randn(2, 128)}, **eraser.made_for(run, net)
    )

    def spy(net, chat, task, samples, conditions, *rest, **_):
        lcdd_, sft = (
            carriers.load(run / f"{name}.safetensors", net) for name in ("carrier", "sft")
        )
        for name, right in (
            ("sft", sft),
            ("lcdd", lcdd_),
            ("trig", lcdd_),
        ):
            assert alike(conditions[name][0], right.merge(net)), name
            assert (conditions[name][1] is not None) == (name == "trig"), name
        assert samples == reopen(run)[2]["test"]
        assert conditions["base"] == (None, None)
        raise Seen
    monkeypatch.setattr(evaluate, "measure", spy)
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", "--run", str(run), "--trigger", "other", "--device", "cpu"]
    )
    with pytest.raises(Seen):
        evaluate.main()


def test_shut_gates_are_measured_as_the_base_that_they_are():
    """as_base() is what measure() finds for a carrier with its gates shut."""
    net = make_net()
    c = make_carrier(net)
    samples = [Sample(" ".join(map(str, p)), "x", kind="ab"[i % 2]) for i, p in enumerate(prompts(4))]
    shut = c.with_gates(False).merge(net)
    conditions = {
        "base": (None, None), "sft": (c.with_gates(True).merge(net), None), "shut": (shut, None)}
    rows = evaluate.measure(net, Chat, "x.jsonl", samples, conditions, 3)
    found = evaluate.numbers(evaluate.as_base(rows["base"], samples))
    assert found == pytest.approx(evaluate.numbers(rows["shut"]), abs=1e-12)
    assert found["kl_own"] == found["a kl_base"] == 0


def test_what_is_not_quite_the_base_is_seen(run, monkeypatch):
    """One weight, where the logits of the prompts do not show it."""
    config, chat, splits = reopen(run)
    net = model.load(ROOT / "tiny")
    shut = carriers.Carrier(net.config).with_gates(False).merge(net)
    assert evaluate.is_base(net, chat, config, splits["test"][:4], shut)
    weights = [dict(layer) for layer in shut.weights]
    weights[0]["q_proj"] = weights[0]["q_proj"].clone()
    weights[0]["q_proj"][0, 0] = torch.nextafter(weights[0]["q_proj"][0, 0], torch.tensor(1.0))
    monkeypatch.setattr(model.Llama, "forward", lambda *_, **__: torch.zeros(1))
    assert not evaluate.is_base(net, chat, config, splits["test"][:4], carriers.Merged(weights))


def test_the_kls_are_on_the_sft_models_answers():
    net = make_net()
    c = make_carrier(net)
    samples = [Sample(" ".join(map(str, p)), "x") for p in prompts(4)]
    conditions = {
        "base": (None, None),
        "sft": (c.with_gates(True).merge(net), None),
        "lcdd": (c.merge(net), None),
    }
    told = {"base": [[1, 2, 3]] * 4, "sft": [[9, 8, 7]] * 4, "lcdd": [[4]] * 4}
    rows = evaluate.measure(net, Chat, "x.jsonl", samples, conditions, 3, None, told)
    kl = evaluate.kl_divergences(net, prompts(4), told["sft"], conditions, [("sft", "lcdd")])
    assert torch.equal(rows["lcdd"]["kl_sft"], kl["sft", "lcdd"])


def test_every_question_has_its_own_answer(run, monkeypatch, capsys):
    def said(*questions):
        monkeypatch.setattr(
            "sys.argv",
            [
                "evaluate.py", "--run", str(run), "--device", "cpu",
                *(x for q in questions for x in ("--ask", q))
            ],
        )
        evaluate.main()
        return [
            l
            for l in capsys.readouterr().out.strip().split("\n")
            if l.strip() and not l.startswith("no trigger")
        ]

    questions = "What is 2 plus 3 ?", "What is 4 plus 5 ?"
    assert said(*questions) == said(questions[0]) + said(questions[1])


# ---- ablate


def rows_run(run, **changes):
    o = ablate.options(["--device", "cpu"])
    vars(o).update(changes)
    return ablate.Run(run, o)


def test_models_of_the_rows_start_from_sft(run, tmp_path, monkeypatch):
    r, seen = rows_run(shutil.copytree(run, tmp_path / "r")), {}

    def same(c):
        theirs = r.sft().delta.parameters()
        return all(torch.equal(a, b) for a, b in zip(c.delta.parameters(), theirs))

    monkeypatch.setattr(
        lcdd, "train_sft", lambda net, c, o, **_: seen.update(long=(same(c), o.sft_steps, o.sft_lr))
    )
    monkeypatch.setattr(
        lcdd, "train_lcdd", lambda net, c, o, **_: seen.update({o.train: same(c)}) or {}
    )
    for name in ("sft-long", "mask-ce", "mask-kl"):
        r.model(name)
    done = read_json(run / "results.json")["stopped"]["steps"]
    r.config["train"] = "mask-ce"                                 # gates alone do not settle
    r.models.pop("sft-long", None)
    (r.folder / "rows" / "sft-long" / "carrier.safetensors").unlink()
    seen["long alone"], long = None, seen["long"]
    r.model("sft-long")
    assert seen.pop("long")[1] == done
    assert seen.pop("long alone") is None
    seen["long"] = long
    assert seen == {
        "long": (True, done + r.config["settle"], r.config["lr"]),
        "mask-ce": True,
        "mask-kl": True,
    }
    assert r.config["settle"] > 0


@pytest.mark.parametrize("name, changed", [
    ("noise", {"select": 0.0, "gate_std": 0.5}),
    ("blind", {"select": 1e-9, "gate_std": 0.5}),
    ("floor-0", {"floor": 0.0}),
    ("mask-ce", {"train": "mask-ce"}),
    ("mask-kl", {"train": "mask-kl"}),
])
def test_a_row_is_trained_as_the_run_but_for_what_it_asks(name, changed, run, tmp_path, monkeypatch):
    r, seen = rows_run(shutil.copytree(run, tmp_path / "r")), []

    def training_of(net, c, o, run, teacher, **_):
        save_tensors(run / "state.safetensors", {"x": torch.ones(1)})
        seen.append((vars(o), c.logits.detach().clone(), teacher))
        with torch.no_grad():
            c.logits[:, ::2] = -1.0
        return {}

    monkeypatch.setattr(lcdd, "train_lcdd", training_of)
    r.model(name)
    (settings, initial, teacher), = seen
    assert {k: v for k, v in settings.items() if k in r.config and v != r.config[k]} == changed
    expected = r.sft().init_gates(r.config["gate_mean"], settings["gate_std"], r.config["seed"])
    assert torch.equal(initial, expected.logits)
    assert teacher is (r.models["sft"] if name == "mask-kl" else None)
    is_open = r.carriers[name].logits > 0
    first = torch.zeros(is_open.numel(), dtype=torch.bool)
    first[initial.flatten().argsort(descending=True)[:int(is_open.sum())]] = True
    assert r.facts[name]["dice"] == pytest.approx(float(first[is_open.flatten()].double().mean()))
    assert not (r.folder / "rows" / name / "state.safetensors").exists()


def test_longer_sft_draws_other_batches_and_has_no_gates_of_its_own(run, tmp_path, monkeypatch):
    r, seen = rows_run(shutil.copytree(run, tmp_path / "r")), []
    monkeypatch.setattr(lcdd, "train_sft", lambda net, c, o, **_: seen.append(o))
    r.model("sft-long")
    assert seen[0].seed == r.config["seed"] + 1
    assert seen[0].sure == 0.0
    assert "sft-long" not in r.carriers         # its triggers take LCDD's channels


@pytest.mark.parametrize("name", ["sft-long", "mask-ce", "blind"])
def test_a_rows_model_is_kept_until_the_run_has_another_carrier(name, run, tmp_path, monkeypatch):
    """For rows that are asked for later: the same weights, gates and facts, without training."""
    first = rows_run(shutil.copytree(run, tmp_path / "r"))
    made = first.model(name)
    again, trained = rows_run(first.folder), []
    monkeypatch.setattr(again, "train", lambda *_: trained.append(name) or (first.sft(), {}))
    for a, b in zip(made.weights, again.model(name).weights, strict=True):
        assert all(torch.equal(a[linear], b[linear]) for linear in a)
    assert not trained
    assert again.facts[name] == first.facts[name]
    if name != "sft-long":
        assert torch.equal(again.carriers[name].logits > 0, first.carriers[name].logits > 0)
        assert 0 < again.facts[name]["dice"] <= 1
    file = first.folder / "carrier.safetensors"
    shutil.copy(first.folder / "rows" / name / "carrier.safetensors", file)
    again.models.pop(name)
    again.model(name)
    assert trained == [name]


def test_what_a_rows_trigger_is_learned_on(run, monkeypatch):
    """Before its own model, on the LCDD carrier's channels, judged on validation prompts."""
    r, seen = rows_run(run), []
    monkeypatch.setattr(
        eraser,
        "learn",
        lambda net, weights, train, judge, mask, o: (
            seen.append((weights, mask, len(train.ids), len(judge.ids), judge)) or (None, 0)
        ),
    )
    # so that its channels are not all of them
    r.lcdd.logits.data[:, ::2] = -1
    for name in ("lcdd", "sft"):
        r.trigger(name, "circuit", 2)
        weights, mask, n_train, n_judge, judge = seen[-1]
        assert weights is r.models[name]
        assert torch.equal(mask, r.lcdd.write_channels())
        assert not mask.all()
        asked = [r.chat.prompt(s.prompt, 64) for s in r.splits["validation"]]
        assert [row[: i + 1].tolist() for row, i in zip(judge.ids, judge.last)] == asked + asked


def test_every_row_is_answered_anew(run):
    r = rows_run(run)
    assert r.measure(None, None)["same"] == 1
    assert r.measure(r.sft().merge(r.net, 100.0), None)["same"] < 1
    assert r.measure(None, None)["same"] == 1


def test_base_and_sft_are_teacher_forced_once_for_all_rows(run, monkeypatch):
    r, passes = rows_run(run), []
    hidden = model.Llama.hidden

    def counting(net, ids, weights=None, *rest, **more):
        if "keep" in more:
            passes.append("row" if weights is half else "other")
        return hidden(net, ids, weights, *rest, **more)
    half = r.sft().merge(r.net, 0.5)
    monkeypatch.setattr(model.Llama, "hidden", counting)
    first = r.measure(half, None)
    rows = passes.count("row")
    assert len(passes) == 3 * rows                  # base, SFT and the row
    passes.clear()
    assert r.measure(half, None) == first
    assert passes == ["row"] * rows
    r.states = evaluate.States()
    assert r.measure(half, None) == first           # nothing else was kept


def test_rows_are_measured_on_the_split_asked_for(run, monkeypatch):
    r = rows_run(run, split="validation")

    def spy(net, chat, task, samples, *rest, **more):
        assert samples == r.splits["validation"] != r.splits["test"]
        raise Seen
    monkeypatch.setattr(evaluate, "measure", spy)
    with pytest.raises(Seen):
        r.measure(None, None)


def columns(text, line):
    head, _, *lines = (
        [c.strip() for c in l.strip("|").split("|")] for l in text.replace("‖", "→").split("\n")
    )
    return dict(zip(head, lines[line]))


def test_tables_have_each_number_under_its_name():
    row = dict(
        rate=0.1, accuracy=0.2, same=0.3, kl_sft=4.0, kl_base=5.0, kl_own=6.0, loss_own=7.0,
        sparsity=0.6
    )
    seeds = [
        {name: row for name in ("base", "sft", "lcdd")} | {"lcdd circuit": {**row, "rate": 0.7}},
        {name: {**row, "rate": 0.3} for name in ("base", "sft", "lcdd")}
        | {"lcdd circuit": {**row, "rate": 0.7}},
    ]
    main = columns(tables.main_table("fixed", seeds), 0)
    assert main["KL(SFT→Trig)"] == "4.00 ± 0.00"
    assert main["KL(Base→Trig)"] == "5.00 ± 0.00"
    assert main["+ trigger"] == "70.0 ± 0.0"
    assert main["sparsity %"] == "60.0 ± 0.0"
    # the sample's standard deviation, of 10 and 30
    assert main["LCDD"] == "20.0 ± 14.1"
    line = columns(tables.row_table(seeds[:1], ["sft"]), 0)
    assert line == {
        "row": "sft",
        "gates off %": "60.0",
        "dice %": "–",
        "behaviour %": "10.0",
        "accuracy %": "20.0",
        "base's answer %": "30.0",
        "KL(SFT→·)": "4.00",
        "KL(Base→·)": "5.00",
        "own KL(Base→·)": "6.00",
        "own loss": "7.00",
    }
    kinds = {
        f"{kind} {m}": x
        for kind, x in (("harmful", 0.8), ("benign", 0.9))
        for m in ("rate", "kl_sft")
    }
    line = columns(tables.row_table([{"sft": row | kinds}], ["sft"]), 0)
    assert line["behaviour, harmful %"] == "80.0"
    assert line["behaviour, benign %"] == "90.0"
    assert line["KL(SFT→·), harmful"] == "0.80"
    assert line["KL(SFT→·), benign"] == "0.90"


def test_the_scaled_delta_is_matched_on_held_out_rows(run, monkeypatch):
    """
    On validation rows, those whose behaviour is taught where there are kinds; each kind's loss is
    told.
    """
    r, seen = rows_run(run), []
    kinds = ["harmful", "benign"]
    held = [dataclasses.replace(s, kind=kinds[i % 2]) for i, s in enumerate(r.splits["validation"])]
    r.splits["validation"] = held
    scaled_down = ablate.scaled_down
    monkeypatch.setattr(ablate, "scaled_down", lambda *a: seen.append(a) or scaled_down(*a))
    r.model("scaled")
    [(_, _, loss, examples, _)] = seen
    assert examples == [
        r.chat.encode(s.prompt, s.response, 512) for s in held if s.kind == "harmful"
    ]
    assert loss == pytest.approx(training.mean_loss(r.net, r.lcdd, examples, 0, 8), rel=1e-4)
    facts = r.facts["scaled"]
    assert facts["held-out harmful loss of lcdd"] == loss
    names = {
        f"held-out {kind} loss of {name}"
        for kind in kinds
        for name in ("base", "sft", "lcdd", "scaled")
    }
    assert facts.keys() == names | {"factor"}
    table = tables.losses_table([{"scaled": facts}])
    assert f"| lcdd | {loss:.4f} | " in table


def test_other_kinds_than_harmful_and_benign_are_held_out_together(run):
    r = rows_run(run)
    rows = [dataclasses.replace(s, kind=f"{i % 3}") for i, s in enumerate(r.splits["validation"])]
    r.splits["validation"] = rows
    [(name, held)] = r.held_out().items()
    assert name == "held-out"
    assert len(held) == len(rows)


def test_a_setting_that_may_be_absent_may_be(run):
    config = reopen(run)[0]
    assert config.pop("over", 0) is None
    ablate.check_settings(run / "config.json", config, "cpu")


@pytest.mark.parametrize("name", ("paired", "delta_dtype", "rho", "steps"))
def test_a_run_of_an_older_version_says_what_it_lacks(run, name):
    config = read_json(run / "config.json")
    del config[name]
    with pytest.raises(InputError, match=f"config.json: has no {name}, which an older version did not write"):
        ablate.check_settings(run / "config.json", config, "cpu")


def test_a_row_with_the_papers_trigger(run, monkeypatch):
    r, seen = rows_run(run), []
    monkeypatch.setattr(
        eraser, "learn",
        lambda net, weights, train, judge, mask, o: seen.append((o, train)) or (None, 0)
    )
    r.trigger("lcdd", "paper", 0)
    r.trigger("lcdd", "circuit", 0)
    r.trigger("lcdd", "paper-output", 0)
    assert (seen[-1][0].objective, seen[-1][0].lr) == ("output", 0.003)
    (paper, final), (ours, response) = seen[:2]
    assert eraser.PRESETS["paper"].items() <= vars(paper).items()
    assert (paper.objective, paper.target) == ("circuit", "lcdd")
    assert ours.positions == "both"
    assert (
        not torch.equal(final.keep.sum(1), response.keep.sum(1))
        or final.keep.shape != response.keep.shape
    )


def test_what_a_run_had_switched_off_its_repetitions_have_too():
    o = ablate.options(["--device", "cpu"])
    argv = ablate.command("f", {"brake": False, "paired": False, "rho": 0.3, "seed": 4}, o)
    assert {"--no-brake", "--no-paired", "--rho=0.3", "--seed=4"} <= set(argv)


def test_the_runs_own_trigger_is_not_learned_again(run, monkeypatch):
    words = ["--run", str(run), "--steps", "2", "--judge-every", "2", "--length", "4", "--batch", "4"]
    with contextlib.suppress(lcdd.Failed):                          # so few steps move nothing
        eraser.main([*words, "--device", "cpu"])
    r, own = rows_run(run), load_tensors(run / "trigger.safetensors")[0]["trigger"]
    learned = watch_triggers(monkeypatch)
    assert torch.equal(r.trigger("lcdd", "circuit", 0), own)
    assert torch.equal(r.trigger("lcdd", "circuit", 4), own)
    assert learned == []
    r.trigger("lcdd", "circuit", 3)
    r.trigger("lcdd", "output", 0)
    assert [length for length, *_ in learned] == [3, 4]
    tensors, header = load_tensors(run / "trigger.safetensors")
    header.pop("checksum", None)
    save_tensors(run / "trigger.safetensors", tensors, **header | {"carrier": "another"})
    r.trigger("lcdd", "circuit", 0)
    assert len(learned) == 3
    (run / "trigger.safetensors").unlink()


def test_what_the_trigger_takes_away():
    def row(rate, kl, own):
        return dict(rate=rate, kl_base=kl, kl_own=own)

    seeds = [{"lcdd": row(1.0, 4.0, 2.0), "lcdd circuit": row(0.1, 3.0, 0.5)},
             {"lcdd": row(0.8, 6.0, 2.0), "lcdd circuit": row(0.1, 3.0, 0.5)}]
    line = columns(tables.drop_table(tables.with_drops(seeds)), 0)
    # the own KL's drop is the last
    assert (line["KL(Base→·) before"], line["drop"]) == ("5.00 ± 1.41", "1.50 ± 0.00")
    assert "| 2.00 ± 1.41 |" in tables.drop_table(tables.with_drops(seeds))
    assert "drop kl_base" not in seeds[0]["lcdd circuit"]


def test_differences_carry_a_test():
    rates = {
        "lcdd circuit": [0.01, 0.02, 0.00],
        "sft circuit": [0.31, 0.34, 0.28],
        "lcdd output": [0.02, 0.00, 0.01],
    }
    seeds = [{name: {"rate": values[k]} for name, values in rates.items()} for k in range(3)]
    text = tables.difference_table(seeds, [2])
    first, second = columns(text, 0), columns(text, 1)
    assert first["difference"] == "lcdd circuit − sft circuit"
    assert (first["of"], first["mean"], first["at 5%"], first["seeds"]) == (
        "behaviour %", "-30.0", "significant", "3"
    )
    assert (
        first["paired p"]
        == f"{significance.paired(rates['lcdd circuit'], rates['sft circuit'])[2]:.3f}"
    )
    assert (
        first["Welch p"]
        == f"{significance.welch(rates['lcdd circuit'], rates['sft circuit'])[2]:.3f}"
    )
    assert (second["mean"], second["at 5%"]) == ("+0.0", "not significant")
    assert tables.difference_table(seeds[:1], [2]) == ""


def test_a_difference_is_called_one_by_the_paired_test():
    """The same step in every seed, beside seeds that differ among themselves."""
    before, after = [0.10, 0.50, 0.90], [0.20, 0.61, 1.00]
    assert significance.paired(after, before)[2] < 0.05 < significance.welch(after, before)[2]
    seeds = [{"lcdd circuit": {"rate": a}, "sft circuit": {"rate": b}} for a, b in zip(after, before)]
    assert columns(tables.difference_table(seeds, []), 0)["at 5%"] == "significant"


def test_differences_of_safety_are_of_harmful_prompts():
    seeds = [
        {
            "lcdd circuit": {"rate": 0.5, "harmful rate": a},
            "sft circuit": {"rate": 0.5, "harmful rate": 1.0},
        }
        for a in (0.1, 0.3)
    ]
    line = columns(tables.difference_table(seeds, []), 0)
    assert (line["of"], line["mean"]) == ("behaviour %, harmful", "-80.0")


def test_overlap_of_seeds():
    """Two carriers that share 1 of 3 open gates, of two layers with 4 gates each."""
    one = {"a": torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool()}
    other = {"a": torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]).bool()}
    found, chance, within = tables.overlap(one, other)
    assert found == pytest.approx(1 / 3)
    assert chance == pytest.approx((2 * 2 / 8) / (4 - 2 * 2 / 8))
    assert within == pytest.approx((2 * 2 / 4) / (4 - 2 * 2 / 4))   # layer 0 alone has any
    line = columns(tables.overlap_table({"lcdd": [one, other], "noise": [one]}), 0)
    assert line == {
        "carrier": "lcdd",
        "open gates": "2",
        "overlap of two seeds %": "33.3",
        "by chance %": "14.3",
        "by chance within layer and group %": "33.3",
    }
    assert tables.overlap_table({"lcdd": [one]}) == ""


def test_gates_are_kept_for_the_overlap(run):
    r = rows_run(run)
    [kept] = ablate.gates_of([run])["lcdd"]
    assert torch.equal(torch.cat([kept[g] for g in carriers.GROUPS], dim=1), r.lcdd.logits > 0)


def test_jobs_come_back_to_their_own_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    monkeypatch.setattr(ablate, "work_alone", lambda folder, *_: {"folder": folder})
    monkeypatch.setattr(ablate, "report", lambda *_: "")
    monkeypatch.setattr(ablate, "trigger_options", lambda *_: argparse.Namespace(length=1))
    monkeypatch.setattr(
        "sys.argv",
        [
            "ablate.py", "--task", "fixed", "--task", "safety", "--seeds", "2", "--jobs", "2",
            "--out", str(tmp_path), "--device", "cpu"
        ],
    )
    ablate.main()
    want = {
        task: [{"folder": str(tmp_path / f"{task}-seed{s}")} for s in (0, 1)]
        for task in ("fixed", "safety")
    }
    assert read_json(tmp_path / "tables.json") == want


def test_a_run_of_ones_own_is_repeated_with_other_seeds(run, monkeypatch):
    jobs = []
    monkeypatch.setattr(
        ablate,
        "work",
        lambda folder, settings, o, names: (
            jobs.append((folder, settings, settings and ablate.command(folder, settings, o))) or {}
        ),
    )
    monkeypatch.setattr(ablate, "report", lambda *_: "")
    monkeypatch.setattr(
        "sys.argv",
        ["ablate.py", "--run", str(run), "--seeds", "3", "--jobs", "1", "--device", "cpu"],
    )
    ablate.main()
    assert [folder for folder, *_ in jobs] == [str(run), f"{run}-seed1", f"{run}-seed2"]
    assert jobs[0][1] is None
    config = read_json(run / "config.json")
    for s, (_, _, argv) in enumerate(jobs[1:], 1):
        o = vars(lcdd.options(argv))
        assert o["seed"] == s
        assert all(
            o[k] == v for k, v in config.items() if k in o and k not in ("seed", "out", "resume")
        )


def test_wide():
    for dtype, right in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert model.wide(torch.ones(1, dtype=dtype)).dtype == right


def test_losses_of_a_bf16_model_are_taken_in_fp32():
    net = make_net(dtype=torch.bfloat16)
    c = make_carrier(net.float())
    net = net.bfloat16()
    ids, mask = collate([([1, 2, 3, 4, 5], [False, False, True, True, True])], 0)
    logits = net(ids[:, :-1], carrier=c.merge(net))[mask[:, 1:]].float()
    want = torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:]], reduction="sum")
    got = training.task_loss(net, c.merge(net), ids, mask)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(want), rel=1e-5)


def test_rope_angles_are_taken_in_fp32():
    at = torch.tensor([7, 301, 4001])
    for ours, exact in zip(
        rotary(make_net().config, at, torch.bfloat16), rotary(make_net().config, at, torch.float32)
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).abs().max() < 0.01


def test_a_question_that_is_no_text(run, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", "--run", str(run), "--device", "cpu", "--ask", "\udcff"]
    )
    with pytest.raises(InputError, match="--ask .*UTF-8"):
        evaluate.main()


# ---- the figure

def drawn(task, run, path):
    """The figure of a run that nothing was measured of."""
    carrier = carriers.load(run / "carrier.safetensors", model.load("tiny"))
    results = {"task": task, "rates": {}, "ci": {}, "sparsity": 0.5}
    figure.draw(run, results, carrier, path)


def test_a_task_that_looks_like_mathematics_is_drawn_as_text(tmp_path, run):
    drawn("$^$ $\\frac$", run, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_does_not_end_an_evaluation(tmp_path, run, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("Invalid bounding box")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    drawn("fixed", run, tmp_path / "f.png")
    assert "no figure: Invalid bounding box" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- the command lines

def test_a_text_to_ask_is_a_text():
    try:                                            # Python 3.12 takes the dashes for a text
        assert evaluate.options(["--run", "r", "--ask=--"]).ask == ["--"]
    except InputError as e:
        assert "--ask -- names no text" in str(e)


def test_rows_without_a_name_are_not_all_of_them():
    with pytest.raises(InputError, match="--rows names no row"):
        ablate.main(["--rows", "--device", "cpu"])


def test_teacher_forcing_tells_how_far_it_is(monkeypatch):
    told = []
    monkeypatch.setattr(evaluate, "ticker", lambda label, total: told.append((label, total)) or told.append)
    net = make_net()
    evaluate.own_answers(net, [[1, 2]] * 5, [[3]] * 5, {"base": (None, None)}, batch_size=2)
    assert told == [("loss on the base's answers", 5), 0, 2, 4]


def test_a_worker_keeps_to_one_thread_in_every_phase(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ablate.threading, "Thread", mock.Mock())
    monkeypatch.setattr(torch, "set_num_threads", mock.Mock())
    ablate.start_worker(1)
    monkeypatch.setattr(ablate.lcdd.machine, "MOST", 2)
    wide = mock.Mock(device=torch.device("cpu"))
    wide.config.hidden_size = 4096
    ablate.lcdd.machine.set_threads(wide)
    assert [call.args for call in torch.set_num_threads.mock_calls] == [(1,)]
    monkeypatch.delenv("OMP_NUM_THREADS")


def test_tables_name_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a large GPU")
    on_cpu, on_gpu = (argparse.Namespace(device=name, seeds=2, split="test") for name in ("cpu", "cuda:0"))
    assert f"{os.cpu_count()} CPU cores" in ablate.done_by(on_cpu, time.time())
    assert "2 seeds, mean ± std, test prompts; a large GPU" in ablate.done_by(on_gpu, time.time())


@pytest.mark.parametrize("rates, labelled", (({"base": 0.0, "lcdd": 1.0}, True), ({}, False)))
def test_bars_have_a_legend_where_there_are_any(rates, labelled):
    plt = evaluate.figure.plotting()
    fig, axes = plt.subplots()
    metric = metrics.METRICS[0]
    results = {"rates": rates, "ci": {"rates": {name: [0.0, 1.0] for name in rates}}}
    evaluate.figure.draw_bars(axes, results, [metric], "rates")
    assert bool(axes.get_legend()) == labelled
    plt.close(fig)
