#!/usr/bin/env bash
# Pre-train a diffusion language model, on a laptop or on many nodes: one file, started in three ways, same options.
#
#     torchrun --nproc-per-node 2 examples/pretrain_dlm.sh [RECIPE.py] [--run-dir DIR] [--section.field VALUE …]
#     bash examples/pretrain_dlm.sh …                starts torchrun: a process per GPU, or two on CPUs
#     sbatch --nodes 4 examples/pretrain_dlm.sh …    a torchrun on each node; goes on after preemption and time limit
#
# --dry-run checks everything and prints what each node would start. --ladder FILE, with sbatch --array=1-N: task n
# takes its arguments from line n of FILE and trains in DIR/n. Clusters, signals, logs, faults: docs/cluster.md.
#
# It is Bash and Python at once: Bash takes ''':' for its command `:` and the Python half for a here-document, Python
# takes the Bash half for a string. The Python half stands under __main__: the process that torch spawns to write
# checkpoints imports this file again, and would otherwise start a training of its own, and wait for ever.

# What a cluster wants to be told differently goes before the file name: sbatch --nodes 4 --time 4:00:00 -p gpu FILE.
# Two minutes before its time is over, and where the cluster's preemption sends it, training gets SIGUSR1: it saves and
# is put back into the queue. The log of all starts of a job is one file.
#SBATCH --job-name=pretrain_dlm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# What is trained, where there are no arguments: a recipe of this checkout, the run directory, and settings for
# `megadiff train`, which arguments add to and replace.
RECIPE="examples/recipes/gidd_85m.py"
RUN_DIR="runs/pretrain_dlm"
OVERRIDES=""
# Variables of all processes, unless they are set already:
#   OMP_NUM_THREADS                a thread per process, or each would take every core
#   CUDA_DEVICE_MAX_CONNECTIONS    one queue, so that exchanges between GPUs start before the kernels they overlap with
#   PYTORCH_ALLOC_CONF             segments that grow: logits come and go in sizes that would leave holes
#   NCCL_DEBUG                     NCCL says why it fails, but not how it starts
# Where NCCL or Gloo choose the wrong network of several, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the right one.
ENVIRONMENT="OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1 PYTORCH_ALLOC_CONF=expandable_segments:True "
ENVIRONMENT+="NCCL_DEBUG=WARN"
# What Python is, and what srun needs to know, where megadiff is in a container (docs/container.md):
#   MEGADIFF_PYTHON="apptainer exec --nv megadiff.sif python"
#   MEGADIFF_SRUN="--container-image=megadiff.sqsh --container-mounts=/data"
PYTHON="${MEGADIFF_PYTHON:-python}"
SRUN_OPTIONS="${MEGADIFF_SRUN:-}"

''':'
set -euo pipefail

say() { printf '\n==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# The value of NAME=value in what scontrol shows.
field() {
    local pattern=" $1=([^ ]*)"
    [[ " $2" =~ $pattern ]] && echo "${BASH_REMATCH[1]}"
}

# A task of an array by its own name: one of them has the number of the whole array for its own.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}
show_job() { scontrol show job --oneliner "$job"; }

# Slurm runs a copy of this file, far from the checkout. It remembers the path that sbatch was given, and where.
find_checkout() {
    local candidate pattern command=""
    if [ -n "$job" ]; then
        command=$(show_job)
        # Where the path has blanks, the name of this file tells it apart from arguments.
        pattern=" Command=(.*/examples/pretrain_dlm.sh)"
        if [[ $command =~ $pattern ]]; then command=${BASH_REMATCH[1]}; else command=$(field Command "$command"); fi
    fi
    for candidate in "$(dirname -- "${BASH_SOURCE[0]}")/.." "$(dirname -- "$command")/.." "${SLURM_SUBMIT_DIR:-.}"; do
        if [ -f "$candidate/tools/run_state.sh" ]; then
            realpath -- "$candidate"
            return
        fi
    done
    die "no checkout of megadiff around '${command:-${BASH_SOURCE[0]}}' or in '${SLURM_SUBMIT_DIR:-$PWD}': start" \
        "examples/pretrain_dlm.sh where it lies, or submit a copy from within the checkout"
}

# Sets recipe, run_dir, settings, dry_run and task from the command line; a line of the ladder is read in its place.
parse() {
    local line words
    if [[ ${1:-} == *.py ]]; then
        recipe=$1
        shift
    fi
    while [ $# -gt 0 ]; do
        case $1 in # --option=value is --option value
            --run-dir=* | --ladder=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        esac
        case $1 in
            --run-dir | --ladder) [ -n "${2:-}" ] || die "$1 has no value: give one as $1 VALUE" ;;
        esac
        case $1 in
            -h | --help) sed -nE '2,/^$/s/^# ?//p' "${BASH_SOURCE[0]}"; exit 0 ;;
            --dry-run) dry_run=true; shift ;;
            --run-dir) run_dir=$2; shift 2 ;;
            --ladder)
                task=${SLURM_ARRAY_TASK_ID:-}
                [ -n "$task" ] || die "--ladder is for tasks of an array: sbatch --array=1-N"
                [ -f "$2" ] || die "there is no ladder '$2': name a file with the arguments of one run on each line"
                line=$(sed -n "${task}p" "$2")
                line=${line%[[:cntrl:]]} # an editor of another system may end lines otherwise
                [ -n "$line" ] || die "line $task of $2 is empty, or there is none: let --array count its lines from 1"
                read -ra words <<<"$line"
                parse "${words[@]}"
                shift 2
                ;;
            *) settings+=("$1"); shift ;;
        esac
    done
}

# As many as the GPUs that Slurm has granted or torch sees; without any, two.
processes_per_node() {
    if [ -n "${NPROC_PER_NODE:-}" ]; then
        [[ $NPROC_PER_NODE =~ ^[1-9][0-9]*$ ]] ||
            die "NPROC_PER_NODE is '$NPROC_PER_NODE', but must be a number of processes: leave it out to have one per GPU"
        echo "$NPROC_PER_NODE"
    elif [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
        echo "$SLURM_GPUS_ON_NODE"
    else
        "${python[@]}" -c 'import torch; print(torch.cuda.device_count() or 2)'
    fi
}

# Says in one sentence what is wrong with recipe, settings, layout, corpus or the devices of a node, before anything is
# started: on every node, for each may be the one without GPUs, and once where all say the same.
check() {
    local found status=0
    found=$(RANK=0 WORLD_SIZE=$((processes * ${#nodes[@]})) LOCAL_WORLD_SIZE=$processes \
        "${everywhere[@]}" "${python[@]}" "${train[@]}" --dry-run 2>&1) || status=$?
    if [ $status -eq 0 ] || [ $status -eq 2 ]; then # no traceback, which may repeat a line
        found=$(awk '!/^srun: .* Exited with exit code/ && !said[$0]++' <<<"$found")
    fi
    if [ $status -ne 0 ]; then
        echo "$found" >&2
    elif $dry_run || [[ $found != ready:* ]]; then
        echo "$found"
    fi
    return $status
}

# Sets what lets step and checkpoint still fit into the time that Slurm grants, however long they take; a minute is for
# the end. Where they are quick, the signal stops the run, later. Time counts from the start of the job: so the setting
# is the same at each start, as reruns (docs/faults.md) demand. Whoever sets a limit of his own counts as ever.
set_time_limit() {
    local shown start end
    if [[ " ${settings[*]} " == *" --training.exit-after"* ]]; then return; fi
    shown=$(show_job)
    if [ "$(field TimeLimit "$shown")" = UNLIMITED ]; then return; fi
    start=$(date --date "$(field StartTime "$shown")" +%s)
    end=$(date --date "$(field EndTime "$shown")" +%s)
    export MEGADIFF_JOB_START=$start
    settings=("--training.exit-after=$((end - start > 120 ? end - start - 60 : 60))" "${settings[@]}")
}

# A node, and the command that it would start.
show() {
    printf '%s:' "$1"
    printf ' %q' "${@:2}"
    echo
}

# torchrun by its module: where a virtual environment sits on a container's packages, the command is another Python's.
start_here() {
    local launch=("${python[@]}" -m torch.distributed.run --standalone --nproc-per-node "$processes" "${train[@]}")
    if $dry_run; then
        show "$(hostname)" "${launch[@]}"
    else
        exec "${launch[@]}"
    fi
}

# What runs on each node, with the folder of logs as $0: torchrun, and word of its failure. Many clusters signal this
# shell alone, so it passes on to the ranks what preempts a job or ends its time. They save after the same step and leave
# with exit code 0. torchrun hears none of it: it would kill them after 30 s, and fail. How long saving may take is
# Slurm's affair. Peers of a node that has failed get a moment to say what they saw of it.
# shellcheck disable=SC2016 # each node reads its own name and number
on_node='
exec >"$0/$SLURMD_NODENAME.log" 2>&1
export MEGADIFF_PID_FILE=$0/$SLURMD_NODENAME.pid TORCH_ELASTIC_SHUTDOWN_TIMEOUT=5
pass_on() { [ ! -s "$MEGADIFF_PID_FILE" ] || kill -USR1 "$(<"$MEGADIFF_PID_FILE")"; }
trap pass_on TERM USR1 USR2
(trap "" TERM USR1 USR2; exec "${@/#@rank@/$SLURM_NODEID}") &
while wait $!; kill -0 $! 2>/dev/null; do :; done # a signal ends a wait before its time
wait $!
status=$?
[ $status -ne 0 ] || exit 0
echo $status >"$0/$SLURMD_NODENAME.failed"
sleep 15
exit $status'

is_taken() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }

# Where the nodes are to meet, on the first one. Jobs that share a node must not; from 32768 on, Linux hands out ports to
# whoever asks.
meeting_port() {
    local head=$1 port=${MASTER_PORT:-}
    if [ -n "$port" ]; then
        [[ $port =~ ^[1-9][0-9]*$ ]] && [ "$port" -le 65535 ] ||
            die "MASTER_PORT is '$port', but must be a port from 1 to 65535: leave it out to have one chosen"
        ! is_taken "$head" "$port" ||
            die "port $port of ${nodes[0]} is in use, where the nodes are to meet: choose another MASTER_PORT, or none"
    else
        port=$((20000 + SLURM_JOB_ID % 10000))
        while is_taken "$head" "$port"; do port=$((port + 1)); done
    fi
    echo "$port"
}

start_on_nodes() {
    local head port launch rank step watch status=0
    logs=$run_dir/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    head=$(field NodeAddr "$(scontrol show node --oneliner "${nodes[0]}")")
    port=$(meeting_port "$head")
    launch=("${python[@]}" -m torch.distributed.run --node-rank @rank@ --nnodes "${#nodes[@]}"
        --nproc-per-node "$processes" --master-addr "$head" --master-port "$port"
        --signals-to-handle "SIGINT,SIGHUP,SIGQUIT" "${train[@]}")
    if $dry_run; then
        for rank in "${!nodes[@]}"; do
            show "${nodes[rank]}" "${launch[@]/#@rank@/$rank}"
        done
        return
    fi

    mkdir -p "$logs"
    rm -f "$logs"/*.failed "$logs"/*.pid # of an earlier start in the same interactive job
    newest_checkpoint "$run_dir" >"$logs/began"
    say "start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID on ${nodes[*]}, each with its log in $logs"
    "${everywhere[@]}" --kill-on-bad-exit=1 bash -c "$on_node" "$logs" "${launch[@]}" &
    step=$!
    end_after_failure "$step" &
    watch=$!
    # shellcheck disable=SC2064 # these two
    trap "kill $step $watch 2>/dev/null || true" EXIT
    trap : TERM # the ranks get it, too, and this shell has to see what becomes of them
    trap 'scancel --signal USR1 "$job"' USR1 USR2 # meant for them, as by sbatch --signal=B:USR1
    while wait "$step" || true; kill -0 "$step" 2>/dev/null; do :; done
    wait "$step" || status=$?
    trap - EXIT TERM USR1 USR2
    kill "$watch" 2>/dev/null || true
    if [ $status -ne 0 ]; then
        explain
        exit 1
    fi
    go_on
}

# The first node that fails ends the step, by srun. But where a node is gone, srun would wait until Slurm misses it, too,
# which takes minutes.
end_after_failure() {
    until compgen -G "$logs/*.failed" >/dev/null; do sleep 1; done
    sleep 20
    kill -KILL "$1"
}

# Who said nothing, who failed, and what the log says about it.
explain() {
    local node failed=() silent=()
    for node in "${nodes[@]}"; do
        if [ -f "$logs/$node.failed" ]; then failed+=("$node"); else silent+=("$node"); fi
    done
    if ! compgen -G "$logs/*.log" >/dev/null; then
        echo "error: srun has not started anything on ${nodes[*]}: see above what it says"
        return
    fi
    [ ${#silent[@]} -eq 0 ] || echo "error: no word from ${silent[*]}: down, or still waiting for the others"
    for node in "${failed[@]:0:8}"; do
        echo "error: $node failed with exit code $(<"$logs/$node.failed"), see $logs/$node.log"
        grep -E "error:|error on|Error: |no progress|the job hangs" "$logs/$node.log" | grep -v ChildFailed | head -3 || true
    done
}

# A run that was stopped before its last step goes back into the queue, unless the job is cancelled or may not, or three
# starts in a row have come to nothing.
go_on() {
    local state before_last=$run_dir/logs/$SLURM_JOB_ID.$((${SLURM_RESTART_COUNT:-0} - 2))
    if complete "$run_dir"; then
        say "complete: $run_dir"
        return
    fi
    if [ -f "$before_last/began" ] && [ "$(<"$before_last/began")" = "$(newest_checkpoint "$run_dir")" ]; then
        die "three starts have not saved one new step: see $logs, and give them more time, or nodes that stay"
    fi
    state=$(show_job)
    # Slurm adds to BatchFlag when it requeues a job itself; of an interactive one it is 0.
    if [[ "$(field JobState "$state") $(field Requeue "$state") $(field BatchFlag "$state")" == "RUNNING 1 "[1-9]* ]]; then
        say "stopped before the last step; back into the queue"
        scontrol requeue "$job"
    else
        say "stopped before the last step; start again to go on"
    fi
}

checkout=$(find_checkout)
# shellcheck source=tools/run_state.sh
source "$checkout/tools/run_state.sh"
# The environment that is active where the job is submitted, or the checkout's own. Modules and the like go here.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$checkout/.venv/bin/python" ]; then
    export VIRTUAL_ENV=$checkout/.venv PATH=$checkout/.venv/bin:$PATH
fi
for assignment in $ENVIRONMENT; do
    name=${assignment%%=*}
    [ -n "${!name:-}" ] || export "${assignment?}"
done

read -ra python <<<"$PYTHON"
# The code of the container, which has kernels, not that of the folder where the job is submitted.
if [ -n "${MEGADIFF_PYTHON:-}${MEGADIFF_SRUN:-}" ]; then export PYTHONSAFEPATH=1; fi
recipe=$checkout/$RECIPE run_dir=$RUN_DIR dry_run=false task=""
read -ra settings <<<"$OVERRIDES"
parse "$@"
if [ -n "$task" ]; then
    run_dir=$run_dir/$task
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    die "this is task $SLURM_ARRAY_TASK_ID of an array, and all would train the same in $run_dir: give --ladder FILE"
fi

nodes=("$(hostname)") everywhere=(env)
if [ -n "$job" ]; then
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    read -ra everywhere <<<"srun --nodes ${#nodes[@]} --ntasks ${#nodes[@]} --ntasks-per-node 1 --overlap \
        --cpu-bind=none $SRUN_OPTIONS"
    set_time_limit
fi
processes=$(processes_per_node)
train=(-m megadiff train "$recipe" --run-dir "$run_dir" "${settings[@]}")
if [[ " ${settings[*]} " == *" --help-config "* ]]; then exec "${python[@]}" "${train[@]}"; fi
check
if [ -n "$job" ]; then start_on_nodes; else start_here; fi
exit

# shellcheck disable=SC2317
: <<'# The end of the Python half.'
'''

import os
import sys

from megadiff.cli import main

if __name__ == "__main__":
    for assignment in ENVIRONMENT.split():
        os.environ.setdefault(*assignment.split("=", 1))
    given = sys.argv[1:]
    recipe = given.pop(0) if given and given[0].endswith(".py") else RECIPE
    sys.exit(main(["train", recipe, "--run-dir", RUN_DIR, *OVERRIDES.split(), *given]))
# The end of the Python half.
