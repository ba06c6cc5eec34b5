#!/usr/bin/env bash
# Train on all workers of a TPU slice that exists already; nothing is created or deleted.
#
#   export TPU=NAME ZONE=ZONE [PROJECT=PROJECT]
#   tools/launch/tpu_pod.sh setup                                # copy HEAD there and install it
#   tools/launch/tpu_pod.sh start --config=configs/olmo2_7b.py --config.dir=gs://BUCKET/olmo2_7b
#   tools/launch/tpu_pod.sh log                                  # follow worker 0
#   tools/launch/tpu_pod.sh stop                                 # save and end
#   tools/launch/tpu_pod.sh run COMMAND ...                      # any command, on every worker
#
# `start` also goes on with a run that was stopped or preempted. All workers must see the same
# config.dir (a bucket) and the same token files (on disk or in a mounted bucket).
# JAX_COORDINATOR_PORT=8476 tools/launch/tpu_pod.sh start ... meets there instead of on port 8482,
# which the firewalls of some pods close; a run that waits says so.
# PYTHON=python3.12 takes another Python than python3.11; it is installed where it is missing.

set -euo pipefail
REMOTE=olmo_jax # folder in the home of every worker
PYTHON="${PYTHON:-python3.11}"

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 2
}

[[ $# -ge 1 ]] || usage
action="$1"
shift
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
WHERE=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})

on_workers() { # on_workers WORKER COMMAND
  gcloud compute tpus tpu-vm ssh "$TPU" "${WHERE[@]}" --worker="$1" --command="$2"
}

case "$action" in
  setup)
    archive="$(mktemp -d)/olmo_jax.tar.gz"
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:olmo_jax.tar.gz" "${WHERE[@]}" --worker=all
    on_workers all "set -e
      mkdir -p $REMOTE && tar -xzf olmo_jax.tar.gz -C $REMOTE && cd $REMOTE
      $PYTHON -c 'import ensurepip, venv' 2>/dev/null || {
        sudo apt-get -q update && sudo apt-get -qy install $PYTHON $PYTHON-venv; }
      $PYTHON -m venv .venv
      .venv/bin/python -m pip install -q -e '.[tpu,gcs]'"
    ;;
  start)
    [[ $# -ge 1 ]] || usage
    port="${JAX_COORDINATOR_PORT:+JAX_COORDINATOR_PORT=$JAX_COORDINATOR_PORT}"
    # The run outlives this connection; a second one on the same chips is refused.
    on_workers all "cd $REMOTE
      if kill -0 \$(cat train.pid 2>/dev/null) 2>/dev/null; then echo 'runs already'; exit 1; fi
      $port nohup .venv/bin/python -m olmo_jax.train $(printf '%q ' "$@") >>train.log 2>&1 </dev/null &
      echo \$! >train.pid"
    ;;
  log) on_workers 0 "tail -n 50 -f $REMOTE/train.log" ;;
  stop) on_workers all "kill -TERM \$(cat $REMOTE/train.pid)" ;;
  run)
    [[ $# -ge 1 ]] || usage
    on_workers all "cd $REMOTE && $(printf '%q ' "$@")"
    ;;
  *) usage ;;
esac
