"""lab/sizes.py: how a carrier grows with the model, counted on runs and fitted to known laws."""
import math
import shutil

import pytest
from helpers import ROOT

import carrier
import model
from files import InputError, read_json, write_json
from lab import sizes, tiny

RUN = dict(parameters=10 ** 6, gates=1000, open=10, entries=10 ** 5, on=20, own=0.05, sft=100.0,
           lcdd=99.0, trig=1.0)


def grown(factor):
    """Runs of two seeds on a model `factor` times as large, whose carrier grows with the root of it."""
    found = []
    for seed in (0, 1):
        more = {"gates": 1000 * factor, "open": round(100 * factor ** 0.5), "on": 20 + 20 * seed}
        found.append(RUN | more | {"entries": 10 ** 5 * factor})
    return found


def test_the_exponent_of_a_power_law():
    slope, error = sizes.power([10, 100, 1000], [2, 20 ** 0.5 * 2 ** 0.5, 20])
    assert slope == pytest.approx(0.5)
    assert error == pytest.approx(0, abs=1e-12)
    slope, error = sizes.power([1, 2, 4, 8], [1, 3, 3, 9])
    # in units of log 2: Σ (x − x̄) y = 3 log₂ 3, Σ (x − x̄)² = 5, and the squared rests sum to (log₂ 3)² / 5
    three = math.log2(3)
    assert slope == pytest.approx(3 * three / 5)
    assert error == pytest.approx((three ** 2 / 5 / 2 / 5) ** 0.5)


def test_the_table_has_means_and_spreads():
    lines = sizes.table({"64x4": grown(1), "128x4": grown(4)}).splitlines()
    assert "| 64x4 | 1,000,000 | 1,000 | 100 ± 0 | 90.00 ± 0.00 | 100,000 | 30 ± 14 |" in lines[2]
    assert "| 128x4 | 1,000,000 | 4,000 | 200 ± 0 | 95.00 ± 0.00 |" in lines[3]


def test_the_laws_are_said():
    said = sizes.laws({"64x4": grown(1), "128x4": grown(4)})
    assert "open gates ~ (gates)^0.50 ± 0.00" in said
    assert "entries on ~ (entries of Δ)^0.00 ± 0.35" in said.replace("-0.00", "0.00")


def test_no_law_of_one_size():
    assert sizes.laws({"64x4": grown(1)}) == ""


def test_numbers_of_a_run(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "r")
    results = read_json(folder / "results.json")
    results["loss_own"] = {"base": 0.5, "trig": 0.75}
    results["rates"]["trig"] = 0.25
    write_json(folder / "results.json", results)
    found = sizes.numbers(folder, ROOT / "tiny")
    net = model.load(ROOT / "tiny")
    c = carrier.load(folder / "carrier.safetensors", net)
    assert found["open"] == int((c.logits > 0).sum())
    assert found["entries"] == sum(p.numel() for p in c.delta.parameters())
    assert found["on"] == sum(len(rows) * len(cols) for _, _, rows, cols in c.open_blocks())
    assert found["own"] == 0.25
    assert found["trig"] == 25
    assert set(found) == set(sizes.NUMBERS)


def test_of_safety_the_harmful_prompts_count(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "r")
    results = read_json(folder / "results.json")
    results["loss_own"], results["rates"]["trig"] = {"base": 0.5, "trig": 0.75}, 0.25
    results["kinds"]["trig"] = {"harmful": {"rate": 0.5}, "benign": {"rate": 0.0}}
    write_json(folder / "results.json", results)
    assert sizes.numbers(folder, ROOT / "tiny")["trig"] == 50


def test_a_damaged_measurement_is_no_table(tmp_path):
    write_json(tmp_path / "size.json", RUN | {"open": "10"})
    with pytest.raises(InputError, match="size.json: .*open"):
        sizes.measured(tmp_path, None, 0, None)


def test_a_base_is_made_once_and_a_run_measured_once(tmp_path, monkeypatch):
    made, run = [], []

    def make(folder, *shape):
        made.append(shape)
        folder.mkdir()
        return {"overall": 1.0}
    monkeypatch.setattr(tiny, "make", make)
    for phase in (sizes.lcdd, sizes.eraser, sizes.evaluate):
        monkeypatch.setattr(phase, "main", lambda argv: run.append(argv))

    def numbers(folder, base):
        folder.mkdir()
        return RUN
    monkeypatch.setattr(sizes, "numbers", numbers)
    for _ in range(2):
        sizes.main(["--out", str(tmp_path / "s"), "--shapes", "32x1", "128x4", "--seeds", "1"])
    assert made == [(32, 1)]                                # 128x4 is the embedded model
    assert len(run) == 2 * 3
    assert "| 32x1 | 1,000,000 |" in (tmp_path / "s" / "sizes-fixed.md").read_text()
    assert (tmp_path / "s" / "sizes-fixed.png").is_file()


@pytest.mark.parametrize("words, said", (
    (["--shapes", "64"], "--shapes 64: has to be WIDTHxLAYERS"),
    (["--shapes=--"], "--shapes (names none|--: has to be)"),    # as Python reads it, 3.11 and 3.12
    (["--seeds", "0"], "--seeds 0: has to be at least 1"),
))
def test_odd_options_are_refused(words, said):
    with pytest.raises(InputError, match=said):
        sizes.main(words)
