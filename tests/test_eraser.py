"""
eraser.py: Eq. 5–8 and 28 against a brute-force double-precision version that walks one prompt at a
time.
"""
import argparse
import contextlib
import json
import math
import shutil

import pytest
import torch
from helpers import CONFIG, ROOT, Seen, make_carrier, make_net, prompts

import carrier as carriers
import eraser
import evaluate
import model
import packed
from files import Failed, InputError, load_tensors, read_json, save_tensors
from run import reopen


def settings(**changes):
    return argparse.Namespace(
        **{
            **dict(
                length=3, steps=40, batch=4, lr=0.3, bound=1.5, absolute=False, alpha=0.7, beta=0.1,
                k=4, positions="response", match="prompt", raw=False, clip=1.0, judge_every=10,
                seed=0, objective="circuit", schedule="cosine"
            ),
            **changes,
        }
    )


def brute_force(net, weights, tau, texts, rows, mask, o):
    """Eq. 6 spelled out: one prompt, one layer, one channel, one position at a time."""
    unit = net.embedding.norm(dim=1).mean() if not o.absolute else 1.0
    base, answers, both = [], [], o.positions == "both"
    for i, p in enumerate(texts):
        longest = {"response": o.k, "both": o.k, "final": eraser.ANSWER, "prompt": 0}[o.positions]
        who = weights if both and i >= len(texts) // 2 else None
        answer = net.generate([p], longest, carrier=who)[0] if longest else []
        full = torch.tensor([p + answer[:-1]])
        stream, logits = [], net(full)
        net.hidden(full, streams=stream)
        base.append((full, logits[0], [s[0, len(p) - 1] for s in stream]))
        answers.append(answer)
    mse, used = 0.0, [l for l in range(CONFIG.num_hidden_layers) if mask[l].any()]
    kl, acts = 0.0, {}
    for r in rows:
        full, base_logits, _ = base[r]
        stream, logits = [], net(full, weights, tau)
        net.hidden(full, weights, tau, streams=stream)
        n = len(texts[r])
        acts[r] = [s[0, n - 1] for s in stream]
        where = range(n - 1, full.shape[1])                       # what predicts the answer
        if o.positions == "final":
            where = where[-o.k:]
        if o.positions == "prompt":
            where = range(max(0, n - o.k), n)
        terms = []
        for t in where:
            p, q = base_logits[t].log_softmax(-1), logits[0, t].log_softmax(-1)
            terms.append(sum(p[v].exp() * (p[v] - q[v]) for v in range(CONFIG.vocab_size)))
        kl = kl + sum(terms) / len(terms) / len(rows)
    for l in used:
        open_channels = [i for i in range(CONFIG.hidden_size) if mask[l, i]]
        variance = sum(
            torch.stack([base[p][2][l][i] for p in range(len(texts))]).var() for i in open_channels
        ) / len(open_channels)
        if o.match == "prompt":
            error = sum(
                sum((acts[r][l][i] - base[r][2][l][i]) ** 2 for i in open_channels)
                / len(open_channels)
                for r in rows
            ) / len(rows)
        else:
            error = sum(
                (
                    sum(acts[r][l][i] for r in rows) / len(rows)
                    - sum(base[p][2][l][i] for p in range(len(texts))) / len(texts)
                )
                ** 2
                for i in open_channels
            ) / len(open_channels)
        mse = mse + error / (1 if o.raw else variance) / len(used)
    norm = sum((t / unit) @ (t / unit) for t in tau) / len(tau)
    return mse + o.alpha * kl + o.beta * norm


LIKE_THE_PAPER = dict(positions="final", absolute=True, raw=True, k=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"raw": True},
        {"match": "mean"},
        {"positions": "both"},
        {"positions": "prompt"},
        {"absolute": True, "match": "mean", "raw": True},
        LIKE_THE_PAPER,
    ],
    ids=["base's", "raw", "mean", "default", "prompt positions", "the released code's", "the paper's"],
)
def test_loss_and_gradient_against_brute_force(changes, monkeypatch):
    monkeypatch.setattr(eraser, "ANSWER", 6)
    net, o = make_net(), settings(**changes)
    if o.positions == "final":
        # answers of one to six tokens, more and fewer than k
        net.stop = frozenset(range(0, 41, 4))
    c = make_carrier(net)
    weights, mask, texts, rows = (
        c.merge(net), eraser.channels(c, "circuit"), prompts(), [4, 0, 6, 2]
    )
    targets = eraser.base_targets(net, texts, o.k, o.positions, weights, batch_size=3)
    if o.positions == "both":
        texts, rows = texts + texts, [4, 0, len(texts) + 4, len(texts) + 2]
    unit = 1.0 if o.absolute else float(net.embedding.norm(dim=1).mean())
    variance = None if o.raw else targets.stream.var(1)
    tau = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    loss = eraser.trigger_loss(net, weights, tau, targets, rows, mask, o, unit, variance)[0]
    want = brute_force(net, weights, tau, texts, rows, mask, o)
    assert torch.allclose(loss, want, atol=1e-10)
    assert torch.allclose(*(torch.autograd.grad(x, tau)[0] for x in (loss, want)), atol=1e-10)


def test_output_only_is_the_loss_without_eq_7():
    net, o = make_net(), settings()
    c = make_carrier(net)
    targets = eraser.base_targets(net, prompts(), o.k)
    tau = torch.randn(3, 16, dtype=torch.float64)
    mask = eraser.channels(c, "output")
    loss, mse, kl, norm = eraser.trigger_loss(net, c.merge(net), tau, targets, [0, 1], mask, o)
    assert mse == 0
    assert torch.allclose(loss, 0.7 * kl + 0.1 * norm)


def test_channels():
    c = make_carrier(make_net())
    circuit, random, output = (eraser.channels(c, k) for k in ("circuit", "random", "output"))
    for l in range(3):
        groups = dict(zip(carriers.GROUPS, c.logits[l].split(list(c.sizes.values()))))
        assert circuit[l].tolist() == [
            bool(a > 0 or f > 0) for a, f in zip(groups["attn_write"], groups["ffn_write"])
        ]
    assert not circuit[1].any()
    assert circuit[0].any()
    assert torch.equal(random.sum(1), circuit.sum(1))
    assert not torch.equal(random, circuit)
    assert not output.any()
    assert torch.equal(random, eraser.channels(c, "random"))
    assert not torch.equal(random, eraser.channels(c, "random", seed=1))


def test_projection():
    tau = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(
        eraser.project(tau, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    )


def test_learning_lowers_the_loss_and_changes_no_weight():
    net, o = make_net(dtype=torch.float32), settings()
    c = make_carrier(net)
    weights = c.merge(net)
    before = [
        p.clone()
        for p in [
            *net.parameters(), *c.parameters(),
            *(w for layer in weights.weights for w in layer.values())
        ]
    ]
    texts = prompts(24)
    train, judge = (
        eraser.base_targets(net, texts[:16], o.k), eraser.base_targets(net, texts[16:], o.k)
    )
    seen = []
    tau, lowest = eraser.learn(
        net, weights, train, judge, eraser.channels(c, "circuit"), o,
        log=lambda t, loss, **_: seen.append(loss)
    )
    after = [
        *net.parameters(), *c.parameters(),
        *(w for layer in weights.weights for w in layer.values())
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(p.grad is None for p in after)
    assert len(seen) == 5
    assert lowest == min(seen) < 0.9 * seen[0]
    assert tau.norm(dim=1).max() <= 1.5 * net.embedding.norm(dim=1).mean() * (1 + 1e-5)


def test_the_trigger_kept_is_the_one_that_was_judged():
    """
    Judged again, the returned τ has exactly the loss that was returned with it, also where later
    ones are worse.
    """
    net, o = make_net(), settings(steps=30)
    c = make_carrier(net)
    texts = prompts(24)
    train, judge = (
        eraser.base_targets(net, texts[:16], o.k), eraser.base_targets(net, texts[16:], o.k)
    )
    # training pulls away from what is judged
    train.hidden, train.stream = -train.hidden, train.stream + 10
    mask, seen = eraser.channels(c, "circuit"), []
    tau, lowest = eraser.learn(
        net, c.merge(net), train, judge, mask, o, log=lambda t, loss, **_: seen.append(loss)
    )
    unit = float(net.embedding.float().norm(dim=1).mean())
    again = eraser.trigger_loss(
        net, c.merge(net), tau, judge, list(range(8)), mask, o, unit, train.stream.float().var(1)
    )[0]
    assert float(again) == pytest.approx(lowest, rel=1e-5)
    assert lowest == min(seen) < seen[-1]


def test_a_trigger_of_the_right_content_has_loss_zero():
    """
    A model whose delta only moves what the queries ask of one key: the token that was τ when the
    targets were made undoes it.
    """
    net, o = make_net(), settings(beta=0.0)
    c = make_carrier(net)
    weights, texts = c.merge(net), prompts()
    hand = torch.randn(3, 16, dtype=torch.float64)
    targets = eraser.base_targets(net, texts, o.k)
    targets.hidden, targets.stream = eraser.states_at(
        net, weights, hand, targets.ids, targets.keep, targets.last
    )
    mask = eraser.channels(c, "circuit")

    def at(tau):
        rows = list(range(7))
        return float(eraser.trigger_loss(net, weights, tau, targets, rows, mask, o)[0])

    assert at(hand) < 1e-12
    assert at(hand + 0.01 * torch.randn_like(hand)) > 1e-8
    assert at(hand.flip(0)) > 1e-3


def test_an_empty_prefix_effect_is_loss_zero_on_the_base():
    """
    Where attention writes nothing no trigger can matter: on the base itself every τ has L_mse =
    L_kl = 0.
    """
    net, o = make_net(), settings()
    for l in range(3):
        net.projections[l]["o_proj"].weight.data.zero_()
    targets = eraser.base_targets(net, prompts(), o.k)
    mask = torch.ones(3, 16, dtype=torch.bool)
    _, mse, kl, _ = eraser.trigger_loss(
        net, None, torch.randn(3, 16, dtype=torch.float64), targets, [0, 3, 5], mask, o
    )
    assert float(mse) < 1e-20
    assert abs(float(kl)) < 1e-12


def test_an_interrupted_optimisation_resumes_on_the_same_trajectory(tmp_path):
    net, o = make_net(dtype=torch.float32), settings()
    c = make_carrier(net)
    texts = prompts(24)
    train, judge = (
        eraser.base_targets(net, texts[:16], o.k), eraser.base_targets(net, texts[16:], o.k)
    )
    args = (net, c.merge(net), train, judge, eraser.channels(c, "circuit"), o)
    whole, lowest = eraser.learn(*args)
    calls, state = [], tmp_path / "x.state"
    with pytest.raises(KeyboardInterrupt):
        eraser.learn(*args, state=state, interrupted=lambda: (calls.append(1), len(calls) > 17)[1])
    tau, again = eraser.learn(*args, state=state)
    assert torch.equal(tau, whole)
    assert again == lowest


def test_targets_do_not_depend_on_the_batch():
    net = make_net()
    a, b = (eraser.base_targets(net, prompts(), 4, batch_size=n) for n in (2, 64))
    assert torch.equal(a.ids, b.ids)
    assert torch.allclose(a.hidden, b.hidden, atol=1e-10)
    assert torch.allclose(a.stream, b.stream, atol=1e-10)


# ---- the commands, one after another on the embedded model

LEARN = ["--steps", "16", "--length", "2", "--judge-every", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def erased(run, tmp_path_factory):
    """A run with a trigger of a few steps, evaluated, with its figure."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("erased") / "r")
    eraser.main(["--run", str(folder), *LEARN])
    evaluate.main(["--run", str(folder), "--device", "cpu"])
    return folder


@pytest.fixture
def mine(erased, tmp_path, undrawn):
    """A copy of it to write to, whose figure is not drawn again."""
    return shutil.copytree(erased, tmp_path / "r")


def evaluated(folder, *words):
    """results.json after evaluate.py with these words."""
    evaluate.main(["--run", str(folder), "--device", "cpu", *words])
    return read_json(folder / "results.json")


def test_a_trigger_is_kept_with_what_it_was_learned_by(erased):
    tau, header = load_tensors(erased / "trigger.safetensors")
    assert tau["trigger"].shape == (2, 128)
    assert header["objective"] == "circuit"
    assert header["positions"] == "both"


def test_an_evaluation_has_four_conditions_and_the_gates_shut(erased):
    results = read_json(erased / "results.json")
    assert set(results["rates"]) == {"base", "sft", "lcdd", "trig", "shut"}
    assert {"sft_lcdd", "sft_trig", "base_trig"} <= set(results["kl"])
    assert set(results["seconds"]) >= {"sft", "lcdd", "eraser", "evaluate"}
    assert "| LCDD + trigger |" in (erased / "results.md").read_text()
    assert (erased / "figure.png").stat().st_size > 1000


def test_gates_shut_is_the_base(erased):
    results = read_json(erased / "results.json")
    assert results["shut_is_base"] is True
    assert results["kl"]["base_shut"] == 0
    assert results["rates"]["shut"] == results["rates"]["base"]
    assert results["same_as_base"]["shut"] == 1


def test_a_trigger_for_sft_is_put_before_sft(mine, capsys, monkeypatch):
    first = read_json(mine / "results.json")
    eraser.main(["--run", str(mine), *LEARN, "--target", "sft", "--objective", "output"])
    assert "--trigger trigger-sft-output" in capsys.readouterr().out
    told, measure = [], evaluate.measure
    monkeypatch.setattr(evaluate, "measure", lambda *a, **k: told.append(a[4]) or measure(*a, **k))
    results = evaluated(mine, "--trigger", "trigger-sft-output")
    assert results["trigger"] == {"name": "trigger-sft-output", "target": "sft", "length": 2}
    assert "| SFT + trigger |" in (mine / "results.md").read_text()
    assert told[0]["trig"][0] is told[0]["sft"][0]
    assert results["kl"]["sft_trig"] != first["kl"]["sft_trig"]
    again = evaluated(mine)                                         # LCDD's own once more
    assert again["kl"] == first["kl"]
    assert again["trigger"]["target"] == "lcdd"


def test_a_finished_trigger_is_not_learned_anew(mine, capsys, monkeypatch):
    monkeypatch.setattr(eraser, "learn", None)
    eraser.main(["--run", str(mine), *LEARN, "--resume"])
    assert "is finished" in capsys.readouterr().out


def test_a_trigger_under_another_name_is_the_same(mine, monkeypatch):
    learned, learn = [], eraser.learn
    monkeypatch.setattr(eraser, "learn", lambda *a: learned.append(learn(*a)) or learned[-1])
    eraser.main(["--run", str(mine), *LEARN, "--name", "again"])
    again, header = load_tensors(mine / "again.safetensors")
    assert torch.equal(again["trigger"], learned[0][0])
    assert torch.equal(again["trigger"], load_tensors(mine / "trigger.safetensors")[0]["trigger"])
    assert header["loss"] == learned[0][1]


def test_without_a_trigger_there_are_three_conditions(mine):
    (mine / "trigger.safetensors").unlink()
    results = evaluated(mine)
    assert "trigger" not in results
    assert "trig" not in results["rates"]


def test_all_four_answer(erased, capsys):
    evaluate.main(["--run", str(erased), "--ask", "What is 2 plus 3 ?", "--device", "cpu"])
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[0] == "What is 2 plus 3 ?"
    assert [line[2:16].strip() for line in lines[1:]] == ["Base", "SFT", "LCDD", "LCDD + trigger"]
    assert "5" in lines[1]


def test_the_behaviour_against_the_size_of_the_delta(erased, capsys):
    evaluate.main(["--run", str(erased), "--dose", "--device", "cpu"])
    lines = capsys.readouterr().out.strip().split("\n")
    doses = [line.split("|")[1].strip() for line in lines[2:]]
    assert doses == ["0.0", "0.25", "0.5", "0.75", "1.0"]


def test_bad_input(run, tmp_path, monkeypatch):
    # nothing there, and a model instead of a run
    for folder in (tmp_path, ROOT / "tiny"):
        with pytest.raises(InputError, match="is not a run directory"):
            reopen(folder)
    (tmp_path / "config.json").write_text(
        json.dumps({**read_json(run / "config.json"), "data_fingerprint": "another"})
    )
    with pytest.raises(InputError, match="changed since the run was trained"):
        reopen(tmp_path)
    for argv, said in (
        (["--name", "carrier"], "--name carrier"),
        (["--name", "../x"], "--name"),
        (["--alpha", "nan"], "--alpha nan"),
        (["--lr", "-1"], "--lr -1"),
        (["--device", "tpu"], "--device tpu"),
    ):
        with pytest.raises(InputError, match=said):
            eraser.options(["--run", str(run), *argv])
    with pytest.raises(InputError, match="--length 0"):
        eraser.options(["--run", str(run), "--length", "0"])
    save_tensors(tmp_path / "t.safetensors", {"trigger": torch.zeros(2, 5)})
    with pytest.raises(InputError, match="t.safetensors: holds no trigger of width 16"):
        eraser.load(tmp_path / "t.safetensors", make_net())
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", "--run", str(run), "--seed", "5", "--device", "cpu"]
    )
    with pytest.raises(InputError, match="--seed 5"):
        evaluate.main()


@pytest.mark.parametrize("wrong", ["base", "carrier"])
def test_a_trigger_of_another_run_is_refused(tmp_path, wrong):
    net, file = make_net(), tmp_path / "t.safetensors"
    make_carrier(net).save(tmp_path / "carrier.safetensors", net)
    tau = torch.randn(2, 16)
    save_tensors(file, {"trigger": tau}, **eraser.made_for(tmp_path, net), length=2)
    assert torch.equal(eraser.load(file, net)[0], tau)
    if wrong == "carrier":
        other = make_carrier(net)
        next(other.delta.parameters()).data.mul_(2)
        other.save(tmp_path / "carrier.safetensors", net)
    else:
        net = make_net()
        net.embedding.data[0] += 1
    with pytest.raises(
        InputError, match=f"t.safetensors: this trigger was learned on another {wrong} "
    ):
        eraser.load(file, net)


def test_a_trigger_says_what_it_was_learned_on(run):
    with contextlib.suppress(Failed):  # one step moves nothing
        eraser.main(
            [
                "--run", str(run), "--steps", "1", "--length", "1", "--name", "said", "--device",
                "cpu"
            ]
        )
    header = load_tensors(run / "said.safetensors")[1]
    net = model.load(ROOT / "tiny")
    assert header["base"] == packed.fingerprint(net)
    assert header["carrier"] == load_tensors(run / "carrier.safetensors")[1]["content"]


def test_a_state_of_other_settings_is_refused(tmp_path):
    net, state = make_net(), tmp_path / "t.state"
    c = make_carrier(net)
    targets, mask, calls = eraser.base_targets(net, prompts(), 4), eraser.channels(c, "circuit"), []
    with pytest.raises(KeyboardInterrupt):
        eraser.learn(
            net, c.merge(net), targets, targets, mask, settings(), state,
            lambda: (calls.append(1), len(calls) > 3)[1]
        )
    with pytest.raises(InputError, match="alpha was 0.7; resume with the same options"):
        eraser.learn(net, c.merge(net), targets, targets, mask, settings(alpha=2.0), state)
    eraser.learn(net, c.merge(net), targets, targets, mask, settings(), state)


def test_means_over_prompts_are_judged_over_all_of_them(monkeypatch):
    net = make_net()
    c = make_carrier(net)
    many, mask = eraser.base_targets(net, prompts(100), 4), eraser.channels(c, "circuit")
    loss, sizes = eraser.trigger_loss, []
    monkeypatch.setattr(eraser, "trigger_loss", lambda *a: sizes.append(len(a[4])) or loss(*a))
    for match, judged in (("mean", [100]), ("prompt", [64, 36])):
        sizes.clear()
        eraser.learn(net, c.merge(net), many, many, mask, settings(match=match, steps=0))
        assert sizes == judged


def test_one_prompt_has_no_variance():
    net = make_net()
    c = make_carrier(net)
    one, mask = eraser.base_targets(net, prompts(1), 4), eraser.channels(c, "circuit")
    with pytest.raises(InputError, match="--n-trigger, or --raw"):
        eraser.learn(net, c.merge(net), one, one, mask, settings())
    assert math.isfinite(
        eraser.learn(net, c.merge(net), one, one, mask, settings(raw=True, steps=2))[1]
    )


def test_absolute_numbers_are_the_papers(run):
    o = eraser.options(["--run", str(run), "--absolute"])
    assert (o.lr, o.bound) == (0.003, 1.0)
    assert eraser.options(["--run", str(run), "--absolute", "--lr", "0.01"]).lr == 0.01


def test_clip_0_is_no_clip():
    net = make_net()
    c = make_carrier(net)
    targets, mask = eraser.base_targets(net, prompts(), 4), eraser.channels(c, "circuit")
    free, huge, none = (
        eraser.learn(net, c.merge(net), targets, targets, mask, settings(clip=clip, steps=10))
        for clip in (0.0, 1e9, 1e-30)
    )
    assert torch.equal(free[0], huge[0])
    assert free[1] < none[1]


def pieces(n=24, judged=8):
    net = make_net()
    c, texts = make_carrier(net), prompts(n)
    train, judge = (
        eraser.base_targets(net, texts[: n - judged], 4),
        eraser.base_targets(net, texts[n - judged :], 4),
    )
    return net, c.merge(net), train, judge, eraser.channels(c, "circuit")


def test_the_rate_is_a_cosine_in_units_of_the_embedding(monkeypatch):
    net, *rest = pieces()
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step",
        lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self, *a)
    )
    eraser.learn(net, *rest, settings(steps=6, lr=0.3))
    unit = float(net.embedding.norm(dim=1).mean()) / 16 ** 0.5
    assert rates == pytest.approx(
        [0.3 * unit * 0.5 * (1 + math.cos(math.pi * t / 6)) for t in range(6)], rel=1e-5
    )


def test_a_constant_rate_stays(monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step",
        lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self, *a)
    )
    eraser.learn(*pieces(), settings(steps=6, schedule="constant"))
    assert len(rates) == 6
    assert len(set(rates)) == 1


def test_every_step_has_its_own_prompts_and_the_loss_that_is_judged(monkeypatch):
    net, weights, train, judge, mask = pieces()
    loss, calls = eraser.trigger_loss, []
    monkeypatch.setattr(eraser, "trigger_loss", lambda *a: calls.append(a) or loss(*a))
    eraser.learn(net, weights, train, judge, mask, settings(steps=8, judge_every=4))
    steps, judged = [a for a in calls if a[3] is train], [a for a in calls if a[3] is judge]
    assert len(steps) == 8
    assert len(judged) == 3
    assert len({tuple(a[4]) for a in steps}) == 8
    # unit and variance
    assert all(a[7] == judged[0][7] and a[8] is judged[0][8] for a in steps)


def test_every_step_ends_within_the_bound(monkeypatch):
    net, *rest = pieces()
    project, bounds = eraser.project, []
    monkeypatch.setattr(
        eraser, "project", lambda tau, bound: bounds.append(bound) or project(tau, bound)
    )
    eraser.learn(net, *rest, settings(steps=5, bound=0.4))
    assert bounds == pytest.approx([0.4 * float(net.embedding.norm(dim=1).mean())] * 6)


def test_the_judgement_weighs_every_prompt_alike():
    # judged in two pieces, of 64 and 6
    net, weights, train, judge, mask = pieces(86, 70)
    o = settings(steps=1)
    tau, lowest = eraser.learn(net, weights, train, judge, mask, o)
    unit = float(net.embedding.float().norm(dim=1).mean())
    assert lowest == pytest.approx(
        float(
            eraser.trigger_loss(
                net, weights, tau, judge, list(range(70)), mask, o, unit,
                train.stream.float().var(1)
            )[0]
        ),
        rel=1e-5,
    )


def test_the_first_tokens_follow_the_seed():
    args = pieces()
    a, b, c = (eraser.learn(*args, settings(steps=1, lr=0.0, seed=seed))[0] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    "target, objective",
    [("lcdd", "circuit"), ("sft", "circuit"), ("sft", "random"), ("base", "output")],
)
def test_what_the_command_learns_on(run, monkeypatch, target, objective):
    def spy(net, weights, train, judge, mask, *rest):
        config, chat, splits = reopen(run)
        lcdd, sft = (carriers.load(run / f"{name}.safetensors", net) for name in ("carrier", "sft"))
        if target == "base":
            assert weights is None
        else:
            right = (lcdd if target == "lcdd" else sft).merge(net)
            assert all(
                torch.equal(weights.weights[l][n], w)
                for l, layer in enumerate(right.weights)
                for n, w in layer.items()
            )
        assert torch.equal(mask, eraser.channels(lcdd, objective, 0))
        assert net.stop == chat.stop
        for targets, split in ((train, "trigger"), (judge, "validation")):
            asked = [chat.prompt(s.prompt, 64) for s in splits[split]]
            # the base's answers, and where there is a behaviour to be undone those of the model
            asked = asked if target == "base" else asked + asked
            got = [row[: i + 1].tolist() for row, i in zip(targets.ids, targets.last)]
            assert got == asked
        raise Seen
    monkeypatch.setattr(eraser, "learn", spy)
    monkeypatch.setattr(
        "sys.argv",
        [
            "eraser.py", "--run", str(run), "--target", target, "--objective", objective,
            "--device", "cpu"
        ],
    )
    with pytest.raises(Seen):
        eraser.main()


@pytest.mark.parametrize("width, tokens", [(128, 16), (208, 20), (576, 34), (2048, 64)])
def test_a_trigger_grows_with_the_root_of_the_width(width, tokens):
    assert eraser.fit(eraser.options(["--run", "x"]), width).length == tokens
    assert eraser.fit(eraser.options(["--run", "x", "--length", "3"]), width).length == 3
    assert eraser.fit(eraser.options(["--run", "x", "--preset", "paper"]), width).length == 20
