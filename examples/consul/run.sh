#!/usr/bin/env bash
# Two services in Consul, found by Tidegate: one instance is killed, one is added.
#
# Environment, all optional:
#   CONSUL    address of a Consul agent (default 127.0.0.1:8500). If none answers there, the
#             script starts the double of this repository.
#   TIDEGATE  the program (default: the debug build of this repository).
#   USERS, ORDERS  addresses of the two frontends (default 127.0.0.1:8081 and :8082).
#
# The script checks each step, exits with 1 if one fails, and ends only what it started.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
consul=${CONSUL:-127.0.0.1:8500}
users=${USERS:-127.0.0.1:8081}
orders=${ORDERS:-127.0.0.1:8082}
work=$(mktemp -d)
pids=()
registered=()

fail() {
    echo "run.sh: $*" >&2
    tail -n 20 "$work"/*.log >&2 2>/dev/null || true
    exit 1
}

finish() {
    for id in "${registered[@]}"; do
        curl -s -o /dev/null -m 5 -X PUT "http://$consul/v1/agent/service/deregister/$id" || true
    done
    for pid in "${pids[@]}"; do
        kill -KILL "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap finish EXIT

# Runs a command until it succeeds, at most for 15 s.
eventually() {
    for _ in $(seq 150); do
        if "$@"; then return; fi
        sleep 0.1
    done
    fail "not after 15 s: $*"
}

# Starts a service and registers it: start NAME ID
start() {
    local name=$1 id=$2 port
    python3 "$here/service.py" "$id" >"$work/$id.port" 2>"$work/$id.log" &
    pids+=($!)
    eval "pid_${id//-/_}=$!"
    eventually test -s "$work/$id.port"
    port=$(cat "$work/$id.port")
    curl -s -S -f -X PUT --data @- "http://$consul/v1/agent/service/register" <<END || fail "cannot register $id"
{
  "ID": "$id",
  "Name": "$name",
  "Address": "127.0.0.1",
  "Port": $port,
  "Check": {
    "HTTP": "http://127.0.0.1:$port/",
    "Interval": "1s",
    "Timeout": "1s",
    "DeregisterCriticalServiceAfter": "1m"
  }
}
END
    registered+=("$id")
}

# The instances that answer 20 requests, sorted: answers ADDRESS
answers() {
    for _ in $(seq 20); do
        curl -s -S -f -m 5 "http://$1/" || echo "failed"
    done | sort -u | tr '\n' ' '
}

answered_by() {
    [ "$(answers "$1" 2>/dev/null)" = "$2 " ]
}

status() {
    "$tidegate" status --config "$work/tidegate.toml"
}

# --- Consul, or the double ---
if ! curl -s -f -m 2 -o /dev/null "http://$consul/v1/status/leader"; then
    [ -z "${CONSUL:-}" ] || fail "no Consul agent answers at $consul"
    echo "No Consul agent answers at $consul; starting the double."
    (cd "$root" && cargo build -q -p tidegate-discovery --example consul_double)
    "${CARGO_TARGET_DIR:-$root/target}/debug/examples/consul_double" 127.0.0.1:0 >"$work/double.log" &
    pids+=($!)
    eventually grep -q listening "$work/double.log"
    consul=$(sed -n 's/listening at //p' "$work/double.log")
fi
tidegate=${TIDEGATE:-}
if [ -z "$tidegate" ]; then
    (cd "$root" && cargo build -q)
    tidegate=${CARGO_TARGET_DIR:-$root/target}/debug/tidegate
fi

# --- Two services ---
start user-service user-1
start user-service user-2
start order-service order-1

# --- Tidegate ---
{
    echo "[admin]"
    echo "listen = \"unix:$work/admin.sock\""
    sed -e "s/127.0.0.1:8081/$users/" -e "s/127.0.0.1:8082/$orders/" \
        -e "s/127.0.0.1:8500/$consul/" "$here/tidegate.toml"
} >"$work/tidegate.toml"
"$tidegate" check "$work/tidegate.toml"
"$tidegate" run --config "$work/tidegate.toml" 2>"$work/tidegate.log" &
pids+=($!)

eventually answered_by "$users" "user-1 user-2"
eventually answered_by "$orders" "order-1"
echo
echo "== Before =="
status

# --- One instance is killed: no request fails ---
kill -KILL "$pid_user_1"
wait "$pid_user_1" 2>/dev/null || true
seen=$(answers "$users")
[ "$seen" = "user-2 " ] || fail "after the end of user-1: $seen"
reported_critical() { status | grep -q "^$1 .*consul: critical"; }
eventually reported_critical user-1

# --- One instance is added ---
start user-service user-3
eventually answered_by "$users" "user-2 user-3"
answered_by "$orders" "order-1" || fail "order-service changed"

echo
echo "== After: user-1 was killed, user-3 was added =="
status
echo
echo "ok: no request failed"
