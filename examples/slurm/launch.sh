#!/usr/bin/env bash
# Functions of the batch scripts, which run on the first node of a job, outside any container.

# Prints the address of the first of these nodes, as Slurm knows it.
address_of() {
    local first
    first=$(scontrol show hostnames "$1" | head -n 1)
    scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

# Ports that no other job of this cluster uses at once: four to each job.
port() { echo $((10000 + SLURM_JOB_ID % 5000 * 4 + $1)); }

# There when the job was told to stop and its student saves.
export STOP_FILE=$RUN_DIR/.stopped-$SLURM_JOB_ID

# Runs a command on every process of COMPONENT: 0, 1 or "0,1" of a heterogeneous job, "" in a job of one.
#   launch COMPONENT COMMAND...
launch() {
    local component=$1 options=(--kill-on-bad-exit=1 --wait=60 --export=ALL)
    shift
    if [[ -n $component ]]; then options+=(--het-group="$component"); fi
    options+=(--ntasks-per-node="$((GPUS_PER_NODE ? GPUS_PER_NODE : CPU_PROCESSES_PER_NODE))")
    if [[ -n $CONTAINER ]]; then
        options+=(--container-image="$CONTAINER" --container-mounts="$CONTAINER_MOUNTS")
        options+=(--container-workdir="$CONTAINER_WORKDIR")
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
    read -ra arguments <<<"$DOCTOR_ARGS"
    MASTER_ADDR=$(address_of "$nodes") MASTER_PORT=$(port 3) \
        launch "$component" "$PYTHON" -m vcrd doctor --run-dir "$RUN_DIR" "${arguments[@]}" ||
        [[ $DOCTOR == look ]] || exit 1
}

# The student, until it has finished, or has saved after a signal; its exit status.
run_student() {
    local arguments component=$1 nodes=$2
    read -ra arguments <<<"$STUDENT_ARGS"
    rm -f "$STOP_FILE"
    start "$component" "$nodes" "$(port 0)" "$STUDENT_SCRIPT" "${arguments[@]}" \
        --save "$RUN_DIR/student" --load "$RUN_DIR/student" --exit-signal-handler
}

# The teacher, again and again until it ends by itself, because its student has; 1 when it dies too often.
run_teacher() {
    local arguments began status component=$1 nodes=$2 deaths=0
    shift 2
    read -ra arguments <<<"$TEACHER_ARGS"
    # Before its time is over a job's steps get SIGTERM. The student saves then, and needs the teacher for it.
    export IGNORE_TERM=1
    while true; do
        began=$SECONDS
        start "$component" "$nodes" "$(port 1)" "$TEACHER_SCRIPT" --load "$TEACHER_CHECKPOINT" \
            --use-checkpoint-args "${arguments[@]}" "$@" && return
        status=$?
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
# one's sake, lets the student save and then runs again; any other ends with the student's status.
finish_or_run_again() {
    local student=$1 status
    trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM # passes it on to the steps
    while kill -0 "$student" 2>/dev/null; do
        wait "$student" # ends at a signal too
        status=$?
    done
    trap '' TERM
    # Not where the job is cancelled: then it has another state already.
    if [[ -e $STOP_FILE && $(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID" | head -n 1) == RUNNING ]]; then
        rm -f "$STOP_FILE"
        echo "the student has stopped and saved with status $status; the job runs again" >&2
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
    return "$status"
}
