#!/usr/bin/env bash
# A real SLURM of two nodes, n1 and n2, on this host: `tests/slurm/cluster.sh up|down [FOLDER]`, as root.
#
# `up` starts munged, slurmctld and two slurmd in FOLDER (default /tmp/swim-slurm), waits until both nodes are idle and
# prints the line that makes srun, sbatch and scontrol talk to them. `down` stops what `up` started, by pid files.
# Needs: apt-get install slurmctld slurmd slurm-client munge. An installed SLURM is left alone: own ports, own key.
set -euo pipefail
command="${1:-}"
folder="$(readlink -m "${2:-/tmp/swim-slurm}")"
export SLURM_CONF="$folder/slurm.conf" PATH="$PATH:/usr/sbin:/sbin"
pids=("$folder"/run/{slurmd.n1,slurmd.n2,slurmctld,munged}.pid)

alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

# Both nodes idle or at work, as slurmctld says; without its file sinfo would look for one in the network for a minute.
ready() { [ -f "$SLURM_CONF" ] && [ "$(sinfo --noheader --Node --format=%t 2>/dev/null | grep -cE '^(idle|mix|alloc)$')" -eq 2 ]; }

down() {
  local pid file
  for file in "${pids[@]}"; do
    if ! alive "$file"; then continue; fi
    pid="$(cat "$file")"
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -KILL "$pid" 2>/dev/null || true
  done
  rm -rf "$folder"
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

configure() {
  local host port=16810
  host="$(hostname -s)"
  # Three ports in a row that nobody listens at: another such cluster may be up.
  while listens "$port" || listens $((port + 1)) || listens $((port + 2)); do port=$((port + 3)); done
  mkdir -p "$folder"/{run,log,state,spool.n1,spool.n2}
  chmod 755 "$folder" "$folder"/*
  # A key of its own: 128 random bytes, readable by its owner alone.
  (umask 077 && head -c 128 /dev/urandom > "$folder/munge.key")
  cat > "$SLURM_CONF" <<END
ClusterName=swim
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until credentials of its first start have expired; SLURM's default is 120 s.
AuthInfo=socket=$folder/run/munge.socket,cred_expire=10
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
# No cgroups needed.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptMode=OFF
KillWait=30
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 State=UNKNOWN
PartitionName=p Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
}

up() {
  if ready; then return; fi
  for tool in munged slurmctld slurmd sinfo; do
    command -v "$tool" >/dev/null ||
      { echo "error: no $tool; apt-get install slurmctld slurmd slurm-client munge" >&2; exit 2; }
  done
  [ "$(id -u)" -eq 0 ] || { echo "error: slurmd runs jobs as their users and needs root" >&2; exit 2; }
  down
  configure
  # --force: the folder's parents may be writable by others, as /tmp is.
  munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" \
    --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/state/munge.seed" \
    2>>"$folder/log/munged.err"
  slurmctld -f "$SLURM_CONF"
  slurmd -f "$SLURM_CONF" -N n1
  slurmd -f "$SLURM_CONF" -N n2
  for _ in $(seq 300); do
    if ready; then return; fi
    sleep 0.2
  done
  echo "error: no two idle nodes after a minute; the logs end with" >&2
  tail -n 5 "$folder"/log/* >&2
  down
  exit 1
}

case "$command" in
  up) up; echo "export SLURM_CONF=$SLURM_CONF" ;;
  down) down ;;
  *) echo "usage: tests/slurm/cluster.sh up|down [FOLDER]" >&2; exit 2 ;;
esac
