#!/usr/bin/env bash
# Rehearses a pod job on this machine: several processes, each with simulated devices.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/local.sh [options] -- TRAIN_ARGUMENTS
  --processes N   processes, one per host of the pod to be (default 2)
  --devices N     simulated CPU devices of each (default 4)
  --port PORT     of process 0 on 127.0.0.1 (default: a free one)
  --dry-run       print what would run
  --help          this text
Each line of output begins with the number of its process. Ctrl-C and SIGTERM go to all of them.
  launch/local.sh --processes 2 --devices 4 -- \
    --config configs/digits.py --workdir runs/rehearsal \
    --config.training.sharding=fsdp --config.training.mesh=1,-1,1
EOF
}

python=${PYTHON:-python}
module=videollm_mod_jax.train
processes=2 devices=4 port='' dry_run=''

fail() { echo "error: $1; see --help" >&2; exit 2; }

while (($#)); do
  case $1 in
    --processes | --devices | --port)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "$1 needs a number, not '${2:-}'"
      declare "${1#--}=$2"
      shift ;;
    --dry-run) dry_run=1 ;;
    --help) usage; exit ;;
    --) shift; break ;;
    *) fail "unknown option '$1'" ;;
  esac
  shift
done
(($#)) || fail "no arguments for $module behind --"

if [[ ! $port ]]; then
  port=$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0))
print(s.getsockname()[1])')
fi
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"

pids=()
for ((i = 0; i < processes; i++)); do
  command=("$python" -m "$module" "$@"
    --coordinator "127.0.0.1:$port" --num-processes "$processes" --process-id "$i")
  if [[ $dry_run ]]; then
    printf '%q ' "JAX_PLATFORMS=$JAX_PLATFORMS" "XLA_FLAGS=$XLA_FLAGS" "${command[@]}"
    echo
  else
    # With the pipe aside, $! is the process and not the loop.
    PYTHONUNBUFFERED=1 "${command[@]}" > >(while IFS= read -r line; do echo "$i: $line"; done) 2>&1 &
    pids+=($!)
  fi
done

trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
for pid in "${pids[@]}"; do
  # A trapped signal ends a wait early, while the process is still saving.
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  code=0
  wait "$pid" || code=$?
  ((status)) || status=$code
done
exit "$status"
