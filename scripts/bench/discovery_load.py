"""Backends that answer with their address, and clients that read it.

Used by the figures of member discovery. Run as a program, it is the backends: one listener
for all addresses of 127.0.0.0/8. A backend sends its address and a line feed, then echoes
until the client closes.
"""

import selectors
import socket
import sys
import threading
import time

# Pause of a client thread between two sessions, in seconds.
PAUSE = 0.003

# Client threads.
THREADS = 2

# Longest time of a session until the answer, in seconds.
PATIENCE = 10


def serve():
    """Serves until standard input ends. Prints the port first."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", 0))
    listener.listen(4096)
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(sys.stdin, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listener:
                welcome(listener, waiting)
            elif key.fileobj is sys.stdin:
                return
            elif not echo(key.fileobj):
                waiting.unregister(key.fileobj)
                key.fileobj.close()


def welcome(listener, waiting):
    for _ in range(64):
        try:
            session, _ = listener.accept()
        except OSError:
            return
        session.setblocking(False)
        try:
            session.send(session.getsockname()[0].encode() + b"\n")
        except OSError:
            session.close()
            continue
        waiting.register(session, selectors.EVENT_READ)


def echo(session):
    """Returns whether the session stays open."""
    try:
        data = session.recv(4096)
        return bool(data) and session.send(data) > 0
    except BlockingIOError:
        return True
    except OSError:
        return False


class Seen:
    """The sessions that one backend answered: their number, and when the first and the last
    answer arrived."""

    def __init__(self, now):
        self.count, self.first, self.last = 1, now, now


class Clients:
    """Opens short sessions, about 500 per second, and keeps those that `keep` names."""

    def __init__(self, port):
        self.port = port
        self.seen, self.keep, self.kept = {}, set(), {}
        self.failed, self.failures = 0, []
        self.changed = threading.Condition()
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(THREADS)]
        for thread in self.threads:
            thread.start()

    def run(self):
        while not self.stopping.wait(PAUSE):
            session = socket.socket()
            session.settimeout(PATIENCE)
            try:
                session.connect(("127.0.0.1", self.port))
                name = session.recv(64).decode().strip()
                if not name:
                    raise OSError("closed without an answer")
            except OSError as error:
                session.close()
                with self.changed:
                    self.failed += 1
                    self.failures = (self.failures + [str(error)])[:5]
                continue
            now = time.monotonic()
            with self.changed:
                if name in self.keep:
                    self.keep.remove(name)
                    self.kept[name] = session
                    session = None
                if name in self.seen:
                    self.seen[name].count += 1
                    self.seen[name].last = now
                else:
                    self.seen[name] = Seen(now)
                    self.changed.notify_all()
            if session:
                session.close()

    def sessions(self):
        with self.changed:
            return sum(seen.count for seen in self.seen.values())

    def wait_for(self, name, patience):
        """Waits for the first session of a backend. Returns when its answer arrived, or None."""
        with self.changed:
            self.changed.wait_for(lambda: name in self.seen, patience)
            return self.seen[name].first if name in self.seen else None

    def last(self, name):
        """Returns when the last answer of a backend arrived."""
        with self.changed:
            return self.seen[name].last

    def cut(self):
        """Exchanges a message in each kept session. Returns how many were cut."""
        found = 0
        for session in self.kept.values():
            try:
                session.sendall(b"still open")
                found += session.recv(64) != b"still open"
            except OSError:
                found += 1
            session.close()
        self.kept = {}
        return found

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join(PATIENCE + 1)


if __name__ == "__main__":
    serve()
