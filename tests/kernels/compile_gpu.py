"""Compiles attention for H100s that are not here.

`python compile_gpu.py CASES` (JSON) prints a line of JSON for each, beside what ptxas has to say.

Needs: JAX's CUDA plugin and ptxas, which `ai2.cuda` installs; no GPU and no driver.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from olmo_jax.config.model import MeshConfig
from olmo_jax.kernels.attention import attention
from olmo_jax.parallel.sharding import make_mesh, spec

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compiled(
    devices, shape, kv_heads, window=None, has_documents=False, dtype="bfloat16", tensor=1
):
    """Forward and backward of `attention`; `shape`: batch, seq, heads, head_dim."""
    mesh = make_mesh(MeshConfig(fsdp=len(devices) // tensor, tensor=tensor), devices)

    def array(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(axes)))

    q = array(shape, dtype, ("batch", None, "heads", None))
    k = array((*shape[:2], kv_heads, shape[3]), dtype, ("batch", None, "heads", None))
    ids = array(shape[:2], jnp.int32, ("batch", None)) if has_documents else None

    def both(q, k, v, ids, d_out):
        run = functools.partial(attention, window=window, segment_ids=ids, impl="pallas")
        out, pull = jax.vjp(run, q, k, v)
        return out, pull(d_out)

    with jax.set_mesh(mesh):
        program = jax.jit(both).lower(q, k, k, ids, q).compile()
    text = program.as_text()
    moves = ("all-gather", "all-reduce", "all-to-all", "permute(")
    return {
        "temp": program.memory_analysis().temp_size_in_bytes,
        "moved": [word for word in moves if word in text],
    }


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    for case in cases:
        n = case.pop("devices", 1)
        chips = topologies.get_topology_desc(
            topology_name="", platform="cuda", topology=f"1x1x{n}", target_config=H100
        )
        print(json.dumps(compiled(chips.devices, **case)), flush=True)
