#!/usr/bin/env bash
# One study as a Slurm job: Ray on all nodes of the job, the driver on the first, everything gone when the study ends.
# Submit from the folder with the study file; the account and partition are your site's:
#
#   sbatch --nodes=4 --gpus-per-node=4 --time=24:00:00 cluster/slurm.sh study.yaml /shared/peftsearch [OPTIONS of run]
#
# Where time runs out or a node is lost, the job goes back into the queue and the study continues; the same sbatch line,
# given again, continues it as well.
#SBATCH --job-name=peftsearch
#SBATCH --ntasks-per-node=1
# Whole nodes: when the study ends, Ray stops all of your Ray processes on them, also those of other jobs.
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
set -euo pipefail

study=$1
storage=$2
shift 2
environment=${PEFTSEARCH_ENVIRONMENT:-$HOME/peftsearch-env}

# A token for this job alone, in a file that no other user can read: on a cluster that people share, whoever reaches
# Ray's ports runs code as you.
token=$HOME/.peftsearch/token-$SLURM_JOB_ID
ended=$token-ended
driver=$token-driver
trap 'rm -f "$token" "$ended" "$driver"' EXIT
mkdir -p "$HOME/.peftsearch"
# A job that lost its node kept its number, and what its script could not take away.
rm -f "$ended" "$driver"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
export PATH=$environment/bin:$PATH

# Slurm's own --requeue is for lost nodes; two minutes before time runs out, --signal says so to this script. The study
# stops first, and writes what it trains: a job that goes back into the queue is ended at once, Ray with it.
# shellcheck disable=SC2329 # the trap calls it
requeue() {
  out_of_time=yes
  if [ -s "$driver" ]; then
    kill -TERM "$(cat "$driver")" 2>/dev/null || true
    # Until its shell below has said how it ended.
    for _ in $(seq 90); do
      [ -e "$driver" ] || break
      sleep 1
    done
  fi
  [ -e "$ended" ] || scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1

# Many nodes that import Ray from a cold network file system take longer than the 30 seconds that Ray would wait.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

# srun starts the same command on every node: the first becomes the head, and runs what follows "--". A port by the
# job's number, so that a node that is still being cleaned up is not met.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$("$environment/bin/python" -c 'import socket, sys; print(socket.gethostbyname(sys.argv[1]))' "$head")
# Debian calls a machine 127.0.1.1 in its own /etc/hosts; this script runs on the first node, which the others look for.
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && [ "${address%%.*}" = 127 ]; then
  address=$(hostname -I | cut -d " " -f 1)
fi
# shellcheck disable=SC2016 # the inner shell's
srun --kill-on-bad-exit=1 ray symmetric-run \
  --address "$address:$((20000 + SLURM_JOB_ID % 10000))" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --dashboard-host=127.0.0.1 --disable-usage-stats \
  -- bash -c '"${@:2}" & echo $! >"$1"; wait $! && touch "$0"; status=$?; rm -f "$1"; exit $status' "$ended" "$driver" \
  peftsearch run "$study" --address auto --storage "$storage" "$@" &
running=$!

# A signal ends the first wait.
status=0
wait "$running" || status=$?
if [ "${out_of_time:-}" ]; then
  status=0
  wait "$running" || status=$?
fi
# symmetric-run (Ray 2.60) exits with 0 where Ray did not start.
if [ "$status" = 0 ] && [ ! -e "$ended" ] && [ -z "${out_of_time:-}" ]; then
  echo "Ray did not start on all nodes, so the study did not run: see above" >&2
  status=1
fi
exit "$status"
