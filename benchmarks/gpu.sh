#!/usr/bin/env bash
# All that a GPU is needed for, within 8 minutes: a training run of 4 minutes on a token file
# (made before by `python -m benchmarks.gpu.corpus`), the twenty tasks, three circuits, and speed.
#
#   bash benchmarks/gpu.sh OUT [--smoke | --rehearsal] [options of benchmarks.gpu.train]
#
# OUT gets report.md, loss.png and everything (report, curves, logs, circuits and the checkpoint of
# nonzeros) in gpu.tar.gz.aa, .ab, ...: cat OUT/gpu.tar.gz.* | tar xzf - -C FOLDER
# It is packed anew after every stage, so that a run that is cut off keeps what it has.
# --smoke does everything in about a minute; --rehearsal on the CPU with a small model.
# PYTHON, GPU_DATA, GPU_DEVICE, GPU_SECONDS (in all) and GPU_STAGES (names, as below) change the
# defaults.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:?usage: bash benchmarks/gpu.sh OUT [--smoke | --rehearsal]}; shift
SIZE=full
case ${1:-} in --smoke | --rehearsal) SIZE=${1#--}; shift ;; esac
PYTHON=${PYTHON:-python3}
[ "$SIZE" = smoke ] && SECONDS_IN_ALL=${GPU_SECONDS:-150} || SECONDS_IN_ALL=${GPU_SECONDS:-475}
WORK=$(mktemp -d)
mkdir -p "$OUT" "$WORK/logs"
# What the machine's Python lacks comes from wheels that were carried along (see the README beside).
for wheel in .whl/*.whl; do
  name=$(basename "${wheel%%-*}")
  [ -e "$wheel" ] && ! "$PYTHON" -c "import $name" 2>/dev/null &&
    "$PYTHON" -m zipfile -e "$wheel" "$WORK/.packages"
done
export PYTHONPATH="$PWD:$WORK/.packages${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false
[ "$SIZE" = rehearsal ] && GPU_DEVICE=${GPU_DEVICE:-cpu}
COMMON=(--work "$WORK" --data "${GPU_DATA:-gpu_data}" --size "$SIZE" --device "${GPU_DEVICE:-cuda}")

pack() {
  cat "$WORK"/*.md > "$OUT/report.md" 2>/dev/null
  [ -e "$WORK/loss.png" ] && cp "$WORK/loss.png" "$OUT"
  tar -C "$WORK" --exclude=.packages -czf - . | split -b 15m - "$OUT/gpu.tar.gz."
}

# stage NAME SECONDS COMMAND...: with its own limit, and never past the whole run's.
stage() {
  local name=$1 limit=$2 left=$((SECONDS_IN_ALL - SECONDS)); shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  [ "$limit" -lt 5 ] && { echo "- $name: no time left" >> "$WORK/9-failures.md"; return 0; }
  timeout --kill-after=5 "$limit" "$@" > "$WORK/logs/$name.log" 2>&1
  local code=$?
  echo "$name: exit code $code after $SECONDS s"
  [ "$code" -eq 0 ] && return 0
  echo "- $name: exit code $code (124 is its limit of $limit s)" >> "$WORK/9-failures.md"
  tail -n 25 "$WORK/logs/$name.log"
  return 0
}

wanted() { [[ " ${GPU_STAGES:-train tasks speed kernels circuits} " == *" $1 "* ]]; }

wanted train && stage train 420 "$PYTHON" -m benchmarks.gpu.train "${COMMON[@]}" "$@" && pack
wanted tasks && stage tasks 60 "$PYTHON" -m benchmarks.gpu.evaluate "${COMMON[@]}" && pack
wanted speed && stage speed 100 "$PYTHON" -m benchmarks.gpu.speed "${COMMON[@]}" && pack
if wanted kernels && [ "$SIZE" != rehearsal ]; then
  stage kernels 50 "$PYTHON" -m benchmarks.speed.gpu_kernels --quick --results "$WORK/kernels" --name 6-kernels
  cp "$WORK"/kernels/*.md "$WORK" 2>/dev/null
  pack
fi
if wanted circuits; then
  # Last, with what time is left, and at once: they wait for their launches, not for the device.
  for number in $([ "$SIZE" = full ] && echo 0 1 2 || echo 0); do
    stage "circuit-$number" 120 "$PYTHON" -m benchmarks.gpu.evaluate "${COMMON[@]}" --circuit "$number" &
  done
  wait
fi
pack
cat "$OUT/report.md"
rm -rf "$WORK"
[ -e "$OUT/report.md" ] && ! grep -q "exit code" "$OUT/report.md"
