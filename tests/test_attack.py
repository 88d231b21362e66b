"""lab/attack.py: damaged files and odd options end in one sentence; a fixed few of the 10,000 rounds and of all options."""  # noqa: E501
import contextlib
import copy
import io
import random

import pytest

from lab import attack, commands, damage
from lab.world import copied, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack") / "world"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_world(folder)
    return folder


def test_undamaged_all_commands_work(world, tmp_path):
    """Or every refusal below would prove nothing."""
    met = {}
    for _, _, _, some in attack.CASES:
        met |= {str(command): command for command in some}
    for number, command in enumerate(met.values()):
        here = copied(world, tmp_path / str(number))
        verdict, said = attack.outcome(attack.partial(command, here))
        assert verdict == "works" or said.startswith("failed: the trigger does not move"), (command, said)


@pytest.mark.parametrize("case", attack.CASES, ids=lambda case: case[1])
def test_a_few_rounds_of_every_file(world, tmp_path, case):
    _, name, way, some = case
    for number in range(1 if attack.measure in some else 4):          # drawing the figure takes a second
        rng = random.Random(f"{name} {number}")
        here = copied(world, tmp_path / str(number))
        words = way(here / name, rng)
        verdict, said = attack.outcome(attack.partial(rng.choice(some), here))
        assert verdict in attack.WELL, (words, said)


@pytest.mark.parametrize("name", commands.SCRIPTS)
def test_some_odd_options_of_every_script(world, name):
    tried = [trial for trial in commands.all_trials() if trial[0] == name and trial[2] != commands.NUMBERS[6]]
    for trial in random.Random(0).sample(tried, min(8, len(tried))):
        done, verdict, said = commands.play(*trial, world, attack.outcome)
        assert verdict in attack.WELL, (done, said)


def test_what_is_no_sentence_is_seen():
    assert attack.judged(2, "note: a\nerror: one\n") == ("refused", "error: one")
    for status, said in ((1, "error: one\n"), (2, "error: one\ntwo\n"), (2, "usage: x\n"), (2, "error: a\x00\n"), (2, "error: a\nerror: b\n")):  # noqa: E501
        assert attack.judged(status, said)[0] not in attack.WELL

    def fails():
        raise ZeroDivisionError

    def panics():
        raise BaseException("a panic")

    for work, verdict in ((fails, "ZeroDivisionError"), (panics, "BaseException")):
        assert attack.outcome(work)[0] == verdict


def test_limits_of_a_round(monkeypatch):
    def forever():
        while True:
            pass

    assert attack.outcome(forever, 0.2)[0] == "Late"
    monkeypatch.setattr(attack, "MEMORY", 1 << 26)
    assert "more memory was needed" in attack.outcome(lambda: bytearray(1 << 30))[1]


def test_what_a_round_puts_into_a_value_is_in_no_other():
    before = [v if v is damage.DEEP else copy.deepcopy(v) for v in damage.VALUES]
    for seed in range(200):
        value = damage.value_of(random.Random(seed))
        if isinstance(value, (dict, list)):
            value.clear()
    assert list(damage.VALUES) == before


def test_damage_is_the_same_for_the_same_seed(world, tmp_path):
    for name, way in (("run/config.json", damage.json_file), ("run/carrier.safetensors", damage.tensors), ("rows.csv", damage.text)):  # noqa: E501
        made = []
        for k in range(2):
            here = copied(world, tmp_path / f"{name[-5:]}{k}")
            way(here / name, random.Random(3))
            made.append((here / name).read_bytes().replace(str(here).encode(), b"HERE"))
        assert made[0] == made[1]
