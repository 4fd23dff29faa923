#!/usr/bin/env bash
# The workflow on a real Slurm of two nodes, started on this machine:   run.sh [smoke] [kill] [cancel]
#
#   smoke    every paper at smoke scale, over both nodes; GPU jobs ask for GPUs
#   kill     a node dies during a job; the run ends right, with the bytes of a local run
#   cancel   Ctrl-C ends the run's jobs; a later run ends it
#
# All three by default. PYTHON is one with this workflow and snakemake-executor-plugin-slurm
# (default: python3 of the PATH); root and Debian's packages are needed, see cluster.sh.
set -euo pipefail
set -m # a process group a job, so that Ctrl-C can be sent to one
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
python=${PYTHON:-python3}
work=$(mktemp -d /tmp/retrace-slurm.XXXX)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# accounting is off: squeue tells a job's state, and soon
polling=(--slurm-no-account --slurm-status-command squeue --slurm-init-seconds-before-status-checks 3)
papers=[$(cd "$root/rules/papers" && ls -d -- */ | tr -d / | paste -sd,)]

finish() {
    local code=$?
    scancel --partition=main || true # what an interrupted test left
    "$here/cluster.sh" stop "$work/slurm"
    if [ $code = 0 ]; then rm -rf "$work"; else echo "FAILED; see $work" >&2; fi
}

fail() {
    echo "error: $1" >&2
    exit 1
}

snakemake() { # FOLDER TARGET OPTION...: the workflow at smoke scale, in a folder of its own
    local folder=$1 target=$2
    shift 2
    "$python" -m snakemake --snakefile "$root/Snakefile" --directory "$folder" "$@" \
        --config scale=smoke "papers=$papers" -- "$target"
}

slurm() { # FOLDER TARGET: the same through Slurm
    snakemake "$1" "$2" --workflow-profile "$root/rules/profiles/slurm" "${polling[@]}" > "$1.log" 2>&1
}

running() { # STAGE: wait for a running job of a stage; its id and node
    local found
    for _ in $(seq 600); do
        found=$(squeue --noheader --states=R --format='%i %N %k' | grep "$1" || true)
        [ -z "$found" ] || { echo "$found" && return; }
        sleep 0.5
    done
    fail "no job of $1 within 5 minutes"
}

tree() { # PID...: these processes and all below them
    for pid; do
        echo "$pid"
        # shellcheck disable=SC2046
        tree $(pgrep -P "$pid" || true)
    done
}

smoke() {
    local started=$SECONDS folder=$work/smoke
    slurm "$folder" all || fail "smoke: snakemake failed, see $folder.log"
    echo "smoke: $papers in $((SECONDS - started)) s; the claims:"
    grep -E '^\w+: [0-9]+ of [0-9]+ claims' "$folder.log"
    for node in n1 n2; do
        jobs=$(scontrol --oneliner show jobs | grep -c "NodeList=$node ") || fail "smoke: none on $node"
        gpus=$(scontrol --oneliner show jobs | grep "NodeList=$node " | grep -c "TresPerJob=gres:gpu:1") ||
            fail "smoke: no job on $node asked for a GPU"
        echo "smoke: $jobs jobs on $node, $gpus of them with a GPU"
    done
    slurm "$folder" all
    grep -q "Nothing to be done" "$folder.log" || fail "smoke: a second run did something"
    echo "smoke: a second run does nothing"
}

kill_node() {
    local folder=$work/kill job node
    snakemake "$work/local" toy_superposition -c2 > "$work/local.log" 2>&1
    slurm "$folder" toy_superposition &
    read -r job node _ <<< "$(running toy_superposition_superposition)"
    sleep 4 # it is at work
    # shellcheck disable=SC2046
    kill -KILL $(cat "$work/slurm/slurmd-$node.pid") $(tree $(pgrep -f "^slurmstepd: \[$job\."))
    scontrol update nodename="$node" state=down reason=killed
    echo "kill: killed $node with job $job"
    wait $! || fail "kill: snakemake failed, see $folder.log"
    scontrol show job "$job" | grep -q "JobState=NODE_FAIL" || fail "kill: job $job did not die"
    (cd "$work/local/results" && find smoke -name '*.parquet' -o -name claims.csv -o -name metrics.json) |
        while read -r file; do
            cmp "$work/local/results/$file" "$folder/results/$file" || fail "kill: another $file"
            echo "$file"
        done > "$work/compared"
    echo "kill: the run ended right; $(wc -l < "$work/compared") files have the bytes of a local run"
    slurmd -N "$node"
}

cancel() {
    local folder=$work/cancel run job
    slurm "$folder" toy_superposition &
    run=$!
    read -r job _ <<< "$(running toy_superposition_superposition)"
    kill -INT -- -$run
    ! wait $run || fail "cancel: snakemake did not stop"
    for _ in $(seq 30); do
        [ -n "$(squeue --noheader)" ] || break
        sleep 1
    done
    [ -z "$(squeue --noheader)" ] || fail "cancel: jobs are left: $(squeue)"
    scontrol show job "$job" | grep -q "JobState=CANCELLED" || fail "cancel: job $job was not cancelled"
    echo "cancel: job $job was cancelled, none is left"
    slurm "$folder" toy_superposition || fail "cancel: the next run failed, see $folder.log"
    echo "cancel: the next run ended right"
}

trap finish EXIT
mkdir "$work/slurm"
"$here/cluster.sh" start "$work/slurm"
for test in "${@:-smoke kill cancel}"; do
    for name in $test; do
        case $name in
            smoke | cancel) "$name" ;;
            kill) kill_node ;;
            *) fail "no test '$name': smoke, kill, cancel" ;;
        esac
    done
done
