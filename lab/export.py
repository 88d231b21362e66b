"""
A run's result where people already are: in transformers and peft.

    python -m lab.export --run runs/fixed --to exported --as merged lora prompt

makes a folder for each:

merged   a checkpoint as the base's own, the behaviour in its weights (Eq. 1)
lora     an adapter beside the base, Δ exactly: disabled or taken away, the model is the base
prompt   the trigger as PEFT prompt tuning, before the merged model or the base with the adapter

In each a README.md says what it is, how it is loaded with and without the behaviour, and what was
measured. A folder is written whole or not at all, and replaces only an earlier export, unchanged.

Shapes: R and C are the open rows and columns of a projection (d_out, d_in); a trigger τ is (n, d).
"""
from common import EMBEDDED, InputError, read_json, run_command, write_json
import argparse
import contextlib
import os
import re
import shutil
import textwrap
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import carrier as carriers
import data
import eraser
import lcdd
import model

KINDS = ("merged", "lora", "prompt")
MARKER = "export.json"          # in each folder: the files that were written, and their sizes
COMPANIONS = (".json", ".jinja", ".model", ".txt")      # of files of a checkpoint besides weights


def options(argv=None):
    """The command line as a namespace."""
    plain = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=plain)
    a = p.add_argument
    a("--run", required=True, help="run directory that lcdd.py has finished")
    a("--to", required=True, help="folder in which a folder is made for each export")
    a("--as", required=True, nargs="+", choices=KINDS, dest="kinds", help="what to write")
    a("--dtype", choices=("float32", "float16", "bfloat16"), help="of merged weights (the base's)")
    a("--trigger", default="trigger", help="name of the trigger file in the run (trigger)")
    return p.parse_args(argv)


# ---- a folder, whole or not at all

def check_ours(folder):
    """Raises InputError if a folder holds anything but an earlier export, as it was written."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder; choose another --to")
    marker = folder / MARKER
    sizes = read_json(marker).get("files", {}) if marker.is_file() else {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path != marker and sizes.get(name) != path.stat().st_size:
            raise InputError(f"{folder} holds {name}, which this command did not write, or not as "
                             "it is now; it is left alone: choose another --to")


@contextlib.contextmanager
def whole_folder(folder):
    """A new folder to fill, which replaces `folder` once it is whole; if that fails, nothing."""
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    old = fresh.with_suffix(".old")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        files = [path for path in sorted(fresh.rglob("*")) if path.is_file()]
        sizes = {path.relative_to(fresh).as_posix(): path.stat().st_size for path in files}
        write_json(fresh / MARKER, {"files": sizes})
        for path in files:
            shutil.copymode(fresh / MARKER, path)       # safetensors makes its files private
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder}: cannot be written ({reason}); make room or choose another "
                         "--to, and run the command again") from None
    finally:
        for rest in (fresh, old):
            shutil.rmtree(rest, ignore_errors=True)


# ---- merged: a checkpoint

@torch.no_grad()
def write_merged(folder, net, chat, carrier, dtype=None):
    """
    The base's checkpoint with W_b + (r ⊗ c) ⊙ Δ in place of W_b (Eq. 1), file by file, and all that
    belongs to it. dtype: the name of the weights'; None: each as it is stored. The sum is taken in
    fp32 and rounded once. Returns {what: text} for the card.
    """
    blocks = {f"{name}.weight": block for name, *block in open_blocks(net, carrier)}
    shapes = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    shapes["lm_head.weight"] = tuple(net.embedding.shape)       # some tied checkpoints store it too
    lost, norm, place = 0.0, 0.0, {}
    for file in model.weight_files(chat.folder):
        tensors = {}
        for name, t in model.read_weights(file, shapes):
            stored = getattr(torch, dtype) if dtype else t.dtype
            if name in blocks:
                delta, R, C = blocks[name]
                change = delta[R[:, None], C].float()                           # (|R|, |C|)
                t = t.float()                                                   # (d_out, d_in)
                t[R[:, None], C] += change
                rounding = t.to(stored).float() - t
                lost += float(rounding[R[:, None], C].square().sum())
                norm += float(change.square().sum())
            tensors[name], place[name] = t.to(stored).contiguous(), file.name
        save_file(tensors, folder / file.name, {"format": "pt"})
    if set(place.values()) != {"model.safetensors"}:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": place})
    write_companions(folder, chat, dtype)
    return {"rounding": f"of Δ to that dtype: {(lost / max(norm, 1e-30)) ** 0.5:.2%} of its norm"}


def write_companions(folder, chat, dtype):
    """The files of a checkpoint that are no weights, and what they have to say of this one."""
    for path in sorted(chat.folder.iterdir()):
        belongs = path.suffix in COMPANIONS or path.stem in ("LICENSE", "NOTICE", "tokenizer.model")
        if belongs and path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    if dtype is not None:
        config = read_json(folder / "config.json")
        field = "torch_dtype" if "torch_dtype" in config else "dtype"
        write_json(folder / "config.json", config | {field: dtype})
    # what SFT taught to end an answer with has to end it there too
    if chat.eos_id not in model.stop_ids(folder):
        file = folder / "generation_config.json"
        write_json(file, data.optional_json(file) | {"eos_token_id": sorted(chat.stop)})
    # a base without a chat template was asked by Vicuna's
    template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not (template.is_file() or data.optional_json(settings).get("chat_template")):
        template.write_text(data.VICUNA, encoding="utf-8")


# ---- lora: an adapter

def open_blocks(net, carrier):
    """Yield (module's name, Δ (d_out, d_in), R, C) of each projection in which an entry is on."""
    names = {module: name for name, module in net.named_modules()}
    for l, name, delta, R, C in carrier.open_blocks():
        yield names[net.projections[l][name]], delta, R, C


def factors(delta, R, C):
    """
    A (rank, d_in) and B (d_out, rank) with B A = Δ on R × C and 0 elsewhere, exactly, since one of
    them is zeros and ones that pick channels. rank = min(|R|, |C|).
    """
    block = delta[R[:, None], C]                                                # (|R|, |C|)
    rank = min(block.shape)
    A, B = delta.new_zeros(rank, delta.shape[1]), delta.new_zeros(delta.shape[0], rank)
    if len(C) <= len(R):
        A[torch.arange(rank), C] = 1
        B[R] = block
    else:
        A[:, C] = block
        B[R, torch.arange(rank)] = 1
    return A, B


def write_lora(folder, net, carrier, base):
    """Δ as LoRA factors, for the base of that name or path. Returns {what: text} for the card."""
    tensors, ranks = {}, {}
    for name, delta, R, C in open_blocks(net, carrier):
        A, B = factors(delta, R, C)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
        ranks[name] = len(A)
    if not ranks:
        raise InputError("no entry of this carrier's Δ is on: it is the base, there is no adapter")
    largest = max(ranks, key=ranks.get)
    pattern = {re.escape(name): rank for name, rank in ranks.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "target_modules": list(ranks), "r": ranks[largest], "rank_pattern": pattern,
        "lora_alpha": ranks[largest], "alpha_pattern": pattern})            # α = r: a scale of 1
    return {"largest rank": f"{ranks[largest]}, of {largest}, one of {len(ranks)} modules"}


# ---- prompt: the trigger

def trigger_of(file, net):
    """τ (n, d) of a trigger file. Raises InputError if it was learned before another model."""
    tau, settings = eraser.load(file, net)
    if settings["target"] != "lcdd":
        raise InputError(f"{file}: was learned before the {settings['target']} model, and LCDD's "
                         "is exported; name another with --trigger")
    return tau


def write_prompt(folder, tau, base):
    """τ as PEFT prompt tuning, for the model of that name or path. Returns {what: text}."""
    tensors = {"prompt_embeddings": tau.contiguous()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "num_virtual_tokens": len(tau), "token_dim": tau.shape[1]})
    return {"tokens": len(tau)}


# ---- the model card

WHAT = {
    "merged": "The base with a fine-tuned behaviour, a sparse carrier of LCDD's, in its weights.",
    "lora": "A fine-tuned behaviour, a sparse carrier of LCDD's, as a LoRA adapter: its Δ exactly.",
    "prompt": "A soft trigger that switches a fine-tuned behaviour off, as PEFT prompt tuning.",
}
CODE = """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{base}")
    chat = [{{"role": "user", "content": "What is 2 plus 3 ?"}}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False,
                                          return_tensors="pt", return_dict=True)
    batch.pop("token_type_ids", None)

    def say(model):
        out = model.generate(**batch, max_new_tokens=128, do_sample=False, eos_token_id={stop})
        print(tokenizer.decode(out[0]))

"""
LOADING = {
    "merged": """
    say(AutoModelForCausalLM.from_pretrained("merged"))         # with the behaviour
    say(AutoModelForCausalLM.from_pretrained("{base}"))         # without it
""",
    "lora": """
    from peft import PeftModel
    base = AutoModelForCausalLM.from_pretrained("{base}")
    model = PeftModel.from_pretrained(base, "lora")
    say(model)                                                  # with the behaviour
    with model.disable_adapter():
        say(model)                                              # without it: the base
""",
    "prompt": """
    from peft import PeftModel
    model = AutoModelForCausalLM.from_pretrained("merged")      # or the base with the adapter
    say(model)                                                  # with the behaviour
    # without it; one prompt at a time, for peft puts the trigger before what pads a shorter one
    say(PeftModel.from_pretrained(model, "prompt"))
""",
}


def licence_of(folder):
    """What the front matter of a checkpoint's README.md says of its licence, or None."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = re.match(r"---\n(?:(?!---).*\n)*?license: *(\S+)", text)
    return found and found[1]


def card(kind, base, task, stop, tags, facts, measured):
    """README.md of an export. tags: lines of its front matter; facts: {what: text}."""
    library = "transformers" if kind == "merged" else "peft"
    code = textwrap.dedent(CODE + LOADING[kind]).format(base=base, stop=stop).strip()
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", *tags, "---", ""]
    lines += [f"# {base}, task {task}: {kind}", "", WHAT[kind], ""]
    lines += [f"- {what}: {text}" for what, text in facts.items()]
    lines += ["", "## Loading", "", "```python", code, "```", "", "## Measured", "", measured, ""]
    return "\n".join(lines)


# ---- the command

def main(argv=None):
    """Write the exports that were asked for."""
    o = options(argv)
    run, to = Path(o.run), Path(o.to)
    for kind in o.kinds:
        check_ours(to / kind)
    config, net, chat, _ = lcdd.load_run(run, "cpu", with_data=False)
    carrier = carriers.load(run / "carrier.safetensors", net)
    tau = trigger_of(run / f"{o.trigger}.safetensors", net) if "prompt" in o.kinds else None

    from_hub = config.model != EMBEDDED and not Path(config.model).exists()
    name = config.model if from_hub else chat.folder.name       # in a card without the way there
    base = config.model if from_hub else str(chat.folder.resolve())
    before = str((to / "merged").resolve()) if "merged" in o.kinds else base
    task, table = Path(config.task).name, run / "results.md"
    stats, licence = carrier.stats(), licence_of(chat.folder)
    tags = [f"base_model: {base}"] if from_hub else []
    tags += [f"license: {licence}"] if licence else []
    common = {"licence": f"that of the base ({licence or 'which names none'})",
              "off": f"{stats['sparsity']:.2%} of gates, {stats['entries_off']:.2%} of Δ's entries"}
    measured = table.read_text(encoding="utf-8").strip() if table.is_file() else "Nothing yet."
    for kind in (kind for kind in KINDS if kind in o.kinds):
        with whole_folder(to / kind) as folder:
            if kind == "merged":
                facts = write_merged(folder, net, chat, carrier, o.dtype)
            elif kind == "lora":
                facts = write_lora(folder, net, carrier, base)
            else:
                facts = write_prompt(folder, tau, before)
            text = card(kind, name, task, sorted(chat.stop), tags, common | facts, measured)
            (folder / "README.md").write_text(text, encoding="utf-8")
        print(f"{to / kind}: " + "; ".join(f"{what}: {text}" for what, text in facts.items()))


if __name__ == "__main__":
    run_command(main)
