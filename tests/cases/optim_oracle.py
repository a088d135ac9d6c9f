"""AdamW and SGD from their formulas, in f64 and element by element: what PyTorch is compared with.

AdamW (Loshchilov and Hutter; the maximum of AMSGrad is that of v before its bias is corrected):
    m = beta1 m + (1 - beta1) g           v = beta2 v + (1 - beta2) g^2
    x = (1 - lr weight_decay) x - lr m_hat / (sqrt(v_hat) + eps)

SGD (momentum starts as the first gradient, undamped):
    g = g + weight_decay x                b = momentum b + (1 - dampening) g
    x = x - lr b, with Nesterov's momentum x - lr (g + momentum b)
"""

import math
from dataclasses import dataclass, field

from formats import FORMATS, round_to
from optim_inputs import NORM_EPS, OptimCase, norm_of
from oracle import clamp

HALVES = ("bf16", "f16")


@dataclass
class Answer:
    total_norms: list[float] = field(default_factory=list)  # of the steps whose norm was clipped
    ends: list[list[float]] = field(default_factory=list)
    # The largest |x| that an element had on the way: what its rounding errors are relative to.
    reaches: list[list[float]] = field(default_factory=list)
    # Whether a value that was rounded to a half was within an f32 error of a tie.
    is_near_a_tie: bool = False


@dataclass
class Element:
    x: float
    visible: float
    reach: float
    m: float = 0.0
    v: float = 0.0
    largest_v: float = 0.0
    momentum: float | None = None

    def adamw(self, g: float, hyper: dict, lr: float, step: int) -> None:
        beta1, beta2 = hyper["beta1"], hyper["beta2"]
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * (g * g)
        self.largest_v = maximum(self.largest_v, self.v)
        m_hat = self.m / (1 - beta1**step)
        v_hat = (self.largest_v if hyper["amsgrad"] else self.v) / (1 - beta2**step)
        update = m_hat / (math.sqrt(v_hat) + hyper["eps"])
        self.x = (1 - lr * hyper["weight_decay"]) * self.x - lr * update

    def sgd(self, g: float, hyper: dict, lr: float) -> None:
        momentum = hyper["momentum"]
        if hyper["weight_decay"]:
            g += hyper["weight_decay"] * self.x
        if momentum:
            before, kept = self.momentum, 1 - hyper["dampening"]
            self.momentum = g if before is None else momentum * before + kept * g
            g = g + momentum * self.momentum if hyper["nesterov"] else self.momentum
        self.x -= lr * g


def maximum(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def answer(case: OptimCase, f32_error_a_step: float) -> Answer:
    made = Answer()
    all_elements = [[Element(x, x, abs(x)) for x in param.start] for param in case.params]
    for step, lr in enumerate(case.lrs, 1):
        grads = clipped(case, step - 1, made)
        for param, elements, grad in zip(case.params, all_elements, grads, strict=True):
            if grad is None:
                continue
            for element, g in zip(elements, grad, strict=True):
                if case.optimizer == "adamw":
                    element.adamw(g, case.hyper, lr, step)
                else:
                    element.sgd(g, case.hyper, lr)
                element.reach = max(element.reach, abs(element.x))
                element.visible = round_to(param.dtype, element.x)
                if param.dtype in HALVES:
                    counts = not case.master_weights or step == len(case.lrs)
                    error = f32_error_a_step * step * max(element.reach, lr)
                    if counts and near_a_tie(param.dtype, element.x, error):
                        made.is_near_a_tie = True
                    if not case.master_weights:
                        element.x = element.visible
    made.ends = [[element.visible for element in elements] for elements in all_elements]
    made.reaches = [[element.reach for element in elements] for elements in all_elements]
    return made


def near_a_tie(dtype: str, x: float, error: float) -> bool:
    """Whether another half is nearest to a number that is `error` away."""
    return round_to(dtype, x - error) != round_to(dtype, x + error)


def clipped(case: OptimCase, step: int, made: Answer) -> list[list[float] | None]:
    grads = case.gradients(step)
    match case.clip:
        case ("value", limit):
            return [grad and [clamp(g, limit) for g in grad] for grad in grads]
        case ("norm", limit):
            norm = norm_of(grads)
            made.total_norms.append(norm)
            coef = math.nan if math.isnan(norm) else min(1.0, limit / (norm + NORM_EPS))
            return [grad and [g * coef for g in grad] for grad in grads]
    return grads
