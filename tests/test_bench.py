"""bench.py: the baselines are the same model, and its figures arrive. Nothing here is timed."""
import json
import sys

import pytest
import torch

import carrier
from files import InputError
from lab import bench
from rows import Rows

EXACT = 1e-10     # float64, relative: the same mathematics in another order
CONFIG = bench.Config(61, 48, 80, 2, 4, 2, 12, qk_norm=True)


@pytest.mark.parametrize("dense_below", (1 << 60, 0), ids=("dense", "gathered"))
def test_every_way_takes_the_same_step(monkeypatch, dense_below):
    monkeypatch.setattr(carrier, "DENSE_BELOW", {"cpu": dense_below})
    net = bench.random_net(CONFIG, "cpu", torch.float64)
    c = bench.random_carrier(net, dtype=torch.float64).double()
    worst = bench.disagreement(net, c, *bench.random_batch(CONFIG, 2, 12, 5, "cpu"))
    assert set(worst) == {
        "plain SFT", "literal Eq. 1", "literal Eq. 1, parametrize", "gated activations"
    }
    assert max(worst.values()) < EXACT, worst


def test_a_wrong_baseline_would_be_noticed(monkeypatch):
    net = bench.random_net(CONFIG, "cpu", torch.float64)
    c, batch = (
        bench.random_carrier(net, dtype=torch.float64).double(),
        bench.random_batch(CONFIG, 2, 12, 5, "cpu"),
    )
    monkeypatch.setattr(
        bench,
        "literal",
        lambda x, base, delta, row, col: bench.F.linear(
            x, base.weight + row[:, None] * delta * 1.001 * col
        ),
    )
    assert bench.disagreement(net, c, *batch)["literal Eq. 1"] > 1000 * EXACT


def test_plain_sft_trains_the_projections_and_nothing_else():
    net = bench.random_net(CONFIG, "cpu", torch.float32)
    sft, _, weights = bench.ways(net, bench.random_carrier(net))["plain SFT"]
    assert sorted(p.shape for p in sft.parameters() if p.requires_grad) == sorted(
        p.shape for p in weights
    )
    assert len(weights) == 7 * CONFIG.num_hidden_layers
    assert not any(p.requires_grad for p in net.parameters())


def test_live_counts_each_storage_once_until_it_is_freed():
    with bench.Live() as live:
        a = torch.ones(1000)
        b = a.view(10, 100).t()                                    # a view: nothing new
        b.add_(1)
        c = torch.cat((a, a))
        assert (live.now, live.peak) == (12000, 12000)
        del a, b
        assert (live.now, live.peak) == (8000, 12000)
        d = c[:500] * 2
    assert (live.now, live.peak) == (10000, 12000)
    assert d.shape == (500,)


def test_memory_of_a_step():
    """
    A step needs its weights and gradients at least, and LCDD one d_out × d_in matrix a projection
    less than the literal Eq. 1 (for most projections both are alive at the peak).
    """
    net = bench.random_net(bench.replace(CONFIG, num_hidden_layers=6), "cpu", torch.float32)
    c, batch = bench.random_carrier(net, 0.2), bench.random_batch(CONFIG, 2, 12, 5, "cpu")
    ours, literal = (
        bench.memory(bench.ways(net, c)[name], *batch) for name in ("LCDD", "literal Eq. 1")
    )
    # gradients that lie there count once
    assert abs(ours - bench.memory(bench.ways(net, c)["LCDD"], *batch)) < 100
    wide = bench.random_net(
        bench.replace(CONFIG, vocab_size=20_000, tie_word_embeddings=True), "cpu", torch.float32
    )
    # a weight counts once
    assert (
        bench.memory(bench.ways(wide, bench.random_carrier(wide))["LCDD"], *batch)
        < 2 * wide.embedding.nbytes
    )
    deltas = sum(p.nbytes for p in c.delta.parameters())
    assert ours > 3 * deltas
    assert 0.5 * deltas < literal - ours < 1.5 * deltas


def test_quick_run_ends_in_one_json_line(capsys):
    bench.main(["--quick", "--seed", "1"])
    lines = capsys.readouterr().out.rstrip().split("\n")
    result = json.loads(lines[-1])
    assert result["quick"]
    assert result["device"] == "cpu"
    assert result["seed"] == 1
    assert max(result["step"]["disagreement"].values()) < 1e-4
    assert set(result["step"]["ratio"]["LCDD"]) == {"1.0", "0.5", "0.2", "0.1"}
    assert (
        result["precision"]["fp32 Δ beside a bf16 base"]["moved"]
        > 0.99
        > 0.5
        > result["precision"]["bf16 weights themselves"]["moved"]
    )
    assert result["batching"]["gradient_differs"] < 1e-3
    assert result["batching"]["same_answers"] == 1
    shared = "tokens that a shared prefix leaves"
    assert set(result["growth"]) == {"tokens", shared, "layers", "width", "density"}
    assert result["growth"][shared]["values"] == [4 * 16, 4 + 4 * 12, 8 + 4 * 8]
    assert sum(line.startswith("## ") for line in lines) == 5


def test_growth_is_measured_on_rows_that_share_a_prefix(monkeypatch):
    given, real = [], bench.random_batch

    def watched(config, rows, length, supervised, device, prefix=0):
        given.append(prefix)
        return real(config, rows, length, supervised, device, prefix)

    monkeypatch.setattr(bench, "random_batch", watched)
    bench.bench_growth(bench.SETTINGS["quick"], "cpu")
    assert sorted(given)[-2:] == [4, 8]


def test_rows_that_begin_alike():
    """As many tokens are computed as the growth curve says."""
    ids, _ = bench.random_batch(bench.SMALL, 4, 16, 4, "cpu", prefix=8)
    net = bench.random_net(bench.SMALL, "cpu", torch.float32)
    assert len(Rows(net, ids[:, :-1]).ids) == 8 + 4 * 8


def test_memory_alone(capsys):
    bench.main(["--quick", "--memory"])
    result = json.loads(capsys.readouterr().out.rstrip().split("\n")[-1])
    assert result["quick"]
    assert "step" not in result
    assert len(result["memory"]["bytes"]) == 4


def test_refuses_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: torch sees no GPU here; use --device cpu"):
        bench.main(["--device", "cuda"])


def test_a_deep_model_is_counted_at_two_depths(monkeypatch, capsys):
    """The straight line through one layer and two ends at what all of them weigh."""
    monkeypatch.setattr(bench, "DEEPSEEK", bench.replace(CONFIG, num_hidden_layers=6))
    found = bench.deepseek_memory("cpu")
    net = bench.random_net(bench.DEEPSEEK, "cpu", torch.bfloat16)
    parameters = [*net.parameters(), *bench.random_carrier(net, 1.0, torch.bfloat16).parameters()]
    weights, deltas = (
        sum(p.nbytes for p in parameters),
        sum(p.nbytes for p in parameters[len([*net.parameters()]) + 1 :]),
    )
    assert found > weights + 3 * deltas  # a gradient and two moments
    monkeypatch.setattr(
        bench.Live, "peak", property(lambda self: 1000, lambda self, value: None), raising=False
    )
    assert bench.deepseek_memory("cpu") == weights + 1000
    assert "counted with one layer" in capsys.readouterr().out


# ---- beside transformers and peft

@pytest.fixture
def peers():
    pytest.importorskip(
        "transformers", reason="transformers is not installed: nothing to compare with"
    )
    pytest.importorskip("peft", reason="peft is not installed: nothing to compare with")
    from lab import peers
    return peers


def test_beside_peers(peers, capsys):
    bench.main(["--model", "tiny", "--quick", "--rounds", "1"])
    out = capsys.readouterr().out.rstrip().split("\n")
    found = json.loads(out[-1])["peers"]
    losses = found["step"]["losses"]
    assert len(losses) == 8
    # the embedded model is fp32
    assert losses["LCDD, 10% open"] == pytest.approx(losses["transformers fp32"], rel=1e-5)
    assert (
        found["step"]["to_fp32"]["transformers fp32"]
        == found["step"]["to_bf16"]["transformers bf16"]
        == 1
    )
    # the model itself
    assert min(found["step"]["bytes"].values()) > 4e6
    assert found["generation"]["same"]["transformers fp32"] == 1
    assert set(found["goals"]) == {"step_fp32", "step_bf16", "memory", "memory_bf16", "generation"}
    assert sum(line.startswith("## ") for line in out) == 3
    against = found["generation"]["to_fp32"]["ours"], found["generation"]["to_bf16"]["ours"]
    assert found["goals"]["generation"] == 1 / max(against)


def test_peers_train_what_we_train(peers):
    folder = bench.locate("tiny")
    net = peers.model.load(folder)
    entries = sum(p.numel() for p in carrier.Carrier(net.config).delta.parameters())
    theirs = peers.theirs(folder, torch.float32, "cpu")
    assert sum(p.numel() for p in peers.trained_by(theirs)) == entries
    adapted = peers.with_lora(theirs, 0.1)
    ranks = {len(p) for name, p in adapted.named_parameters() if "q_proj.lora_A" in name}
    assert ranks == {round(0.1 * min(net.projections[0]["q_proj"].weight.shape))}
    assert all("lora" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_a_step_that_computes_something_else_is_noticed(peers, monkeypatch):
    monkeypatch.setattr(
        bench,
        "literal",
        lambda x, base, delta, row, col: bench.F.linear(
            x, 1.5 * base.weight + row[:, None] * delta * col
        ),
    )
    with pytest.raises(AssertionError, match="do not compute the same"):
        bench.main(["--model", "tiny", "--quick", "--rounds", "1"])


@pytest.mark.parametrize("missing", ("transformers", "peft"))
def test_peers_that_are_not_installed(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)  # what makes an import fail
    with pytest.raises(
        InputError, match=f"{missing} is not installed; pip install transformers peft"
    ):
        bench.main(["--model", "tiny", "--quick"])


@pytest.mark.parametrize("words, largest", (
    (["--device", "cuda"], True), (["--device", "cuda", "--quick"], False), ([], False)))
def test_the_largest_step_is_taken_last_and_on_a_gpu(monkeypatch, words, largest):
    taken = []
    monkeypatch.setattr(bench, "check_device", lambda name: None)
    for name in ("step", "memory", "precision", "batching", "growth"):
        monkeypatch.setattr(bench, f"bench_{name}", lambda *_, name=name: taken.append(name) or {})
    monkeypatch.setattr(bench, "deepseek_memory", lambda device: taken.append("DeepSeek-8B"))
    found = bench.everything(bench.options(words))
    assert taken == ["step", "memory", "precision", "batching", "growth", *["DeepSeek-8B"] * largest]
    assert ("deepseek_bytes" in found["memory"]) == largest
