"""
The decisions of Alg. 1 (Sec. 3.2): how strong the penalty is, which loss it has to keep to, which
gates shut and which open again, how fast Δ moves, and when to stop. The loop that acts on them is
prune() in lcdd.py.
"""
import math
import statistics

import torch

from console import ticker
from settings import pull
from training import draw, linear, losses, warmup_steps

NEAR_0 = 0.03   # nats a token: what varies with the samples of such a loss is nothing beside the floor
FEW = 4608      # open gates from which on Δ's rate grows: those that the embedded model has in all


class Controller:
    """λ, ε and the average of the loss (Alg. 1). Everything advances once an optimizer step."""

    def __init__(self, o):
        """The settings, and the state of Alg. 1 before its first step."""
        self.o = o
        self.lam = o.lambda0
        self.raw = self.ema = 0.0
        self.budget = None                                  # ε, None during warm-up
        self.start = None                                   # the average when ε was set
        self.reference = None                               # the same, at least ε's floor: for EarlyStop
        self.highest = o.lambda0                            # λ so far

    def warm(self, t):
        """min(1, t/T_w): from 0 to 1 over the warm-up."""
        return min(1.0, t / max(1, self.o.warmup))

    def weight(self, t):
        """Factor on Ω at step t: λ, faded in over the warm-up, and braked."""
        return self.lam * self.warm(t) * self.brake()

    def brake(self):
        """
        1 where the loss is what it was when ε was set, 0 at ε, down to −1 beyond: what is pruned
        slows down before the edge, and past it the gates that shut last are the first to open
        again. The paper has 1 throughout; λ alone comes down too late, for a gate that is shut
        hardly opens on its own.
        """
        if self.budget is None or not self.o.brake:
            return 1.0
        return max(-1.0, min(1.0, self.room()))

    def room(self):
        """What is left of the slack between the loss at the start and ε, as a share of it."""
        return (self.budget - self.ema) / max(self.budget - self.start, 1e-12)

    def update(self, t, loss):
        """Take in the loss of step t; set ε once after warm-up, from then on move λ."""
        o = self.o
        # ema = β·ema + (1 − β)·L, bias-corrected by 1 − β^(t+1)
        self.raw = o.beta * self.raw + (1 - o.beta) * loss
        self.ema = self.raw / (1 - o.beta ** (t + 1))
        if t < o.warmup:
            return
        # when warm-up ends: ε = (1 + ρ)·ema
        if self.budget is None:
            self.start = self.ema
            self.budget = max((1 + o.rho) * self.ema, o.floor)
            self.reference = max(self.ema, o.floor)
            return
        # from then on: v = clip((ema − ε)/ε, ±V);  λ ← clamp(λ·exp(−η·v), λ_min, λ_max)
        v = (self.ema - self.budget) / max(self.budget, 1e-12)
        if o.brake:
            v = -self.room()                                # a loss that cannot go to 0 has only its slack
        if o.violation_clip:
            v = max(-o.violation_clip, min(o.violation_clip, v))
        eta = o.eta if v > 0 else o.eta_grow
        self.lam *= math.exp(min(-eta * v, 700))            # 700: where exp() overflows
        self.lam = max(o.lambda_min, min(o.lambda_max, self.lam))
        self.highest = max(self.highest, self.lam)

    def recovers(self):
        """
        Is the loss within ε and λ on its way back up, after a fall to less than half? Gates rest
        meanwhile, and will shut again. Not in the paper.
        """
        within = self.budget is not None and self.ema < self.budget
        return self.o.brake and within and self.lam < self.highest / 2

    def fits(self, loss):
        """Are both the loss and its average within the budget?"""
        return self.budget is not None and max(loss, self.ema) <= self.budget

    def state(self):
        """What changes from step to step, for a saved state."""
        return {k: v for k, v in vars(self).items() if k != "o"}


class Chance:
    """
    What of a batch's loss comes of the choice of its samples: SFT's loss on them, beyond its loss on
    all. Taken off (a control variate) the mean stays, and batches that are hard by chance no longer
    cross an ε that is only ρ above a loss far from 0. Where SFT's loss is near 0 or under `floor`
    there is next to nothing to take off, and it is not measured.
    """

    def __init__(self, losses=None):
        """`losses` (n, 2), float64: SFT's, sample by sample (training.losses), 0 where unseen."""
        self.losses = losses

    @classmethod
    def measured(cls, net, carrier, examples, o, pad_id):
        """Of the samples that Alg. 1 draws, by the carrier as SFT leaves it."""
        if not o.paired:
            return cls()
        first = draw(examples, 2 * o.batch, 0, o.seed + 1)
        loss, tokens = losses(net, carrier, first, pad_id, o.micro_batch).sum(0).tolist()
        if loss / tokens <= max(o.floor, NEAR_0):
            return cls()
        drawn = sorted(set(draw(range(len(examples)), o.batch * o.steps, 0, o.seed + 1)))
        found = torch.zeros(len(examples), 2, dtype=torch.float64)
        found[drawn] = losses(net, carrier, [examples[i] for i in drawn], pad_id, o.micro_batch,
                              ticker("SFT's loss of samples", len(drawn)))
        return cls(found)

    def of(self, batch):
        """For samples by their numbers, in nats a token. 0 where nothing was measured."""
        if self.losses is None:
            return 0.0
        (some, tokens), (every, all_tokens) = self.losses[batch].sum(0), self.losses.sum(0)
        return float(some / tokens - every / all_tokens)


class Selection:
    """
    The task's say in which gates stay open. Its gradient is next to nothing beside the penalty's
    while the loss is near 0, so that Ω alone decides, and with it the noise of the initial logits.
    Here the running mean of the gradient is scaled until its root mean square over all gates is
    `select` times the penalty's pull at the start. `spread` says how far every layer has a scale of
    its own: 0, one for all; 1, the root mean square is that in each layer, so that none is emptied
    for another's sake; between them, their geometric mean.
    """

    def __init__(self, o, logits):
        """No mean yet; `size` is the root mean square that it is scaled to."""
        self.o, self.size, self.mean = o, o.select * pull(o), torch.zeros_like(logits)

    @torch.no_grad()
    def rescale(self, grad, t, warm):
        """
        Replace ∂L/∂m of step t, in place, by the scaled mean; `warm` fades it in with the penalty.
        """
        if not self.o.select:
            return
        self.mean.mul_(0.9).add_(grad, alpha=0.1)                   # (L, gates a layer)
        square = self.mean.square()
        unit = square.mean().sqrt().clamp(min=1e-30)                # free of the bias correction
        layer = square.mean(1, keepdim=True).sqrt().clamp(min=1e-30)        # (L, 1)
        unit = unit ** (1 - self.o.spread) * layer ** self.o.spread
        grad.copy_(self.mean * (warm * self.size / unit))


class EarlyStop:
    """
    Both stops of Alg. 1 on log points of (open gates, loss): stalled, and over-pruned. No verdict
    before pruning has begun, and none on log points of the warm-up.
    """

    def __init__(self, o, total):
        """`total`: the number of gates, open and shut."""
        self.o, self.total, self.points = o, total, []
        self.stalled = self.over = 0                        # log points in a row

    def update(self, n_open, loss, reference, recovers=False):
        """
        Take in a log point; `reference`: the loss after warm-up, None before; `recovers`: λ is on its
        way back, and gates that rest are no stall. Returns the reason to stop, or None.
        """
        o = self.o
        if reference is None:
            return None
        self.points.append((n_open, loss))
        if len(self.points) <= o.window or n_open >= 0.9 * self.total:
            return None
        before, _ = self.points[-1 - o.window]
        stalled = n_open > (1 - o.stall) * before
        self.stalled = self.stalled + 1 if stalled and not recovers else 0
        median = statistics.median(loss for _, loss in self.points[-o.window:])
        over = o.over is not None and median > (1 + o.over) * reference
        self.over = self.over + 1 if over else 0
        if self.stalled >= o.patience:
            return (f"stalled: open gates fell by less than {o.stall:.0%} over {o.window} "
                    f"log points, {o.patience} times in a row")
        if self.over >= o.patience:
            return (f"over-pruned: the median loss is more than {o.over:.0%} above the loss after "
                    f"warm-up, {o.patience} times in a row")
        return None

    def state(self):
        """What changes from log point to log point, for a saved state."""
        return {k: v for k, v in vars(self).items() if k != "o"}


def rate_of_delta(o, t):
    """AdamW's rate at step t of Alg. 1."""
    rise = warmup_steps(o, o.steps)
    if o.schedule == "linear":
        return o.lr * linear(t, o.steps, rise)
    return o.lr * min(1.0, t / rise) if rise else o.lr


@torch.no_grad()
def faster(carrier, o):
    """
    How many times o.lr the rate of Δ is: once few gates are open, what is left has to change more
    to give the same behaviour.
    """
    few = min(FEW, carrier.logits.numel())
    share = float((carrier.logits > 0).float().sum() / few)
    return min(max(share, 1 / few), 1) ** -o.quicken


@torch.no_grad()
def hold_back(logits, rate, share):
    """
    Let at most `share` of the open gates (at least one) shut in this step of SGD at `rate`: those
    that the step takes furthest below 0, measured by what they have left. The others wait; their
    gradient becomes 0, in place. share 0: all may shut, as in the paper. All gates arrive at 0 at
    nearly the same time, and the average of the loss knows it ten steps later.
    """
    step = rate * logits.grad
    shuts = (logits > 0) & (step >= logits)
    allowed = max(1, int(share * int((logits > 0).sum())))
    if not share or int(shuts.sum()) <= allowed:
        return
    left = torch.where(shuts, logits / step, torch.inf).flatten()
    last = left.kthvalue(allowed).values
    logits.grad.view(-1)[shuts.flatten() & (left > last)] = 0.0


@torch.no_grad()
def reopen_last(carrier, share):
    """
    Raise all logits alike until `share` more gates (of those open; at least one) are open. Returns
    how many.
    """
    shut = carrier.logits[carrier.logits <= 0]
    n_open = int((carrier.logits > 0).sum())
    n = min(len(shut), max(1, math.ceil(share * n_open)))
    if n == 0:
        return 0
    edge = shut.topk(n).values[-1]
    carrier.logits.add_(1e-4 - edge)
    return len(shut) - int((carrier.logits <= 0).sum())
