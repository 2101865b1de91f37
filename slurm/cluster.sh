#!/usr/bin/env bash
# A real one-node SLURM cluster on this machine, for experiments and for the tests. Needs neither systemd nor cgroups.
#   apt-get install -y --no-install-recommends slurm-wlm munge
#   eval "$(slurm/cluster.sh up /tmp/cluster)"    # start it and export SLURM_CONF
#   sinfo
#   slurm/cluster.sh down /tmp/cluster            # stop what `up` started, and nothing else
# `up` reads CPUS=4 and KILL_WAIT=5 (seconds between SIGTERM and SIGKILL). Partitions: main, low, high. A job in high
# preempts jobs in low, which are requeued after GRACE_TIME=20 seconds.
set -euo pipefail

PATH=$PATH:/usr/sbin # not in every user's PATH
DAEMONS=(slurmd slurmctld munged) # in stopping order

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

# The pid of a daemon running for this folder; a stale pid file may point to an unrelated process.
running() {
    local pid
    pid=$(cat "$dir/$1.pid" 2>/dev/null) || return 1
    [[ $(tr '\0' ' ' <"/proc/$pid/cmdline") == *"$dir/"* ]] 2>/dev/null && echo "$pid"
}

free_port() {
    local port
    while port=$((RANDOM % 20000 + 10000)); do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo "$port"
}

configure() {
    local host user
    host=$(hostname -s)
    user=$(id -un)
    cat >"$dir/slurm.conf" <<CONF
ClusterName=one-node
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$user
SlurmdUser=$user
AuthInfo=socket=$dir/munged.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=5
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=${KILL_WAIT:-5}
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=${CPUS:-4} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=$host MaxTime=INFINITE PriorityTier=1 GraceTime=${GRACE_TIME:-20}
PartitionName=high Nodes=$host MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
}

up() {
    local program
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || fail "$program is not installed: apt-get install slurm-wlm munge"
    done
    for program in "${DAEMONS[@]}"; do
        ! running "$program" >/dev/null || fail "$program already runs in $dir; stop it with: slurm/cluster.sh down $dir"
    done
    mkdir -p "$dir/state" "$dir/spool"
    # munged refuses a socket in a folder writable by others; socket paths have a length limit.
    chmod 755 "$dir"
    ((${#dir} < 90)) || fail "$dir is too long for a socket path."
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
    munged --force --key-file="$dir/munge.key" --socket="$dir/munged.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" >"$dir/munged.out" 2>&1 ||
        fail "munged did not start: $(cat "$dir/munged.out")"
    configure
    export SLURM_CONF=$dir/slurm.conf
    slurmctld -f "$SLURM_CONF" -c >"$dir/slurmctld.out" 2>&1 || fail "slurmctld did not start: see $dir/slurmctld.out"
    slurmd -f "$SLURM_CONF" -N "$(hostname -s)" >"$dir/slurmd.out" 2>&1 || fail "slurmd did not start: see $dir/slurmd.out"
    for ((i = 0; i < 150; i++)); do
        if [[ $(sinfo --noheader --partition=main --format=%t 2>/dev/null) == idle ]]; then
            echo "export SLURM_CONF='$SLURM_CONF'"
            return
        fi
        sleep 0.2
    done
    fail "the node did not become idle: $(sinfo --noheader --long --Node 2>&1 | head -1); logs are in $dir"
}

down() {
    local daemon pid
    [[ -f $dir/slurm.conf ]] || fail "no cluster in $dir."
    export SLURM_CONF=$dir/slurm.conf
    # Jobs outlive their slurmd.
    if running slurmctld >/dev/null && running slurmd >/dev/null; then
        squeue --noheader --format=%A | xargs --no-run-if-empty scancel 2>/dev/null || true
        for ((i = 0; i < 100; i++)); do
            [[ -n $(squeue --noheader 2>/dev/null) ]] || break
            sleep 0.2
        done
    fi
    for daemon in "${DAEMONS[@]}"; do
        pid=$(running "$daemon") || continue
        kill "$pid"
        for ((i = 0; i < 100; i++)); do
            running "$daemon" >/dev/null || break
            sleep 0.1
        done
        ! running "$daemon" >/dev/null || fail "$daemon ($pid) did not exit."
    done
}

[[ $# == 2 && ($1 == up || $1 == down) ]] || fail "usage: slurm/cluster.sh up DIR | down DIR"
[[ $1 == down ]] || mkdir -p "$2"
[[ -d $2 ]] || fail "no such folder: $2."
dir=$(realpath "$2")
"$1"
