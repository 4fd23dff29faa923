#!/usr/bin/env bash
# snakemake 9.27.1: the later in a run, the more often a second it looks for jobs to start.
#
# Guess: while one job runs and another waits for its core, the scheduler looks about once a second,
#        however many jobs have ended before.
# Seen:  under its limit of starts, which is on by default (--max-jobs-per-timespan 100/1s), each
#        look sets a timer for another look a second later, for as long as any job waits, and each
#        job that ends begins such a chain of its own, which no other look ends. While one job slept
#        for 15 seconds and one waited, it looked 15 times when nothing had run before, and about
#        900 times, 61 a second, when 60 short jobs had. Each look evaluates params and resources of
#        all waiting jobs: of 401 jobs of a real graph, 45 s of processor time in 3 minutes in place
#        of 15 s.
# Here:  local runs take the default limit off (pipeline/papers/rule_helpers.py,
#        start_at_any_rate); tests/papers/test_rule_helpers.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet snakemake==9.27.1
export XDG_CACHE_HOME=$work/cache
cat > "$work/Snakefile" << 'SNAKE'
N = int(config["shorts"])


rule all:
    input:
        expand("short{i}", i=range(N)),
        "long",
        "waiting",


rule short:
    output:
        "short{i}",
    priority: 3
    shell:
        "touch {output}"


rule long:
    output:
        "long",
    priority: 2
    shell:
        "sleep 15; touch {output}"


rule waiting:
    output:
        "waiting",
    priority: 1
    shell:
        "touch {output}"
SNAKE
looks() { # after so many short jobs: how often the scheduler looked for jobs to start
    mkdir "$work/$1"
    "$work/venv/bin/snakemake" --snakefile "$work/Snakefile" --directory "$work/$1" --cores 1 \
        --scheduler greedy --verbose --config shorts="$1" > "$work/log" 2>&1
    # one line a look: from the start of the long job to its end
    sed -n '/rule long:/,/rule waiting:/p' "$work/log" | grep -c "Waiting for running jobs"
}
before=$(looks 0)
after=$(looks 60)
echo "looks while one job sleeps for 15 s and one waits: $before after no job, $after after 60"
test "$before" -lt 40 && test "$after" -gt 400
