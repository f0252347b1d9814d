#!/usr/bin/env bash
# Trains on a Cloud TPU slice: makes or reuses it, installs this checkout, runs train on all workers.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/tpu_pod.sh COMMAND --name NAME --zone ZONE [options] [-- TRAIN_ARGUMENTS]
  create    make the slice; a slice of that name is reused, a preempted one is replaced
  install   copy the last commit to all workers and install it; mount the bucket
  start     run train on all workers in the background; the same command resumes
  logs      follow what worker 0 prints
  stop      ask all workers to save and stop, and wait until they have
  delete    delete the slice, which ends what it costs
  --type TYPE        accelerator type (default v5litepod-16)
  --version VERSION  software of the machines (default v2-alpha-tpuv5-lite)
  --bucket BUCKET    mounted by install beside configs/; give train --workdir bucket/RUN
  --spot             create a slice that may be taken away, for less money
  --dry-run          print what would run
  --help             this text
EOF
}

module=videollm_mod_jax.train
type=v5litepod-16 version=v2-alpha-tpuv5-lite name='' zone='' bucket='' spot='' dry_run=''

fail() { echo "error: $1; see --help" >&2; exit 2; }
run() {
  printf '%q ' "$@" && echo
  if [[ ! $dry_run ]]; then "$@"; fi
}
tpu() { run gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$zone"; }
on() { tpu ssh "$name" --worker="$1" --command="$2"; }

[[ " $* " != *' --help '* ]] || { usage; exit; }
action=${1:-}
(($#)) && shift
while (($#)); do
  case $1 in
    --name | --zone | --type | --version | --bucket)
      [[ ${2:-} ]] || fail "$1 needs a value"
      declare "${1#--}=$2"
      shift ;;
    --spot) spot=--spot ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown option '$1'" ;;
  esac
  shift
done
[[ $name && $zone ]] || fail "--name and --zone are needed"

case $action in
  create)
    state=$(tpu describe "$name" --format='value(state)' 2>/dev/null | tail -n 1) || state=''
    if [[ $dry_run || ! $state =~ ^(READY|CREATING)$ ]]; then
      if [[ $state =~ ^(PREEMPTED|TERMINATED)$ ]]; then tpu delete "$name" --quiet; fi
      tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+"$spot"}
    fi ;;
  install)
    archive=${TMPDIR:-/tmp}/$name.tar.gz
    run git archive --format=tar.gz --output="$archive" HEAD
    tpu scp "$archive" "$name:source.tar.gz" --worker=all
    # The machines' own Python may be older than the package allows; uv brings one.
    on all "mkdir -p source && tar -xzf source.tar.gz -C source && pip install --quiet uv &&
python3 -m uv venv --quiet --allow-existing --python 3.12 venv &&
python3 -m uv pip install --quiet --python venv/bin/python --editable 'source[tpu]'"
    [[ ! $bucket ]] || on all "mkdir -p source/bucket &&
{ mountpoint -q source/bucket || gcsfuse --implicit-dirs $bucket source/bucket; }" ;;
  start)
    (($#)) || fail "no arguments for $module behind --"
    on all "if kill -0 \$(cat train.pid) 2> /dev/null; then echo 'train already runs' >&2; exit 1; fi
cd source
nohup ../venv/bin/python -m $module$(printf ' %q' "$@") > ../train.log 2>&1 < /dev/null &
echo \$! > ../train.pid" ;;
  logs) on 0 'tail -n 100 -F train.log' ;;
  stop) on all "kill -TERM \$(cat train.pid) && tail --pid=\$(cat train.pid) -f /dev/null" ;;
  delete) tpu delete "$name" ;;
  *) fail "unknown command '$action'" ;;
esac
