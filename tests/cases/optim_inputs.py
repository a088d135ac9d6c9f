"""The optimizers, parameters and gradients of the optimizer cases. As in inputs.py, every case
seeds its own generator with its id."""

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from types import SimpleNamespace

from formats import FORMATS, round_to
from oracle import exact_norm

VARIANTS = ["adamw", "amsgrad", "sgd", "momentum", "dampening", "nesterov"]
CLIPS = ["none", "norm", "value"]
STEPS = [1, 2, 3, 5, 8, 20]
SHAPES = [(), (1,), (3,), (7,), (0,), (2, 3), (1, 5), (3, 0, 2), (2, 1, 2)]
NORM_EPS = 1e-6  # of clip_grad_norm_

PLAIN = ["normal", "small", "uneven", "some zeros"]
RANGE = ["zeros", "tiny", "huge", "spread"]
NON_FINITE = ["one nan", "one inf"]

# Gradients at the ends of a format's range. Squares of 1e-20 have few digits left in f32, and
# PyTorch's f32 norm is made of such squares: where the norm counts they are 1e-15.
TINY = {"f64": 1e-20, "f32": 1e-20, "bf16": 1e-20, "f16": 1e-6}
HUGE = {"f64": 1e15, "f32": 1e15, "bf16": 1e15, "f16": 1e4}


@dataclass
class Param:
    dtype: str
    shape: tuple[int, ...]
    start: list[float]
    grads: list[list[float] | None] = field(default_factory=list)  # None: no gradient in that step


@dataclass
class OptimCase:
    id: str
    optimizer: str  # adamw or sgd
    hyper: dict
    params: list[Param]
    lrs: list[float]  # one a step
    clip: tuple[str, float] | None
    master_weights: bool = False

    @property
    def is_scheduled(self) -> bool:
        return any(lr != self.hyper["lr"] for lr in self.lrs)

    def gradients(self, step: int) -> list[list[float] | None]:
        return [param.grads[step] for param in self.params]


def few(dtype: str, x: float) -> float:
    """A number of the dtype with three digits, so that the file stays small."""
    bound = float(FORMATS[dtype].largest)
    return max(-bound, min(bound, round_to(dtype, float(f"{x:.3g}"))))


def hyper_of(rng: random.Random, variant: str) -> dict:
    """A large weight decay is part of it, and learning rates with which nothing explodes."""
    lr = rng.choice([1e-3, 0.01, 0.05, 0.1, 3e-4, 0.3])
    if variant in ("adamw", "amsgrad"):
        beta1, beta2 = rng.choice([(0.9, 0.999), (0.9, 0.95), (0.8, 0.99), (0.0, 0.9), (0.5, 0.5)])
        return {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "eps": rng.choice([1e-8, 1e-8, 1e-5, 0.1]),
            "weight_decay": rng.choice([0.0, 0.01, 0.1, 3.0]),
            "amsgrad": variant == "amsgrad",
        }
    hyper = {"lr": lr, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
    hyper["weight_decay"] = rng.choice([0.0, 0.0, 1e-4, 0.1, 2.0])
    if variant != "sgd":
        hyper["momentum"] = rng.choice([0.9, 0.5, 0.99])
    if variant == "dampening":
        hyper["dampening"] = rng.choice([0.1, 0.5, 0.9, 1.0])
    if variant == "nesterov":
        hyper["nesterov"] = True
    if variant == "sgd" and rng.random() < 0.3:
        hyper["dampening"] = 0.5  # without momentum it changes nothing
    return hyper


def scale_of(rng: random.Random, dtype: str, kind: str, norm_counts: bool) -> float:
    match kind:
        case "normal" | "one nan" | "one inf":
            return 1.0
        case "some zeros":
            return float(rng.random() < 0.7)
        case "small":
            return 1e-3
        case "uneven":
            return 10 ** rng.uniform(-2, 2)
        case "zeros":
            return 0.0
        case "tiny":
            return max(TINY[dtype], 1e-15) if norm_counts else TINY[dtype]
        case "huge":
            return HUGE[dtype]
        case "spread":
            return 10 ** rng.uniform(math.log10(TINY[dtype]), math.log10(HUGE[dtype]))
    raise AssertionError(kind)


def parameters(rng, dtypes: list[str], kind: str, steps: int, clip: str) -> list[Param]:
    made = []
    for index in range(max(len(dtypes), rng.randint(1, 4))):
        dtype, shape = dtypes[index % len(dtypes)], rng.choice(SHAPES)
        count = math.prod(shape)
        start = [few(dtype, rng.gauss(0, 1)) for _ in range(count)]
        param = Param(dtype, shape, start)
        for _ in range(steps):
            scales = [scale_of(rng, dtype, kind, clip == "norm") for _ in range(count)]
            param.grads.append([few(dtype, rng.gauss(0, 1) * scale) for scale in scales])
        made.append(param)
    if not any(param.start for param in made):
        return parameters(rng, dtypes, kind, steps, clip)
    if kind in NON_FINITE:
        victim = rng.choice([param for param in made if param.start])
        grad = rng.choice(victim.grads)
        grad[rng.randrange(len(grad))] = math.nan if kind == "one nan" else -math.inf
    return made


def remove_gradients(rng: random.Random, params: list[Param], optimizer: str) -> None:
    """AdamW's step counter is one for all Vars (PyTorch's is the parameter's own), so there a
    gradient may only be missing from some step to the end, or always."""
    steps = len(params[0].grads)
    for index, param in enumerate(params):
        if index and rng.random() < 0.4:
            param.grads = [None] * steps
        elif optimizer == "sgd":
            param.grads = [None if rng.random() < 0.3 else grad for grad in param.grads]
        else:
            last = rng.randint(1, steps)
            param.grads = [g if step < last else None for step, g in enumerate(param.grads)]


def norm_of(grads: list[list[float] | None]) -> float:
    """Exact, rounded once."""
    tensors = [SimpleNamespace(grad=grad) for grad in grads]
    return float(exact_norm(SimpleNamespace(tensors=tensors, norm_type=2.0)))


def limit_of(rng: random.Random, clip: str, params: list[Param]) -> float:
    """A limit that some steps reach: near one step's norm or largest element."""
    steps = range(len(params[0].grads))
    norms = [norm_of([param.grads[step] for param in params]) for step in steps]
    elements = [abs(x) for param in params for grad in param.grads for x in grad or ()]
    of_steps = [x for x in (norms if clip == "norm" else elements) if math.isfinite(x) and x > 0]
    limit = few("f64", (rng.choice(of_steps) if of_steps else 1.0) * rng.uniform(0.2, 1.1))
    if clip == "value":
        # Rounded to the gradients' dtype by PyTorch: take one that all of them hold.
        for param in params:
            limit = max(round_to(param.dtype, limit), float(FORMATS[param.dtype].smallest))
    return limit


class Maker:
    def __init__(self):
        self.made, self.seen = [], Counter()

    def add(self, variant, dtypes, clip, kind, *, missing=False, master=False, schedule=False):
        words = ["pytorch", variant, "+".join(dtypes), f"clip-{clip}", kind.replace(" ", "-")]
        words += ["missing"] if missing else []
        words += ["master"] if master else []
        words += ["schedule"] if schedule else []
        self.seen["/".join(words)] += 1
        words += [str(repeat)] if (repeat := self.seen["/".join(words)]) > 1 else []
        name = "/".join(words)
        self.made.append(
            lambda again: make(name, variant, dtypes, clip, kind, missing, master, schedule, again)
        )


def make(name, variant, dtypes, clip, kind, missing, master, schedule, again) -> OptimCase:
    """The case; `again` counts from 0, for other numbers where those before were of no use."""
    rng = random.Random(f"{name} {again}" if again else name)
    optimizer = "adamw" if variant in ("adamw", "amsgrad") else "sgd"
    steps = rng.choice(STEPS[2:] if missing or schedule else STEPS)
    hyper = hyper_of(rng, variant)
    params = parameters(rng, dtypes, kind, steps, clip)
    if missing:
        remove_gradients(rng, params, optimizer)
    lrs = [hyper["lr"]] * steps
    if schedule:
        lrs = [few("f64", hyper["lr"] * rng.choice([0.0, 0.1, 0.5, 1.0])) for _ in lrs]
    limit = None if clip == "none" else (clip, limit_of(rng, clip, params))
    return OptimCase(name, optimizer, hyper, params, lrs, limit, master)


def makers() -> list:
    """Functions that make a case each."""
    made = Maker()
    plain, ranges, clips = cycle(PLAIN), cycle(RANGE), cycle(CLIPS)
    for variant in VARIANTS:
        for dtype in ["f32", "f64"]:
            for clip in CLIPS:
                for _ in range(3):
                    made.add(variant, [dtype], clip, next(plain))
                next(plain)
                made.add(variant, [dtype], clip, "normal", missing=True)
            for kind in RANGE:
                made.add(variant, [dtype], next(clips), kind)
            next(clips)
            for kind in NON_FINITE:
                made.add(variant, [dtype], next(clips), kind)
            made.add(variant, [dtype], next(clips), "normal", schedule=True)
        for dtype in ["bf16", "f16"]:
            for master in [False, True]:
                for clip in CLIPS:
                    made.add(variant, [dtype], clip, next(plain), master=master)
                made.add(variant, [dtype], next(clips), next(ranges), master=master)
                made.add(variant, [dtype], next(clips), "normal", missing=True, master=master)
            next(ranges)
        made.add(variant, ["f32", "f64"], "none", next(plain))
        made.add(variant, ["bf16", "f32", "f64", "f16"], "value", next(plain))
        made.add(variant, ["bf16", "f32", "f64", "f16"], "none", next(plain), master=True)
    return made.made
