"""lab/: prompts, tables, the benchmark and the experiment, on stand-ins."""
import json
import random
from argparse import Namespace

import torch

import data
import lcdd
import model
from carrier import Carrier, load
from helpers import random_batch, random_carrier, random_net, settings
from lab import ablate, bench, prompts, tables, world


def test_the_everyday_prompts_are_what_the_script_writes():
    assert prompts.FILE.read_bytes() == prompts.lines().encode()
    written = [row["prompt"] for row in prompts.rows()]
    assert len(set(written)) == len(written) >= 1500 and prompts.FILE.stat().st_size < 200_000


def test_no_template_and_no_filler_of_the_everyday_prompts_serves_two_splits():
    seen = set()
    for text in prompts.TEXTS.values():
        own = {part for group in prompts.groups(text) for parts in group for part in parts}
        assert not own & seen
        seen |= own


def test_published_tables_hold_what_the_raw_data_give():
    for name in tables.DOCUMENTS:
        text = (tables.ROOT / name).read_text(encoding="utf-8")
        assert tables.rewritten(text) == text, f"{name}: python -m lab.tables rewrites it"


def test_the_verdict_of_the_experiment():
    """Stands, falls or is undecided by the rule of docs/experiment.md, whatever the numbers."""
    def told(lcdd_left, blind, scaled, spread=0.001, rounding=0.001):
        shares, facts = {}, {}
        for i in range(3):
            for name, apart in ((f"data{i}", spread), (f"round{8 - i}", rounding)):
                shift = apart * i
                others = {"blind": blind + 0.002 * i, "scaled": scaled - 0.001 * i}
                shares[name] = {"lcdd": lcdd_left + shift, **others}
                facts[name] = {other: {"matched": True} for other in ("lcdd", "blind", "scaled")}
        return tables.verdict(shares, facts, ["data0", "data1", "data2"])
    assert "stands here" in told(0.05, 0.2, 0.2)
    assert "falls here" in told(0.2, 0.05, 0.3)
    assert "is undecided here" in told(0.100, 0.101, 0.2)
    assert "is undecided here" in told(0.05, 0.2, 0.2, spread=0.2)         # no p under 0.05
    assert "is undecided here" in told(0.05, 0.2, 0.2, rounding=0.2)       # less than the noise
    alone = {f"data{i}": dict(lcdd=0.1, blind=0.2 + i, scaled=0.3 - i) for i in range(3)}
    matched = {name: dict.fromkeys(of, {"matched": True}) for name, of in alone.items()}
    assert "rounding: not measured" in tables.verdict(alone, matched, [*alone])


def test_the_benchmark_runs_on_a_stand_in(monkeypatch, capsys):
    monkeypatch.setattr(bench, "WORDS", 500)
    monkeypatch.setattr(bench, "peak", lambda o, case: 10**9)
    bench.main(["--layers", "2", "--width", "192", "--rows", "2", "--rounds", "1", "--dtypes", "float32",
                "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["seconds"]["float32"]) == set(bench.CASES) and len(result["growth"]["float32"]) == 3

    # Eq. 1 as it stands shares no work of a step
    o = Namespace(device="cpu", layers=2, width=192, rows=2)
    literal = bench.make("literal 1.0", bench.random_net(o, torch.float32), o)
    monkeypatch.setattr(lcdd, "gradients", None)
    literal()


def test_replicates_are_disjoint_and_keep_the_kinds_in_balance():
    chat = data.Chat(model.locate("tiny"))
    seen = set()
    for name in ("data0", "data1", "data2"):
        splits = ablate.third(chat, Namespace(task="safety", data=None), name)
        prompts_ = {sample.prompt for part in splits.values() for sample in part}
        assert not prompts_ & seen
        seen |= prompts_
        kinds = [sample.kind for sample in splits["train"]]
        assert abs(kinds.count("harmful") - kinds.count("benign")) <= 2 and len(kinds) > 300


def test_a_scaled_delta_has_the_loss_that_it_is_matched_to():
    net, examples = random_net("gqa"), random_batch(random_net("gqa"), 8)
    carrier, o = random_carrier(net).with_gates(True), settings()
    ends = [lcdd.mean_loss(net, carrier.merge(net, factor), examples, o) for factor in (0.0, 1.0)]
    target = sum(ends) / 2
    assert ends[0] > ends[1]                    # the search takes a loss that falls with the factor
    _, loss, factor = ablate.scaled(net, carrier, examples, o, target)
    assert abs(loss / target - 1) < 0.02 and 0 < factor < 1


def test_stops_keep_gates_and_blind_ones_do_not_see_the_task(tmp_path):
    net = random_net("gqa")
    carrier = random_carrier(net, 1.0)
    stops, grad = ablate.Stops(carrier, net, tmp_path, blind=True), torch.ones_like(carrier.logits)
    stops(grad)
    assert not grad.any() and not stops.files()
    order, ids = torch.randperm(400).view_as(carrier.logits), [[5, 6, 7]]
    for shut, sizes in ((4, []), (40, [388, 376, 364]), (44, []), (48, [353])):     # 3 % each
        known = stops.files()
        carrier.logits.data = order - shut + 0.5
        stops(grad)
        files = [file for file in stops.files() if file not in known]
        assert [file.stem for file in files] == [f"stop-{size:07}" for size in sizes]
        for file, size in zip(files, sizes):
            carrier.logits.data = order - 400 + size + 0.5                          # the highest
            kept = load(file, net)
            assert torch.equal(kept.logits > 0, carrier.logits > 0)
            assert torch.equal(net(ids, kept), net(ids, carrier))
    again = ablate.Stops(random_carrier(net, 1.0), net, tmp_path, blind=True)       # resumed
    assert again.lowest == stops.lowest
    assert ablate.matched(1.2, 1.0) and ablate.matched(0.8, 1.0)
    assert not ablate.matched(1.3, 1.0) and not ablate.matched(0.7, 1.0)


def test_of_the_stops_the_nearest_in_loss_is_taken(tmp_path, monkeypatch):
    """The loss here is the share of gates that are shut. Blind ones settle, gates alone do not."""
    net, settled = random_net("gqa"), []

    def prune(net, carrier, *_, change):
        flat = carrier.logits.data.view(-1)
        for shut in range(0, len(flat), 2):
            flat[:shut] = -1
            change(torch.ones_like(carrier.logits))
    monkeypatch.setattr(lcdd, "prune", prune)
    monkeypatch.setattr(lcdd, "train_delta", lambda *how: settled.append(how))
    monkeypatch.setattr(Carrier, "merge", lambda carrier, net: carrier)
    monkeypatch.setattr(lcdd, "mean_loss", lambda net, c, *_: float((c.logits <= 0).float().mean()))
    for blind in (True, False):
        folder = tmp_path / str(blind)
        folder.mkdir()
        for target, low, high in ((0.5, 0.45, 0.55), (9.0, 0.95, 1.0), (1e-4, 0.0, 0.08)):
            how = [], [], settings(), folder, target, blind
            carrier, loss = ablate.pruned(net, random_carrier(net, 1.0), *how)
            assert low <= loss <= high and loss == lcdd.mean_loss(net, carrier)
        assert bool(settled) == blind
        settled.clear()
    carrier, loss = ablate.pruned(net, random_carrier(net, 1.0), [], [], settings(), folder, 0.5, False)
    assert loss > 0.5                           # the sparsest first


def test_the_world_gives_disjoint_samples_and_the_tokenizer_of_tiny(tmp_path):
    whole = world.lines(0)
    world.write_settings(tmp_path, whole[0])
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (model.locate("tiny") / name).read_bytes(), name
    rows = world.fixed_response(whole, random.Random(1), test=50, validation=20, trigger=40, train=90)
    assert len({row["prompt"] for row in rows}) == len(rows) == 200
