"""evaluate.py and ablate.py: KLs against a closed form and a loop, intervals, the scaled delta."""
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ablate
import carrier
import data
import evaluate
import lcdd
from data import Sample
from test_eraser import CONFIG, make_carrier, make_net, prompts


def answers(n=7):
    return [p[:5] for p in prompts(n, seed=9)]


def test_kl_against_a_loop():
    net = make_net()
    c = make_carrier(net)
    tau = torch.randn(3, 16, dtype=torch.float64)
    conditions = {"base": (None, None), "lcdd": (c.merge(net), None), "trig": (c.merge(net), tau)}
    got = evaluate.kl_divergences(net, prompts(), answers(), conditions, [("base", "lcdd"), ("base", "trig"), ("lcdd", "trig")], batch_size=3, chunk=4)
    for (p, q), values in got.items():
        for i, (x, y) in enumerate(zip(prompts(), answers())):
            total = 0.0
            for t in range(len(y)):                               # each token given the prompt and the tokens before it
                seen = torch.tensor([x + y[:t]])
                a, b = (net(seen, carrier=conditions[k][0], trigger=conditions[k][1])[0, -1].softmax(-1) for k in (p, q))
                total += sum(float(a[v] * (a[v] / b[v]).log()) for v in range(CONFIG.vocab_size))
            assert float(values[i]) == pytest.approx(total / len(y), abs=1e-10)
        assert values.min() > 0


def test_kl_against_a_closed_form():
    """Hidden states that do not matter: with a head of two known rows the KL is that of two categorical distributions."""
    class Fixed:
        device, config = torch.device("cpu"), CONFIG
        head = staticmethod(lambda h: h)

        def __call__(self, ids, carrier, trigger, keep, head):
            return torch.tensor(carrier).log().expand(int(keep.sum()), -1)
    p, q = [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]
    got = evaluate.kl_divergences(Fixed(), [[1, 2], [3]], [[4], [5, 6]], {"p": (p, None), "q": (q, None)}, [("p", "q"), ("q", "p")])
    want = [sum(a * math.log(a / b) for a, b in zip(*pair)) for pair in ((p, q), (q, p))]
    assert got["p", "q"].tolist() == pytest.approx([want[0]] * 2, abs=1e-6) and got["q", "p"].tolist() == pytest.approx([want[1]] * 2, abs=1e-6)


def test_kl_is_zero_for_equal_models_and_ignores_batches_and_padding():
    net = make_net()
    c = make_carrier(net)
    conditions = {"a": (c.merge(net), None), "b": (c.merge(net), None), "base": (None, None)}
    runs = [evaluate.kl_divergences(net, prompts(), answers(), conditions, [("a", "b"), ("a", "base")], batch_size=n, chunk=k)
            for n, k in ((1, 1024), (4, 3), (64, 1024))]
    assert all(r["a", "b"].abs().max() == 0 for r in runs)
    assert all(torch.allclose(r["a", "base"], runs[0]["a", "base"], atol=1e-12) for r in runs)


def test_wilson_interval():
    assert evaluate.wilson(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)      # published tables
    low, high = evaluate.wilson(0.0, 200)
    assert low == 0 and high == pytest.approx(0.0188, abs=1e-4)


def test_dose_response_ends_are_the_base_and_the_carrier():
    net = make_net(torch.float32)
    c = make_carrier(net)

    class Chat:
        prompt = staticmethod(lambda text, max_len: [int(x) for x in text.split()])
        decode = staticmethod(lambda ids: " ".join(map(str, ids)))
    samples = [Sample(" ".join(map(str, p)), "x") for p in prompts()]
    plain = [net.generate(prompts(), 6, carrier=x) for x in (None, c)]
    assert plain[0] != plain[1]
    for i, dose in enumerate((0.0, 1.0)):
        told = [Sample(s.prompt, Chat.decode(a)) for s, a in zip(samples, plain[i])]
        rates = evaluate.dose_response(net, Chat, {"max_len": 64, "max_new_tokens": 6, "task": "x.jsonl"}, told, c)
        assert rates[dose]["rate"] == 1 and rates[1.0 - dose]["rate"] < 1


def test_scaled_down_delta_has_the_loss_asked_for():
    net = make_net()
    c = make_carrier(net).with_gates(True)
    examples = [(p + a, [False] * len(p) + [True] * len(a)) for p, a in zip(prompts(), net.generate(prompts(), 5, carrier=c, stop=()))]
    full, none = (ablate.mean_loss(net, w, examples, 0) for w in (c.merge(net), None))
    assert full < none
    weights, factor = ablate.scaled_down(net, c, (full + none) / 2, examples, 0, steps=16)
    assert ablate.mean_loss(net, weights, examples, 0) == pytest.approx((full + none) / 2, abs=1e-3 * none) and 0 < factor < 1


def test_mean_loss_is_lcdds_own():
    net = make_net()
    c = make_carrier(net)
    examples = [(p + a, [False] * len(p) + [True] * len(a)) for p, a in zip(prompts(), answers())]
    want = lcdd.gradients(net, c, examples, 4, 0)
    assert ablate.mean_loss(net, c.merge(net), examples, 0, batch_size=2) == pytest.approx(want, rel=1e-10)


def test_ablation_rows_of_a_short_run(tmp_path, monkeypatch):
    out = tmp_path / "t"
    argv = ["--out", str(out / "fixed-seed0"), "--resume", "--sft-steps", "6", "--steps", "5", "--settle", "1", "--warmup", "1", "--n-test", "8", "--n-validation", "8",
            "--n-trigger", "20", "--device", "cpu", "--task", "fixed", "--seed", "0"]
    lcdd.main(argv)
    logged = len(data.read_jsonl(out / "fixed-seed0" / "metrics.jsonl"))
    monkeypatch.setattr(ablate, "command", lambda *_: argv)
    train, taught = lcdd.train_lcdd, []                           # mask-ce trains on the data, mask-kl on the SFT model

    def spy(net, carrier, o, teacher, **rest):
        taught.append((o.train, teacher is not None))
        return train(net, carrier, o=o, teacher=teacher, **rest)
    monkeypatch.setattr(ablate.eraser, "PRESETS", {"tiny": dict(length=4, steps=3, judge_every=3), "paper": {}})
    monkeypatch.setattr(ablate.lcdd, "train_lcdd", spy)
    learn, learned = ablate.eraser.learn, []
    monkeypatch.setattr(ablate.eraser, "learn", lambda *a: learned.append((a[-1].length, a[-1].lr, a[-1].objective)) or learn(*a))
    monkeypatch.setattr("sys.argv", ["ablate.py", "--task", "fixed", "--out", str(out), "--lengths", "2", "--device", "cpu", "--jobs", "1"])
    ablate.main()
    rows = data.read_json(out / "fixed-seed0" / "ablation.json")
    assert len(rows) == 21 + len(ablate.CURVE) and all({"rate", "accuracy", "same", "kl_sft", "kl_base"} <= row.keys() for row in rows.values())
    assert rows["base"]["kl_base"] == 0 and rows["base"]["same"] == 1 and rows["sft"]["kl_sft"] == 0 and rows["base trigger"]["kl_base"] > 0
    assert taught == [("mask-ce", False), ("mask-kl", True)] and rows["sft-long"]["kl_sft"] > 0
    usual = ablate.eraser.options(["--run", str(out / "fixed-seed0")]).lr
    assert learned.count((2, usual / 10, "circuit")) == 2 and learned.count((4, usual, "random")) == 1 and learned.count((4, usual, "output")) == 2
    whole = ablate.Run(out / "fixed-seed0", ablate.options(["--device", "cpu"]))
    assert not all(all(mask) for _, mask in whole.examples())
    whole.config["loss"] = "all"                                  # rows are trained on what the run was trained on
    assert all(all(mask) for _, mask in whole.examples())
    text = (out / "tables.md").read_text()
    for name, label in ablate.CURVE.items():                      # each line of the curve has its own model's numbers
        assert f"| {label} | {100 * rows[f'{name} circuit 2']['rate']:.1f} / " in text and f" / {rows[f'{name} circuit 2']['kl_base']:.2f} | " in text
    assert list(ablate.CURVE.items())[1:3] == [("sft", "plain SFT"), ("sft-long", "SFT for as many steps as LCDD")]
    assert "Table 4" in text and "paper, Qwen3-0.6B" in text and "2 tokens" in text
    phases = [r["phase"] for r in data.read_jsonl(out / "fixed-seed0" / "metrics.jsonl")]
    assert len(phases) == logged and (out / "fixed-seed0" / "rows" / "mask-ce" / "metrics.jsonl").is_file()   # a row is no phase of the run
    before = (out / "fixed-seed0" / "ablation.json").stat().st_mtime_ns
    ablate.main()                                                 # everything is there: nothing is done again
    assert (out / "fixed-seed0" / "ablation.json").stat().st_mtime_ns == before
    carrier.save_tensors(out / "fixed-seed0" / "trigger.safetensors", {"trigger": torch.zeros(7, 128)}, length=7, lr=0.5, loss=1.0)
    own = ablate.trigger_options(out / "fixed-seed0", "cpu")       # a run's own trigger says how the rows' are learned
    assert (own.length, own.lr, own.steps) == (7, 0.5, 3) and not hasattr(own, "loss")

    lcdd_rows = {k: row for k, row in rows.items() if row["of"] == rows["base"]["of"]}
    assert lcdd_rows == rows
    monkeypatch.setattr("sys.argv", ["ablate.py", "--run", str(out / "fixed-seed0"), "--rows", "lcdd circuit", "--lengths", "--device", "cpu"])
    learned.clear()
    ablate.main()                                                 # rows of another trigger are not this run's any more
    assert learned == [(7, 0.5, "circuit")] and set(data.read_json(out / "fixed-seed0" / "ablation.json")) == {"lcdd circuit"}
    for wrong in (["--run", "x", "--task", "fixed"], ["--run", "x", "--out", "y"], ["--seed", "-1"]):
        monkeypatch.setattr("sys.argv", ["ablate.py", "--device", "cpu", *wrong])
        with pytest.raises(data.InputError, match="leave out --task|--seed -1"):
            ablate.main()

    # a row alone, as after an interruption: gates of its own mean channels of its own; and other seeds learn as this one does
    (out / "fixed-seed0" / "ablation.json").unlink()
    channels, asked = ablate.eraser.channels, []
    monkeypatch.setattr(ablate.eraser, "channels", lambda c, *a: asked.append((a[0], c.stats()["gates"]["open"])) or channels(c, *a))
    monkeypatch.setattr("sys.argv", ["ablate.py", "--run", str(out / "fixed-seed0"), "--rows", "mask-ce circuit", "--device", "cpu"])
    learned.clear()
    ablate.main()
    mine = data.read_json(out / "fixed-seed0" / "ablation.json")["mask-ce circuit"]
    assert asked[0][1] == round((1 - mine["sparsity"]) * 4608) and learned == [(7, 0.5, "circuit")]
    seed1 = ablate.Run(out / "fixed-seed0", ablate.options(["--run", str(out / "fixed-seed0"), "--device", "cpu"]))
    seed1.folder = tmp_path
    assert ablate.trigger_options(seed1.o.run or seed1.folder, "cpu").length == 7


def test_interrupted_jobs_save_their_states(tmp_path):
    """SIGTERM to the command alone: the processes of its runs save and end, and nothing new is begun."""
    folder, errors = Path(ablate.__file__).parent, tmp_path / "errors"
    command = [sys.executable, "ablate.py", "--task", "safety", "--seeds", "3", "--jobs", "2", "--out", str(tmp_path / "t"), "--device", "cpu"]
    with errors.open("w") as file, subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=file) as process:
        states = [tmp_path / "t" / f"safety-seed{n}" / "state.safetensors" for n in (1, 2)]      # the last are begun first
        while process.poll() is None and not all(s.is_file() for s in states):
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 130
    assert errors.read_text() == "interrupted\n" and all(s.is_file() for s in states)
    assert not (tmp_path / "t" / "safety-seed0").exists()


def test_measure_tells_what_is_the_bases_own():
    """Answers handed in: `same` compares with the base's, not with SFT's; the KLs are those of kl_divergences."""
    net = make_net()
    c = make_carrier(net)

    class Chat:
        prompt = staticmethod(lambda text, max_len: [int(x) for x in text.split()])
        decode = staticmethod(lambda ids: " ".join(map(str, ids)))
    samples = [Sample(" ".join(map(str, p)), "x") for p in prompts(4)]
    conditions = {"base": (None, None), "sft": (c.with_gates(True).merge(net), None), "lcdd": (c.merge(net), None)}
    told = {"base": [[1], [2], [3], [4]], "sft": [[9], [9], [9], [9]], "lcdd": [[1], [2], [3], [9]]}
    rows = evaluate.measure(net, Chat, "x.jsonl", samples, conditions, 1, None, told)
    assert [rows[k]["same"] for k in conditions] == [1, 0, 3 / 4]
    kl = evaluate.kl_divergences(net, prompts(4), told["sft"], conditions, [("sft", "lcdd"), ("base", "lcdd")])
    assert torch.equal(rows["lcdd"]["kl_sft"], kl["sft", "lcdd"]) and torch.equal(rows["lcdd"]["kl_base"], kl["base", "lcdd"])
