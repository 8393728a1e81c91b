"""Echoes on 127.0.0.1:PORT and keeps every connection open: a backend for idle sessions."""
import resource, select, socket, sys

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", int(sys.argv[1])))
listener.listen(4096)
listener.setblocking(False)
epoll = select.epoll()
epoll.register(listener, select.EPOLLIN)
open_connections = {}
while True:
    for fd, _ in epoll.poll():
        if fd == listener.fileno():
            try:
                connection, _ = listener.accept()
            except OSError:
                continue
            open_connections[connection.fileno()] = connection
            epoll.register(connection, select.EPOLLIN)
            continue
        connection = open_connections[fd]
        try:
            data = connection.recv(4096)
            if data:
                connection.sendall(data)
        except OSError:
            data = b""
        if not data:
            epoll.unregister(fd)
            del open_connections[fd]
            connection.close()
