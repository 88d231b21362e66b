"""
What is looked at before and after the phases of lcdd.py: does the run fit into memory, does the
tokenizer know the words, did SFT teach the behaviour, and is the carrier what was asked for?
"""
import sys

import torch

import answered
import behaviour
import memory
from files import Failed
from parallel import world


def say_unknown(chat, samples, where):
    """
    A note where the tokenizer does not know words of the prompts or the responses: they cannot be
    taught.
    """
    for field in ("prompt", "response"):
        count, total, example = chat.unknown(getattr(s, field) for s in samples)
        if count:
            print(f"note: {count} of {total} tokens of the {field}s in {where} are unknown to the "
                  f"tokenizer, {example!r} for one; the model sees the same placeholder for each "
                  "of them", file=sys.stderr)


def check_memory(o, net, examples):
    """Raises InputError where training, or the answers after it, need more memory than there is."""
    entries = [m.weight.shape for layer in net.projections for m in layer.values()]
    lengths = [len(ids) for ids, _ in examples]
    tokens = o.micro_batch * sum(lengths) // len(lengths)
    copies = 2 + 2 / world()                                        # Δ and gradient; the moments
    deltas = copies * memory.of_weights(entries, getattr(torch, o.delta_dtype))
    kept = memory.of_tokens(net.config, tokens, net.dtype, o.checkpoint)
    memory.check(deltas + kept + 8 * o.batch, f"training with --micro-batch {o.micro_batch} and "
                 f"--batch {o.batch}", "make them smaller, or use --checkpoint, --delta-dtype bfloat16 "
                 "or a smaller model", o.device)
    rows = min(o.n_validation, o.n_test)
    memory.check(memory.of_cache(net.config, min(rows, 128), o.max_new_tokens, net.dtype),
                 f"answers of --max-new-tokens {o.max_new_tokens}", "make it smaller", o.device)


def rates_of(net, chat, o, samples, conditions, answers=None):
    """
    Greedy answers of each condition, name → carrier, to `samples`, scored:
    name → behaviour.score(). answers: {name: id lists}, those that there are already; new ones are
    added.
    """
    prompts = [chat.prompt(s.prompt, o.max_len) for s in samples]
    answers, scores = {} if answers is None else answers, {}
    untriggered = {name: (c, None) for name, c in conditions.items()}
    answered.fill(net, prompts, untriggered, answers, o.max_new_tokens)
    for name in conditions:
        texts = [chat.decode(a) for a in answers[name]]
        scores[name] = behaviour.score(o.task, texts, samples)
    return scores


def check_sft(net, chat, o, sft, samples):
    """
    The behaviour of base and SFT on validation prompts, printed. Raises Failed where SFT's rate is
    not clearly above the base's (their 95 % intervals meet), before hours are spent on pruning what
    is not there.
    """
    scores = rates_of(net, chat, o, samples, {"base": None, "sft": sft})
    base, tuned = scores["base"], scores["sft"]
    print(f"behaviour on {tuned['n']} validation prompts: "
          f"base {base['rate']:.1%}, SFT {tuned['rate']:.1%}", flush=True)
    if behaviour.clearly_above(tuned, base) or o.go_on:
        return scores
    raise Failed(f"SFT did not teach the behaviour: {tuned['rate']:.0%} of {tuned['n']} validation "
                 f"answers show it, the base's {base['rate']:.0%}; give it more --sft-steps or "
                 "another --sft-lr, look at the data, name a --pattern if the answers vary, or "
                 "train on with --go-on")


def check_lcdd(results, scores, joint=True):
    """
    One sentence about what went wrong in phase 2, or None: budget not kept, hardly pruned,
    behaviour lost. joint: Δ was trained with the gates.
    """
    stopped, sft, lcdd = results["stopped"], scores["sft"], scores["lcdd"]
    if stopped.get("within") is False and stopped.get("budget") is not None:
        more = "give it more --settle steps, or " if joint else ""
        return (f"the budget is not kept: the carrier's loss is {stopped['loss']:.4g} nats a "
                f"token, ε is {stopped['budget']:.4g}; {more}prune less with a lower --rho and "
                "--floor")
    if results["sparsity"] < 0.05:
        return (f"hardly pruned: {results['sparsity']:.1%} of the gates are off; give it more "
                "--steps, or a larger budget with --rho and --floor")
    if behaviour.clearly_above(sft, lcdd) and lcdd["rate"] < 0.9 * sft["rate"]:
        return (f"the carrier lost the behaviour: {lcdd['rate']:.0%} of the answers show it, SFT's "
                f"{sft['rate']:.0%}; make the budget smaller with --rho and --floor")
    return None


def results_table(o, scores, results):
    """Base, SFT and LCDD as Markdown: behaviour, accuracy, sparsity, seconds."""
    lines = [f"| {o.task} | behaviour | accuracy | gates off | entries off | seconds |",
             "|---|---|---|---|---|---|"]
    off = {"base": "1.000 | 1.000", "sft": "0.000 | 0.000",
           "lcdd": f"{results['sparsity']:.3f} | {results['entries_off']:.3f}"}
    for name, s in scores.items():
        seconds = results["seconds"].get(name, 0)
        lines.append(f"| {name} | {behaviour.show_score(s)} | {off[name]} | {seconds:.1f} |")
    return "\n".join(lines)
