#!/usr/bin/env bash
# Everything that differs from site to site and from run to run. What is already in the environment wins, also over what
# is changed here later: source it in a new shell then. It is for bash.
# Before submitting: source examples/slurm/env.sh, so that sbatch itself sees the SBATCH_* lines; the jobs read it again.

# --- the site
# export SBATCH_ACCOUNT=...      # whom the job is charged to
# export SBATCH_PARTITION=...    # where it runs
: "${GPUS_PER_NODE=8}"           # one process each; 0: no GPUs, and CPU_PROCESSES_PER_NODE processes
: "${CPU_PROCESSES_PER_NODE=1}"  # without GPUs only
: "${PYTHON=python}"             # inside the container, or of an environment that every node sees
: "${CONTAINER=}"                # an image for enroot/pyxis: the absolute path of vcrd.sqsh (docker/README.md); empty: none
: "${CONTAINER_WORKDIR=/opt/vcrd}"  # where the container has examples/; $PWD for those of this checkout
: "${CONTAINER_MOUNTS=}"         # host paths that it sees, host:container,...; empty: this folder and those of the run

# --- the run
: "${RUN_DIR=$PWD/vcrd-run}"     # checkpoints, logs and addresses; on a file system that all nodes share
: "${TEACHER_CHECKPOINT=$RUN_DIR/teacher}"      # Megatron, format torch_dist
: "${STUDENT_SCRIPT=examples/pretrain_vcrd.py}" # or a script of your own with the plug in it
: "${STUDENT_ARGS=}"             # Megatron's and vcrd's of the student, without --load, --save; quoted as in a shell
: "${TEACHER_SCRIPT=examples/serve_teacher.py}"
: "${TEACHER_ARGS=}"             # and of the teacher, such as --tensor-model-parallel-size 8
: "${RESTART_PAUSE=10}"          # seconds between a teacher's end and its next start
: "${TEACHER_RESTARTS=5}"        # how often in a row it may die within 10 minutes of its start
: "${STUDENTS_DIR=$RUN_DIR/students}"   # with two jobs, the same for all of them: where students write their address
: "${VCRD_CONNECT_TIMEOUT=1800}" # seconds that either job waits for the other, at the start and when it is lost
: "${DOCTOR=look}"              # look: the doctor's table at the head of the log; stop: no start with a problem; no
: "${DOCTOR_ARGS=}"              # such as --student tp=8,dp=4 --teacher tp=8,pp=2, for it to measure the link

# --- the network
: "${VCRD_INTERFACE=}"           # the interface that the link listens on, such as ib0; empty: the one that leads there
: "${NCCL_SOCKET_IFNAME=}"       # NCCL finds its peers over it; needed where the default route is a management network
: "${GLOO_SOCKET_IFNAME=}"       # the same for gloo, where a node's name leads to itself alone
: "${NCCL_IB_HCA=}"              # which InfiniBand adapters carry data; needed where some of them are for storage
: "${NCCL_DEBUG=WARN}"           # INFO says which transport NCCL chose: look once for NET/IB

# --- Megatron
: "${CUDA_DEVICE_MAX_CONNECTIONS=1}"  # what tensor parallelism needs on Hopper for its overlap to be in order
: "${OMP_NUM_THREADS=1}"         # one process per GPU shares the node's cores with the others

export RUN_DIR VCRD_CONNECT_TIMEOUT NCCL_DEBUG CUDA_DEVICE_MAX_CONNECTIONS OMP_NUM_THREADS
# An empty value is not the same as none for these.
for name in VCRD_INTERFACE NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_IB_HCA; do
    if [[ -n ${!name} ]]; then export "${name?}"; else unset "$name"; fi
done
if ((GPUS_PER_NODE)); then export SBATCH_GPUS_PER_NODE=$GPUS_PER_NODE; fi
