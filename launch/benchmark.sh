#!/usr/bin/env bash
# Runs every benchmark on this machine and writes one page about them.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/benchmark.sh --out DIR [options] [-- OVERRIDES]
  --out DIR      for the results; those that are there are kept, so that a run can be resumed
  --model NAME   llama3-8b (default), for one GPU of 141 GB, or tiny, for any computer
  --rounds N     timed calls of every step (default 10)
  --dry-run      print what would run
  --help         this text
Without libtpu, memory on TPUs is left out; without torch, transformers and peft, the PyTorch peer.
OVERRIDES go to all parts: --config.data.batch_size=4.
EOF
}

python=${PYTHON:-python} out='' model=llama3-8b rounds=10 dry_run=''
fail() { echo "error: $1; see --help" >&2; exit 2; }

while (($#)); do
  case $1 in
    --out | --model | --rounds)
      [[ ${2:-} ]] || fail "$1 needs a value"
      declare "${1#--}=$2"; shift ;;
    --dry-run) dry_run=1 ;;
    --help) usage; exit ;;
    --) shift; break ;;
    *) fail "unknown option '$1'" ;;
  esac
  shift
done
[[ $out ]] || fail "--out is needed"
[[ $rounds =~ ^[1-9][0-9]*$ ]] || fail "--rounds needs a number, not '$rounds'"
[[ $model == llama3-8b || $model == tiny ]] || fail "--model is '$model', not llama3-8b or tiny"

# JAX takes three quarters of a GPU unless it is told otherwise.
export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.95}
overrides=("$@") failed=0
# measure FILE CONFIG MODULE [ARGUMENTS]: runs a module that writes OUT/FILE, unless it is there.
measure() {
  local file=$out/$1
  local command=("$python" -m "${@:3}" --config "configs/benchmark.py:$2" --out "${file%/*}")
  if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}" "${overrides[@]}"
    echo
  elif [[ ! -e $file ]]; then
    "${command[@]}" "${overrides[@]}" || failed=1
  fi
}

# has MODULE...: whether Python has all of them; in a dry run it has.
has() {
  local code='import sys, importlib.util as i; sys.exit(None in map(i.find_spec, sys.argv[1:]))'
  [[ $dry_run ]] || "$python" -c "$code" "$@" || { echo "left out: needs $*" >&2; return 1; }
}

ours=videollm_mod_jax.benchmark
timed=(--rounds "$rounds")
# Nothing is computed twice: one sequence leaves room for that on a GPU of 141 GB.
no_remat=(--config.data.batch_size=1 --config.training.{remat=False,row_chunk=0})
measure n10/train.json "$model" $ours train --frames 150 300 600 "${timed[@]}"
measure n10/stream.json "$model" $ours stream --minutes 1 10 60 "${timed[@]}"
measure int8/stream.json "$model" $ours stream --int8 --minutes 10 "${timed[@]}"
measure n10/kernels.json "$model" $ours kernels "${timed[@]}"
if [[ $model != tiny ]]; then
  measure n50/train.json "$model,50" $ours train "${timed[@]}"
  measure no_remat/train.json "$model" $ours train "${timed[@]}" "${no_remat[@]}"
  measure long/train.json "$model" $ours train --frames 1200 2400 4800 "${timed[@]}" \
    --config.data.batch_size=1
  ! has libtpu || measure tpu/memory.json "$model" $ours memory --topology v5p:2x2x2 \
    --frames 600 1200 2400 4800 --max-frames
fi
if has torch transformers peft; then
  measure n10/peer_train.json "$model" tests.peers.train "${timed[@]}"
  measure n10/peer_stream.json "$model" tests.peers.stream --minutes 1 10 60 "${timed[@]}"
fi
[[ $dry_run ]] || "$python" -m $ours summary "$out" || failed=1
exit "$failed"
