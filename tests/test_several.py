"""lab/several.py: the sum of two carriers, gates in common, and the command on finished runs."""
import itertools
import shutil

import pytest
import torch

import carrier as carriers
from common import InputError, read_json, write_json
from helpers import apart, normal, random_carrier, random_ids, random_net
from lab import several


def test_each_row_has_the_carriers_that_are_switched_on_for_it():
    """(0, 0) is the base, (1, 0) and (0, 1) one carrier alone, (1, 1) W_b + Σ M ⊙ Δ."""
    net, ids = random_net("gqa"), random_ids(4, 7, alike=3)
    both = [random_carrier(net, 0.5, 1), random_carrier(net, 0.3, 2)]
    switched = net(ids, carrier=both, scale=several.SWITCHES)
    alone = [None, both[0], both[1], several.merged(net, both)]
    for row, weights in enumerate(alone):
        assert apart(switched[row], net(ids, carrier=weights)[row]) < 1e-10
    assert torch.equal(net(ids, carrier=several.merged(net, [])), net(ids))


def test_conditions_are_of_the_own_and_of_the_other_behaviour():
    """Carriers and triggers all differ, so that none can stand in another's place unseen."""
    net, ids = random_net("gqa"), random_ids(2, 6)
    a, b = random_carrier(net, seed=1), random_carrier(net, seed=2)
    own, other = normal(2, 24), normal(3, 24)
    pair = several.Behaviour(*"...", a, own), several.Behaviour(*"...", b, other)
    models = {"base": None, "sft": b, "own": a, "both": [a, b]}
    triggers = {"": None, "own": own, "other": other, "own and other": torch.cat((own, other)),
                "other and own": torch.cat((other, own))}
    for name, (weights, tau) in several.conditions_of(net, *pair).items():
        start, _, trigger = name.removesuffix(" trigger").partition(", ")
        expected = net(ids, models[start], triggers[trigger])
        assert apart(net(ids, weights, tau), expected) < 1e-10, name


def with_open(net, opened):
    """A carrier of which only these gates are open, {(layer, group): places}."""
    carrier = carriers.Carrier(net.config).with_gates(False)
    groups = dict(zip(carriers.GROUPS, carrier.logits.split(list(carrier.sizes.values()), dim=1)))
    for (l, group), places in opened.items():
        groups[group].data[l, places] = 1.0
    return carrier


def test_chance_of_gates_in_common_is_what_all_placements_give():
    """b's gates at every place of their group and layer, one after the other."""
    net = random_net("gqa")
    a = with_open(net, {(0, "attn_k"): [1, 2, 3], (1, "ffn_read"): [0, 5]})
    b = with_open(net, {(0, "attn_k"): [3, 7], (1, "ffn_read"): [5, 6]})
    found = several.overlap(a, b)
    first = [len({1, 2, 3} & set(p)) for p in itertools.combinations(range(16), 2)]
    second = [len({0, 5} & set(p)) for p in itertools.combinations(range(24), 2)]
    sums = [x + y for x in first for y in second]
    assert [found[name] for name in ("a", "b", "both")] == [5, 4, 2]
    assert found["expected"] == pytest.approx(sum(sums) / len(sums))
    assert found["p"] == pytest.approx(sum(s >= 2 for s in sums) / len(sums))
    assert found["jaccard"] == pytest.approx(2 / 7)


def test_the_command_measures_both_and_refuses_another_base(finished, tmp_path):
    """One run twice: the same on both sides, every gate in common, and each row its own answer."""
    words = ["--runs", f"{finished},{finished}", "--out", str(tmp_path), "--device", "cpu"]
    several.main(words)
    result = read_json(tmp_path / "0.json")
    rates = result["a"]["rates"]
    assert rates == result["b"]["rates"] and rates["own"] == rates["sft"] > 0.5
    assert rates["base"] == 0 and rates["own, own trigger"] < rates["own"]
    assert result["overlap"]["jaccard"] == 1 and result["a"]["switched"]["same"] == 1
    words[1] += f",{shutil.copytree(finished, tmp_path / 'other')}"
    with pytest.raises(InputError, match="name two"):
        several.main(words)
    words[1] = f"{finished},{tmp_path / 'other'}"
    config = read_json(finished / "config.json") | {"base_fingerprint": "another"}
    write_json(tmp_path / "other" / "config.json", config)
    with pytest.raises(InputError, match="another base"):
        several.main(words)
