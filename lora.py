"""A carrier as a PEFT LoRA adapter, and back.

Where both gates are open Δ is a block of |R| rows × |C| columns, and so of rank min(|R|, |C|) at
most. Its two factors need no decomposition, W = W_b + B A with

    |C| ≤ |R|    B = Δ's open columns        A = one-hot rows that pick them out of x
    |C| > |R|    B = one-hot columns that put them into y        A = Δ's open rows

and as one of them holds zeros and ones only, B A is the block exactly. The adapter is read by peft,
transformers and what is built on them; peft itself is not needed here.
"""
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import patterns
from carrier import PROJECTIONS, Carrier
from files import (
    NUMBER, TEXT, InputError, check_fields, check_finite, digest, read_json, write_json)
from packed import fingerprint, pack_bits, unpack_bits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."       # before the base's own module names in an adapter's file
MODULE = r"(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+))"
FACTOR = re.compile(rf"(?:base_model\.model\.)?{MODULE}\.lora_([AB])(?:\.\w+)?\.weight")
# options with which an adapter is not W_b + s·BA; first values of A and B that are taken out of W_b
UNLIKE = ("use_dora", "use_qalora", "use_bdlora", "layer_replication",
          "alora_invocation_tokens", "fan_in_fan_out")
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
HEADER = {"gates": TEXT, "base": TEXT, "content": TEXT}    # of the carrier in an adapter of write()
MERGE_IT = "merge the adapter with peft's merge_and_unload() and give the checkpoint"


def module_name(l, name):
    """
    The name of a projection in a checkpoint of any of our families:
    model.layers.0.self_attn.q_proj.
    """
    part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{l}.{part}.{name}"


def factors(delta, rows, cols):
    """
    A (rank, d_in) and B (d_out, rank) with B A = Δ on open rows × open columns and 0 elsewhere.
    """
    block = delta[rows[:, None], cols]                                                       # (|R|, |C|)
    rank = min(block.shape)
    A, B = delta.new_zeros(rank, delta.shape[1]), delta.new_zeros(delta.shape[0], rank)
    if len(cols) <= len(rows):
        A[torch.arange(rank), cols] = 1
        B[rows] = block
    else:
        A[:, cols] = block
        B[rows, torch.arange(rank)] = 1
    return A, B


@torch.no_grad()
def write(folder, carrier, net, base):
    """
    The adapter of a carrier in `folder`, for the base of that name or path. Returns {module: rank}.

    Beside PEFT's own the file's header has the carrier's gates and the fingerprint of its base, for
    read(). Raises InputError where no entry of Δ is on.
    """
    tensors, ranks = {}, {}
    for name, delta, rows, cols in carrier.open_blocks():
        _, l, projection = name.split(".")
        module = module_name(l, projection)
        A, B = factors(delta.cpu(), rows.cpu(), cols.cpu())
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B
        ranks[module] = len(A)
    if not ranks:
        raise InputError("no entry of this carrier's delta is on: it is the base, and there is no "
                         "adapter to write")
    gates = pack_bits(carrier.logits > 0)
    header = {"gates": gates.numpy().tobytes().hex(), "base": fingerprint(net),
              "content": digest(tensors)}
    save_file(tensors, Path(folder) / WEIGHTS, {"format": "pt", "carrier": json.dumps(header)})
    largest, pattern = max(ranks.values()), {re.escape(module): r for module, r in ranks.items()}
    write_json(Path(folder) / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "inference_mode": True, "bias": "none", "lora_dropout": 0.0, "target_modules": list(ranks),
        "r": largest, "rank_pattern": pattern,
        "lora_alpha": largest, "alpha_pattern": pattern})                                # α = r: s = 1
    return ranks


def read_config(path):
    """An adapter's configuration. Raises InputError where it is more than plain LoRA."""
    config = read_json(path)
    check_fields(path, config, {"lora_alpha": (None, NUMBER), "alpha_pattern": (None, {"*": NUMBER})})
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters are read")
    odd = [k for k in UNLIKE if config.get(k)]
    if str(config.get("init_lora_weights")).startswith(MOVES_THE_BASE):
        odd.append("init_lora_weights")
    if odd:
        raise InputError(f"{path}: {odd[0]} = {config[odd[0]]!r} is no plain LoRA; {MERGE_IT}")
    return config


@torch.no_grad()
def read(folder, net, dtype=torch.float32):
    """
    The carrier in a PEFT LoRA adapter: Δ = s·B A. One that write() wrote has its gates back; any
    other has all open.

    Raises InputError where the adapter is more than that (DoRA, a trained embedding or head, …),
    damaged, or was written for another base.
    """
    file = Path(folder) / WEIGHTS
    config = read_config(Path(folder) / CONFIG)
    try:
        if not file.is_file():
            raise OSError("it is no file")
        with safe_open(file, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            header = json.loads((f.metadata() or {}).get("carrier", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error}); save the adapter "
                         "again") from None
    check_finite(file, tensors)
    check_fields(file, {"carrier": header}, {"carrier": (None, HEADER)})
    if header and header["base"] != fingerprint(net):
        raise InputError(f"{file}: this carrier was made on another base model than the one given")
    if header and header["content"] != digest(tensors):
        raise InputError(f"{file}: damaged, its tensors are not those that were written; export it "
                         "again")

    carrier = Carrier(net.config, dtype, net.device)
    alphas = alphas_of(Path(folder) / CONFIG, config, [key[0] for key in pairs(file, tensors)])
    for (module, l, name), (A, B) in pairs(file, tensors).items():
        if int(l) >= len(carrier.delta) or name not in PROJECTIONS:
            raise InputError(f"{file}: {module} is no projection of the model given; use the base that "
                             "the adapter was trained on")
        delta = carrier.delta[int(l)][name]
        if A.dim() != 2 or B.dim() != 2 or (len(B), A.shape[1]) != delta.shape or len(A) != B.shape[1]:
            raise InputError(f"{file}: the factors of {module} have shapes {tuple(A.shape)} and "
                             f"{tuple(B.shape)}, which do not make a delta of {tuple(delta.shape)}")
        scale = alphas[module] / (len(A) ** 0.5 if config.get("use_rslora") else len(A))
        delta.copy_(scale * (B.float() @ A.float()))
    if header:
        try:
            bits = torch.frombuffer(bytearray.fromhex(header["gates"]), dtype=torch.uint8)
            gates = unpack_bits(bits.view(len(carrier.logits), -1), carrier.logits.shape[1])
        except (ValueError, RuntimeError) as error:
            raise InputError(f"{file}: its gates are not this model's ({error}); export it again") from None
        carrier.logits.copy_(gates.float() * 2 - 1)
    return carrier


def pairs(file, tensors):
    """
    {(module, layer, projection): (A, B)}; InputError for a tensor that is no factor of a
    projection, or stands alone.
    """
    found = {}
    for name, t in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None:
            raise InputError(f"{file}: tensor {name} is no LoRA factor of a projection; {MERGE_IT}")
        module, l, projection, which = match.groups()
        found.setdefault((module, l, projection), {})[which] = t
    for (module, _, _), both in found.items():
        if len(both) < 2:
            raise InputError(f"{file}: {module} has only its factor {next(iter(both))}; save the "
                             "adapter again")
    return {key: (both["A"], both["B"]) for key, both in found.items()}


def alphas_of(path, config, modules):
    """
    {module: α}, of which peft makes the factor of B A: α/r, with rslora α/√r. A module has its own α
    where a pattern for its name, or for the end of it, says so.
    """
    found = dict.fromkeys(modules, config.get("lora_alpha", 8))
    own = config.get("alpha_pattern") or {}
    for pattern in own:
        if wrong := patterns.problem(pattern):
            raise InputError(f"{path}: {pattern!r} in alpha_pattern {wrong}")
    pairs = [(rf"^(.*\.)?({pattern})$", module) for module in modules for pattern in own]
    hits = iter(matches(pairs))
    for module in modules:
        fitting = [alpha for alpha in own.values() if next(hits)]
        found[module] = (fitting or [found[module]])[0]
    return found


def matches(pairs):
    """[bool] for (pattern, name); patterns that may take any time are searched under a time limit."""
    if all(re.fullmatch(r"\^\(\.\*\\\.\)\?\([\w.\\]*\)\$", pattern) for pattern, _ in pairs):
        return [re.match(pattern, name) is not None for pattern, name in pairs]
    return patterns.search(pairs)
