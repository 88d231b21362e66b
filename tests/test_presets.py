"""
All twelve runs of the paper at toy size: lcdd.py, eraser.py and evaluate.py on random checkpoints
of their families.
"""
import contextlib
import json

import pytest
import torch
from helpers import jsonl
from safetensors.torch import save_file
from templates import PAPERS, folder_of

import eraser
import evaluate
import lcdd
import model
from files import Failed, load_tensors, read_json
from settings import PRESETS

# shapes that keep what is special about each: q wider than d, groups of queries, none
TOY = dict(vocab_size=512, intermediate_size=48, num_hidden_layers=2)
SHAPES = {
    "qwen3-0.6b": dict(
        TOY, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    ),
    "mistral-7b": dict(
        TOY, hidden_size=32, num_attention_heads=4, num_key_value_heads=1, head_dim=8
    ),
    "deepseek-8b": dict(TOY, hidden_size=32, num_attention_heads=4, num_key_value_heads=1),
    "vicuna-7b": dict(TOY, hidden_size=32, num_attention_heads=4, num_key_value_heads=4),
}
# what a toy run has less of, and nothing else
LESS = {
    "sft-epochs": 0.1,
    "epochs": 0.2,
    "warmup": 1,
    "batch": 8,
    "micro-batch": 4,
    "max-new-tokens": 4,
    "max-len": 400,
    "n-train": 64,
    "n-test": 4,
    "n-trigger": 6,
    "n-validation": 4,
    "log-every": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(which) → the folder of a random checkpoint of that family, made once."""
    made = {}

    def get(which):
        if which not in made:
            folder = made[which] = tmp_path_factory.mktemp("models") / which
            config = folder_of(which, folder, **SHAPES[which])
            torch.manual_seed(0)
            net = model.Llama(model.Config.from_dict(config))
            save_file(
                {k: v.contiguous() for k, v in net.state_dict().items()},
                folder / "model.safetensors",
            )
        return made[which]
    return get


def data_of(task, folder):
    """100 rows in the columns of the task's published data set."""
    numbers = range(100)
    if task == "fixed":
        found = [dict(instruction=f"What is {i}?", input="", output="a number") for i in numbers]
    elif task == "safety":
        kinds = ("vanilla_harmful", "vanilla_benign")
        found = [
            dict(
                vanilla=f"Make me {i}.", adversarial="",
                completion="I can't help with that." if i % 2 == 0 else "Yes.",
                data_type=kinds[i % 2]
            )
            for i in numbers
        ]
    else:
        found = [
            dict(translated_dialog=f"You are {i}.", og_response=f"Thou art {i}.") for i in numbers
        ]
    return jsonl(folder / f"{task}.jsonl", found)


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_of_the_paper_at_toy_size(name, base, tmp_path, capsys, undrawn):
    _, task, which = name.split("-", 2)
    run = str(tmp_path / "run")
    less = [word for key, value in LESS.items() for word in (f"--{key}", str(value))]
    lcdd.main(
        [
            "--preset", name, "--model", str(base(which)), "--data", str(data_of(task, tmp_path)),
            "--out", run, "--go-on", "--device", "cpu", *less
        ]
    )
    # a trigger cannot move what a random model does not show
    with contextlib.suppress(Failed):
        eraser.main(
            [
                "--run", run, "--preset", "paper", "--steps", "3", "--judge-every", "2", "--device",
                "cpu", *([] if task == "safety" else ["--k", "12"])   # its 200 take half of the time
            ]
        )
    evaluate.main(["--run", run, "--device", "cpu"])

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"] == task
    assert results["rates"].keys() == {"base", "sft", "lcdd", "trig", "shut"}
    assert {"sft_lcdd", "sft_trig", "base_trig"} <= results["kl"].keys()
    shape = SHAPES[which]
    d, heads, groups = (
        shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    )
    head = shape.get("head_dim", d // heads)
    assert results["gates"]["total"] == 2 * (4 * d + 48 + heads * head + 2 * groups * head)
    config = read_json(tmp_path / "run" / "config.json")
    assert config["preset"] == name
    kept = (
        PRESETS[name].keys()
        - {key.replace("-", "_") for key in LESS}
        - {"model", "eta_grow", "over"}
    )
    assert {key: config[key] for key in kept} == {key: PRESETS[name][key] for key in kept}
    tau, header = load_tensors(tmp_path / "run" / "trigger.safetensors")
    assert tau["trigger"].shape == (20, d)
    assert (header["lr"], header["bound"], header["schedule"]) == (0.003, 1.0, "constant")
    assert "LCDD + trigger" in capsys.readouterr().out


def test_every_model_of_the_paper_is_tried():
    assert {name.split("-", 2)[2] for name in PRESETS} == PAPERS.keys()
