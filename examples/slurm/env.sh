#!/usr/bin/env bash
# All settings that differ between clusters and runs, for bash. Variables that are already set keep their value. So after
# a change of this file, source it in a new shell.
# Before submitting: source examples/slurm/env.sh, so that sbatch sees the SBATCH_* lines. The jobs read it again.

# --- the cluster
# export SBATCH_ACCOUNT=...      # the account of the job
# export SBATCH_PARTITION=...    # the partition of the job
: "${GPUS_PER_NODE=8}"           # one process per GPU; 0: no GPUs, and CPU_PROCESSES_PER_NODE processes
: "${CPU_PROCESSES_PER_NODE=1}"  # only without GPUs
: "${PYTHON=python}"             # in the container, or in an environment that every node sees
: "${CONTAINER=}"                # an image for enroot/pyxis: the absolute path of vcrd.sqsh (docker/README.md); empty: none
: "${CONTAINER_WORKDIR=/opt/vcrd}"  # the folder with examples/ in the container; $PWD for this checkout
: "${CONTAINER_MOUNTS=}"         # mounted paths, host:container,...; empty: this folder and those of the run

# --- the run
: "${RUN_DIR=$PWD/vcrd-run}"     # checkpoints, logs and addresses; on a file system that all nodes share
: "${TEACHER_CHECKPOINT=$RUN_DIR/teacher}"      # Megatron, format torch_dist
: "${STUDENT_SCRIPT=examples/pretrain_vcrd.py}" # or your own script with the plug
: "${STUDENT_ARGS=}"             # the student's arguments of Megatron and vcrd, without --load, --save; quoted as in a shell
: "${TEACHER_SCRIPT=examples/serve_teacher.py}"
: "${TEACHER_ARGS=}"             # the teacher's arguments, such as --tensor-model-parallel-size 8
: "${RESTART_PAUSE=10}"          # seconds between the end of a teacher and its restart
: "${TEACHER_RESTARTS=5}"        # allowed failures in a row within 10 minutes of a start
: "${STUDENTS_DIR=$RUN_DIR/students}"   # with two jobs: the folder for the addresses of students, the same for all jobs
: "${CACHE_DIR=$RUN_DIR/cache}"   # the folder that cache.sbatch fills
: "${CACHE_ARGS=}"               # options of python -m vcrd cache --write: --data FILES ..; empty: the data of STUDENT_ARGS
: "${VCRD_CONNECT_TIMEOUT=1800}" # seconds that each job waits for the other one, at the start and when it is lost
: "${DOCTOR=look}"              # look: the doctor's table at the start of the log; stop: end the job if a check fails; no: no doctor
: "${DOCTOR_ARGS=}"              # such as --student tp=8,dp=4 --teacher tp=8,pp=2, to measure the link

# --- the network
: "${VCRD_INTERFACE=}"           # the interface for the link, such as ib0; empty: the one with the route to the other job
: "${NCCL_SOCKET_IFNAME=}"       # the interface for NCCL's bootstrap; needed if the default route is a management network
: "${GLOO_SOCKET_IFNAME=}"       # the same for gloo; needed if the name of a node resolves only locally
: "${NCCL_IB_HCA=}"              # the InfiniBand adapters for data; needed if some adapters are for storage
: "${NCCL_DEBUG=WARN}"           # INFO shows NCCL's transport: look once for NET/IB

# --- Megatron
: "${CUDA_DEVICE_MAX_CONNECTIONS=1}"  # tensor parallelism needs it on Hopper for overlap in the right order
: "${OMP_NUM_THREADS=1}"         # the processes of a node share its cores

export RUN_DIR VCRD_CONNECT_TIMEOUT NCCL_DEBUG CUDA_DEVICE_MAX_CONNECTIONS OMP_NUM_THREADS
# For these an empty value differs from an unset variable.
for name in VCRD_INTERFACE NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_IB_HCA; do
    if [[ -n ${!name} ]]; then export "${name?}"; else unset "$name"; fi
done
if ((GPUS_PER_NODE)); then export SBATCH_GPUS_PER_NODE=$GPUS_PER_NODE; fi
