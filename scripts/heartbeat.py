#!/usr/bin/env python3
"""Sends heartbeats for a backend, with nothing but Python's standard library.

    scripts/heartbeat.py TO POOL NAME ADDRESS KEY_ID KEY_FILE [COUNT]
    scripts/heartbeat.py 10.0.0.5:7946 web a 10.0.0.11:8080 1 /etc/tidegate/hb.key

An example to build on, in any language: see "Format" in src/heartbeat/wire.
"""
import hashlib, hmac, ipaddress, socket, struct, sys, time

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


to, pool, name, address, key_id, key_file = sys.argv[1:7]
count = int(sys.argv[7]) if len(sys.argv) > 7 else sys.maxsize
key = open(key_file, "rb").read()
text = key.rstrip(b" \t\r\n\f")
key = text if all(32 <= byte <= 126 for byte in text) else key.removesuffix(b"\n")
sender = socket.socket(socket.AF_INET6 if to.startswith("[") else socket.AF_INET, socket.SOCK_DGRAM)
started = int(time.time() * 1000)
for sequence in range(1, count + 1):
    sender.sendto(datagram(pool, name, *split(address), int(key_id), key, started, sequence, READY), split(to))
    time.sleep(INTERVAL_MS / 1000)
