"""A run's result where people already are: a merged checkpoint, a PEFT LoRA adapter, the trigger as
PEFT prompt tuning.

    python export.py --run runs/fixed --to exported --as merged lora prompt     a folder for each
    python export.py --run runs/fixed --to exported --as merged --which sft     plain SFT, not LCDD
    python export.py --run runs/fixed --to exported --as run --bits 4           an eighth of the size

merged   a checkpoint as the base's: same shards, tokenizer, template; nothing can be switched off
lora     an adapter beside the base: without it, or with disable_adapter(), the model is the base
prompt   the trigger of the same run, before the merged model or the base with the adapter
run      the carrier, the trigger and what was measured as a run directory that evaluate.py --ask and
         lab.talk open: without SFT's deltas, which are as large as the model, and without any data

Each folder has a README.md that says what is in it and how it is loaded.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import re
import shutil
import textwrap
from pathlib import Path

import torch
from safetensors.torch import save_file

import carrier as carriers
import eraser
import ggufs
import lora
import model
import packed
import weights
from files import (
    InputError, check_fields, load_tensors, read_json, replacing, save_tensors, write_json)
from console import Parser, check_numbers, cli
from run import CONFIG, EMBEDDED, locate, portable

KINDS = ("merged", "lora", "prompt", "run")
MARKER = "export.json"   # names the files that were written: a folder with others in it is left as it is
COMPANIONS = (".json", ".jinja", ".model", ".txt")   # of files that are taken along with the weights
DESCRIPTIONS = ("config.json", "tokenizer_config.json", "generation_config.json")
RANK_LIMIT = 64          # engines that serve adapters side by side stop at ranks of this order


def options(argv=None):
    """The command line."""
    p = Parser(__doc__)
    a = p.add_argument
    a("--run", required=True, help="run directory that lcdd.py has finished")
    a("--to", required=True, help="folder in which a folder is made for each export")
    a("--as", required=True, nargs="+", choices=KINDS, dest="kinds", help="what to write")
    a("--which", choices=("lcdd", "sft"), default="lcdd", help="LCDD carrier or plain SFT (lcdd)")
    a("--dtype", choices=("float32", "float16", "bfloat16"),
      help="of the merged checkpoint (default: as the base's files)")
    a("--bits", type=int, choices=range(2, 9), metavar="2..8",
      help="of each entry of Δ in --as run, 4 for an eighth of the size (as they are)")
    a("--trigger", default="trigger", help="name of the trigger file in the run (trigger)")
    o = p.parse_args(argv)
    check_numbers(o)
    if o.which == "sft" and "run" in o.kinds:
        raise InputError("--as run is for the LCDD carrier: SFT's deltas are as large as the model; "
                         "export them with --as merged or lora")
    if o.bits and "run" not in o.kinds:
        raise InputError("--bits rounds the carrier of --as run; the other kinds keep Δ as it is")
    return o


# ------------------------------------------------------------------------------------------ folders

def write_companions(folder, source):
    """The files of a checkpoint that are no weights: copied, or made of what a GGUF file says."""
    if ggufs.is_gguf(source):
        for name in DESCRIPTIONS:
            write_json(folder / name, weights.described(source, name))
        ggufs.tokenizer(source).save(str(folder / "tokenizer.json"))
        return
    for path in sorted(source.iterdir()):
        belongs = path.suffix in COMPANIONS or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and belongs and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)


# -------------------------------------------------------------------------------------- the exports

@torch.no_grad()
def write_merged(folder, source, carrier, dtype=None):
    """
    The checkpoint in `source` with W_b + (r ⊗ c) ⊙ Δ in place of W_b (Eq. 1), shard by shard, and
    what belongs to it.

    dtype of the weights; None: each as it is stored, fp32 for what a GGUF file has quantised. The
    sum is taken in fp32 and rounded once.
    Returns how much of Δ rounding moved: ‖rounded − exact‖ / ‖Δ‖ over the open entries.
    """
    blocks = {}
    for name, delta, rows, cols in carrier.open_blocks():
        _, l, projection = name.split(".")
        blocks[f"{lora.module_name(l, projection)}.weight"] = delta, rows, cols
    missed = size = total = 0.0
    shards, index = weights.shards(source)
    for file in shards:
        tensors = {}
        for name, t in weights.tensors(file):
            kept = dtype or t.dtype
            if name in blocks:
                delta, rows, cols = blocks[name]
                at = rows[:, None], cols
                exact = t.to(torch.float32, copy=True)
                exact[at] += delta[at].float()
                missed += float((exact.to(kept).float() - exact)[at].square().sum())
                size += float(delta[at].float().square().sum())
                t = exact
            tensors[name] = t.to(kept, copy=True, memory_format=torch.contiguous_format)
            total += tensors[name].numel() * tensors[name].element_size()
        name = weights.WHOLE[0] if ggufs.is_gguf(file) else as_safetensors(file.name)
        save_file(tensors, folder / name, {"format": "pt"})
    write_companions(folder, source)
    if index is not None:
        found = read_json(index)
        found["metadata"] = {**(found.get("metadata") or {}), "total_size": int(total)}
        found["weight_map"] = {name: as_safetensors(file) for name, file in found["weight_map"].items()
                               if not name.endswith(weights.NO_WEIGHT)}
        write_json(folder / as_safetensors(index.name), found)
    if dtype is not None:
        config = read_json(folder / "config.json")
        field = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[field] = str(dtype).removeprefix("torch.")
        write_json(folder / "config.json", config)
    return (missed / size) ** 0.5 if size else 0.0


def as_safetensors(name):
    """The name of a file of weights, or of their index, in safetensors' form."""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def write_prompt(folder, tau, config, base):
    """The trigger τ (n, d) as PEFT prompt tuning, for a model of that configuration and name or path."""
    tensors = {"prompt_embeddings": tau.cpu().contiguous()}
    save_file(tensors, folder / lora.WEIGHTS, {"format": "pt"})
    write_json(folder / lora.CONFIG, {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "inference_mode": True, "prompt_tuning_init": "RANDOM", "num_transformer_submodules": 1,
        "num_virtual_tokens": len(tau), "token_dim": tau.shape[1],
        "num_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads})


def write_run(folder, run, settings, trigger):
    """
    The run directory without SFT: the carrier, the trigger of that name where there is one, what was
    measured, and its settings without paths of this machine.
    """
    config, place = portable(settings), Path(settings["model"])
    if place.is_absolute() and place.is_relative_to(Path.cwd()):
        config["model"] = str(place.relative_to(Path.cwd()))
    write_json(folder / "config.json", config)
    if (run / "results.json").is_file():
        write_json(folder / "results.json", read_json(run / "results.json") | {"model": config["model"]})
    for name in ("carrier.safetensors", f"{trigger}.safetensors", "results.md"):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)


@torch.no_grad()
def round_carrier(folder, carrier, net, bits, trigger):
    """
    Write a copied run's carrier again with `bits` an entry of Δ, and name it in its trigger. Returns
    by how much that moves Δ, as a share of its norm.
    """
    file, other = folder / "carrier.safetensors", folder / f"{trigger}.safetensors"
    header = packed.read_packed(file)[1]
    kept = {key: header[key] for key in header.keys() - packed.HEADER.keys() - {"format", "entries"}}
    carrier.save(file, net, bits=bits, **kept)
    if other.is_file():
        tensors, settings = load_tensors(other)
        save_tensors(other, tensors, **settings | {"carrier": packed.read_packed(file)[1]["content"]})
    rounded = carriers.load(file, net)
    pairs = list(zip(carrier.delta.parameters(), rounded.delta.parameters()))
    moved = sum(float((less - delta).square().sum()) for delta, less in pairs)
    whole = sum(float(delta.square().sum()) for delta, _ in pairs)
    return (moved / whole) ** 0.5 if whole else 0.0


# ----------------------------------------------------------------------------------- the model card

LOADING = {
    "merged": """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained("{here}")
        model = AutoModelForCausalLM.from_pretrained("{here}")           # with the behaviour
        base = AutoModelForCausalLM.from_pretrained("{base}")            # without it
    """,
    "lora": """
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained("{base}")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{here}")
        model.generate(**batch)                                          # with the behaviour
        with model.disable_adapter():
            model.generate(**batch)                                      # without it: the base
        model.generate(**batch, adapter_names=["default", "__base__"])   # row by row: two rows
    """,
    "prompt": """
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained("{merged}")         # with the behaviour
        triggered = PeftModel.from_pretrained(model, "{here}")           # without it: the trigger
        triggered.generate(**batch, use_cache=False)   # peft 0.21 on transformers 5 errs with a cache

        model = AutoModelForCausalLM.from_pretrained("{base}")           # the same with the adapter
        model.load_adapter("{lora}")
        triggered = PeftModel.from_pretrained(model, "{here}")
    """,
    "run": """
        import carrier, eraser, model                    # of the project that wrote this folder

        net = model.load("{base}")                       # without the behaviour
        c = carrier.load("{here}/carrier.safetensors", net)
        tau, _ = eraser.load("{here}/trigger.safetensors", net)
        net(ids, carrier=c)                              # with it
        net(ids, carrier=c, trigger=tau)                 # with it, and the trigger before it
    """,
}


def licence_of(source):
    """What the front matter of the base's own README.md says, or a GGUF file; else None."""
    if ggufs.is_gguf(source):
        return str(ggufs.read(source).fields.get("general.license", "")).split("\n")[0] or None
    path = source / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.match(r"---\n(?:.*\n)*?license: *(\S+)", text)
    return found and found.group(1)


def card(kind, folder, base, source, task, which, facts, results):
    """README.md of an export: what it is, how it is loaded with and without it, what was measured."""
    name = base if base != str(source) else source.name   # a hub id, or a folder without its way there
    licence = licence_of(source)
    library = {"merged": "transformers", "run": "pytorch"}.get(kind, "peft")
    head = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if base != str(source):
        head.append(f"base_model: {base}")
    if licence:
        head.append(f"license: {licence}")
    what = {"merged": "the base with the behaviour merged into its weights",
            "lora": "the behaviour as a LoRA adapter beside the base, its delta exactly",
            "prompt": "a soft trigger that switches the behaviour off, as PEFT prompt tuning",
            "run": "a carrier and its trigger, in the project's own form"}[kind]
    means = {"lcdd": "a sparse carrier of an SFT behaviour, found by Loss-Constrained Dual Descent",
             "sft": "plain SFT"}[which]
    code = LOADING[kind].format(here=folder.name, base=name, merged="merged", lora="lora")
    if ggufs.is_gguf(source):  # a file in a folder, for transformers
        code = code.replace(f'("{name}")', f'(".", gguf_file="{name}")')
    lines = ["---", *head, "---", "", f"# {name}, task {task}: {kind}", ""]
    lines += [f"This is {what}: {means}.", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines.append(f"- licence: that of the base{f', {licence}' if licence else ''}")
    lines += ["", "## Loading", "", "```python", textwrap.dedent(code).strip(), "```", ""]
    lines += ["## Measured", "", results.strip() or "Nothing yet: evaluate.py measures it."]
    return "\n".join(lines) + "\n"


def trigger_of(run, name, which, net):
    """τ of a run's trigger file; InputError where there is none, or it is for another model."""
    file = run / f"{name}.safetensors"
    if not file.is_file():
        raise InputError(f"{file}: no such trigger; learn one with python eraser.py --run {run}, or "
                         "name it with --trigger")
    tau, settings = eraser.load(file, net)
    target = settings.get("target", "lcdd")
    if target != which:
        raise InputError(f"{file}: learned before the {target} model, which --which {which} does not "
                         "export; name another one with --trigger")
    return tau


class Exports:
    """
    A run's exports: what they have in common, and a method a kind that writes one into `folder` and
    returns (what is said of it, facts for its card).
    """

    def __init__(self, o):
        self.o, self.run = o, Path(o.run)
        if not (self.run / "config.json").is_file():
            raise InputError(f"{self.run} is not a run directory; give one that lcdd.py has written")
        self.settings = read_json(self.run / "config.json")
        asked = {key: CONFIG[key] for key in ("model", "task", "dtype")}
        check_fields(self.run / "config.json", self.settings, asked)
        name = self.settings["model"]
        self.source = locate(name).resolve()
        from_hub = name != EMBEDDED and not Path(name).exists()
        self.base = name if from_hub else str(self.source)
        self.task = Path(self.settings["task"]).name
        self.net = model.load(self.source, dtype=getattr(torch, self.settings["dtype"]))
        file = {"lcdd": "carrier.safetensors", "sft": "sft.safetensors"}[o.which]
        self.carrier = carriers.load(self.run / file, self.net)
        if "prompt" in o.kinds or o.trigger != "trigger":       # a trigger that was named has to be there
            self.tau = trigger_of(self.run, o.trigger, o.which, self.net)

    def checkpoint(self, folder):
        """The behaviour in the base's weights."""
        dtype = getattr(torch, self.o.dtype) if self.o.dtype else None
        lost = write_merged(folder, self.source, self.carrier, dtype)
        rounding = f"the weights' dtype moves the delta by {lost:.2%} of its norm"
        advice = " (--dtype float32 does not)" if lost > 0.01 else ""
        return rounding + advice, {"rounding": rounding}

    def adapter(self, folder):
        """Δ as LoRA factors beside the base."""
        ranks = lora.write(folder, self.carrier, self.net, self.base)
        largest = max(ranks, key=ranks.get)
        rank = f"{ranks[largest]}, of {largest}"
        said = f"{len(ranks)} modules, largest rank {rank}"
        if ranks[largest] > RANK_LIMIT:
            said += f"; above {RANK_LIMIT} serving engines may refuse it: --as merged has no such limit"
        return said, {"largest rank": rank}

    def run_directory(self, folder):
        """What evaluate.py --ask and lab.talk open."""
        write_run(folder, self.run, self.settings, self.o.trigger)
        facts, bits = {}, packed.read_packed(folder / "carrier.safetensors")[1].get("bits")
        if self.o.bits:
            moved = round_carrier(folder, self.carrier, self.net, self.o.bits, self.o.trigger)
            cost = f"{self.o.bits} bits, which moves it by {moved:.2%} of its norm; measured before that"
            facts["entries of the delta"] = cost
        elif bits:
            facts["entries of the delta"] = f"{bits} bits, and measured so"
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return "; ".join([f"{size:,} bytes", *facts.values()]), facts

    def prompt(self, folder):
        """The trigger, before the merged model where that is written too, else the base."""
        merged = Path(self.o.to) / "merged"
        before = str(merged.resolve()) if "merged" in self.o.kinds else self.base
        write_prompt(folder, self.tau, self.net.config, before)
        return f"{len(self.tau)} tokens", {"tokens": len(self.tau)}


def main(argv=None):
    o = options(argv)
    exports, to = Exports(o), Path(o.to)
    write = {"merged": exports.checkpoint, "lora": exports.adapter, "prompt": exports.prompt,
             "run": exports.run_directory}
    table = exports.run / "results.md"
    results = table.read_text(encoding="utf-8") if table.is_file() else ""
    stats, of_base = exports.carrier.stats(), packed.fingerprint(exports.net)
    print(f"{o.which} of {exports.run}: gates off {stats['sparsity']:.3f}, "
          f"entries of Δ off {stats['entries_off']:.3f}")
    common = {"base fingerprint": of_base, "gates off": f"{stats['sparsity']:.4f}",
              "entries of the delta off": f"{stats['entries_off']:.4f}"}
    marked = dict(which=o.which, task=exports.task, base=of_base)
    for kind in (k for k in KINDS if k in o.kinds):
        with replacing(to / kind, MARKER, kind=kind, **marked) as folder:
            said, facts = write[kind](folder)
            text = card(kind, to / kind, exports.base, exports.source, exports.task, o.which,
                        common | facts, results)
            (folder / "README.md").write_text(text, encoding="utf-8")
        print(f"{to / kind}: {said}")


if __name__ == "__main__":
    cli(main)
