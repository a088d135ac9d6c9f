#!/usr/bin/env python3
"""TensorFlow: `tf.clip_by_global_norm`, Keras' optimizers, one `tf.function` an operation. See protocol.py.

Gradients lie in variables that the function reads, and writes where clipping is all it does: inside a real train step they never
leave the graph either.
"""

import os

import protocol

threads = protocol.threads_from_args()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf  # noqa: E402

tf.config.threading.set_intra_op_parallelism_threads(threads)
tf.config.threading.set_inter_op_parallelism_threads(threads)


class TensorFlow:
    name = "tensorflow"
    version = f"tensorflow {tf.__version__}"
    ops = ["total_norm", "clip_grad_norm", "clip_grad_norm_noop", "clip_grad_value", "clip_adamw", "clip_sgd"]
    # Keras' AdamW does nothing to bf16 variables, in which its 0.999 is 1: its users keep variables in f32.
    dtypes = ["f32"]
    # A step on 500 takes a minute to compile, one on 2,000 many.
    max_tensors = 300

    def load(self, grads, params, _dtype):
        self.fresh = [tf.constant(grad) for grad in grads]
        self.params_at_start = params
        self.now = [tf.Variable(grad) for grad in self.fresh]
        self.vars = []

    def prepare(self, op, settings):
        self.vars, self.optimizer = [], None
        if op in protocol.STEPS:
            self.vars = [tf.Variable(p) for p in self.params_at_start()]
            self.optimizer = optimizer(op, settings)
            self.optimizer.build(self.vars)
        body = getattr(self, op)
        # XLA makes AdamW on large tensors 1.5 times as fast, and clipping alone 3 times slower: each has what is good for it.
        self.function = tf.function(lambda: body(settings), jit_compile=op in protocol.STEPS)

    def set_grads(self, scale):
        for now, fresh in zip(self.now, self.fresh):
            now.assign(fresh if scale == 1 else fresh * scale)

    def run(self):
        norm = self.function()
        return None if norm is None else float(norm)

    def total_norm(self, settings):
        return tf.linalg.global_norm(self.now)

    def clip_grad_norm(self, settings):
        clipped, norm = tf.clip_by_global_norm(self.now, settings["max_norm"])
        for now, grad in zip(self.now, clipped):
            now.assign(grad)
        return norm

    clip_grad_norm_noop = clip_grad_norm

    def clip_grad_value(self, settings):
        for now in self.now:
            now.assign(tf.clip_by_value(now, -settings["clip_value"], settings["clip_value"]))

    def clip_step(self, settings):
        clipped, norm = tf.clip_by_global_norm(self.now, settings["max_norm"])
        self.optimizer.apply(clipped, self.vars)
        return norm

    clip_adamw = clip_sgd = clip_step

    def grads(self):
        return [now.numpy() for now in self.now]

    def params(self):
        return [var.numpy() for var in self.vars]


def optimizer(op, settings):
    if op == "clip_sgd":
        return tf.keras.optimizers.SGD(settings["lr"])
    return tf.keras.optimizers.AdamW(
        settings["lr"],
        weight_decay=settings["weight_decay"],
        beta_1=settings["beta1"],
        beta_2=settings["beta2"],
        epsilon=settings["adam_eps"],
    )


protocol.Bench(TensorFlow(), threads).serve()
