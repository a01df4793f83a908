"""What the benchmarks time: update rules, parameters, the paper's step, models' lists of shapes."""

import math

import torch

import tl1kernels as tk

LR, LAM, A, MU = 0.01, 0.05, 1.0, 0.5
REGULARIZER = {"lam": LAM, "a": A, "mu": MU}
RULES = {
    "SGD": (tk.ProxSGD, torch.optim.SGD, {}, 3),
    "SGD momentum": (tk.ProxSGD, torch.optim.SGD, {"momentum": 0.9}, 5),
    "AdamW": (tk.ProxAdamW, torch.optim.AdamW, {}, 7),
}  # ours, torch's, options, reads and writes a weight


def fresh(shape, dtype=torch.float32, device="cpu"):
    """Return a parameter like a trained layer's, with a gradient."""
    p = torch.randn(shape, device=device).mul_(0.05).to(dtype).requires_grad_()
    p.grad = torch.randn(shape, device=device).mul_(0.01).to(dtype)
    return p


def step_of(rule, p, **regularizer):
    ours, _, options, _ = RULES[rule]
    return ours([p], lr=LR, **options, **regularizer).step


def steps_on_one_memory(rule, given, **regularizer):
    """Return our step and torch's on the same parameters, gradients and state.

    How fast memory is differs from one allocation to the next, by more than the two steps do.
    """
    ours, torchs, options, _ = RULES[rule]
    mine = ours(given, lr=LR, **options, **regularizer)
    mine.step()
    params = [p for group in mine.param_groups for p in group["params"]]
    theirs = torchs(params, lr=LR, fused=True, **options)
    for p in params:
        theirs.state[p] = dict(mine.state[p])
    return mine.step, theirs.step


@torch.no_grad()
def eager_step(p, g):
    """Take the step as a user would type it from the paper: SGD, eq. 11, group lasso on rows."""
    tau, c = LR * LAM * MU, LR * LAM * (1 - MU)
    v = p - LR * g
    if tau <= A * A / (2 * (A + 1)):
        threshold = tau * (A + 1) / A
    else:
        threshold = math.sqrt(2 * tau * (A + 1)) - A / 2
    size = v.abs()
    phi = torch.arccos((1 - 27 * tau * A * (A + 1) / (2 * (A + size) ** 3)).clamp(-1, 1))
    t = v.sign() * (2 / 3 * (A + size) * torch.cos(phi / 3) - 2 * A / 3 + size / 3)
    t = torch.where(size <= threshold, 0.0, t)
    norm = t.norm(dim=1, keepdim=True)
    p.copy_(t * torch.where(norm > 0, (1 - c / norm).clamp(min=0), 0.0))


def resnet50():
    """Return the shapes of a ResNet-50's 161 parameters (He et al. 2016)."""

    def block(channels, width):
        yield from ((width, channels, 1, 1), (width,), (width,))
        yield from ((width, width, 3, 3), (width,), (width,))
        yield from ((4 * width, width, 1, 1), (4 * width,), (4 * width,))

    shapes, channels = [(64, 3, 7, 7), (64,), (64,)], 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(depth):
            shapes += block(channels, width)
            if i == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_small():
    """Return the shapes of a GPT-2 small's 148 parameters (Radford et al. 2019), its head tied."""
    width = 768
    layer = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(50257, width), (1024, width), *(12 * layer), (width,), (width,)]
