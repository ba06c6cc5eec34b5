"""A small OLMo 2 trained by plain JAX and optax and nothing else: what a framework may cost.

Run:   python tools/bench/plain.py TOKENS.npy N_STEPS
The shape is that of `overhead.py`, which starts this beside olmo_jax.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCAB, D, LAYERS, HEADS, D_FF, SEQ, BATCH = 8192, 256, 4, 4, 1024, 256, 8
THETA, EPS = 500_000.0, 1e-6


def init(key: jax.Array) -> dict:
    """fp32 parameters; a leading dimension of `layers` counts the blocks."""
    shapes = {
        "embed": (VOCAB, D),
        "head": (D, VOCAB),
        "layers": {"qkv": (LAYERS, 3, D, D), "out": (LAYERS, D, D), "gate_up": (LAYERS, 2, D, D_FF)}
        | {"down": (LAYERS, D_FF, D)},
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    drawn = [0.02 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    params = tree.unflatten(drawn)
    params["layers"] |= {n: jnp.ones((LAYERS, D)) for n in ("q_norm", "k_norm", "norm1", "norm2")}
    return params | {"norm": jnp.ones(D)}


def normed(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS) * gain


def rotated(x: jax.Array) -> jax.Array:
    """RoPE on `[batch, seq, heads, dim]`."""
    half = x.shape[-1] // 2
    angle = jnp.arange(SEQ)[:, None, None] * THETA ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def block(x: jax.Array, p: dict) -> tuple[jax.Array, None]:
    q, k, v = (x @ w for w in p["qkv"])
    q, k = normed(q, p["q_norm"]), normed(k, p["k_norm"])
    q, k, v = (y.reshape(*y.shape[:2], HEADS, -1) for y in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", rotated(q), rotated(k)) * q.shape[-1] ** -0.5
    scores = jnp.where(np.tri(SEQ, dtype=bool), scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)
    x = x + normed(mixed @ p["out"], p["norm1"])
    gate, up = (x @ w for w in p["gate_up"])
    return x + normed((jax.nn.silu(gate) * up) @ p["down"], p["norm2"]), None


def loss_fn(params: dict, tokens: jax.Array) -> jax.Array:
    x, _ = jax.lax.scan(block, params["embed"][tokens], params["layers"])
    logits = normed(x, params["norm"])[:, :-1] @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def main(path: str, n_steps: int) -> None:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 50, 1e-4)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: dict, state: optax.OptState, tokens: jax.Array) -> tuple:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.jit(init)(jax.random.key(0))
    state = optimizer.init(params)
    rows = np.memmap(path, np.uint16, "r")
    rows = rows[: rows.size // SEQ * SEQ].reshape(-1, SEQ)
    for step in range(1, n_steps + 1):
        at = step * BATCH % (len(rows) - BATCH)
        params, state, loss = update(params, state, rows[at : at + BATCH].astype(np.int32))
        loss = float(loss)
        if step in (1, n_steps):
            print(f"step {step}/{n_steps} | loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
