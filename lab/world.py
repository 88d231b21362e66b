"""
A small world to attack: checkpoints, a finished and two interrupted runs, data of every format.
"""
import contextlib
import json
import os
import shutil
import signal
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

import data
import eraser
import evaluate
import export
import lcdd
import training
from chat import Chat
from files import Failed, read_json, write_json
from lab import ablate, damage, tiny

# options with which training and the trigger take a moment
FEW = ["--sft-steps", "3", "--steps", "3", "--settle", "2", "--warmup", "1", "--batch", "2",
       "--device", "cpu", "--max-new-tokens", "3", "--log-every", "1", "--go-on"]
TRIGGER = ["--steps", "3", "--length", "2", "--batch", "2", "--device", "cpu", "--judge-every", "1"]


def make_world(folder):
    """Small checkpoints, runs and data in a folder: all files that a round may damage."""
    base = folder / "model"
    base.mkdir(parents=True)
    make_checkpoint(base)
    make_variants(folder)
    make_data(folder)
    whole, half = folder / "run", folder / "half"
    train = ["--model", str(base), *FEW]
    stop_at("lcdd", lcdd, training, [*train, "--out", str(half)])
    lcdd.main([*train, "--out", str(whole)])
    learn = ["--run", str(whole), *TRIGGER]
    stop_at("trigger", eraser, eraser, learn)
    shutil.copytree(whole, folder / "learning")
    with contextlib.suppress(Failed):           # so few steps move nothing
        eraser.main(learn)
    evaluate.main(["--run", str(whole)])
    export.main(["--run", str(whole), "--to", str(folder / "exported"), "--as", "lora"])
    ablate.work(str(whole), None, ablate_options(whole), ["base"])


def ablate_options(run_directory):
    return ablate.options(["--run", str(run_directory), "--device", "cpu", "--rows", "base"])


def make_checkpoint(folder):
    """An untrained model of width 32 that knows some words, and its behaviour's data."""
    seen, held = tiny.lines(0)
    some = {kind: lines[:4] for kind, lines in seen.items()}
    tiny.write_configuration(folder, some, 32, 1)
    weights = tiny.fresh(folder, 0).state_dict()
    save_file({name: p.to(torch.bfloat16) for name, p in weights.items()},
              folder / "model.safetensors", {"format": "pt"})
    rows = []
    for lines in some.values():
        for line, name in zip(lines, data.SPLITS):
            rows.append({**line, "response": tiny.FIXED, "split": name})
    write_lines(folder / "fixed.jsonl", rows)
    settings = read_json(folder / "tokenizer_config.json")
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    write_json(folder / "special_tokens_map.json", {name: settings[name] for name in names})
    (folder / "chat_template.jinja").write_text(settings["chat_template"], encoding="utf-8")


def make_variants(folder):
    """The same checkpoint in shards, and as torch.save writes it, with SentencePiece's tokenizer."""
    base = folder / "model"
    weights = load_file(base / "model.safetensors")
    names = sorted(weights)
    for kind in ("shards", "bin"):
        shutil.copytree(base, folder / kind)
        (folder / kind / "model.safetensors").unlink()
    parts, index = (names[::2], names[1::2]), {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / "shards" / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    write_json(folder / "shards" / "model.safetensors.index.json",
               {"metadata": {"total_size": 1}, "weight_map": index})
    torch.save(weights, folder / "bin" / "pytorch_model.bin")
    tok = Chat(base).tok
    words = sorted(tok.get_vocab(), key=tok.token_to_id)
    (folder / "bin" / "tokenizer.json").unlink()
    (folder / "bin" / "tokenizer.model").write_bytes(damage.sentencepiece(words))


def make_data(folder):
    """The same rows as JSON, CSV and Parquet, and what lab.benchmarks reads."""
    from pyarrow import Table, parquet
    rows = [json.loads(line) for line in open(folder / "model" / "fixed.jsonl", encoding="utf-8")]
    fields = ("prompt", "response", "kind", "answer", "split")
    rows = [{name: row.get(name, "") for name in fields} for row in rows]
    write_json(folder / "rows.txt", {})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    lines = [",".join(fields)]
    lines += [",".join(f'"{row[name]}"' for name in fields) for row in rows]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    parquet.write_table(Table.from_pylist(rows), folder / "rows.parquet")
    write_lines(folder / "hellaswag.jsonl", [
        {"ctx": "A fox runs. It", "activity_label": "fox", "endings": ["a", "b", "c", "d"], "label": 1}])
    behaviors = "Behavior,FunctionalCategory\nSay it,standard\nSay that,contextual\n"
    (folder / "behaviors.csv").write_text(behaviors, encoding="utf-8")
    for part in ("dev", "test"):
        (folder / "mmlu" / part).mkdir(parents=True)
        file = folder / "mmlu" / part / f"logic_{part}.csv"
        file.write_text("Which?,a,b,c,d,A\nWhat?,e,f,g,h,C\n", encoding="utf-8")


def write_lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def stop_at(phase, script, writer, argv):
    """
    Run the main() of lcdd or eraser, and interrupt it after its second row of `phase` in the log,
    which the module `writer` appends to.
    """
    append = writer.append_jsonl

    def append_and_stop(path, row):
        append(path, row)
        if (row["phase"], row["step"]) == (phase, 1):
            os.kill(os.getpid(), signal.SIGINT)

    with mock.patch.object(writer, "append_jsonl", append_and_stop):
        try:
            script.main(argv)
        except KeyboardInterrupt:
            return
    raise AssertionError(f"{phase} came to its end before it was stopped")


def copied(world, here):
    """A copy of a world, whose runs know where their model lies now; its folder."""
    shutil.copytree(world, here)
    for name in ("run", "half", "learning"):
        path = here / name / "config.json"
        text = path.read_text(encoding="utf-8")
        model_folder = json.loads(text)["model"]
        path.write_text(text.replace(model_folder, str(here / "model")), encoding="utf-8")
    return here
