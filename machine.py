"""What the machine at hand computes fastest with: the dtype, and how many threads."""
import functools
import os
import time

import torch
import torch.nn.functional as F

from parallel import once

MOST = torch.get_num_threads()      # before anything here changes it
WIDE = 512   # hidden size from which matrix products are what a CPU spends its time on
GAIN = 1.25  # times as fast as fp32 that bf16 has to be


def native_bf16():
    """
    Whether this processor multiplies bf16 itself. Where torch cannot tell, it does not: emulated,
    bf16 is slower than fp32.
    """
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = [getattr(torch.cpu, name, None) for name in names]
    return any(check() for check in checks if check is not None)


@once
def fast_dtype(config, device):
    """
    The dtype in which a model of this `config` computes fastest: bf16 on a GPU, on a CPU where the
    products are large enough to be what takes the time, bf16 is native and a trial shows that it is
    faster.
    """
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    width = config.hidden_size
    fast = width >= WIDE and native_bf16() and bf16_gain(width) > GAIN
    return torch.bfloat16 if fast else torch.float32


def bf16_gain(width):
    """
    How many times as fast as in fp32 this processor multiplies in bf16: with matrix units 4, with
    bf16 instructions alone about 1/2 on some machines, though torch calls both native.
    """
    in_bf16 = own_seconds(width, torch.bfloat16)
    return own_seconds(width, torch.float32) / max(in_bf16, 1e-9)


@torch.no_grad()
def own_seconds(width, dtype, rows=256, rounds=5, products=4):
    """The processor's own time for `products` products of `rows` rows: the least of some rounds."""
    width = min(width, 1024)
    x = torch.ones(rows, width, dtype=dtype)
    weight = torch.ones(4 * width, width, dtype=dtype)
    F.linear(x, weight)                                       # the first one also makes the kernel
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(products):
            F.linear(x, weight)
        times.append(time.process_time() - start)
    return min(times)


def set_threads(net, rows=256):
    """
    Choose how many threads compute on a CPU, from one to as many as torch would take: one for a
    model under WIDE, where the barriers of a second one cost more than it computes, else as many as
    are worth it for products of `rows` rows (1: single answers are decoded) on the machine as busy
    as it is now: every phase asks anew. A set OMP_NUM_THREADS is the user's own word.
    """
    if net.device.type != "cpu" or MOST == 1:
        return
    if net.config.hidden_size < WIDE:
        torch.set_num_threads(1)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(worth_it(MOST, functools.partial(product_seconds, net, rows)))


def worth_it(most, seconds):
    """
    Of 1, 2, 4, … and `most` threads the largest number with which seconds(n) is a fifth less than
    with the best below.
    """
    best, least = 1, seconds(1)
    n = 2
    while n < 2 * most:
        count = min(n, most)
        found = seconds(count)
        if found < 0.8 * least:
            best, least = count, found
        n *= 2
    return best


def product_seconds(net, rows, threads, enough=0.3):
    """
    Seconds of the products of `rows` rows with the weights of a few layers, with so many threads:
    the mean over `enough` seconds.
    """
    x = torch.ones(rows, net.config.hidden_size, dtype=net.dtype)
    some = [layer["up_proj"].weight for layer in net.projections[:4]]
    torch.set_num_threads(threads)
    F.linear(x, some[0])                                      # the first one also makes the threads
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < enough:
        for weight in some:
            F.linear(x, weight)
        count += 1
    return (time.perf_counter() - start) / count
