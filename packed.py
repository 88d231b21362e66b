"""
The packed file of a carrier, and a look at what one holds. A safetensors file with

    gates               (L, ⌈gates a layer / 8⌉) uint8: a bit a gate, open or shut
    logits              (L, gates a layer), where training is to go on
    delta.{l}.{name}    (|R|, |C|): the open rows and open columns of a projection's Δ; or, where the
                        header has `bits`, whole numbers of so many bits, packed
    scale.{l}.{name}    (|R|, 1), beside these: what a row's whole numbers are multiplied with

and a header: FORMAT, the fingerprint of its base, a digest of its tensors, how many gates each
group has, the carrier's own numbers, and what the commands add. `Carrier.save` and `carrier.load`
say what the tensors mean; this file keeps them.
"""
import math
from pathlib import Path

import numpy as np
import torch

from files import COUNT, TEXT, InputError, check_fields, digest, load_tensors, save_tensors

FORMAT = 2
SHARE = ((int, float), 0, 1)
# of each group of gates the length, and the carrier's own numbers
HEADER = {
    "base": TEXT, "content": TEXT, "groups": {"*": ((int,), 1, 1 << 24)},
    "gates": {"total": ((int,), 1, 2**53), "open": COUNT}, "sparsity": SHARE, "entries_off": SHARE,
    "bits": ((int, type(None)), 2, 8)}
# of the largest entry of a row, bounds to which the row may be cut for smaller steps
CUTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15)


def fingerprint(net):
    """
    A short hash of the base that a carrier belongs to: of all its weights, rounded to bf16, so that
    one checkpoint has one fingerprint in every precision. Computed once a net: the base's weights
    are never changed.
    """
    if not hasattr(net, "fingerprint"):
        net.fingerprint = digest(net.state_dict(), torch.bfloat16)
    return net.fingerprint


def pack_bits(gates):
    """
    (L, gates a layer) bool → (L, ⌈gates a layer / 8⌉) uint8, the first gate in the highest bit.
    """
    return torch.from_numpy(np.packbits(gates.cpu().numpy(), axis=1))


def unpack_bits(packed, count):
    """pack_bits() undone, for `count` gates a layer."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=count)).bool()


# ---- Δ in few bits

def quantize(block, bits):
    """
    The entries (R, C) rounded to 2^bits − 1 levels: (levels (R, C) uint8, 0 in the middle, and a
    scale a row, (R, 1)). Each row takes the bound out of CUTS with the smallest squared error.
    """
    middle = 2 ** (bits - 1) - 1
    largest = block.abs().amax(1, keepdim=True)
    least = torch.full_like(largest, torch.inf)
    scale = largest
    for cut in CUTS:
        step = (largest * cut / middle).clamp_min(torch.finfo(block.dtype).tiny)
        error = (levels_of(block, step, middle) * step - block).square().sum(1, keepdim=True)
        scale = torch.where(error < least, step, scale)
        least = torch.minimum(error, least)
    levels = levels_of(block, scale, middle) + middle
    return levels.to(torch.uint8), scale


def levels_of(block, scale, most):
    """The nearest whole multiples of a row's scale, between −most and most."""
    return (block / scale).round().clamp(-most, most)


def dequantize(levels, scale, bits):
    """(R, C) entries out of quantize()'s two tensors."""
    return (levels.to(scale.dtype) - (2 ** (bits - 1) - 1)) * scale


def pack_levels(levels, bits):
    """Levels below 2^bits, of any shape, → (⌈their number · bits / 8⌉) uint8, highest bits first."""
    each = np.unpackbits(levels.numpy().reshape(-1, 1), axis=1)[:, 8 - bits:]
    return torch.from_numpy(np.packbits(each))


def unpack_levels(packed, bits, count):
    """pack_levels() undone: (count) uint8. Raises ValueError where it was another number."""
    if packed.shape != (-(-count * bits // 8),):
        raise ValueError(f"{count} entries of {bits} bits are not {packed.numel()} bytes")
    each = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy(np.packbits(each, axis=1)[:, 0] >> (8 - bits))


# ---- the file

def write_packed(path, tensors, net, **header):
    """Write a carrier's tensors, made on the base `net`; the old file stands until then."""
    content = digest(tensors)
    save_tensors(path, tensors, format=FORMAT, base=fingerprint(net), content=content, **header)


def read_packed(path):
    """
    (tensors, header) of a packed carrier file. Raises InputError where it has another format or is
    damaged.
    """
    tensors, header = load_tensors(path)
    if header.get("format") != FORMAT:
        raise InputError(f"{path}: no carrier of format {FORMAT} (its header says "
                         f"{header.get('format')}); run the command that writes it again")
    if header.get("content") != digest(tensors):
        raise InputError(f"{path}: damaged, its tensors are not those that were written; restore "
                         "it, or run the command that writes it again")
    check_fields(path, header, HEADER)
    if header.get("bits"):
        check_fields(path, header, {"entries": COUNT})
    gates, width = tensors.get("gates"), -(-sum(header["groups"].values()) // 8)
    if gates is None or gates.dtype != torch.uint8 or gates.shape[1:] != (width,) or not len(gates):
        raise InputError(f"{path}: its gates are missing or misshapen; run the command that writes "
                         "it again")
    return tensors, header


def annotate(path, **metadata):
    """Write more metadata into the header of a packed carrier file; its tensors stay."""
    tensors, header = read_packed(path)
    save_tensors(path, tensors, **(header | metadata))


# ---- a look at it

def describe(path):
    """
    What a packed carrier file holds, as text: base, task, sizes, and a layer a line (layer_lines).
    """
    tensors, header = read_packed(path)
    lines = [f"{path}: format {header['format']}, base {header['base']}, "
             f"content {header['content']}"]
    for key in ("task", "phase", "metrics", "settings"):
        if key in header:
            lines.append(f"{key}: {show_value(header[key])}")
    lines.append(size_line(path, tensors, header))
    lines.append("")
    lines += layer_lines(tensors["gates"], header["groups"])
    return "\n".join(lines)


def size_line(path, tensors, header):
    """How many gates are open, and how much of Δ the file holds."""
    n_open, total = header["gates"]["open"], header["gates"]["total"]
    blocks = [t for name, t in tensors.items() if name.startswith(("delta.", "scale."))]
    dtype = str(blocks[0].dtype).removeprefix("torch.") if blocks else "no dtype"
    entries = sum(t.numel() for t in blocks)
    if header.get("bits"):
        entries, dtype = header["entries"], f"{header['bits']} bits each"
    size = sum(t.numel() * t.element_size() for t in blocks)
    whole = Path(path).stat().st_size
    return (f"gates open {n_open} of {total} ({n_open / total:.1%}); "
            f"entries of Δ on {entries} ({1 - header['entries_off']:.2%}), "
            f"{dtype}, {size:,} bytes of the file's {whole:,}")


def layer_lines(bits, groups):
    """
    A layer a line: how many gates of each group are open, their share as a bar (full height: the
    largest share in the file), and the layer's write channels (Eq. 5). groups: {name: gates}.
    """
    gates = unpack_bits(bits, sum(groups.values()))                     # (L, gates a layer)
    parts = gates.split(list(groups.values()), dim=1)
    parts = dict(zip(groups, parts))                                    # group → (L, length)
    largest = max(float(part.float().mean(1).max()) for part in parts.values())
    writes = (parts["attn_write"] | parts["ffn_write"]).sum(1).tolist()

    lines = ["layer " + "".join(f"{group:>12}" for group in groups) + "   writes to"]
    for l, write in enumerate(writes):
        line = f"{l:>5} "
        for part in parts.values():
            count = int(part[l].sum())
            share = count / part.shape[1] / largest if count else 0
            line += f"{count:>10} {bar(share)}"
        lines.append(line + f"{write:>12}")
    return lines


def show_value(value):
    """A header's value on a line: numbers short, an object as name value, …"""
    if isinstance(value, dict):
        return ", ".join(f"{k} {show_value(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def bar(share):
    """A share from 0 to 1 as one character; a space is exactly nothing."""
    marks = " ▁▂▃▄▅▆▇█"
    return marks[min(len(marks) - 1, math.ceil(share * (len(marks) - 1)))]
