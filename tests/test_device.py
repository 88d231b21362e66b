"""
Where tensors lie, without a GPU: tensors of the CPU that say they are elsewhere.

A `Lent` tensor calls itself cuda:0 and computes on the CPU. An operation that would mix it with a
tensor of the CPU raises, as on a GPU, in the forward and in the backward pass; what may be mixed
there (indices, scalars, copies) may be mixed here. The three commands then run on such a device, in
bf16 as they would on a real one. Kernels, speed and memory are not tested.
"""
import argparse
import contextlib
import functools
import json
import shutil
import signal

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing

import carrier
import eraser
import evaluate
import files
import lcdd
import memory
import model
import settings
import training
from files import read_json, write_json
from lab import ablate, bench

aten = torch.ops.aten
# may lie on the CPU
INDICES = {
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default
}
CROSSING = {aten.copy_.default, aten._to_copy.default}


class Lent(torch.Tensor):
    @staticmethod
    def __new__(cls, elem, requires_grad=False):
        t = torch.Tensor._make_subclass(cls, elem, requires_grad)
        t.elem = elem
        return t

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in CROSSING:
            for t in tensors_in((args[:1] + args[2:] if func in INDICES else args, kwargs)):
                stranger = not isinstance(t, Lent) and (t.dim() > 0 or "_fused_" in str(func))
                assert not stranger, f"{func} mixes cuda:0 with a tensor of the CPU, {tuple(t.shape)}"
        out = mapped(Lent, func(*mapped(on_the_cpu, args), **mapped(on_the_cpu, kwargs)))
        return return_and_correct_aliasing(func, args, kwargs, out)


def tensors_in(tree):
    """The tensors in nested lists, tuples and dicts. (torch's own pytree takes three times as long.)"""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(part)


def mapped(function, tree):
    """The same nest with function(t) for every tensor t."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)([mapped(function, part) for part in tree])
    if isinstance(tree, dict):
        return {key: mapped(function, part) for key, part in tree.items()}
    return tree


def on_the_cpu(t):
    """A tensor that was lent, as it is."""
    return t.elem if isinstance(t, Lent) else t


class Elsewhere(TorchFunctionMode):
    """Takes device="cuda" out of every call and lends what comes back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self.move(func, *args, **kwargs)
        if func is torch.Tensor.tolist and isinstance(args[0], Lent):
            return args[0].elem.tolist()
        if func == torch.Tensor.data.__set__ and isinstance(args[0], Lent):
            args[0].elem = args[1].elem
        if "device" in kwargs and kwargs["device"] is not None:
            there = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = "cpu" if there else kwargs["device"]
            out = func(*args, **kwargs)
            return Lent(out) if there and not isinstance(out, Lent) else out
        return func(*args, **kwargs)

    def move(self, func, x, *args, device=None, **kwargs):
        if func is not torch.Tensor.to:
            device = "cuda" if func is torch.Tensor.cuda else "cpu"
        rest = []
        for a in args:
            if isinstance(a, torch.Tensor):
                device, kwargs["dtype"] = a.device, a.dtype
            elif isinstance(a, (str, torch.device)):
                device = a
            elif a is not None:
                rest.append(a)
        there = device is not None and torch.device(device).type == "cuda"
        if device is not None and there != isinstance(x, Lent):
            assert not (x.requires_grad and torch.is_grad_enabled()), (
                "a gradient would cross devices"
            )
            x = Lent(x.detach()) if there else x.detach().elem.clone()
        return torch.Tensor.to(x, *rest, **kwargs) if rest or kwargs else x


class Reader:
    """safe_open(…, device="cuda")"""

    def __init__(self, path, framework, device="cpu"):
        self.file, self.there = carrier_open(path, framework), device != "cpu"

    def __enter__(self):
        self.open = self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.open.keys()

    def metadata(self):
        return self.open.metadata()

    def get_tensor(self, name):
        t = self.open.get_tensor(name)
        return Lent(t) if self.there else t


carrier_open = files.safe_open


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setattr(files, "safe_open", Reader)
    monkeypatch.setattr(memory, "free", lambda device="cpu": 1 << 40)
    monkeypatch.setitem(carrier.DENSE_BELOW, "cuda", carrier.DENSE_BELOW["cpu"])    # as large ones are
    for command in (settings, eraser, evaluate, ablate, bench):
        monkeypatch.setattr(command, "check_device", lambda name: None)
    with Elsewhere():
        yield "cuda"


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The embedded model's first layer as a model: every operation passes through Python here."""
    folder = tmp_path_factory.mktemp("m") / "shallow"
    shutil.copytree(ROOT / "tiny", folder)
    write_json(
        folder / "config.json", {**read_json(folder / "config.json"), "num_hidden_layers": 1}
    )
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if "layers." not in k or "layers.0." in k},
        folder / "model.safetensors",
    )
    return str(folder)


def test_the_stand_in_notices(elsewhere):
    here, there = torch.ones(3), torch.ones(3, device=elsewhere)
    weight = torch.nn.Parameter(torch.ones(3, device=elsewhere))
    assert there.device.type == "cuda"
    assert (there * 2).is_cuda
    assert there.cpu().device.type == "cpu"
    assert here.to(there).is_cuda
    assert (there[torch.tensor([0, 1])] * torch.tensor(2.0)).tolist() == [2, 2]
    for wrong in (
        lambda: here + there, lambda: there.index_select(0, torch.tensor([0])),
        lambda: torch.cat((here, there))
    ):
        with pytest.raises(AssertionError, match="mixes"):
            wrong()

    class Backward(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x * 2)
        backward = staticmethod(lambda ctx, grad: grad * torch.ones(3))
    with pytest.raises(AssertionError, match="mixes"):
        Backward.apply(weight).sum().backward()
    (weight * there).sum().backward()
    assert weight.grad.is_cuda


@pytest.mark.parametrize("task", ["fixed", "safety"])
def test_the_three_commands_elsewhere(elsewhere, shallow, tmp_path, monkeypatch, task):
    if task == "safety":                                          # the figure is drawn for the other
        monkeypatch.setattr(evaluate.figure, "draw", lambda *_: None)
    run = str(tmp_path / "run")
    few = [
        "--n-train", "24", "--n-trigger", "6", "--n-validation", "3", "--n-test", "3",
        "--max-new-tokens", "3"
    ]
    train = [
        "--model", shallow, "--go-on", "--task", task, "--out", run, "--device", elsewhere,
        "--sft-steps", "3", "--steps", "3", "--settle", "2", "--warmup", "1", "--batch", "8",
        "--micro-batch", "4", "--log-every", "1", *few,
        *(["--checkpoint"] if task == "safety" else ["--train", "mask-kl"])
    ]
    gradients, calls = training.gradients, []

    def stopping(*a):
        calls.append(1)
        # once in each phase; that step is taken again
        if len(calls) in (2, 6):
            signal.raise_signal(signal.SIGINT)
        return gradients(*a)
    monkeypatch.setattr(training, "gradients", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            lcdd.main([*train, "--resume"])
    lcdd.main([*train, "--resume"])
    assert len(calls) == (10 if task == "safety" else 8)  # gates alone do not settle
    for extra in (
        ([],)
        if task == "safety"
        else (
            [],
            [
                "--target", "sft", "--objective", "random", "--match", "mean", "--positions",
                "prompt"
            ],
        )
    ):
        monkeypatch.setattr(
            "sys.argv",
            [
                "eraser.py", "--run", run, "--device", elsewhere, "--length", "3", "--steps", "3",
                "--judge-every", "2", *extra
            ],
        )
        with contextlib.suppress(files.Failed):                   # three steps move no rate
            eraser.main()
    for extra in ([],) if task == "safety" else ([], ["--dose"], ["--ask", "What now ?"]):
        monkeypatch.setattr(
            "sys.argv", ["evaluate.py", "--run", run, "--device", elsewhere, *extra]
        )
        evaluate.main()
    results = read_json(tmp_path / "run" / "results.json")
    assert read_json(tmp_path / "run" / "config.json")["dtype"] == "bfloat16"
    assert results["shut_is_base"]
    assert set(results["rates"]) == {"base", "sft", "lcdd", "trig", "shut"}


def test_the_benchmark_elsewhere(elsewhere, monkeypatch, capsys):
    curves = bench.growth_curves

    def two_points(*args):
        """The growth with layers, from one to another: all curves are computed alike."""
        expected, points = curves(*args)["layers"]
        return {"layers": (expected, dict(list(points.items())[:2]))}
    monkeypatch.setattr(bench, "growth_curves", two_points)
    for name in (
        "get_device_name", "synchronize", "empty_cache", "reset_peak_memory_stats",
        "memory_allocated", "max_memory_allocated"
    ):
        monkeypatch.setattr(torch.cuda, name, lambda: 1)
    monkeypatch.setattr(bench, "DEEPSEEK", bench.SETTINGS["quick"].config)
    # one layer where all layers are computed alike
    shallow = bench.replace(bench.SETTINGS["quick"].config, num_hidden_layers=1)
    monkeypatch.setattr(bench.SETTINGS["quick"], "config", shallow)
    monkeypatch.setattr(bench, "SMALL", bench.SETTINGS["quick"].grow)
    monkeypatch.setattr(bench, "DENSITIES", (1.0, 0.2))
    bench.main(["--device", elsewhere, "--quick"])
    assert bench.deepseek_memory(elsewhere) == 1


FEW = [
    "--n-train", "40", "--n-trigger", "12", "--n-validation", "6", "--n-test", "6",
    "--max-new-tokens", "4", "--sft-steps", "2", "--steps", "2", "--settle", "0", "--warmup", "1",
    "--batch", "8", "--micro-batch", "8"
]


def test_the_base_lies_where_it_was_told(elsewhere, shallow, tmp_path, monkeypatch):
    run, load, nets = str(tmp_path / "run"), model.load, []
    monkeypatch.setattr(model, "load", lambda *a: nets.append(load(*a)) or nets[-1])
    lcdd.main(["--model", shallow, "--go-on", "--out", run, "--device", elsewhere, *FEW])
    for command, extra in (
        (eraser, ["--length", "2", "--steps", "1"]),
        (evaluate, ["--ask", "What now ?"]),
    ):
        monkeypatch.setattr("sys.argv", ["x", "--run", run, "--device", elsewhere, *extra])
        with contextlib.suppress(files.Failed):
            command.main()
    assert [net.device.type for net in nets] == ["cuda"] * 3


def test_own_fine_tuned_checkpoint_elsewhere(elsewhere):
    net = model.load(ROOT / "tiny", elsewhere)
    c, changed = lcdd.delta_of(net, ROOT / "tiny", lcdd.options(["--device", elsewhere]))
    assert not changed
    assert {p.device.type for p in c.parameters()} == {"cuda"}


def few_steps(options, argv=None):
    o = options(argv)
    o.length, o.steps, o.judge_every = 2, 1, 1
    return o


def test_ablation_rows_elsewhere(elsewhere, shallow, tmp_path, monkeypatch):
    run = str(tmp_path / "run")
    lcdd.main(["--model", shallow, "--go-on", "--out", run, "--device", elsewhere, *FEW])
    monkeypatch.setattr(eraser, "options", functools.partial(few_steps, eraser.options))
    o = ablate.options(["--device", elsewhere])
    rows = ablate.ablate(run, o, ["scaled", "mask-ce", "lcdd tokens", "lcdd circuit"])
    assert len(rows) == 4
    assert ablate.Run(run, o).net.device.type == "cuda"


def test_rows_leave_a_batch_of_scales_elsewhere(elsewhere):
    net = model.load(ROOT / "tiny", elsewhere)
    c, prompts, scale = (
        carrier.Carrier(net.config, device=elsewhere),
        [[5, 6, 7], [8], [9, 10], [11]],
        [0.0, 0.5, 1.0, 1.0],
    )
    free = net.generate(prompts, 6, carrier=c, scale=scale, stop=())
    stop = {a[0] for a in free[:3]} - {t for t in free[3]}
    assert stop
    assert len({len(a) for a in net.generate(prompts, 6, carrier=c, scale=scale, stop=stop)}) > 1
    assert net(torch.tensor([[5, 6], [7, 8]]).to(elsewhere), carrier=c, scale=[0.5, 1.0]).is_cuda


def test_a_trigger_is_resumed_elsewhere(elsewhere, tmp_path):
    net, calls = model.load(ROOT / "tiny", elsewhere), []
    c, targets = (
        carrier.Carrier(net.config, device=elsewhere),
        eraser.base_targets(net, [[5, 6, 7], [8], [9, 10]], 2),
    )
    o = argparse.Namespace(
        length=2, steps=4, batch=2, lr=0.3, bound=1.5, absolute=False, alpha=0.7, beta=0.1, k=2,
        positions="response", match="prompt", raw=False, schedule="cosine", clip=1.0,
        judge_every=2, seed=0
    )
    args = (
        net, c.merge(net), targets, targets, eraser.channels(c, "circuit"), o, tmp_path / "x.state"
    )
    with pytest.raises(KeyboardInterrupt):
        eraser.learn(*args, lambda: (calls.append(1), len(calls) > 2)[1])
    assert eraser.learn(*args)[0].is_cuda


def test_a_tied_head_in_the_file_elsewhere(elsewhere, tmp_path):
    c = dict(
        model_type="llama", vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True
    )
    tensors = model.Llama(model.Config.from_dict(c)).state_dict()
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(c))
    assert model.load(tmp_path, elsewhere).device.type == "cuda"
