"""The gradients, limits and norm orders of the cases. Every case seeds its own generator with its
id, so that adding one changes no other."""

import math
import random
from dataclasses import dataclass, field

from formats import FORMATS, round_to
from oracle import exact_norm

NORM_TYPES = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf]
LIMITS = ["zero", "tiny", "below", "equal", "above", "inf"]
SHAPES = [(), (1,), (3,), (7,), (16,), (0,), (2, 3), (1, 5), (4, 0), (8, 8), (2, 3, 4), (3, 0, 2)]

# Scales at which the squares leave the format's range, by dtype.
TINY = {"f64": 1e-200, "f32": 1e-25, "bf16": 1e-25, "f16": 2e-6}
HUGE = {"f64": 1e200, "f32": 1e25, "bf16": 1e25, "f16": 1e4}
# Powers of ten that one case spans.
SPREAD = {"f64": 20.0, "f32": 20.0, "bf16": 20.0, "f16": 4.0}

FINITE = ["normal", "integers", "milli", "kilo", "uneven"]
RANGE = ["tiny", "huge", "subnormal", "largest", "spread"]
NON_FINITE = ["one nan", "one inf", "one -inf", "all inf", "nan and inf"]


@dataclass
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    grad: list[float] | None  # None: this Var got no gradient


@dataclass
class Case:
    id: str
    op: str
    norm_type: float
    limit: float | None
    eps: float
    tensors: list[Tensor] = field(default_factory=list)
    known_norm: float | None = None

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(x) for t in self.tensors for x in t.grad or ())


def elements(rng: random.Random, dtype: str, kind: str, count: int) -> list[float]:
    """`count` finite values of `dtype`."""
    form = FORMATS[dtype]

    def one() -> float:
        gauss = rng.gauss(0, 1)
        match kind:
            case "normal":
                return gauss
            case "integers":
                return float(rng.randint(-9, 9))
            case "milli":
                return gauss * 1e-3
            case "kilo":
                return gauss * 1e3
            case "uneven":
                return gauss * 10 ** rng.uniform(-2, 2)
            case "zeros":
                return 0.0
            case "tiny":
                return gauss * TINY[dtype]
            case "huge":
                return gauss * HUGE[dtype]
            case "subnormal":
                return float(rng.randint(-99, 99) * form.smallest)
            case "largest":
                return rng.choice([-1, 1]) * float(form.largest)
            case "spread":
                return gauss * 10 ** rng.uniform(-SPREAD[dtype], SPREAD[dtype])
        raise AssertionError(kind)

    # The Gaussian tail times a large scale may pass f16's largest number.
    bound = float(form.largest)
    return [max(-bound, min(bound, round_to(dtype, one()))) for _ in range(count)]


def gradients(rng: random.Random, dtypes: list[str], kind: str, may_be_empty: bool) -> list[Tensor]:
    """One to four tensors, of which some got no gradient, and some may have zero elements."""
    shapes = SHAPES if may_be_empty else [shape for shape in SHAPES if math.prod(shape)]
    finite_kind = "normal" if kind in NON_FINITE else kind
    tensors = []
    for index in range(max(len(dtypes), rng.randint(1, 4))):
        dtype, shape = dtypes[index % len(dtypes)], rng.choice(shapes)
        grad = elements(rng, dtype, finite_kind, math.prod(shape))
        tensors.append(Tensor(dtype, shape, None if rng.random() < 0.12 else grad))
    if not any(t.grad for t in tensors):
        dtype = dtypes[0]
        tensors.append(Tensor(dtype, (5,), elements(rng, dtype, finite_kind, 5)))
    if kind in NON_FINITE:
        spoil(rng, tensors, kind)
    return tensors


def spoil(rng: random.Random, tensors: list[Tensor], kind: str) -> None:
    grads = [t.grad for t in tensors if t.grad]
    victim = rng.choice(grads)
    at = rng.randrange(len(victim))
    match kind:
        case "one nan":
            victim[at] = math.nan
        case "one inf":
            victim[at] = math.inf
        case "one -inf":
            victim[at] = -math.inf
        case "all inf":
            for grad in grads:
                grad[:] = [math.inf] * len(grad)
        case "nan and inf":
            victim[at] = math.nan
            other = rng.choice(grads)
            other[(at + 1) % len(other)] = math.inf


def norm_limit(rng: random.Random, name: str, case: Case) -> float:
    """The limit of that name, from where the case's norm is."""
    norm = exact_norm(case)
    norm = 1.0 if isinstance(norm, float) or norm == 0 else min(float(norm), 1e300)
    return {
        "zero": 0.0,
        "tiny": norm * 1e-6,
        "below": norm * rng.uniform(0.05, 0.8),
        "equal": norm,
        "above": norm * rng.uniform(1.5, 20),
        "inf": math.inf,
    }[name]


def value_limit(rng: random.Random, name: str, case: Case) -> float:
    magnitudes = [abs(x) for t in case.tensors for x in t.grad or () if math.isfinite(x)]
    largest = max(magnitudes, default=0.0) or 1.0
    bound = {
        "zero": 0.0,
        "tiny": largest * 1e-3,
        "below": largest * rng.uniform(0.1, 0.8),
        "equal": largest,
        "above": largest * 2 if largest < 1e4 else largest,
        "inf": math.inf,
    }[name]
    # Every framework rounds the bound to the gradients' dtype: take one that all of them hold.
    for tensor in case.tensors:
        bound = round_to(tensor.dtype, bound)
    return bound


def name_of(dtypes: list[str]) -> str:
    return "+".join(dtypes)


class Cases:
    """Collects the cases of one framework."""

    def __init__(self, framework: str, eps: float):
        self.framework, self.eps = framework, eps
        self.cases: list[Case] = []

    def add(self, op, dtypes, kind, norm_type=2.0, limit=None, known_norm=None, repeat=0):
        """One case; `limit` is a name of `LIMITS`, `known_norm` a multiple of the true norm."""
        words = [self.framework, op, name_of(dtypes), kind.replace(" ", "-")]
        words += [f"p{norm_type:g}"] if op != "clip_grad_value" else []
        words += [f"limit-{limit}"] if limit else []
        words += [f"known-{known_norm:g}"] if known_norm else []
        words += [str(repeat)] if repeat else []
        case = Case("/".join(words), op, norm_type, None, self.eps)
        rng = random.Random(case.id)
        # PyTorch raises for the infinity norm of an empty tensor: frameworks/pytorch.rs has ours.
        may_be_empty = self.framework != "pytorch" or norm_type != math.inf
        case.tensors = gradients(rng, dtypes, kind, may_be_empty)
        if limit:
            choose = value_limit if op == "clip_grad_value" else norm_limit
            case.limit = choose(rng, limit, case)
        if known_norm:
            case.known_norm = float(exact_norm(case)) * known_norm
        self.cases.append(case)

    def add_all_missing(self, op, limit):
        words = [self.framework, op, "f32", "all-missing"]
        case = Case("/".join(words), op, 2.0, limit, self.eps, [Tensor("f32", (3,), None)] * 2)
        self.cases.append(case)
