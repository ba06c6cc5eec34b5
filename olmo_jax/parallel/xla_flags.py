"""Chosen of the XLA compiler for the training step, one table, each with its reason.

They go to the compiler with the program and not through `XLA_FLAGS`, so that a step compiled for
devices that are elsewhere gets the same ones. "est." marks what the TPU compiler itself estimates
for Olmo 3 7B; the rest is what a compiled program shows. `compute.deterministic` is no row here: it
holds for every program of a process.
"""

import re

Chosen = dict[str, tuple[str, str]]  # (value, reason) by name

_NO_WINDOWED_EINSUM: Chosen = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": (
        "1000000",
        "weights are gathered whole, not in permutes with copies; v5e then overlaps the gathers",
    ),
}
_SPARSE_CORE: Chosen = {
    f"xla_tpu_enable_{name}": ("True", reason)
    for collective in ("all_gather", "reduce_scatter", "all_reduce")
    for name, reason in (
        (f"sparse_core_collective_offload_{collective}", "collectives run beside the matmuls: "
         "147 -> 49 ms of a v5p step in their way, est."),
        (f"{collective}_offload_tracing", "shows the offloaded collective in a profile"),
    )
} | {
    "xla_tpu_use_tc_device_shape_on_sc": ("True", "as the offload of collectives needs it"),
    "xla_sc_disable_megacore_partitioning": ("True", "as the offload of collectives needs it"),
}  # fmt: skip


def _vmem(kib: int, reason: str) -> Chosen:
    return {"xla_tpu_scoped_vmem_limit_kib": (str(kib), reason)}


# By `device_kind`, which must match wholly. Not here, because they bring nothing: async collective
# fusion (on where it helps, v5e, once einsums are not windowed; not recommended elsewhere) and, on
# TPU7x, the offload to SparseCores, which is its default. A CPU has no flag that was worth one.
TABLE: dict[str, Chosen] = {
    r"TPU v4": _NO_WINDOWED_EINSUM,  # its 16 MiB of VMEM leave nothing to give
    r"TPU v5 lite|TPU v5e": _NO_WINDOWED_EINSUM
    | _vmem(98304, "larger fusions, as on v5p; it has 128 MiB"),
    r"TPU v5p?": _NO_WINDOWED_EINSUM
    | _vmem(49152, "larger fusions: matmuls 1,436 -> 1,021 ms of a step with the flag above, est.")
    | _SPARSE_CORE,
    r"TPU v6 lite|TPU v6e": _NO_WINDOWED_EINSUM
    | _vmem(98304, "larger fusions, as on v5p; it has 128 MiB")
    | _SPARSE_CORE,
    r"TPU7x": _NO_WINDOWED_EINSUM
    | _vmem(65536, "as in the published settings of MaxText for Olmo 3 7B on this chip"),
    r"NVIDIA .*|A[18]00.*": {
        "xla_gpu_enable_latency_hiding_scheduler": (
            "True",
            "collectives overlap with compute; set in NVIDIA's images of JAX, not measured here",
        ),
    },
}


def flags(device_kind: str, changes: tuple[str, ...] = ()) -> Chosen:
    """Value and reason of each flag for a kind of device, by name.

    Args:
      device_kind: as `jax.devices()[0].device_kind` says; a kind without a row has no flags.
      changes: `compute.xla_flags`, words `NAME=VALUE`; the value `none` takes a flag away.
    """
    rows = [row for pattern, row in TABLE.items() if re.fullmatch(pattern, device_kind)]
    found = dict(rows[0]) if rows else {}
    for change in changes:
        name, _, value = change.partition("=")
        found.pop(name, None)
        if value.lower() != "none":
            # XLA and libtpu both take the words of Python, and libtpu alone `true` too.
            is_bool = value.lower() in ("true", "false")
            found[name] = value.capitalize() if is_bool else value, "config.compute.xla_flags"
    return found


def options(device_kind: str, changes: tuple[str, ...] = ()) -> dict[str, str]:
    """The flags of `flags` as `compiler_options` of `jax.jit` and of a lowered program."""
    return {name: value for name, (value, _) in flags(device_kind, changes).items()}
