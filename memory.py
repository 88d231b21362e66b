"""
How much memory is free, and whether something fits: said before it is tried, for what does not fit
may end the machine and not only the command.
"""
import math
import resource
from pathlib import Path

import torch

from files import InputError


def free(device="cpu"):
    """Bytes that this process can still take on a device; infinite where the system does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return max(0, min(of_machine(), of_group(), of_process()))


def of_machine():
    """Memory that is free or only caches files, and swap."""
    found = numbers(Path("/proc/meminfo"), ":")
    if "MemAvailable" not in found:
        return math.inf
    return 1024 * (found["MemAvailable"] + found.get("SwapFree", 0))


def of_group(folder=Path("/sys/fs/cgroup")):
    """What a container's limit leaves."""
    try:
        most = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):           # no container, or "max"
        return math.inf
    return most - used + numbers(folder / "memory.stat").get("file", 0)


def of_process():
    """What is left of ulimit -v."""
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return math.inf
    pages = numbers_of(Path("/proc/self/statm"))
    return most - pages[0] * resource.getpagesize() if pages else most


def numbers(path, after=""):
    """{name: number} of lines `name number …`, a sign after the name left out; {} without the file."""
    found = {}
    for words in map(str.split, read(path).splitlines()):
        if len(words) > 1 and words[1].isdigit():
            found[words[0].removesuffix(after)] = int(words[1])
    return found


def numbers_of(path):
    """All numbers in a file of one line."""
    return [int(word) for word in read(path).split() if word.isdigit()]


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def check(needed, what, advice, device="cpu"):
    """Raises InputError where `what` needs more bytes than are free on the device."""
    there = free(device)
    if needed > there:
        raise InputError(f"{what} takes {size(needed)} of memory at least, and {size(there)} are free; "
                         f"{advice}")


def size(count):
    """Bytes as people say them."""
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"


# ---- what things take, from below

def of_cache(config, rows, length, dtype):
    """Bytes of the keys and values of `rows` texts of `length` tokens."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * rows * length * width * dtype.itemsize


def of_tokens(config, tokens, dtype, recompute=False):
    """Bytes that a forward pass of so many tokens keeps for the backward pass."""
    width = 2 * config.hidden_size
    if not recompute:
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        width += heads * config.head_dim + 3 * config.intermediate_size
    return config.num_hidden_layers * tokens * width * dtype.itemsize


def of_weights(shapes, dtype):
    """Bytes of tensors of these shapes."""
    return sum(map(math.prod, shapes)) * dtype.itemsize
