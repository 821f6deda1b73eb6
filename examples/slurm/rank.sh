#!/usr/bin/env bash
# One process of a job. Sets the variables of torch's launcher from those of Slurm. srun starts it once per GPU.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
if [[ ${IGNORE_TERM:-} ]]; then
    trap '' TERM # the program inherits it
    exec "$@"
fi

# Slurm signals every process of a step. The program exits with 0 after a signal, as it does when it has finished. A file
# distinguishes the two cases.
trap 'touch "$STOP_FILE"' TERM
"$@" &
while kill -0 $! 2>/dev/null; do
    status=0
    wait $! || status=$?
done
exit "$status"
