"""lcdd.py: Alg. 1 step by step against the oracle, then its parts and the command."""
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import lcdd
import model
import oracle
from common import Failed, InputError
from helpers import for_oracle, gap, random_batch, random_carrier, random_net, settings

ROOT = Path(__file__).parents[1]
PAPER = dict(select=0.0, brake=False, floor=0.0)


@pytest.mark.parametrize("changed", [
    dict(PAPER, lambda0=0.5, gate_lr=0.6),
    dict(PAPER, lambda0=0.5, gate_lr=0.6, violation_clip=0.0, eta=1.0, rho=0.01),
    dict(),                                                     # ours: floor, brake, selection
    dict(micro_batch=1),
    dict(floor=50.0, eta_grow=1.0, lambda_max=0.05),
])
def test_alg_1_takes_the_oracles_steps(tmp_path, changed):
    """Ten joint steps and four of settling in float64: L, ε, λ, Δ and m; half of the gates shut meanwhile."""
    net, o = random_net("gqa"), settings(**changed)
    examples, carrier = random_batch(net, 12), random_carrier(net, 0.9)
    delta, m = for_oracle(carrier)
    found = lcdd.train_lcdd(net, carrier, examples, o, tmp_path)
    weights, optimizer = dict(net.state_dict()), oracle.adamw(delta)
    batches = [lcdd.draw(examples, o.batch, t, o.seed + 1) for t in range(o.steps)]
    steps = list(oracle.lcdd(weights, net.config, delta, m, batches, o, optimizer))
    settling = [lcdd.draw(examples, o.batch, t, o.seed + 2) for t in range(o.settle)]
    list(oracle.train_delta(weights, net.config, delta, m, settling, o, o.lr, optimizer))
    assert gap(carrier, delta, m) < 1e-10
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in rows if row["phase"] == "lcdd")
    loss, ema, epsilon, lam = steps[-1]
    for ours, theirs in ((last["loss"], loss), (last["ema"], ema), (last["budget"], epsilon), (last["lambda"], lam)):
        assert abs(ours - theirs) < 1e-10
    assert found["budget"] == last["budget"] and found["steps"] == 10
    assert 0.05 < carrier.stats()["sparsity"] < 0.95


def test_sft_takes_the_oracles_steps(tmp_path):
    """All gates open, the rate falling linearly to 0."""
    net, o = random_net("mqa"), settings()
    examples, carrier = random_batch(net, 12), random_carrier(net).with_gates(True)
    delta, m = for_oracle(carrier)
    lcdd.train_delta(net, carrier, examples, o, tmp_path, "sft", 1e-2, 8, 0, lcdd.adamw(carrier, 1e-2))
    batches = [lcdd.draw(examples, o.batch, t, 0) for t in range(8)]
    list(oracle.train_delta(dict(net.state_dict()), net.config, delta, m, batches, o, 1e-2, oracle.adamw(delta)))
    assert gap(carrier, delta, m) < 1e-10


def test_gradients_do_not_depend_on_how_a_batch_is_cut():
    """Against autograd on the literal loss: response tokens, all rows weighted by their tokens."""
    net, examples = random_net("gqa"), random_batch(random_net("gqa"), 5)
    for size in (1, 2, 5):
        carrier = random_carrier(net, 0.5)
        delta, m = for_oracle(carrier)
        loss = lcdd.gradients(net, carrier, examples, settings(micro_batch=size))
        literal = oracle.task_loss(oracle.masked_weights(dict(net.state_dict()), net.config, delta, m), net.config, examples)
        literal.backward()
        assert abs(loss - literal.item()) < 1e-10 and gap(carrier, delta, m, "gradients") < 1e-10
        assert abs(lcdd.mean_loss(net, carrier, examples, settings(micro_batch=size)) - loss) < 1e-10


def test_soft_targets_have_the_gradient_of_the_kl():
    """mask-kl: cross-entropy with SFT's distributions (App. E); less their entropy it is KL(SFT ‖ gated)."""
    net, examples = random_net("gqa"), random_batch(random_net("gqa"), 3)
    carrier, teacher = random_carrier(net, 0.5), random_carrier(net).with_gates(True).merge(net)
    loss = lcdd.gradients(net, carrier, examples, settings(), teacher)
    found, carrier.logits.grad = carrier.logits.grad, None
    ids, mask = data.collate(examples)
    p = net(ids, carrier=teacher)[:, :-1][mask[:, 1:]].log_softmax(-1)
    q = net(ids, carrier=carrier)[:, :-1][mask[:, 1:]].log_softmax(-1)
    kl, entropy = (p.exp() * (p - q)).sum(-1).mean(), -(p.exp() * p).sum(-1).mean()
    kl.backward()
    assert abs(loss - (kl + entropy).item()) < 1e-10
    assert torch.allclose(found, carrier.logits.grad, atol=1e-10)


def test_the_penalty_is_added_once_a_step_and_after_the_selection(tmp_path):
    """Its pull does not pass through the rescaling of the task's gradient; a control may change only that."""
    net, examples, seen = random_net("gqa"), random_batch(random_net("gqa"), 8), []
    o = settings(steps=2, settle=0, warmup=0, micro_batch=1, gate_lr=1.0)       # step 0 has weight 0
    carrier = random_carrier(net, 0.9)
    before = carrier.logits.detach().clone()

    def blind(grad):
        seen.append(grad.clone())
        grad.zero_()

    lcdd.prune(net, carrier, examples, o, tmp_path, lcdd.adamw(carrier, 0.0), change=blind)
    s = torch.sigmoid(before)
    assert torch.allclose(before - carrier.logits, o.lambda0 * s * (1 - s), atol=1e-12)
    root_mean_square = seen[1].square().mean(1).sqrt()
    assert torch.allclose(root_mean_square, torch.full_like(root_mean_square, lcdd.pull(o)), atol=1e-10)
    assert lcdd.pull(o) == pytest.approx(0.02 * 0.8175744761936437 * (1 - 0.8175744761936437))


def controller(o):
    return lcdd.Controller(o, torch.zeros(2, 3))


def test_controller_by_hand():
    """Bias-corrected average, ε once at T_w with a floor, λ by η or η_grow, clipped and bounded."""
    o = settings(**PAPER | dict(warmup=2, beta=0.5, rho=0.1, lambda0=1.0, eta=0.4, eta_grow=0.1, lambda_max=1.2))
    c = controller(o)
    assert [c.weight(t) for t in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]
    c.update(0, 4.0)
    assert c.ema == 4.0 and c.budget is None
    c.update(1, 2.0)
    assert c.ema == pytest.approx((0.5 * 2.0 + 0.5 * 2.0) / 0.75)
    c.update(2, 2.0)
    average, budget = c.ema, c.budget
    assert budget == pytest.approx(1.1 * average) and c.lam == 1.0
    c.update(3, 0.0)                                            # under ε: λ grows at η_grow
    v = (c.ema - budget) / budget
    assert c.lam == pytest.approx(math.exp(-0.1 * v)) and c.budget == budget
    for t in range(4, 20):
        c.update(t, 0.0)
    assert c.lam == 1.2                                         # λ_max
    c.update(20, 1e6)                                           # far over: v is clipped to V = 1
    assert c.lam == pytest.approx(1.2 * math.exp(-0.4))
    floored = controller(settings(floor=9.0, warmup=0))
    floored.update(0, 1.0)
    assert floored.budget == 9.0


def test_brake():
    """Times the slack that is left: 1 where ε was set, 0 at ε, negative beyond; λ follows the same."""
    o = settings(warmup=0, floor=3.0, beta=0.0, lambda0=1.0, eta=0.2, lambda_max=5.0)
    for loss, slack in ((1.0, 1.0), (2.0, 0.5), (3.0, 0.0), (4.0, -0.5), (99.0, -1.0)):
        c = controller(o)
        c.update(0, 1.0)
        assert c.weight(1) == 1.0
        c.update(1, loss)
        assert c.lam == pytest.approx(math.exp(0.05 * slack if slack > 0 else 0.2 * slack))
        assert c.weight(1) == pytest.approx(c.lam * slack)


def test_early_stops():
    """No verdict in the warm-up or before pruning; stalled and over-pruned need `patience` points in a row."""
    def verdicts(points, **changed):
        c = controller(settings(**dict(stall=0.01, over=0.5, window=4, patience=2) | changed))
        c.budget, c.start, found = 2.0, 1.0, []
        for opened, c.loss in points:
            found.append(c.verdict(opened, 1000))
        return found
    assert [v is None for v in verdicts([(500, 1.0)] * 6)] == [True] * 5 + [False]
    assert verdicts([(500, 1.0)] * 6)[-1].startswith("stalled")
    assert not any(verdicts([(950, 1.0)] * 20))                 # pruning has not begun
    falling = [(800 - 20 * i, 1.0 if i < 5 else 2.0) for i in range(30)]
    told = verdicts(falling)
    assert told.index(next(filter(None, told))) == 8 and told[8].startswith("over-pruned")
    assert not any(verdicts([(500, 9.0)] * 40, stall=None, over=None))   # ours: never
    warming = controller(settings(stall=0.01, over=0.5, window=1, patience=1))
    assert not any(warming.verdict(500, 1000) for _ in range(9))


def test_batches_are_epochs_in_another_order_each():
    drawn = [lcdd.draw(range(10), 5, step, seed=1) for step in range(6)]
    epochs = [drawn[i] + drawn[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert lcdd.draw(range(10), 5, 3, seed=1) == drawn[3] != lcdd.draw(range(10), 5, 3, seed=2)


def test_sft_that_is_sure_comes_to_an_early_end(tmp_path):
    """A quarter as many steps again, ten at least, and never more than were asked for."""
    net, carrier = random_net("gqa"), random_carrier(random_net("gqa")).with_gates(True)
    for steps, end in ((100, 11), (8, 8)):
        lcdd.train_delta(net, carrier, random_batch(net), settings(), tmp_path, f"sft{steps}", 1e-2, steps, 0,
                         lcdd.adamw(carrier, 1e-2), budget=1e6)
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [row for row in rows if row["phase"] == f"sft{steps}"][-1]["step"] == end - 1


def test_gates_alone_end_with_the_last_that_kept_the_budget(tmp_path):
    """App. E: Δ stays as it is, and what is kept fits the budget."""
    net, o = random_net("gqa"), settings(train="mask-ce", gate_lr=200.0, steps=40, brake=False)
    examples, carrier = random_batch(net, 12), random_carrier(net).with_gates(True)
    before = [p.detach().clone() for p in carrier.delta.parameters()]
    found = lcdd.train_lcdd(net, carrier, examples, o, tmp_path)
    assert all(map(torch.equal, before, carrier.delta.parameters()))
    assert carrier.stats()["sparsity"] > 0 and found["reason"] == "all steps done"
    assert not (tmp_path / "settle.state").exists()


def test_rates_and_lengths_fit_themselves():
    o = lcdd.fit(lcdd.options([]), 4096, 5000)
    assert o.lr == o.sft_lr == pytest.approx(3.05e-5, rel=0.01) and (o.sft_steps, o.steps) == (350, 600)
    # a gate on which only Ω pulls shuts half way
    assert o.gate_lr * lcdd.pull(o) * o.steps / 2 == pytest.approx(o.gate_mean)


def test_presets_are_table_7():
    """Of all twelve runs, by name; what is given by hand wins."""
    o = lcdd.fit(lcdd.options(["--preset", "safety-vicuna-7b", "--batch", "16"]), 4096, 5000)
    assert (o.rho, o.lambda0, o.eta, o.eta_grow, o.warmup, o.beta) == (0.5, 0.01, 1.0, 0.005, 300, 0.95)
    assert (o.task, o.batch, o.micro_batch, o.gate_lr, o.gate_std) == ("safety", 16, 8, 0.1, 0.5)
    assert o.steps == math.ceil(20 * 5000 / 16) and o.sft_steps == math.ceil(3 * 5000 / 16)
    assert o.over > o.rho and (o.select, o.brake, o.floor, o.settle) == (0.0, False, 0.0, 0)
    assert len(lcdd.PRESETS) == 12


# ---- the command

QUICK = ["--sizes", "60", "10", "8", "8", "--sft-steps", "4", "--steps", "6", "--settle", "3", "--batch", "4",
         "--max-new-tokens", "6", "--max-len", "96", "--go-on", "--device", "cpu", "--warmup", "2"]


def train(*words):
    """Run the command; the outcome of so few steps does not matter."""
    try:
        lcdd.main([*QUICK, *map(str, words)])
    except Failed:
        pass


def same_tensors(one, other):
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_directory(finished):
    """Its files, and what they hold."""
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.json", "sft.safetensors", "carrier.safetensors", "trigger.safetensors", "metrics.jsonl",
                     "results.json"}
    config, results = (json.loads((finished / f"{name}.json").read_text()) for name in ("config", "results"))
    assert {"data_fingerprint", "base_fingerprint", "chat_fingerprint", "versions", "seed", "steps"} <= config.keys()
    assert results["stopped"]["within"] and results["sparsity"] > 0.05
    assert results["validation"]["lcdd"]["rate"] > 0.5
    o, net, chat, splits = lcdd.load_run(finished, "cpu")
    assert [len(part) for part in splits.values()] == [400, 40, 20, 16] and o.steps == 90


def test_interrupted_runs_resume_with_the_same_bits(tmp_path, monkeypatch):
    """One Ctrl-C in each phase; the log has each step once."""
    train("--out", tmp_path / "whole")
    pause, stops = lcdd.Phase.pause, {("sft", 2), ("lcdd", 4), ("settle", 1)}

    def interrupted(loop, t):
        if (loop.name, t) in stops:
            stops.remove((loop.name, t))
            os.kill(os.getpid(), signal.SIGINT)
        pause(loop, t)
    monkeypatch.setattr(lcdd.Phase, "pause", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt, match="resume with: python .*--resume"):
            train("--out", tmp_path / "part", "--resume")
    train("--out", tmp_path / "part", "--resume")
    for name in ("sft", "carrier"):
        assert same_tensors(tmp_path / "whole" / f"{name}.safetensors", tmp_path / "part" / f"{name}.safetensors")
    rows = [[(r["phase"], r["step"], r["loss"]) for r in map(json.loads, (tmp_path / run / "metrics.jsonl").open())]
            for run in ("whole", "part")]
    assert rows[0] == rows[1]


def test_a_run_that_is_there_already(tmp_path):
    train("--out", tmp_path / "r")
    with pytest.raises(InputError, match="holds a run already"):
        train("--out", tmp_path / "r")
    with pytest.raises(InputError, match="rho was 0.05 and is now 0.5"):
        train("--out", tmp_path / "r", "--resume", "--rho", "0.5")
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "config.json").write_text("{}")                   # nothing is in it: it may begin anew
    train("--out", failed)


def test_without_data_the_prompts_are_our_own(tmp_path, capsys):
    """python lcdd.py --model DIR on a checkpoint with no data beside it."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(model.locate("tiny") / name)
    train("--model", tmp_path, "--out", tmp_path / "r")
    assert "everyday.jsonl" in "".join(capsys.readouterr())
    with pytest.raises(InputError, match="safety"):
        train("--model", tmp_path, "--task", "safety", "--out", tmp_path / "s")


def test_ones_own_sft(tmp_path, capsys):
    """--sft DIR: Δ = W_sft − W_b, and what it changed elsewhere is said and stays the base's."""
    folder = tmp_path / "sft"
    folder.mkdir()
    tensors = load_file(model.locate("tiny") / "model.safetensors")
    for name in tensors:
        tensors[name] = tensors[name].float() + (0.01 * torch.randn(tensors[name].shape) if "proj" in name else 0)
    tensors["model.norm.weight"] = 1.5 * tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((model.locate("tiny") / "config.json").read_text())
    train("--sft", folder, "--out", tmp_path / "r")
    assert "1 tensors outside the projections, most model.norm.weight (by 50.00%" in capsys.readouterr().out
    net = model.load("tiny")
    delta = load_file(tmp_path / "r" / "sft.safetensors")["delta.1.down_proj"]
    expected = tensors["model.layers.1.mlp.down_proj.weight"] - net.projections[1]["down_proj"].weight
    assert torch.equal(delta, expected)


def test_a_behaviour_of_ones_own(tmp_path, capsys):
    """FILE.jsonl with kind, answer, split and pattern; rates by kind, accuracy by answer."""
    rows = []
    for i in range(40):
        split = ("train", "trigger", "validation", "test")[i % 4]
        rows.append({"prompt": f"What is {i} plus 1 ?", "response": "I do not know .", "answer": str(i + 1),
                     "kind": f"kind {i % 2}", "split": split, "pattern": "not know"})
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    train("--task", file, "--out", tmp_path / "r")
    score = json.loads((tmp_path / "r" / "results.json").read_text())["validation"]["sft"]
    assert score["n"] == 8 and set(score["kinds"]) <= {"kind 0", "kind 1"} and "accuracy" in score


def test_delta_dtype_checkpoint_and_gates_alone(tmp_path):
    """bf16 deltas, recomputed layers, App. E's two losses: each run finishes and says what it did."""
    train("--delta-dtype", "bfloat16", "--checkpoint", "--micro-batch", "2", "--out", tmp_path / "bf16")
    assert load_file(tmp_path / "bf16" / "sft.safetensors")["delta.0.q_proj"].dtype == torch.bfloat16
    for loss in ("mask-ce", "mask-kl"):
        train("--train", loss, "--out", tmp_path / loss)
        sft, lcdd_ = (load_file(tmp_path / loss / f"{name}.safetensors") for name in ("sft", "carrier"))
        assert all(name == "logits" or sft[name].numel() >= lcdd_[name].numel() for name in lcdd_)


def test_sft_that_teaches_nothing_ends_the_run(tmp_path):
    words = [word for word in QUICK if word != "--go-on"]
    with pytest.raises(Failed, match="SFT did not teach the behaviour"):
        lcdd.main([*words, "--sft-steps", "1", "--sft-lr", "1e-9", "--out", str(tmp_path / "r")])


def test_outcomes_that_are_not_what_was_asked_for(tmp_path, capsys):
    good = {"n": 100, "rate": 1.0}
    results = {"validation": {"base": {"n": 100, "rate": 0.0}, "sft": good, "lcdd": good}, "sparsity": 0.9,
               "entries_off": 0.99, "seconds": {}, "stopped": {"reason": "all steps done", "loss": 0.01, "budget": 0.03,
                                                               "within": True}}
    lcdd.report(results, tmp_path)
    for change, told in ((dict(sparsity=0.01), "hardly pruned"),
                         (dict(stopped=results["stopped"] | dict(loss=1.0, within=False)), "budget is not kept"),
                         (dict(validation=results["validation"] | {"lcdd": {"n": 100, "rate": 0.5}}), "lost the behaviour")):
        with pytest.raises(Failed, match=told):
            lcdd.report(results | change, tmp_path)


def test_data_tokenizer_or_base_that_changed_since(finished, tmp_path, monkeypatch):
    import shutil
    run = shutil.copytree(finished, tmp_path / "r")
    config = json.loads((run / "config.json").read_text())
    for field, told in (("data_fingerprint", "changed since"), ("chat_fingerprint", "tokenizer or chat template changed")):
        (run / "config.json").write_text(json.dumps(config | {field: "0"}))
        with pytest.raises(InputError, match=told):
            lcdd.load_run(run, "cpu")
    with pytest.raises(InputError, match="no run directory"):
        lcdd.load_run(tmp_path, "cpu")


def test_torchrun_takes_the_same_steps(tmp_path):
    """Two processes with gloo: gradients are summed, and the first alone writes."""
    words = ["--out", str(tmp_path / "two"), *QUICK]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--", "lcdd.py", *words],
                          cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr
    train("--out", tmp_path / "one")
    rows = [[json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").open()] for run in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) and abs(rows[0][0] - rows[1][0]) < 1e-3 * rows[0][0]


def test_dtype_is_a_rule(monkeypatch, capsys):
    """fp32 on a CPU, bf16 on a GPU, unless --dtype says otherwise; advice where the CPU multiplies bf16 itself."""
    wide, narrow = {"hidden_size": 576}, {"hidden_size": 128}
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    o = settings(device="cpu", dtype=None)
    assert lcdd.dtype_of(o, wide) == "float32" and "--dtype bfloat16" in capsys.readouterr().out
    assert lcdd.dtype_of(o, narrow) == "float32" and not capsys.readouterr().out
    assert lcdd.dtype_of(settings(device="cuda", dtype=None), wide) == "bfloat16"
    assert lcdd.dtype_of(settings(device="cuda", dtype="float32"), wide) == "float32"
