"""Several processes as one run: finding out who they are, meeting, and never waiting for ever."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import cloud_tpu_init, xla_bridge  # whether a TPU is here, whether JAX has looked
from jax._src import distributed as jax_distributed
from jax._src.clusters import GceTpuCluster, GkeTpuCluster  # what `initialize` asks on a TPU host

WAIT_LINE_S = 10.0  # between lines that say who is missing
SAVE_S = 60.0  # for a save under way when a run ends with an error
LEAVE_S = 5.0  # for the others to end too


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Who is in the run: where process 0 listens, how many processes, which one this is."""

    coordinator: str  # host:port
    n_processes: int
    process_id: int
    local_device: int | None = None  # the only one of this process; None: all that it sees
    is_found: bool = False  # SLURM or a TPU pod describes it, and no flags


def find_cluster(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Cluster | None:
    """The cluster that the flags of `train`, checked there, or SLURM describe, or None."""
    if flags.get("coordinator"):
        return Cluster(flags["coordinator"], flags["n_processes"], flags["process_id"])
    # srun sets all of these; sbatch alone, which starts one process, does not.
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if any(name not in environ for name in slurm):
        return None
    # A shell of salloc is a step of one task, and has the number of tasks of its job too.
    n_tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"])
    if n_tasks == 1:
        return None
    port = environ.get("JAX_COORDINATOR_PORT") or 61_440 + int(environ["SLURM_JOB_ID"]) % 4096
    return Cluster(
        f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        n_tasks,
        int(environ["SLURM_PROCID"]),
        _own_gpu(environ),
        is_found=True,
    )


def _own_gpu(environ: Mapping[str, str]) -> int | None:
    """The GPU of a task that shares its node, and the sight of all GPUs there, with other tasks."""
    n_tasks = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    n_visible = len(environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
    is_sharing = n_tasks is not None and int(n_tasks[0]) > 1 and n_visible > 1
    return int(environ["SLURM_LOCALID"]) if is_sharing else None


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[003-007,9],x1` -> `gpu003`."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if not match:
        raise ValueError(f"SLURM_STEP_NODELIST={nodelist!r}: cannot read the first host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0])


def start(cluster: Cluster | None, timeout_s: float) -> None:
    """Join the other processes, if there are any: from `cluster`, or those of a TPU pod.

    A process that has joined already stays as it is: a notebook trains more than once.

    Raises:
      TimeoutError: if not all have arrived after `timeout_s`; it names the missing ones.
      OSError: if a TPU host does not learn who is in its pod, or JAX finds no device.
      ValueError: if there are others, but JAX has met its devices without them.
    """
    if jax.distributed.is_initialized():
        return
    has_devices = xla_bridge.backends_are_initialized()
    if cluster is None and not has_devices:
        cluster = find_pod(os.environ, timeout_s)
    n_processes = 1 if cluster is None else cluster.n_processes
    if has_devices and max(n_processes, jax.process_count()) > 1:
        raise ValueError(
            "JAX has met the devices of this process alone, but the run has several processes, and"
            " they join before that: start again, and call train.main before anything else of JAX"
        )
    if cluster is not None and n_processes > 1:
        _join(cluster, timeout_s)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for cuda without its plugin
        wanted = jax.config.jax_platforms  # type: ignore[attr-defined]
        raise OSError(
            f"JAX_PLATFORMS={wanted}: {str(error) or 'no such device is here'}"
        ) from error


def _join(cluster: Cluster, timeout_s: float) -> None:
    meet(cluster, timeout_s)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Two steps in flight could meet in Gloo in different orders, and wait for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.n_processes,
        cluster.process_id,
        None if cluster.local_device is None else [cluster.local_device],
        # Else JAX asks SLURM itself, and takes one GPU of a node where one process has all.
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout_s),
    )


def is_one_of_several() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized() and jax_distributed.global_state.num_processes > 1


def find_pod(environ: Mapping[str, str], timeout_s: float) -> Cluster | None:
    """The hosts of this TPU's slices, as JAX finds them; None if there is no TPU or one host.

    Raises:
      OSError: if neither the environment nor Google's metadata server tells.
    """
    if "tpu" not in (jax.config.jax_platforms or "tpu"):  # type: ignore[attr-defined]
        return None
    if not cloud_tpu_init.running_in_cloud_tpu_vm:
        if _looks_like_tpu_host():
            print(
                "no TPU is here, though libtpu is and /dev/vfio or /dev/accel0 too: the run takes"
                " the devices that JAX finds. JAX_PLATFORMS=cpu or cuda says that they"
                " are meant, JAX_PLATFORMS=tpu that a run without a TPU is to end",
                flush=True,
            )
        return None
    if _is_single_host(environ):
        return None
    print("looking for the other hosts of the TPU pod", flush=True)
    try:
        pods = [pod for pod in (GkeTpuCluster, GceTpuCluster) if pod.is_env_present()]
        if not pods or (n_hosts := pods[0].get_process_count()) == 1:
            return None
        port = environ.get("JAX_COORDINATOR_PORT")
        coordinator = environ.get("JAX_COORDINATOR_ADDRESS") or pods[0].get_coordinator_address(
            int(timeout_s), port
        )
        return Cluster(coordinator, n_hosts, pods[0].get_process_id(), is_found=True)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise OSError(
            f"this host has a TPU, but does not learn who else is in its pod: {error}. To train on"
            " its chips alone set TPU_WORKER_HOSTNAMES=localhost; else name the hosts with"
            " --coordinator, --n_processes and --process_id"
        ) from error


def _looks_like_tpu_host() -> bool:
    devices = os.path.exists("/dev/accel0") or os.path.isdir("/dev/vfio")
    return devices and importlib.util.find_spec("libtpu") is not None


def _is_single_host(environ: Mapping[str, str]) -> bool:
    """Whether the environment names one host, as Colab, Kaggle and GKE do, and one slice.

    JAX would resolve a name like `local` until its time is up, and ask for the number of slices.
    """
    if "TPU_PROCESS_ADDRESSES_PATH" in environ or environ.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return False
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    return bool(hosts) and "," not in hosts


def meet(cluster: Cluster, timeout_s: float) -> None:
    """Wait until every process has said that it is there; process 0 listens and names the rest.

    JAX's own start waits without a word. This meeting uses the same address just before it.
    """
    host, port = cluster.coordinator.rsplit(":", 1)
    deadline = time.monotonic() + timeout_s
    if cluster.process_id == 0:
        _listen(cluster, int(port), deadline)
    else:
        _report(cluster, host, int(port), deadline)


def _how(cluster: Cluster, process: int) -> str:
    return _port_advice(cluster) or f" with --process_id={process}"


def _port_advice(cluster: Cluster) -> str:
    """What helps a cluster that no flags describe if its port is closed."""
    if not cluster.is_found:
        return ""
    port = cluster.coordinator.rsplit(":", 1)[1]
    return f"; if a firewall closes port {port}, set JAX_COORDINATOR_PORT to an open one for all"


def _listen(cluster: Cluster, port: int, deadline: float) -> None:
    everyone = set(range(1, cluster.n_processes))
    waiting: list[tuple[int, socket.socket]] = []  # process and connection
    last_line = time.monotonic()
    try:
        server = socket.create_server(("", port), backlog=cluster.n_processes)
    except OSError as error:
        place = f"{'' if cluster.is_found else '--coordinator='}{cluster.coordinator}"
        advice = "; set JAX_COORDINATOR_PORT to a free one for all" if cluster.is_found else ""
        raise OSError(f"{place}: cannot listen: {error}{advice}") from error
    with server, contextlib.ExitStack() as peers:
        server.settimeout(0.5)
        while missing := sorted(everyone - {process for process, _ in waiting}):
            with contextlib.suppress(OSError, ValueError):  # nobody came, or somebody else
                peer = peers.enter_context(server.accept()[0])
                peer.settimeout(5.0)
                waiting.append((int(peer.recv(16).decode()), peer))
            waiting = [(process, peer) for process, peer in waiting if _is_open(peer)]
            missing = sorted(everyone - {process for process, _ in waiting})
            names = ", ".join(map(str, missing[:16])) + (" …" if len(missing) > 16 else "")
            count = f"{cluster.n_processes - len(missing)} of {cluster.n_processes} processes"
            if missing and time.monotonic() > deadline:
                raise TimeoutError(
                    f"only {count} came to {cluster.coordinator}; missing: process {names}. Start"
                    f" the same command there{_how(cluster, missing[0])}"
                )
            if missing and time.monotonic() - last_line > WAIT_LINE_S:
                last_line = time.monotonic()
                print(
                    f"waiting at {cluster.coordinator}: {count} are here, missing: process {names}"
                    f"{_port_advice(cluster)}",
                    flush=True,
                )
        for _, peer in waiting:
            with contextlib.suppress(OSError):  # of one that has died JAX will tell
                peer.sendall(b"go")


def _is_open(peer: socket.socket) -> bool:
    """Whether the other end still waits: one that died, or was started anew, does not."""
    peer.setblocking(False)
    try:
        return peer.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        peer.setblocking(True)


def _report(cluster: Cluster, host: str, port: int, deadline: float) -> None:
    last_line, was_there = time.monotonic(), False
    while True:
        try:
            with socket.create_connection((host, port), timeout=5.0) as peer:
                peer.sendall(str(cluster.process_id).encode())
                was_there = True
                peer.settimeout(max(1.0, deadline - time.monotonic()) + 5.0)
                if peer.recv(2) == b"go":
                    return
        except OSError:
            pass  # process 0 is not there yet
        if time.monotonic() > deadline and was_there:
            raise TimeoutError(
                f"process {cluster.process_id} met process 0 at {cluster.coordinator}, but others"
                " did not come; process 0 names them"
            )
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"process {cluster.process_id} found no process 0 at {cluster.coordinator}; start"
                f" the same command there{_how(cluster, 0)}"
            )
        if time.monotonic() - last_line > WAIT_LINE_S:
            last_line = time.monotonic()
            print(
                f"process {cluster.process_id} waits for process 0 at {cluster.coordinator}"
                f"{_port_advice(cluster)}",
                flush=True,
            )
        time.sleep(0.5)


def leave(code: int) -> None:
    """End this process after an error: with the others if they end too, else alone.

    Python's own end would wait for the others, who may wait for this one.
    """
    for thread in threading.enumerate():  # a save under way may still succeed
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(SAVE_S)
    shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    shutdown.start()
    shutdown.join(LEAVE_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
