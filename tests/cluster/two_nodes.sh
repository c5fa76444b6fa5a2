#!/usr/bin/env bash
# A head and a worker of Ray in two network namespaces, with the commands of a launcher file. Run by test_cluster_runs.py
# under `unshare --mount --net --pid`, which also ends all that is started here. HEAD_COMMAND, WORKER_COMMAND,
# TOKEN_COMMANDS and ASK_COMMANDS come in the environment.
set -euo pipefail

# Ray's folder alone: the Python environment may itself be somewhere in /tmp.
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
export HOME=/tmp/ray/home
mkdir -p "$HOME"
cd "$HOME"

# The worker's network; both have a default route, by which Ray finds its own address.
unshare --net sleep 3600 &
network=$!
worker() { nsenter --target "$network" --net "$@"; }
ip link set lo up
ip link add head type veth peer name worker
until ip link set worker netns "$network" 2>/dev/null && worker ip link show worker >/dev/null 2>&1; do sleep 0.1; done
ip addr add 10.77.0.1/24 dev head
ip link set head up
ip route add default via 10.77.0.2
worker ip link set lo up
worker ip addr add 10.77.0.2/24 dev worker
worker ip link set worker up
worker ip route add default via 10.77.0.1

bash -euo pipefail -c "$TOKEN_COMMANDS" >/dev/null
echo "token-mode $(stat -c %a "$HOME/.ray/auth_token")"

# Ray gives a node 30 seconds to start, which on two busy cores is not always enough: ask again, as `ray up` would.
try() {
  for attempt in 1 2 3; do
    echo "attempt $attempt" >>/tmp/ray/start.log
    if "$@" >>/tmp/ray/start.log 2>&1; then return; fi
    ray stop --force >/dev/null 2>&1 || true
  done
  cat /tmp/ray/start.log
  return 1
}
try bash -c "$HEAD_COMMAND"
RAY_HEAD_IP=10.77.0.1
export RAY_HEAD_IP
# Not again where it fails: stopping it would stop the head.
worker bash -c "$WORKER_COMMAND" >/tmp/ray/worker.log 2>&1 || { cat /tmp/ray/worker.log; exit 1; }

status() { curl --silent --output /dev/null --max-time 10 --write-out '%{http_code}' "$@" || true; }
dashboard=http://127.0.0.1:8265/api/jobs/
echo "http-without-token $(status $dashboard)"
echo "http-wrong-token $(status -H 'Authorization: Bearer wrong' $dashboard)"
echo "http-with-token $(status -H "Authorization: Bearer $(cat "$HOME/.ray/auth_token")" $dashboard)"
echo "http-from-worker $(worker curl --silent --output /dev/null --max-time 10 --write-out '%{http_code}' \
  http://10.77.0.1:8265/ || true)"

nodes='import ray; ray.init(address="10.77.0.1:6379", logging_level="ERROR"); print("nodes", len(ray.nodes()))'
RAY_AUTH_MODE=token python -c "$nodes"
if RAY_AUTH_MODE=disabled timeout 60 python -c "$nodes" >/dev/null 2>&1; then echo "driver-without-token admitted"; else
  echo "driver-without-token refused"
fi
if RAY_AUTH_MODE=token bash -euo pipefail -c "$ASK_COMMANDS" >/tmp/ray/ask.log 2>&1; then echo "asked yes"; else
  tail -n 5 /tmp/ray/ask.log
fi

ss -H -ltn | awk '{ print "head-listens", $4 }'
worker ss -H -ltn | awk '{ print "worker-listens", $4 }'
