"""PyTorch's clip_grad_norm_, clip_grad_value_, get_total_norm and clip_grads_with_norm_."""

from itertools import cycle

import torch
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)

from inputs import FINITE, LIMITS, NON_FINITE, NORM_TYPES, RANGE, Cases

NAME, VERSION = "pytorch", torch.__version__.split("+")[0]
EPS = 1e-6
DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SINGLE = [["f32"], ["f64"], ["f16"], ["bf16"]]
MIXED = [["f32", "f64"], ["bf16", "f32"], ["f16", "bf16", "f32", "f64"]]


def cases() -> Cases:
    made, kinds = Cases(NAME, EPS), cycle(FINITE)
    for dtypes in SINGLE + MIXED:
        for norm_type in NORM_TYPES:
            for limit in LIMITS:
                made.add("clip_grad_norm", dtypes, next(kinds), norm_type, limit)
    range_norms, limits = cycle(NORM_TYPES), cycle(["tiny", "below", "above"])
    for dtypes in SINGLE:
        for kind in RANGE:
            for _ in range(4):
                made.add("clip_grad_norm", dtypes, kind, next(range_norms), next(limits))
        made.add("clip_grad_norm", dtypes, "zeros", 2.0, "zero")
        made.add("clip_grad_norm", dtypes, "zeros", 2.0, "below")
        made.add("clip_grad_norm", dtypes, "zeros", float("inf"), "above")
    for dtypes in SINGLE + MIXED[-1:]:
        for kind in NON_FINITE:
            for limit in ["zero", "below", "inf"]:
                made.add("clip_grad_norm", dtypes, kind, next(range_norms), limit)
    for dtypes in SINGLE + MIXED:
        for norm_type in NORM_TYPES:
            made.add("total_norm", dtypes, next(kinds), norm_type)
        for kind in [*RANGE, *NON_FINITE]:
            if dtypes in SINGLE:
                made.add("total_norm", dtypes, kind, next(range_norms))
        for limit in LIMITS:
            made.add("clip_grad_value", dtypes, next(kinds), limit=limit)
        for limit in ["zero", "below", "inf"]:
            made.add("clip_grad_value", dtypes, "nan and inf", limit=limit)
        for known_norm in [0.5, 1.0, 3.0]:
            made.add("clip_grads_with_norm", dtypes, next(kinds), 2.0, "below", known_norm)
    for dtypes in SINGLE:
        for kind in RANGE:
            made.add("clip_grad_value", dtypes, kind, limit="below")
    made.add_all_missing("clip_grad_norm", 1.0)
    made.add_all_missing("total_norm", None)
    return made


def run(case) -> tuple[float | None, list[list[float] | None]]:
    """The norm that the framework returns, and its gradients after."""
    params = []
    for t in case.tensors:
        param = torch.zeros(t.shape, dtype=DTYPES[t.dtype])
        if t.grad is not None:
            grad = torch.tensor(t.grad, dtype=torch.float64)
            param.grad = grad.to(DTYPES[t.dtype]).reshape(t.shape)
        params.append(param)
    grads = [p.grad for p in params if p.grad is not None]
    norm = None
    match case.op:
        case "clip_grad_norm":
            norm = clip_grad_norm_(params, case.limit, case.norm_type)
        case "clip_grad_value":
            clip_grad_value_(params, case.limit)
        case "total_norm":
            norm = get_total_norm(grads, case.norm_type)
        case "clip_grads_with_norm":
            known_norm = torch.tensor(case.known_norm, dtype=torch.float64)
            clip_grads_with_norm_(params, case.limit, known_norm)
    after = [None if p.grad is None else p.grad.double().flatten().tolist() for p in params]
    return None if norm is None else norm.double().item(), after
