"""The vocabulary's loss on a TPU without a TPU: memory and time of chunks, beside the naive form.

Run:   python tools/bench/cross_entropy.py [--chips=v5p,v6e] [--tokens=8192] [--chunks=1024,4096]
Needs: jax[tpu].

Value and both gradients of one chip's tokens (Olmo 3 7B: d_model 4,096, 100,352 columns), compiled
by the TPU compiler; memory is what the program takes beside its arguments and results, time the sum
of the compiler's own estimates. `naive` holds all logits in fp32 and is differentiated by JAX.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from olmo_jax.kernels.cross_entropy import cross_entropy
from olmo_jax.pods import hlo, kernels
from olmo_jax.pods.chips import CHIPS

D_MODEL, VOCAB, Z_LOSS = 4096, 100_352, 1e-5


def naive(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """The loss as one writes it down."""
    logits = jnp.einsum("btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (lse - picked + Z_LOSS * lse**2))


def measure(chip: str, tokens: int, chunk: int | None, dtype: str) -> tuple[float, float]:
    """MiB of temporary memory and estimated milliseconds; `chunk` 0 is the naive form."""
    mesh = kernels.one_chip(chip)
    whole = jax.NamedSharding(mesh, jax.P())

    def array(*shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def loss(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        if chunk == 0:
            return naive(x, head, targets, weights)
        return cross_entropy(x, head, targets, weights, VOCAB, Z_LOSS, chunk, dtype)[0]

    arguments = (
        array(1, tokens, D_MODEL, dtype=jnp.bfloat16), array(D_MODEL, VOCAB, dtype=jnp.bfloat16),
        array(1, tokens, dtype=jnp.int32), array(1, tokens, dtype=jnp.float32),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments)
        compiled = lowered.compile(compiler_options=kernels.ROOM)
    cycles = hlo.totals(compiled.as_text()).cycles()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return memory / 2**20, cycles / CHIPS[chip].clock * 1e3


def main() -> None:
    """Compile each form and print what it takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", default="v5p,v6e")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunks", default="1024,2048,4096")
    args = parser.parse_args()
    for chip in args.chips.split(","):
        memory, time = measure(chip, args.tokens, 0, "")
        print(f"{chip} naive: {memory:,.0f} MiB, {time:.1f} ms", flush=True)
        for chunk in map(int, args.chunks.split(",")):
            for dtype in ("bfloat16", "float32"):
                mb, ms = measure(chip, args.tokens, chunk, dtype)
                print(
                    f"{chip} chunks of {chunk:,}, gradient of the head in {dtype}: {mb:,.0f} MiB"
                    f" (1/{memory / mb:.1f}), {ms:.1f} ms ({ms / time:.2f} x)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
