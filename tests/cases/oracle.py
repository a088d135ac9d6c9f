"""Our documented answers, in exact arithmetic: what every framework's output is compared with.

Sums and roots in decimals of 60 digits, products as fractions, one rounding at the end.
"""

import math
from decimal import Context, Decimal, localcontext
from fractions import Fraction

from formats import round_to

# Wide enough for (5e-324)^4 and (1.8e308)^4.
PRECISE = Context(prec=60, Emax=10**6, Emin=-(10**6))


def exact_norm(case) -> Decimal | float:
    """`(sum |g|^p)^(1/p)` over all tensors; a float only where it is NaN or infinite."""
    values = [x for tensor in case.tensors if tensor.grad for x in tensor.grad]
    if any(math.isnan(x) for x in values):
        return math.nan
    if any(math.isinf(x) for x in values):
        return math.inf
    with localcontext(PRECISE):
        magnitudes = [abs(Decimal(x)) for x in values if x]
        if not magnitudes:
            return Decimal(0)
        if case.norm_type == math.inf:
            return max(magnitudes)
        p = Decimal(case.norm_type)
        return sum((x**p for x in magnitudes), Decimal(0)) ** (1 / p)


def answer(case) -> tuple[float | None, list[list[float] | None]]:
    """The norm that the operation returns, if it returns one, and the gradients after."""
    if case.op == "clip_grad_value":
        return None, each(case, lambda x: clamp(x, case.limit))
    norm = exact_norm(case) if case.known_norm is None else Decimal(case.known_norm)
    if case.op == "total_norm":
        return as_f64(norm), each(case, lambda x: x)
    coef = clip_coef(case, norm)
    returned = None if case.op == "clip_grads_with_norm" else as_f64(norm)
    return returned, each(case, lambda x: scale(x, coef))


def as_f64(norm: Decimal | float) -> float:
    return norm if isinstance(norm, float) else round_to("f64", Fraction(norm))


def each(case, f) -> list[list[float] | None]:
    return [
        None if t.grad is None else [round_to(t.dtype, f(x)) for x in t.grad]
        for t in case.tensors
    ]


def clamp(x: float, bound: float) -> float:
    return x if math.isnan(x) else max(-bound, min(bound, x))


def clip_coef(case, norm: Decimal | float) -> Fraction | float:
    """`min(1, limit / (norm + eps))`; an infinite limit changes nothing, a zero one gives zeros."""
    if case.limit == math.inf:
        return Fraction(1)
    if isinstance(norm, float):  # NaN or infinite gradients
        # TensorFlow makes everything NaN, where PyTorch and optax have limit / inf = 0.
        return math.nan if case.op == "clip_by_global_norm" or math.isnan(norm) else 0.0
    if case.limit == 0:
        return Fraction(0)
    divisor = Fraction(norm) + Fraction(case.eps)
    return min(Fraction(1), Fraction(case.limit) / divisor) if divisor else Fraction(1)


def scale(x: float, coef: Fraction | float) -> Fraction | float:
    if coef == 1:
        return x
    if isinstance(coef, float) or not math.isfinite(x):
        return x * float(coef)
    return Fraction(x) * coef
