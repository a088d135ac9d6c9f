"""TensorFlow's clip_by_global_norm, clip_by_value and linalg.global_norm."""

from itertools import cycle

import tensorflow as tf

from inputs import FINITE, LIMITS, NON_FINITE, RANGE, Cases

NAME, VERSION = "tensorflow", tf.__version__
EPS = 0.0
DTYPES = {"f64": tf.float64, "f32": tf.float32, "f16": tf.float16, "bf16": tf.bfloat16}
# Its global norm refuses to mix dtypes.
SINGLE = [["f32"], ["f64"], ["f16"], ["bf16"]]


def cases() -> Cases:
    made, kinds, limits = Cases(NAME, EPS), cycle(FINITE), cycle(["tiny", "below", "above"])
    for dtypes in SINGLE:
        for limit in LIMITS:
            for repeat in range(2):
                kind = next(kinds)
                made.add("clip_by_global_norm", dtypes, kind, limit=limit, repeat=repeat)
                made.add("clip_grad_value", dtypes, kind, limit=limit, repeat=repeat)
        for kind in RANGE:
            made.add("clip_by_global_norm", dtypes, kind, limit=next(limits))
            made.add("clip_grad_value", dtypes, kind, limit="below")
            made.add("total_norm", dtypes, kind)
        for kind in NON_FINITE:
            made.add("clip_by_global_norm", dtypes, kind, limit="below")
        made.add("clip_by_global_norm", dtypes, "one inf", limit="inf")
        for limit in ["zero", "below", "inf"]:
            made.add("clip_grad_value", dtypes, "nan and inf", limit=limit)
        made.add("clip_by_global_norm", dtypes, "zeros", limit="zero")
        made.add("clip_by_global_norm", dtypes, "zeros", limit="below")
        for known_norm in [0.5, 1.0, 3.0]:
            kind = next(kinds)
            made.add("clip_by_global_norm", dtypes, kind, limit="below", known_norm=known_norm)
        made.add("total_norm", dtypes, next(kinds))
    return made


def run(case) -> tuple[float | None, list[list[float] | None]]:
    """The norm that the framework returns, and its gradients after."""
    grads = [
        None
        if t.grad is None
        else tf.cast(tf.reshape(tf.constant(t.grad, tf.float64), t.shape), DTYPES[t.dtype])
        for t in case.tensors
    ]
    dtype = DTYPES[case.tensors[0].dtype]
    norm, after = None, grads
    match case.op:
        case "clip_by_global_norm":
            known = case.known_norm
            use_norm = None if known is None else tf.cast(tf.constant(known, tf.float64), dtype)
            limit = tf.cast(tf.constant(case.limit, tf.float64), dtype)
            after, norm = tf.clip_by_global_norm(grads, limit, use_norm=use_norm)
        case "clip_grad_value":
            bounds = -case.limit, case.limit
            after = [None if g is None else tf.clip_by_value(g, *bounds) for g in grads]
        case "total_norm":
            norm = tf.linalg.global_norm(grads)
    norm = None if norm is None else float(tf.cast(norm, tf.float64))
    return norm, [None if g is None else to_list(g) for g in after]


def to_list(grad) -> list[float]:
    return tf.reshape(tf.cast(grad, tf.float64), [-1]).numpy().tolist()
