#!/usr/bin/env bash
# A Slurm of two nodes, n1 and n2, on this machine:   cluster.sh start|stop FOLDER
#
# Needs root and Debian's slurmctld, slurmd, slurm-client and munge. FOLDER takes its state and its
# logs. The configuration has to lie in /etc/slurm, where srun inside a job looks for it; one that
# lies there already is left alone, and nothing starts.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mark="# of $here"

start() {
    mkdir -p "$1" && cd "$1"
    if [ -e /etc/slurm/slurm.conf ]; then
        echo "error: /etc/slurm/slurm.conf is there already; stop or remove that Slurm first" >&2
        exit 1
    fi
    mkdir -p state spool-n1 spool-n2 /etc/slurm
    for gpu in gpu0 gpu1; do [ -e $gpu ] || mknod $gpu c 1 3; done # /dev/null under another name
    for file in slurm.conf gres.conf; do
        { echo "$mark" && sed "s|HOST|$(hostname -s)|; s|FOLDER|$PWD|" "$here/$file"; } > "/etc/slurm/$file"
    done
    head -c 1024 /dev/urandom > munge.key && chmod 600 munge.key
    munged --force --socket="$PWD/munge.socket" --key-file="$PWD/munge.key" --pid-file="$PWD/munged.pid" \
        --log-file="$PWD/munged.log" --seed-file="$PWD/munged.seed"
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --Node --format='%T' 2> /dev/null | grep -c idle)" = 2 ] && exit 0
        sleep 1
    done
    echo "error: the nodes did not come up within a minute; see the logs in $PWD" >&2
    exit 1
}

stop() {
    for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do
        [ -e "$1/$daemon.pid" ] || continue
        kill "$(cat "$1/$daemon.pid")" || rm "$1/$daemon.pid"
        while [ -e "$1/$daemon.pid" ]; do sleep 0.2; done # a daemon's last act
    done
    if grep -qsxF "$mark" /etc/slurm/slurm.conf; then rm /etc/slurm/slurm.conf /etc/slurm/gres.conf; fi
}

"$@"
