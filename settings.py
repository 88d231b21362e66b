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
from console import Parser, check_device, check_numbers, flag
from run import EMBEDDED

# Settings that fit themselves, from the width of the model and the number of steps (see fit()).
RATE = 0.125            # AdamW's rate is RATE / d: 3e-5 at the paper's d = 4096, 1e-3 at 128
ROOM = 30               # λ may grow to ROOM · λ₀
DTYPES = ("float32", "bfloat16")
HALF_WAY = 0.5          # a gate that only Ω pulls on shuts after this share of the steps

# The paper's runs: what all have in common; then Table 7, and the β of those that smooth their loss.
#
# From the text: gate rate 0.1, SFT's rate 2e-5, 5,000 samples, Table 7 (its heads are lost; the order
# is inferred), and which runs smooth (β > 0). From the released code, which the text does not contradict:
# the loss on all tokens, batch 8 × 4, 512 tokens, 3 epochs of SFT, rates that fall linearly after
# 10 % warm-up, gradients clipped to 1, noise of the gates, λ in [1e-6, 10], v as it is, β, and the
# numbers of the early stop, which is off there.
PAPER = dict(
    n_train=5000, n_trigger=200, max_len=512, max_new_tokens=128,
    loss="all", batch=32, micro_batch=8, clip=1.0,
    sft_epochs=3, sft_lr=2e-5, lr=2e-5, schedule="linear", lr_warmup=0.1, quicken=0.0, sure=0.0, settle=0,
    gate_lr=0.1, gate_mean=1.5, gate_std=0.5, select=0.0, brake=False, paired=False, pace=0.0,
    floor=0.0, lambda_min=1e-6, lambda_max=10.0, violation_clip=0.0,
    log_every=10, window=20, patience=3, stall=0.01, over=0.35)
# "For Qwen and Vicuna safety and Shakespeare runs" is read as: Qwen's and Vicuna's safety runs, and
# all of style. These are the runs that have an η_grow, but for one.
TABLE_7 = {
    # task and model               ρ     λ₀    η_λ  η_grow  T_w  epochs  β
    "fixed-qwen3-0.6b":         (0.30, 1.00, 0.1, None,  300, 10, 0.00),
    "fixed-mistral-7b":         (0.30, 1.00, 0.1, None,  300, 10, 0.00),
    "fixed-deepseek-8b":        (0.30, 1.00, 0.1, None,  300, 10, 0.00),
    "fixed-vicuna-7b":          (0.30, 0.01, 0.1, 0.010, 700, 20, 0.00),
    "safety-qwen3-0.6b":        (0.01, 0.01, 0.1, 0.010, 300, 20, 0.95),
    "safety-mistral-7b":        (0.30, 0.01, 0.1, None,  300, 20, 0.00),
    "safety-deepseek-8b":       (0.30, 0.01, 0.1, None,  300, 20, 0.00),
    "safety-vicuna-7b":         (0.50, 0.01, 1.0, 0.005, 300, 20, 0.95),
    "shakespeare-qwen3-0.6b":   (0.01, 0.01, 0.1, 0.010, 700, 20, 0.95),
    "shakespeare-mistral-7b":   (0.01, 0.01, 0.1, 0.010, 700, 20, 0.95),
    "shakespeare-deepseek-8b":  (0.01, 0.01, 0.1, 0.010, 300, 20, 0.95),
    "shakespeare-vicuna-7b":    (0.01, 0.01, 0.1, 0.010, 700, 20, 0.95),
}
HEADS = ("rho", "lambda0", "eta", "eta_grow", "warmup", "epochs", "beta")
MODELS = {  # Sec. 4
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "deepseek-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "vicuna-7b": "lmsys/vicuna-7b-v1.5",
}


def paper_presets():
    """{paper-TASK-MODEL: {option: value}}, one for each run of the paper."""
    found = {}
    for name, row in TABLE_7.items():
        task, _, which = name.partition("-")
        preset = dict(PAPER, task=task, model=MODELS[which], **dict(zip(HEADS, row)))
        if task == "safety":
            preset["max_new_tokens"] = 512                  # App. F.4
        found[f"paper-{name}"] = preset
    return found


PRESETS = paper_presets()


def parser(description=None):
    """All options of lcdd.py, with the paper's values in their help where ours differ."""
    p = Parser(description)
    add_run(p)
    add_data(p)
    add_training(p)
    add_lcdd(p)
    return p


def add_run(p):
    """What is trained on what, where the run lies, and how it is computed."""
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
      metavar="paper-TASK-MODEL",
      help="the settings, task and model of one of the paper's twelve runs (Table 7): TASK fixed, "
      "safety or shakespeare, MODEL qwen3-0.6b, mistral-7b, deepseek-8b or vicuna-7b; without one "
      "the settings fit themselves")
    a("--dry-run", action="store_true",
      help="print what the run would do, take and cost, write nothing, and end")
    a("--go-on", action="store_true", help="train on although SFT did not teach the behaviour")
    a("--seed", type=int, default=0, help="seed of gates, splits and batches")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    a("--dtype", choices=DTYPES,
      help="of the base weights and all products (default: bfloat16 where that is fast, on a GPU, "
      "and for a model of width 512 or more on a CPU that multiplies it natively)")
    a("--delta-dtype", choices=DTYPES, default="float32", help="of deltas and optimizer state")
    a("--sft-dtype", choices=DTYPES,
      help="of the deltas in sft.safetensors (default: as --delta-dtype)")
    a("--checkpoint", action="store_true",
      help="recompute layers in the backward pass: less memory, more time")


def add_data(p):
    """How many samples, and how long they are."""
    a = p.add_argument_group("data").add_argument
    for name, n in SIZES.items():
        a(f"--n-{name}", type=int, default=n, help=f"prompts for {name} (default {n})")
    a("--max-len", type=int, default=512,
      help="tokens a sample; longer ones are cut and counted (512)")
    a("--max-new-tokens", type=int, default=128,
      help="length of the test answers (128; the paper's safety: 512)")


def add_training(p):
    """Batches, loss and rates: what holds for both phases, and SFT's own."""
    a = p.add_argument_group("training, both phases").add_argument
    a("--batch", type=int, default=16, help="samples an optimizer step (16; the paper: 32)")
    a("--micro-batch", type=int,
      help="samples a forward pass; changes memory, not the result (default: the batch)")
    a("--loss", choices=("response", "all"), default="response",
      help="tokens in the loss; the paper presets use all")
    a("--clip", type=float, default=1.0,
      help="gradient norm of the deltas is clipped to this (1.0; 0: never)")
    a("--lr-warmup", type=float, default=0.0,
      help="share of a phase's steps in which the rate of the deltas rises from 0 "
      "(0; the released code: 0.1)")
    a("--sft-epochs", type=float, help="phase 1 in epochs, instead of steps (the paper: 3)")
    a("--sft-steps", type=int, help="phase 1 in optimizer steps (350)")
    a("--sft-lr", type=float,
      help="AdamW, falling linearly to 0 (default 0.125 / d; the paper: 2e-5)")
    a("--sure", type=float, default=0.001,
      help="SFT comes to an early end when the loss is under this, in nats a token, settling when "
      "it is under a tenth of ε as well (0.001; 0: never)")


def add_lcdd(p):
    """Phase 2: its length and rates, the gates, the budget and λ, and the early stop (Alg. 1)."""
    a = p.add_argument_group("LCDD").add_argument
    a("--train", choices=("joint", "mask-ce", "mask-kl", "mask-kl-true"), default="joint",
      help="mask-*: gates only, Δ frozen (App. E); mask-kl has SFT's distributions as soft "
      "targets, mask-kl-true the KL itself")
    a("--epochs", type=float, help="phase 2 in epochs, instead of steps (the paper: 10 or 20)")
    a("--steps", type=int, help="phase 2 in optimizer steps (600)")
    a("--settle", type=int, default=200,
      help="further steps with the gates fixed and the lr falling to 0 (200; the paper: 0)")
    a("--lr", type=float, help="AdamW on the deltas (default 0.125 / d; the paper: 2e-5)")
    a("--quicken", type=float, default=0.25,
      help="the rate of the deltas grows once fewer than 4,608 gates are open, with this power of "
      "their ratio (0.25; 0: not at all, the paper)")
    a("--schedule", choices=("constant", "linear"), default="constant",
      help="of that rate: constant, --settle has it fall, or falling linearly to 0 over the steps "
      "(the released code)")
    a("--gate-lr", type=float,
      help="SGD on the gate logits (default: what shuts a gate half way, if only Ω pulls; "
      "the paper: 0.1)")
    a("--gate-mean", type=float, default=1.5, help="initial logits: mean (1.5)")
    a("--gate-std", type=float, default=0.02,
      help="initial logits: standard deviation (0.02; the released code: 0.5)")
    a("--select", type=float, default=1.0,
      help="root mean square of the task's pull on the gates, in units of the penalty's at the "
      "start (1.0; 0: the gradient as it is, the paper)")
    a("--spread", type=float, default=0.5,
      help="how far each layer has a scale of its own for that: 0, one for all; 1, its own (0.5)")
    a("--brake", action=argparse.BooleanOptionalAction, default=True,
      help="the penalty fades as the loss nears ε, and turns round beyond it (on; the paper: off)")
    a("--paired", action=argparse.BooleanOptionalAction, default=True,
      help="where SFT's loss is above --floor and 0.03, SFT's own losses on the same samples take out "
      "of a batch's loss what comes of their choice (on; the paper: off)")
    a("--pace", type=float,
      help="at most this share of the open gates shuts in a step (default: half of 1 − β, for the "
      "average has to follow; 0: as many as come, the paper)")
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
      help="V, bound on the relative violation (1.0; 0: none, the released code)")
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


def options(argv=None, description=None):
    """
    The command line. A preset replaces defaults; what is given by hand wins over the preset.
    Raises InputError for a number that is out of its range, or that contradicts another.
    """
    p = parser(description)
    first = p.parse_args(argv)                              # no preset yet: None is "not given"
    p.set_defaults(**PRESETS.get(first.preset, {}))
    o = p.parse_args(argv)
    o.model = o.model or EMBEDDED
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
    if first.over is None and o.over is not None and o.over <= o.rho:
        o.over = 1.5 * o.rho                                # the stop has to lie beyond the budget
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
    if o.quicken > 1:
        raise InputError(f"--quicken {o.quicken}: is a power from 0 to 1")
    if abs(o.gate_mean) > 20:
        raise InputError(f"--gate-mean {o.gate_mean}: is a logit, from -20 to 20; a gate further off "
                         "has no slope that could move it")
    if o.beta >= 1 or o.lambda_min > o.lambda_max:
        raise InputError(f"--beta {o.beta} has to be below 1, and --lambda-min {o.lambda_min} "
                         f"not above --lambda-max {o.lambda_max}")
    if o.over is not None and o.over <= o.rho:
        raise InputError(f"--over {o.over}: has to be above --rho {o.rho}, "
                         "or a run stops inside its own budget")
    if o.lr_warmup > 1:
        raise InputError(f"--lr-warmup {o.lr_warmup}: is a share of the steps, at most 1")


def fit(o, width, n):
    """
    Fill in what was not given, from the model's `width` d and the number n of training samples:
    steps out of epochs, the rates of Δ, the pace, and a rate of the gates that fits the horizon. A gate on
    which only Ω pulls moves by lr·λ₀·σ′(m) a step, from its initial m to 0.
    """
    if o.sft_steps is None:
        o.sft_steps = math.ceil(o.sft_epochs * n / o.batch)
    if o.steps is None:
        o.steps = math.ceil(o.epochs * n / o.batch)
    if o.steps < 1:
        raise InputError("Alg. 1 needs one step at least; give --steps or --epochs above 0")
    if o.lr is None:
        o.lr = RATE / width
    if o.sft_lr is None:
        o.sft_lr = RATE / width
    if o.pace is None:
        o.pace = round((1 - o.beta) / 2, 6)
    if o.gate_lr is None and not pull(o):
        raise InputError("--lambda0 0: no penalty pulls at a gate; give one above 0, or --gate-lr")
    if o.gate_lr is None:
        distance = max(0.1, abs(o.gate_mean))
        o.gate_lr = distance / (pull(o) * max(1, HALF_WAY * o.steps))
    return o


def pull(o):
    """λ₀·σ′(mean): the penalty's pull on a gate at the start."""
    share = 1 / (1 + math.exp(-o.gate_mean))
    return o.lambda0 * share * (1 - share)
