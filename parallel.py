"""
More than one process, on torch's own engine: torchrun --nproc-per-node N -- lcdd.py …

Every process runs the whole script and holds the same numbers. What is split between them is a list:
the samples of an optimizer batch, the prompts, AdamW's moments. What comes of it is summed or gathered,
so that all hold the same again. The first process alone writes and prints. Without torchrun everything
here is the identity.
"""
import contextlib
import functools
import os
import sys
import time

import torch
import torch.distributed as dist

size, number, store = 1, 0, None    # how many work together, which one this is, what they all can read


def start():
    """
    Join the processes that torchrun started; all but the first become silent. Raises ValueError or
    RuntimeError where they do not meet.
    """
    global size, number, store
    cuda = torch.cuda.is_available()
    store, number, size = next(dist.rendezvous("env://"))
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size)
    if number:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def end():
    """
    Wait for all processes, and leave at once: what torch's threads still do while Python shuts down
    now and then aborts a process that has done its work.
    """
    if size > 1:
        summed(0)
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def speak_once(error):
    """
    Called where a process ends in an error, and so ends all: one of them says it, the first one where
    it fails too; the others end here, in silence.
    """
    if size == 1:
        return
    spoken, patience = True, time.monotonic() + 5
    with contextlib.suppress(RuntimeError):         # the store has gone with the process that spoke
        while number and not store.check(["error"]) and time.monotonic() < patience:
            time.sleep(0.1)
        spoken = store.add("error", 1) > 1
    if spoken:                                      # at once: what is still connected would abort
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else getattr(error, "status", 2))
    sys.stderr = sys.__stderr__


# ---- what is split, and brought together again

def world():
    """How many processes work together."""
    return size


def share(things):
    """This process's part of a list."""
    return things[number::size] if size > 1 else things


def gathered(things):
    """The lists of all processes, one after another."""
    if size == 1:
        return things
    lists = [None] * size
    dist.all_gather_object(lists, things)
    return sum(lists, [])


def add_up(tensors):
    """Sum tensors over all processes, in place."""
    if size > 1:
        for t in tensors:
            dist.all_reduce(t)


def summed(value):
    """The sum of a number over all processes, the same to the bit in each."""
    if size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def mean(x, dim):
    """x.mean(dim, keepdim=True) over the rows of all processes; gradients flow to each one's own."""
    if size == 1:
        return x.mean(dim, keepdim=True)
    from torch.distributed.nn.functional import all_reduce
    return all_reduce(x.sum(dim, keepdim=True)) / summed(x.shape[dim])


def once(function):
    """A function that the first process runs alone, as it writes or measures; all have what it returns."""
    @functools.wraps(function)
    def by_the_first(*args, **more):
        """Meanwhile the first process counts as the only one, so that it waits for no other."""
        global size
        if size == 1:
            return function(*args, **more)
        found, together = [None], size
        summed(0)                                   # what the others still have to read is read
        if number == 0:
            size = 1
            try:
                found = [function(*args, **more)]
            finally:
                size = together
        dist.broadcast_object_list(found)
        return found[0]
    return by_the_first


class AdamW(torch.optim.AdamW):
    """AdamW with its moments split between the processes: each moves its share and sends it to all."""

    def __init__(self, parameters, **settings):
        self.every = list(parameters)
        super().__init__([{"params": share(self.every)}], **settings)
        self.register_step_post_hook(self.send)

    @torch.no_grad()
    def send(self, *_):
        """After a step: every parameter goes from the process that has moved it to all."""
        if size > 1:
            for i, p in enumerate(self.every):
                dist.broadcast(p, i % size)

    def zero_grad(self, set_to_none=True):
        """Of all parameters, those that another process moves too."""
        for p in self.every:
            p.grad = None

    def moments(self):
        """(i, name, tensor) of every parameter's moments, in the first process; the others send it theirs."""
        for i, p in enumerate(self.every if self.state else ()):
            step = torch.zeros((), device=p.device)
            for name, like in (("step", step), ("exp_avg", p), ("exp_avg_sq", p)):
                t = self.state[p][name] if i % size == number else torch.empty_like(like)
                if size > 1:
                    dist.broadcast(t, i % size)
                if number == 0:
                    yield i, name, t

    def restore(self, i, moments):
        """Take in the moments of parameter i, where they are this process's."""
        p = self.every[i]
        if i % size == number:
            self.state[p] = {name: t.to(p.device) for name, t in moments.items()}
