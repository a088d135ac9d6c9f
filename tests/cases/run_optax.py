"""optax's clip_by_global_norm, clip and tree.norm (once global_norm)."""

from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import optax

from inputs import FINITE, LIMITS, NON_FINITE, RANGE, Cases

jax.config.update("jax_enable_x64", True)

NAME, VERSION = "optax", optax.__version__
EPS = 0.0
DTYPES = {"f64": jnp.float64, "f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16}
SINGLE = [["f32"], ["f64"], ["f16"], ["bf16"]]
MIXED = [["f32", "f64"], ["bf16", "f32"]]


def cases() -> Cases:
    made, kinds, limits = Cases(NAME, EPS), cycle(FINITE), cycle(["tiny", "below", "above"])
    for dtypes in SINGLE + MIXED:
        for limit in LIMITS:
            kind = next(kinds)
            made.add("clip_grad_norm", dtypes, kind, limit=limit)
            made.add("clip_grad_value", dtypes, kind, limit=limit)
        for norm_type in [1.0, 2.0, float("inf")]:
            made.add("total_norm", dtypes, next(kinds), norm_type)
    for dtypes in SINGLE:
        for kind in RANGE:
            made.add("clip_grad_norm", dtypes, kind, limit=next(limits))
            made.add("total_norm", dtypes, kind)
            made.add("clip_grad_value", dtypes, kind, limit="below")
        for kind in NON_FINITE:
            made.add("clip_grad_norm", dtypes, kind, limit="below")
        made.add("clip_grad_norm", dtypes, "one inf", limit="inf")
        for limit in ["zero", "below", "inf"]:
            made.add("clip_grad_value", dtypes, "nan and inf", limit=limit)
        made.add("clip_grad_norm", dtypes, "zeros", limit="zero")
        made.add("clip_grad_norm", dtypes, "zeros", limit="below")
    made.add_all_missing("clip_grad_norm", 1.0)
    made.add_all_missing("total_norm", None)
    return made


def run(case) -> tuple[float | None, list[list[float] | None]]:
    """The norm that the framework returns, and its gradients after."""
    grads = [
        None if t.grad is None else jnp.asarray(np.array(t.grad).reshape(t.shape), DTYPES[t.dtype])
        for t in case.tensors
    ]
    norm, after = None, grads
    match case.op:
        case "clip_grad_norm":
            norm = optax.tree.norm(grads)
            after = transformed(optax.clip_by_global_norm(case.limit), grads)
        case "clip_grad_value":
            after = transformed(optax.clip(case.limit), grads)
        case "total_norm":
            order = "inf" if case.norm_type == float("inf") else int(case.norm_type)
            norm = optax.tree.norm(grads, ord=order)
    after = [None if g is None else np.asarray(g, np.float64).ravel().tolist() for g in after]
    return None if norm is None else float(norm), after


def transformed(transformation, grads):
    updates, _ = transformation.update(grads, transformation.init(grads))
    return updates
