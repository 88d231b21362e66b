"""memory.py: what is free, what things take, and that it is said before it is tried."""
import resource

import pytest
import torch
from helpers import CONFIG, ROOT, Forked, make_net

import eraser
import lcdd
import memory
import model
from carrier import Carrier
from files import InputError
from lab import tiny
from rows import Cache
from console import cli


def test_what_is_free(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 400\nfile 500\n")
    assert memory.of_group(tmp_path) == 600                 # what only caches files can be taken
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.of_group(tmp_path) == float("inf")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\nSwapFree: 2 kB\n")
    assert memory.numbers(tmp_path / "meminfo", ":") == {
        "MemTotal": 9,
        "MemAvailable": 5,
        "SwapFree": 2,
    }
    assert memory.numbers(tmp_path / "none") == {}
    assert 0 < memory.free("cpu") < 1 << 50


def print_what_is_free_under_a_limit(above):
    """memory.free() where the process may take no more than `above` bytes on top of what it has."""
    pages = memory.numbers_of(memory.Path("/proc/self/statm"))[0]
    space = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + above, -1))
    print(memory.free())


def test_a_limit_of_the_process_counts(tmp_path):
    status, output, errors = Forked(tmp_path, print_what_is_free_under_a_limit, 10**8).end()
    assert status == 0, errors
    assert 5 * 10**7 < int(output) <= 10**8


@pytest.mark.parametrize("count, want", [(512, "0.512 kB"), (3.2e9, "3.2 GB"), (4e15, "4e+03 TB")])
def test_sizes(count, want):
    assert memory.size(count) == want


def test_estimates_are_no_more_than_what_is_taken():
    """From below, so that a refusal is true: against the bytes that torch itself allocates."""
    net, rows, length = make_net(dtype=torch.float32), 3, 7
    cache = Cache(net, rows, length)
    assert memory.of_cache(net.config, rows, length, net.dtype) == cache.k.nbytes + cache.v.nbytes
    entries = [p.shape for layer in Carrier(CONFIG).delta for p in layer.values()]
    assert memory.of_weights(entries, torch.float32) == sum(
        p.nbytes for p in Carrier(CONFIG).delta.parameters()
    )
    kept = {}

    def keep(t):
        if not isinstance(t, torch.nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    ids = torch.randint(CONFIG.vocab_size, (64, 8))
    carrier = Carrier(CONFIG)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net.hidden(ids, carrier).sum()
    assert memory.of_tokens(CONFIG, ids.numel(), torch.float32) <= sum(kept.values())


def test_numbers_that_ask_for_more_than_there_is(monkeypatch, tmp_path):
    """Each is named before anything of the kind is made."""
    monkeypatch.setattr(memory, "free", lambda device="cpu": 10**9)
    huge = 10**9
    for argv, named in (
        (["--batch", str(huge)], "--micro-batch 1000000000"),
        (["--max-new-tokens", str(huge)], "answers of --max-new-tokens"),
    ):
        with pytest.raises(
            InputError, match=f"{named}.* takes .* of memory at least, and 1 GB are free; make"
        ):
            lcdd.main(["--out", str(tmp_path / "r"), "--device", "cpu", *argv])
        assert not (tmp_path / "r").exists()
    net = make_net(dtype=torch.float32)
    with pytest.raises(
        InputError, match="keeping keys and values of 1 texts of up to 1000000002 tokens"
    ):
        net.generate([[1, 2]], huge)
    o = eraser.options(["--run", "x", "--length", str(huge), "--device", "cpu"])
    with pytest.raises(InputError, match="a trigger of --length 1000000000 takes"):
        eraser.learn(net, None, None, None, torch.zeros(1), o)
    with pytest.raises(InputError, match="--hidden 64000000 --layers 1000000000 takes"):
        tiny.make(tmp_path / "t", hidden=64000000, layers=huge)
    monkeypatch.undo()
    size = memory.size(sum(p.nbytes for p in model.load(ROOT / "tiny").parameters()))
    monkeypatch.setattr(memory, "free", lambda device="cpu": 10**6)
    with pytest.raises(InputError, match=f"the model in .*tiny takes {size} of memory"):
        model.load(ROOT / "tiny")


def too_many_bytes():
    bytearray(10**15)


def too_large_a_tensor():
    torch.empty(10**15)


def a_full_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("main", [too_many_bytes, too_large_a_tensor, a_full_gpu])
def test_memory_that_is_not_there_is_one_sentence(tmp_path, main):
    status, _, errors = Forked(tmp_path, cli, main).end()
    assert status == 2
    assert errors.startswith("error: more memory was needed")
    assert errors.count("\n") == 1
