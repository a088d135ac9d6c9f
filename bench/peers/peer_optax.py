#!/usr/bin/env python3
"""optax under one `jax.jit` an operation, with donated buffers: results replace their arguments. See protocol.py."""

import protocol

threads = protocol.threads_from_args()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402


class Optax:
    name = "optax"
    version = f"optax {optax.__version__}, jax {jax.__version__}"
    ops = ["total_norm", "clip_grad_norm", "clip_grad_norm_noop", "clip_grad_value", "clip_adamw", "clip_sgd"]
    dtypes = ["f32", "bf16"]
    # XLA compiles a kernel or more for every tensor: 500 take minutes.
    max_tensors = 300

    def load(self, grads, params, dtype):
        self.dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[dtype]
        self.fresh = [jax.device_put(grad.astype(self.dtype)) for grad in grads]
        self.params_at_start = params
        self.scaled = jax.jit(lambda grads, scale: [grad * scale for grad in grads])
        self.now = self.vars = self.state = None

    def prepare(self, op, settings):
        self.now = self.vars = self.state = None
        self.run = self.transform
        clip = optax.clip_by_global_norm(settings["max_norm"])
        if op == "total_norm":
            self.norm = jax.jit(optax.global_norm)
            self.run = self.total_norm
        elif op == "clip_grad_value":
            value = optax.clip(settings["clip_value"])
            self.update = jax.jit(lambda grads: (value.update(grads, value.init(grads))[0], None), donate_argnums=0)
        elif op in protocol.STEPS:
            self.prepare_step(clip, op, settings)
        else:
            # XLA works out the norm once.
            self.update = jax.jit(
                lambda grads: (clip.update(grads, clip.init(grads))[0], optax.global_norm(grads)), donate_argnums=0
            )

    def prepare_step(self, clip, op, settings):
        if op == "clip_adamw":
            named = {"b1": "beta1", "b2": "beta2", "eps": "adam_eps", "weight_decay": "weight_decay"}
            step = optax.adamw(settings["lr"], **{ours: settings[theirs] for ours, theirs in named.items()})
        else:
            step = optax.sgd(settings["lr"])
        chain = optax.chain(clip, step)

        def apply(params, state, grads):
            updates, state = chain.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.vars = [jax.device_put(p.astype(self.dtype)) for p in self.params_at_start()]
        self.state = jax.jit(chain.init)(self.vars)
        self.apply = jax.jit(apply, donate_argnums=(0, 1))
        self.run = self.step

    def set_grads(self, scale):
        self.now = None
        self.now = jax.block_until_ready(self.scaled(self.fresh, jnp.array(scale, self.dtype)))

    def total_norm(self):
        return float(self.norm(self.now))

    def transform(self):
        self.now, norm = jax.block_until_ready(self.update(self.now))
        return None if norm is None else float(norm)

    def step(self):
        self.vars, self.state = jax.block_until_ready(self.apply(self.vars, self.state, self.now))

    def grads(self):
        return [np.asarray(grad, np.float32) for grad in self.now]

    def params(self):
        return [np.asarray(var, np.float32) for var in self.vars]


protocol.Bench(Optax(), threads).serve()
