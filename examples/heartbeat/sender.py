#!/usr/bin/env python3
"""Sends heartbeats for a backend, with the standard library of Python only.

    examples/heartbeat/sender.py TO POOL NAME ADDRESS KEY_ID KEY_FILE [COUNT]
    examples/heartbeat/sender.py 10.0.0.5:7946 web a 10.0.0.11:8080 1 /etc/tidegate/hb.key

It reports "ready" until it gets SIGTERM or SIGINT, then "stopping". Use it as an example for
other languages. docs/heartbeats.md has the format.
"""
import hashlib, hmac, ipaddress, signal, socket, struct, sys, time

STARTING, READY, DRAINING, STOPPING = 1, 2, 3, 4
INTERVAL_MS = 100


def datagram(pool, name, ip, port, key_id, key, incarnation, sequence, state,
             weight=1, in_flight=0, load=0):
    ip = ipaddress.ip_address(ip)
    body = struct.pack(">4sBBBBIQQQIIHHH", b"TGHB", 1, 0, state, ip.version, key_id, incarnation,
                       sequence, int(time.time() * 1000), INTERVAL_MS, in_flight, weight, load, port)
    body += ip.packed
    for text in pool.encode(), name.encode():
        body += bytes([len(text)]) + text
    return body + hmac.digest(key, body, hashlib.sha256)[:16]


def split(address):
    ip, port = address.rsplit(":", 1)
    return ip.strip("[]"), int(port)


def read_key(path):
    key = open(path, "rb").read()
    text = key.rstrip(b" \t\r\n\f")
    return text if all(32 <= byte <= 126 for byte in text) else key.removesuffix(b"\n")


def main(to, pool, name, address, key_id, key_file, count=sys.maxsize):
    key, started = read_key(key_file), int(time.time() * 1000)
    family = socket.AF_INET6 if to.startswith("[") else socket.AF_INET
    sender = socket.socket(family, socket.SOCK_DGRAM)
    sequence = 0

    def send(state):
        nonlocal sequence
        sequence += 1
        sender.sendto(datagram(pool, name, *split(address), int(key_id), key, started, sequence,
                               state), split(to))

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for _ in range(int(count)):
            send(READY)
            time.sleep(INTERVAL_MS / 1000)
    except KeyboardInterrupt:
        # Three, because datagrams can get lost.
        for _ in range(3):
            send(STOPPING)
            time.sleep(0.01)


main(*sys.argv[1:8])
