#!/usr/bin/env bash
# Functions of the batch scripts, which run on the first node of a job, outside any container.

fail() {
    echo "vcrd: $*" >&2
    exit 1
}

# The words of arguments, NUL after each: on any number of lines, quoted and escaped as in a shell.
split() { xargs -r printf '%s\0' <<<"$1"; }

# What is wrong already here ends the job with a sentence, before its nodes are busy.
check_settings() {
    local name
    for name in STUDENT_ARGS TEACHER_ARGS DOCTOR_ARGS; do
        split "${!name}" >/dev/null 2>&1 || fail "$name has a quote that is not closed: ${!name}"
    done
    mkdir -p "$RUN_DIR" "$STUDENTS_DIR" ||
        fail "RUN_DIR and STUDENTS_DIR must be folders that can be made, got $RUN_DIR and $STUDENTS_DIR"
}

# Of jobs with a student.
check_student() {
    [[ -n $STUDENT_ARGS ]] || fail "STUDENT_ARGS must hold Megatron's arguments of the student, got none"
}

# Of jobs with a teacher. A container may see the checkpoint under another path.
check_teacher() {
    [[ -n $CONTAINER || -e $TEACHER_CHECKPOINT/latest_checkpointed_iteration.txt ]] ||
        fail "TEACHER_CHECKPOINT must be the folder of a Megatron checkpoint, got $TEACHER_CHECKPOINT"
}

# Whether this job goes on: not where it is cancelled or put back into the queue. A controller that does not answer
# says nothing against it.
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

# Ports that no other job of this cluster uses at once: four to each job.
port() { echo $((10000 + SLURM_JOB_ID % 5000 * 4 + $1)); }

# Exit status of examples/serve_teacher.py (EX_CONFIG of sysexits.h), with which another start would end, too.
WRONG_ARGUMENTS=78

# There when the job was told to stop and its student saves.
export STOP_FILE=$RUN_DIR/.stopped-$SLURM_JOB_ID
trap 'rm -f "$STOP_FILE"' EXIT

# What a container sees of the host.
mounts() {
    local path found=()
    if [[ -n $CONTAINER_MOUNTS ]]; then
        echo "$CONTAINER_MOUNTS"
        return
    fi
    for path in "$PWD" "$RUN_DIR" "$STUDENTS_DIR" "$TEACHER_CHECKPOINT"; do
        if [[ -e $path ]]; then found+=("$path"); fi
    done
    local IFS=,
    echo "${found[*]}"
}

# Runs a command on every process of COMPONENT: 0, 1 or "0,1" of a heterogeneous job, "" in a job of one.
#   launch COMPONENT COMMAND...
launch() {
    # Each process may use all of its node's cores: where a site binds tasks, one core would be shared by a rank and its
    # data loaders. torch.distributed brings its own way to meet, so no MPI is set up.
    local component=$1 options=(--kill-on-bad-exit=1 --wait=60 --export=ALL --cpu-bind=none --mpi=none)
    shift
    if [[ -n $component ]]; then options+=(--het-group="$component"); fi
    options+=(--ntasks-per-node="$((GPUS_PER_NODE ? GPUS_PER_NODE : CPU_PROCESSES_PER_NODE))")
    if [[ -n $CONTAINER ]]; then
        options+=(--container-image="$CONTAINER" --container-mounts="$(mounts)")
        options+=(--container-workdir="$CONTAINER_WORKDIR")
        # Of these the job's own, whatever the image sets.
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

# The doctor's table of all nodes of COMPONENT, at the head of the log; ends the job where DOCTOR says so.
#   look_first COMPONENT NODES
look_first() {
    local arguments component=$1 nodes=$2
    if [[ $DOCTOR == no ]]; then return; fi
    mapfile -d '' -t arguments < <(split "$DOCTOR_ARGS")
    MASTER_ADDR=$(address_of "$nodes") MASTER_PORT=$(port 3) \
        launch "$component" "$PYTHON" -m vcrd doctor --run-dir "$RUN_DIR" "${arguments[@]}" ||
        [[ $DOCTOR == look ]] || exit 1
}

# The student, until it has finished, or has saved after a signal; its exit status.
run_student() {
    local arguments component=$1 nodes=$2
    mapfile -d '' -t arguments < <(split "$STUDENT_ARGS")
    rm -f "$STOP_FILE"
    start "$component" "$nodes" "$(port 0)" "$STUDENT_SCRIPT" "${arguments[@]}" \
        --save "$RUN_DIR/student" --load "$RUN_DIR/student" --exit-signal-handler
}

# The teacher, again and again until it ends by itself, because its student has; 1 when it dies too often.
run_teacher() {
    local arguments began status component=$1 nodes=$2 deaths=0
    shift 2
    mapfile -d '' -t arguments < <(split "$TEACHER_ARGS")
    # Before its time is over a job's steps get SIGTERM. The student saves then, and needs the teacher for it.
    export IGNORE_TERM=1
    while true; do
        began=$SECONDS
        start "$component" "$nodes" "$(port 1)" "$TEACHER_SCRIPT" --load "$TEACHER_CHECKPOINT" \
            --use-checkpoint-args "${arguments[@]}" "$@" && return
        status=$?
        running || return 1 # the job ends, or runs again with a teacher of its own
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

# Waits for the student's process of this shell. A job that is told to stop, near the end of its time or for another
# one's sake, lets the student save and then runs again; any other ends with the student's status. That counts, for srun
# signals the other processes of a step in which one has failed, too.
finish_or_run_again() {
    local student=$1 status=1 late
    trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM # passes it on to the steps
    while true; do
        wait "$student" # ends at a signal too
        status=$?
        if ((status <= 128)) || ! kill -0 "$student" 2>/dev/null; then break; fi
    done
    # Where it ended while a signal was looked at, its status is still to be had; 127: it was had above.
    wait "$student" 2>/dev/null
    late=$?
    if ((late != 127)); then status=$late; fi
    trap '' TERM
    # Not where the job is cancelled: then it has another state already.
    if ((status == 0)) && [[ -e $STOP_FILE ]] && running; then
        echo "the student has stopped and saved with status $status; the job runs again" >&2
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
    exit "$status"
}
