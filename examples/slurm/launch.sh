#!/usr/bin/env bash
# Functions for the batch scripts, which run on the first node of a job, outside any container.

fail() {
    echo "vcrd: $*" >&2
    exit 1
}

# Splits arguments as a shell does, on any number of lines, and prints each one with a NUL after it.
split() { xargs -r printf '%s\0' <<<"$1"; }

# Ends the job with a message if a setting is wrong, before its nodes are busy.
check_settings() {
    local name
    for name in STUDENT_ARGS TEACHER_ARGS DOCTOR_ARGS CACHE_ARGS; do
        split "${!name}" >/dev/null 2>&1 || fail "$name has a quote that is not closed: ${!name}"
    done
    mkdir -p "$RUN_DIR" "$STUDENTS_DIR" ||
        fail "RUN_DIR and STUDENTS_DIR must be folders that can be made, got $RUN_DIR and $STUDENTS_DIR"
}

# For jobs with a student.
check_student() {
    [[ -n $STUDENT_ARGS ]] || fail "STUDENT_ARGS must hold Megatron's arguments of the student, got none"
}

# For jobs with a teacher. A container may see the checkpoint under another path.
check_teacher() {
    [[ -n $CONTAINER || -e $TEACHER_CHECKPOINT/latest_checkpointed_iteration.txt ]] ||
        fail "TEACHER_CHECKPOINT must be the folder of a Megatron checkpoint, got $TEACHER_CHECKPOINT"
}

# Whether this job continues: not if it is cancelled or requeued. Assumes that it continues if the controller does not
# answer.
running() {
    local states
    states=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID" 2>/dev/null) || return 0
    [[ ${states%%$'\n'*} == RUNNING ]]
}

# Prints the address of the first of these nodes, as Slurm knows it.
address_of() {
    local first
    first=$(scontrol show hostnames "$1" | head -n 1)
    scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

# Four ports for each job, which no other running job of this cluster uses.
port() { echo $((10000 + SLURM_JOB_ID % 5000 * 4 + $1)); }

# Exit status of examples/serve_teacher.py for wrong arguments (EX_CONFIG of sysexits.h). A restart would not help.
WRONG_ARGUMENTS=78

# What the scripts of Megatron-LM need besides STUDENT_ARGS and TEACHER_ARGS, and which folders a container mounts.
# examples/bridge has its own.
STUDENT_FIXED=(--save "$RUN_DIR/student" --load "$RUN_DIR/student" --exit-signal-handler)
TEACHER_FIXED=(--load "$TEACHER_CHECKPOINT" --use-checkpoint-args)
MOUNTED=("$PWD" "$RUN_DIR" "$STUDENTS_DIR" "$TEACHER_CHECKPOINT" "$CACHE_DIR")

# Exists when the job was told to stop and its student saves.
export STOP_FILE=$RUN_DIR/.stopped-$SLURM_JOB_ID
trap 'rm -f "$STOP_FILE"' EXIT

# The mounts of a container.
mounts() {
    local path found=()
    if [[ -n $CONTAINER_MOUNTS ]]; then
        echo "$CONTAINER_MOUNTS"
        return
    fi
    for path in "${MOUNTED[@]}"; do
        if [[ -e $path ]]; then found+=("$path"); fi
    done
    local IFS=,
    echo "${found[*]}"
}

# Runs a command on every process of COMPONENT: 0, 1 or "0,1" of a heterogeneous job, "" in a job of one.
#   launch COMPONENT COMMAND...
launch() {
    # Each process may use all cores of its node. If the cluster binds tasks, a rank and its data loaders would share one
    # core. torch.distributed has its own rendezvous, so no MPI is set up.
    local component=$1 options=(--kill-on-bad-exit=1 --wait=60 --export=ALL --cpu-bind=none --mpi=none)
    shift
    if [[ -n $component ]]; then options+=(--het-group="$component"); fi
    options+=(--ntasks-per-node="$((GPUS_PER_NODE ? GPUS_PER_NODE : CPU_PROCESSES_PER_NODE))")
    if [[ -n $CONTAINER ]]; then
        options+=(--container-image="$CONTAINER" --container-mounts="$(mounts)")
        options+=(--container-workdir="$CONTAINER_WORKDIR")
        # For these, the values of the job have priority over those of the image.
        options+=("--container-env=MASTER_ADDR,MASTER_PORT,OMP_NUM_THREADS,CUDA_DEVICE_MAX_CONNECTIONS")
    fi
    srun "${options[@]}" "$@"
}

# Runs SCRIPT on every process of COMPONENT, with its arguments.
#   start COMPONENT NODES PORT SCRIPT ARGUMENTS...
start() {
    local component=$1 nodes=$2 port=$3
    shift 3
    MASTER_ADDR=$(address_of "$nodes") MASTER_PORT=$port launch "$component" examples/slurm/rank.sh "$PYTHON" "$@"
}

# Prints the doctor's table of all nodes of COMPONENT at the start of the log. With DOCTOR=stop, a failed check ends the
# job.
#   look_first COMPONENT NODES
look_first() {
    local arguments component=$1 nodes=$2
    if [[ $DOCTOR == no ]]; then return; fi
    mapfile -d '' -t arguments < <(split "$DOCTOR_ARGS")
    MASTER_ADDR=$(address_of "$nodes") MASTER_PORT=$(port 3) \
        launch "$component" "$PYTHON" -m vcrd doctor --run-dir "$RUN_DIR" "${arguments[@]}" ||
        [[ $DOCTOR == look ]] || exit 1
}

# Runs the student until it has finished, or has saved after a signal. Returns its exit status.
run_student() {
    local arguments component=$1 nodes=$2
    mapfile -d '' -t arguments < <(split "$STUDENT_ARGS")
    rm -f "$STOP_FILE"
    start "$component" "$nodes" "$(port 0)" "$STUDENT_SCRIPT" "${arguments[@]}" "${STUDENT_FIXED[@]}"
}

# Runs the writers of a cache until they have finished, or have stopped after a signal. Returns their exit status.
run_writers() {
    local arguments component=$1 nodes=$2
    rm -f "$STOP_FILE"
    if [[ -n $CACHE_ARGS ]]; then
        mapfile -d '' -t arguments < <(split "$CACHE_ARGS")
        arguments=(-m vcrd cache --write "$CACHE_DIR" "${arguments[@]}")
    else
        mapfile -d '' -t arguments < <(split "$STUDENT_ARGS")
        arguments=("$STUDENT_SCRIPT" "${arguments[@]}" --vcrd-fill-cache "$CACHE_DIR")
    fi
    start "$component" "$nodes" "$(port 0)" "${arguments[@]}" --exit-signal-handler
}

# Runs the teacher, and restarts it after failures, until it ends with its student. Returns 1 after too many failures.
run_teacher() {
    local arguments began status component=$1 nodes=$2 deaths=0
    shift 2
    mapfile -d '' -t arguments < <(split "$TEACHER_ARGS")
    # Before the time limit of a job its steps get SIGTERM. The student then saves, and needs the teacher for this.
    export IGNORE_TERM=1
    while true; do
        began=$SECONDS
        start "$component" "$nodes" "$(port 1)" "$TEACHER_SCRIPT" "${TEACHER_FIXED[@]}" \
            "${arguments[@]}" "$@" && return
        status=$?
        running || return 1 # the job ends, or runs again with a new teacher
        if ((status == WRONG_ARGUMENTS)); then
            echo "the teacher's arguments are wrong, see above; it is not started again" >&2
            return 1
        fi
        if ((SECONDS - began > 600)); then deaths=0; fi
        if ((++deaths > TEACHER_RESTARTS)); then
            echo "the teacher has ended with status $status, $deaths times in a row; it is not started again" >&2
            return 1
        fi
        echo "the teacher has ended with status $status; it starts again in $RESTART_PAUSE seconds" >&2
        sleep "$RESTART_PAUSE"
    done
}

# Waits for the student's process of this shell. If the job is told to stop, near its time limit or for another job, the
# student saves and the job runs again. Otherwise the job ends with the status of the student. The status is necessary,
# because srun also signals the other processes of a step after one has failed.
finish_or_run_again() {
    local student=$1 status=1 late
    trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM # forwards it to the steps
    while true; do
        wait "$student" # ends at a signal too
        status=$?
        if ((status <= 128)) || ! kill -0 "$student" 2>/dev/null; then break; fi
    done
    # If the student ended during the handling of a signal, its status is available here. 127: it was read above.
    wait "$student" 2>/dev/null
    late=$?
    if ((late != 127)); then status=$late; fi
    trap '' TERM
    # Not if the job is cancelled; then it is no longer running.
    if ((status == 0)) && [[ -e $STOP_FILE ]] && running; then
        echo "the student has stopped and saved with status $status; the job runs again" >&2
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
    exit "$status"
}
