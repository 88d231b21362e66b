"""machine.py: which dtype and how many threads are chosen, and by what."""
import types

import pytest
import torch

import machine


@pytest.mark.parametrize("width, device, native, gain, dtype", [
    (576, "cpu", True, 3.6, torch.bfloat16),
    # instructions that are slower than fp32's
    (576, "cpu", True, 0.5, torch.float32),
    (576, "cpu", False, 3.6, torch.float32),
    (48, "cpu", True, 3.6, torch.float32),
    (48, "cuda:0", False, 0.5, torch.bfloat16),
])
def test_bf16_where_it_is_fast(monkeypatch, width, device, native, gain, dtype):
    monkeypatch.setattr(machine, "native_bf16", lambda: native)
    monkeypatch.setattr(machine, "bf16_gain", lambda width: gain)
    assert machine.fast_dtype(types.SimpleNamespace(hidden_size=width), device) == dtype


def test_the_gain_of_bf16_is_the_ratio_of_the_processors_times(monkeypatch):
    clock = {"now": 0.0}

    def linear(x, weight):
        clock["now"] += 3.0 if x.dtype == torch.float32 else 1.5

    monkeypatch.setattr(machine.time, "process_time", lambda: clock["now"])
    monkeypatch.setattr(machine.F, "linear", linear)
    assert machine.bf16_gain(64) == 2.0


@pytest.mark.parametrize(("most", "seconds", "best"), (
    (2, {1: 1.0, 2: 0.55}, 2),                                   # a quiet machine
    (2, {1: 1.0, 2: 0.9}, 1),                                    # hardly a gain: single rows
    (2, {1: 1.0, 2: 3.0}, 1),                                    # a busy machine
    (6, {1: 1.0, 2: 0.6, 4: 0.4, 6: 0.38}, 4),
    (8, {1: 1.0, 2: 0.9, 4: 0.5, 8: 0.3}, 8),
))
def test_threads_have_to_be_worth_it(most, seconds, best):
    assert machine.worth_it(most, seconds.__getitem__) == best


@pytest.mark.parametrize(
    ("width", "most", "word", "measured", "want"),
    (
        (machine.WIDE, 2, None, True, 2),
        (machine.WIDE, 2, "2", False, None),  # the user's own word
        (machine.WIDE, 1, None, False, None),  # no choice
        (machine.WIDE - 64, 2, None, False, 1),
        (machine.WIDE - 64, 2, "2", False, 1),
    ),
)
def test_threads_are_chosen_by_width_and_measured_where_it_is_wide(
    monkeypatch, width, most, word, measured, want
):
    chosen, asked = [], []
    monkeypatch.setattr(machine, "MOST", most)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(
        machine, "product_seconds", lambda net, rows, n: asked.append(rows) or 1 / n
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if word:
        monkeypatch.setenv("OMP_NUM_THREADS", word)
    net = types.SimpleNamespace(
        device=torch.device("cpu"), config=types.SimpleNamespace(hidden_size=width)
    )
    machine.set_threads(net, rows=3)
    assert chosen == ([want] if want else [])
    assert asked == ([3, 3] if measured else [])


def test_one_thread_chosen_on_a_busy_machine_is_not_for_ever(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "MOST", 2)
    busy, chosen = [True, False], []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(machine, "worth_it", lambda most, seconds: 1 if busy.pop(0) else most)
    wide = types.SimpleNamespace(
        device=torch.device("cpu"), config=types.SimpleNamespace(hidden_size=machine.WIDE))
    machine.set_threads(wide)
    machine.set_threads(wide)
    assert chosen == [1, 2]


def test_products_are_timed_with_the_threads_asked_for(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    net = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=16), dtype=torch.float32,
                                projections=[{"up_proj": torch.nn.Linear(16, 24)}] * 6)
    assert 0 < machine.product_seconds(net, 5, 2, enough=0.01) < 10
    assert chosen == [2]


def test_native_bf16_is_what_torch_says_of_the_processor(monkeypatch):
    # a torch that cannot tell
    monkeypatch.setattr(torch, "cpu", types.SimpleNamespace())
    assert not machine.native_bf16()
    monkeypatch.setattr(
        torch,
        "cpu",
        types.SimpleNamespace(
            _is_avx512_bf16_supported=lambda: False, _is_amx_tile_supported=lambda: True
        ),
    )
    assert machine.native_bf16()
