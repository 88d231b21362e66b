"""
The settings of a run of lcdd.py: its command line, the paper's own settings (Table 7), and what
fits itself to the model and the data.
"""
import argparse
import math
from pathlib import Path

import torch

from data import SIZES
from files import InputError
from run import EMBEDDED, Parser, check_device, check_numbers, flag

# Settings that fit themselves, from the width of the model and the number of steps (see fit()).
RATE = 0.125            # AdamW's rate is RATE / d: 3e-5 at the paper's d = 4096, 1e-3 at 128
ROOM = 30               # λ may grow to ROOM · λ₀
HALF_WAY = 0.5          # a gate that only Ω pulls on shuts after this share of the steps

# Table 7; what the paper's text and the released code have in common for all runs first.
PAPER = dict(
    loss="all", batch=32, micro_batch=8, clip=1.0,
    lr=2e-5, sft_lr=2e-5, epochs=20, sft_epochs=3, sure=0.0, settle=0,
    gate_lr=0.1, gate_std=0.5, select=0.0, brake=False,
    rho=0.30, floor=0.0, warmup=300, beta=0.95,
    lambda0=0.01, lambda_min=1e-6, lambda_max=10.0, eta=0.1,
    window=20, stall=0.01, over=0.35,
    n_trigger=200)
SAFETY = dict(PAPER, max_new_tokens=512)
GROW = dict(rho=0.01, eta_grow=0.01)
PRESETS = {
    "paper-fixed": dict(PAPER, lambda0=1.0, epochs=10),
    "paper-fixed-vicuna": dict(PAPER, eta_grow=0.01, warmup=700),
    "paper-safety": dict(SAFETY),
    "paper-safety-qwen": dict(SAFETY, **GROW),
    "paper-safety-vicuna": dict(SAFETY, rho=0.50, eta=1.0, eta_grow=0.005),
    "paper-shakespeare": dict(PAPER, **GROW, warmup=700),
    "paper-shakespeare-deepseek": dict(PAPER, **GROW),
}


def parser(description=None):
    """All options of lcdd.py, with the paper's values in their help where ours differ."""
    dtypes = ("float32", "bfloat16")
    p = Parser(description)
    a = p.add_argument
    a("--model",
      help="directory of a Hugging Face checkpoint, or a hub id (default: the embedded tiny/)")
    a("--task", default="fixed",
      help="fixed, safety, shakespeare, FILE.jsonl with prompt and response, or own with --data "
      "(default fixed)")
    a("--data",
      help="the task's data: .jsonl, .json, .csv, .tsv, .parquet, or a hub data set owner/name "
      "(default: TASK.jsonl beside the checkpoint)")
    a("--test",
      help="a file of test prompts of their own, in place of some of the data's: own rows, "
      "Alpaca, HarmBench's CSV")
    a("--pattern",
      help="regular expression that shows the behaviour, searched in the answers, case aside; "
      "a row's own pattern wins")
    a("--sft",
      help="your own fine-tuned checkpoint of the same model, or a PEFT LoRA adapter, instead of "
      "phase 1")
    a("--out", help="run directory (default runs/TASK, numbered)")
    a("--resume", action="store_true",
      help="go on where the run in --out stopped; starts it where there is none")
    a("--preset", choices=PRESETS,
      help="the paper's own settings of a run (Table 7); without one the settings fit themselves")
    a("--go-on", action="store_true", help="train on although SFT did not teach the behaviour")
    a("--seed", type=int, default=0, help="seed of gates, splits and batches")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    a("--dtype", choices=dtypes,
      help="of the base weights and all products (default: bfloat16 where that is fast, on a GPU, "
      "and for a model of width 512 or more on a CPU that multiplies it natively)")
    a("--delta-dtype", choices=dtypes, default="float32", help="of deltas and optimizer state")
    a("--sft-dtype", choices=dtypes,
      help="of the deltas in sft.safetensors (default: as --delta-dtype)")
    a("--checkpoint", action="store_true",
      help="recompute layers in the backward pass: less memory, more time")

    a = p.add_argument_group("data").add_argument
    for name, n in SIZES.items():
        a(f"--n-{name}", type=int, default=n, help=f"prompts for {name} (default {n})")
    a("--max-len", type=int, default=512,
      help="tokens a sample; longer ones are cut and counted (512)")
    a("--max-new-tokens", type=int, default=128,
      help="length of the test answers (128; paper-safety: 512)")

    a = p.add_argument_group("training, both phases").add_argument
    a("--batch", type=int, default=16, help="samples an optimizer step (16; the paper: 32)")
    a("--micro-batch", type=int,
      help="samples a forward pass; changes memory, not the result (default: the batch)")
    a("--loss", choices=("response", "all"), default="response",
      help="tokens in the loss; the paper presets use all")
    a("--clip", type=float, default=1.0,
      help="gradient norm of the deltas is clipped to this (1.0; 0: never)")
    a("--sft-epochs", type=float, help="phase 1 in epochs, instead of steps (the paper: 3)")
    a("--sft-steps", type=int, help="phase 1 in optimizer steps (350)")
    a("--sft-lr", type=float,
      help="AdamW, falling linearly to 0 (default 0.125 / d; the paper: 2e-5)")
    a("--sure", type=float, default=0.001,
      help="SFT and settling come to an early end when the loss is under this, in nats a token "
      "(0.001; 0: never)")

    a = p.add_argument_group("LCDD").add_argument
    a("--train", choices=("joint", "mask-ce", "mask-kl", "mask-kl-true"), default="joint",
      help="mask-*: gates only, Δ frozen (App. E); mask-kl has SFT's distributions as soft "
      "targets, mask-kl-true the KL itself")
    a("--epochs", type=float, help="phase 2 in epochs, instead of steps (the paper: 10 or 20)")
    a("--steps", type=int, help="phase 2 in optimizer steps (600)")
    a("--settle", type=int, default=200,
      help="further steps with the gates fixed and the lr falling to 0 (200; the paper: 0)")
    a("--lr", type=float, help="AdamW on the deltas (default 0.125 / d; the paper: 2e-5)")
    a("--gate-lr", type=float,
      help="SGD on the gate logits (default: what shuts a gate half way, if only Ω pulls; "
      "the paper: 0.1)")
    a("--gate-mean", type=float, default=1.5, help="initial logits: mean (1.5)")
    a("--gate-std", type=float, default=0.02,
      help="initial logits: standard deviation (0.02; the released code: 0.5)")
    a("--select", type=float, default=1.0,
      help="root mean square of the task's pull on the gates, in units of the penalty's at the "
      "start (1.0; 0: the gradient as it is, the paper)")
    a("--brake", action=argparse.BooleanOptionalAction, default=True,
      help="the penalty fades as the loss nears ε, and turns round beyond it (on; the paper: off)")
    a("--rho", type=float, default=0.05,
      help="budget ratio: ε = (1 + ρ)·ema after warm-up (0.05; the paper: 0.01 to 0.5)")
    a("--floor", type=float, default=0.03, help="ε is never under this (0.03; the paper: 0)")
    a("--warmup", type=int, default=50,
      help="T_w, steps in which the penalty is faded in (50; the paper: 300 or 700)")
    a("--beta", type=float, default=0.9,
      help="decay of the loss average (0.9; the released code: 0.95)")
    a("--lambda0", type=float, default=0.02,
      help="penalty λ at the start (0.02; the paper: 0.01 or 1.0)")
    a("--lambda-min", type=float, default=1e-5, help="lower bound of λ (1e-5)")
    a("--lambda-max", type=float, help="upper bound of λ (default 30 λ₀)")
    a("--eta", type=float, default=0.2,
      help="η_λ, rate at which λ shrinks over budget (0.2; the paper: 0.1)")
    a("--eta-grow", type=float,
      help="η_grow, rate at which λ grows under budget (default: a quarter of --eta; "
      "the paper: as --eta)")
    a("--violation-clip", type=float, default=1.0,
      help="V, bound on the relative violation (1.0)")
    a("--log-every", type=int, default=10, help="optimizer steps a log point (10)")
    a("--window", type=int, default=6, help="log points looked at for early stopping (6)")
    a("--patience", type=int, default=3, help="log points in a row before an early stop (3)")
    a("--stall", type=float, default=0.03,
      help="stop where open gates fall by less than this share over a window "
      "(0.03; the released code: 0.01)")
    a("--over", type=float,
      help="stop where the median loss is this share above the loss after warm-up "
      "(default: never; the released code: 0.35)")
    a("--save-every", type=int, default=200, help="optimizer steps between saved states (200)")
    return p


def options(argv=None, description=None):
    """
    The command line. A preset replaces defaults; what is given by hand wins over the preset.
    Raises InputError for a number that is out of its range, or that contradicts another.
    """
    p = parser(description)
    first = p.parse_args(argv)                              # no preset yet: None is "not given"
    p.set_defaults(**PRESETS.get(first.preset, {}))
    o = p.parse_args(argv)
    o.model = first.model or EMBEDDED
    choose_length(o, first, "sft_steps", "sft_epochs", 350)
    choose_length(o, first, "steps", "epochs", 600)
    make_absolute(o)
    if o.eta_grow is None:
        o.eta_grow = o.eta if o.preset else o.eta / 4
    o.micro_batch = o.micro_batch or o.batch
    o.sft_dtype = o.sft_dtype or o.delta_dtype
    check(o)
    if o.lambda_max is None:
        o.lambda_max = ROOM * o.lambda0
    if first.over is None and o.over is not None:
        o.over = max(o.over, 1.5 * o.rho)                   # the stop has to lie beyond the budget
    check_bounds(o)
    return o


def choose_length(o, first, steps, epochs, usual):
    """A phase's length: epochs that `first`, without a preset, has win over a preset's steps."""
    by_hand = getattr(first, epochs) is not None and getattr(first, steps) is None
    if by_hand:
        setattr(o, steps, None)
    elif getattr(o, epochs) is None and getattr(o, steps) is None:
        setattr(o, steps, usual)


def make_absolute(o):
    """Write local files and folders as absolute paths: a run may be looked at from anywhere."""
    for name in ("model", "data", "test", "sft"):
        value = getattr(o, name)
        if value and value != EMBEDDED and Path(value).exists():
            setattr(o, name, str(Path(value).resolve()))
    if o.task.endswith(".jsonl"):
        o.task = str(Path(o.task).resolve())


def check(o):
    """Raises InputError for an option that is out of its range."""
    for name in ("batch", "micro_batch", "max_len", "max_new_tokens",
                 "log_every", "window", "patience", "save_every"):
        if getattr(o, name) < 1:
            raise InputError(f"{flag(name)} {getattr(o, name)}: has to be at least 1")
    if o.batch % o.micro_batch:
        raise InputError(
            f"--batch {o.batch} is not a multiple of --micro-batch {o.micro_batch}")
    check_numbers(o, free=("gate_mean",))
    check_device(o.device)


def check_bounds(o):
    """Raises InputError for options that contradict each other."""
    if o.beta >= 1 or o.lambda_min > o.lambda_max:
        raise InputError(f"--beta {o.beta} has to be below 1, and --lambda-min {o.lambda_min} "
                         f"not above --lambda-max {o.lambda_max}")
    if o.over is not None and o.over <= o.rho:
        raise InputError(f"--over {o.over}: has to be above --rho {o.rho}, "
                         "or a run stops inside its own budget")


def fit(o, width, n):
    """
    Fill in what was not given, from the model's `width` d and the number n of training samples:
    steps out of epochs, the rates of Δ, and a rate of the gates that fits the horizon. A gate on
    which only Ω pulls moves by lr·λ₀·σ′(m) a step, from its initial m to 0.
    """
    if o.sft_steps is None:
        o.sft_steps = math.ceil(o.sft_epochs * n / o.batch)
    if o.steps is None:
        o.steps = math.ceil(o.epochs * n / o.batch)
    if o.lr is None:
        o.lr = RATE / width
    if o.sft_lr is None:
        o.sft_lr = RATE / width
    if o.gate_lr is None:
        distance = max(0.1, abs(o.gate_mean))
        o.gate_lr = distance / (pull(o) * max(1, HALF_WAY * o.steps))
    return o


def pull(o):
    """λ₀·σ′(mean): the penalty's pull on a gate at the start."""
    share = 1 / (1 + math.exp(-o.gate_mean))
    return o.lambda0 * share * (1 - share)
