#!/usr/bin/env bash
# Trains on a GKE cluster of TPU slices through xpk (pip install xpk).
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/xpk.sh COMMAND --cluster CLUSTER --workload NAME [options] [-- TRAIN_ARGUMENTS]
  start     run train on all hosts; after a stop, the same command resumes
  logs      list the workloads, then follow what the first host of each slice prints
  stop      delete the workload: its processes get SIGTERM, save and exit
  --type TYPE        TPU type (default v5litepod-16)
  --slices N         slices (default 1); set training.mesh to N,-1,1
  --zone ZONE        of the cluster (default: gcloud's)
  --storage NAME     a bucket or file store attached to the cluster by 'xpk storage attach';
                     put --workdir under the path where it is mounted
  --image IMAGE      base image with Python 3.11 or newer (default python:3.12)
  --max-restarts N   how often a failed job starts again, which resumes it (default 10)
  --dry-run          print what would run
  --help             this text
EOF
}

module=videollm_mod_jax.train
cluster='' workload='' type=v5litepod-16 slices=1 zone='' storage='' image=python:3.12
max_restarts=10 dry_run=''

fail() { echo "error: $1; see --help" >&2; exit 2; }
run() {
  printf '%q ' "$@" && echo
  if [[ ! $dry_run ]]; then "$@"; fi
}

[[ " $* " != *' --help '* ]] || { usage; exit; }
action=${1:-}
(($#)) && shift
while (($#)); do
  case $1 in
    --cluster | --workload | --type | --slices | --zone | --storage | --image | --max-restarts)
      [[ ${2:-} ]] || fail "$1 needs a value"
      option=${1#--}
      declare "${option//-/_}=$2"
      shift ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown option '$1'" ;;
  esac
  shift
done
[[ $cluster && $workload ]] || fail "--cluster and --workload are needed"
where=(--cluster="$cluster" ${zone:+--zone="$zone"})

case $action in
  start)
    (($#)) || fail "no arguments for $module behind --"
    # exec: the signal that ends a container goes to its first process, which has to be train.
    command="pip install --quiet '.[tpu]' && exec python -m $module$(printf ' %q' "$@")"
    run xpk workload create "${where[@]}" --workload="$workload" --tpu-type="$type" \
      --num-slices="$slices" --base-docker-image="$image" --script-dir=. \
      --max-restarts="$max_restarts" ${storage:+--storage="$storage"} --command="$command" ;;
  logs)
    run xpk workload list "${where[@]}"
    run kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$workload,batch.kubernetes.io/job-completion-index=0" ;;
  stop) run xpk workload delete "${where[@]}" --workload="$workload" ;;
  *) fail "unknown command '$action'" ;;
esac
