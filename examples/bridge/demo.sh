#!/usr/bin/env bash
# The whole way of a Hugging Face checkpoint, on the CPU and with the real SmolLM2-135M-Instruct: a teacher job with
# three tensor ranks, a student job with ten of its thirty layers in two stages, and back to a Hugging Face folder.
#   examples/bridge/demo.sh [FOLDER]
# STEPS, PYTHON and EXTRA (more arguments of distill.py) may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-bridge-results}")
python=${PYTHON:-python}
mkdir -p "$folder"
echo '*' >"$folder/.gitignore"
rm -rf "$folder/run" "$folder/exported" # of an earlier run
export VCRD_ADDRESS=file:$folder/address OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' PYTHONWARNINGS=ignore
read -ra extra <<<"${EXTRA:-}"

"$python" examples/bridge/smollm2.py "$folder"

"$python" -m torch.distributed.run --nproc-per-node 3 --rdzv-backend c10d --rdzv-endpoint localhost:0 \
    examples/bridge/teacher.py --hf "$folder/smollm2" --tp 3 --seq-length 256 >"$folder/teacher.log" 2>&1 &
teacher=$!
trap 'kill "$teacher" 2>/dev/null || true' EXIT # it may have ended with its student

"$python" -m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 \
    examples/bridge/distill.py --student-hf "$folder/smollm2" --keep-layers 0-2,8,19,20,24,27-29 \
    --data "$folder/data" --save "$folder/run" --pp 2 --seq-length 256 \
    train.train_iters="${STEPS:-8}" train.global_batch_size=4 optimizer.lr=1e-3 optimizer.min_lr=1e-4 \
    checkpoint.save_interval="${STEPS:-8}" "${extra[@]}" 2>&1 | tee "$folder/student.log" | grep -a --line-buffered 'lm loss'

"$python" examples/bridge/export.py --checkpoint "$folder/run/checkpoints" --out "$folder/exported" --check 2>"$folder/export.log" |
    tail -n 2
