# Replaces HAProxy with the commands of docs/quickstart.md, and removes the package. tests/package.rs
# calls it with root.sh, after the definitions of `first_use` and of the file CONFIGURATION.
for address in 10.0.0.11 10.0.0.12; do
  ip address add "$address/32" dev lo
  python3 -c '
import socket, sys
listener = socket.create_server((sys.argv[1], 8080))
while True:
    client = listener.accept()[0]
    client.sendall(sys.argv[1].encode())
    client.close()' "$address" &
done
# The backend that answers a client of the frontend.
answer() { bash -c 'exec 3<>/dev/tcp/127.0.0.1/80 && cat <&3' 2>/dev/null || true; }
# The program that listens at the frontend, once both backends have answered.
served() {
  for address in 10.0.0.11 10.0.0.12; do
    until [ "$(answer)" = "$address" ]; do sleep 0.05; done
  done
  ss -Hltnp 'sport = :80 and src = 0.0.0.0' | grep -o '"[a-z]*"' | sort -u
}

printf '%s\n' "$CONFIGURATION" >/etc/haproxy/haproxy.cfg
systemctl start haproxy
echo "before: $(served)"
first_use >commands 2>&1 || { cat commands; exit 1; }
echo "after: $(served)"
# The status of the last command may be from before the first result of a probe.
echo "pools in the status: $(grep -c '^POOL' commands)"
echo "status: $(tidegate status | grep '^POOL')"
sed -n 's/^.*haproxy.cfg:/haproxy.cfg:/p; /^[0-9]* lines: /p' commands
echo "units: $(systemctl is-enabled haproxy tidegate 2>/dev/null | tr '\n' ' ')"

echo "user: $(getent passwd tidegate | cut -d: -f6,7)"
echo "runs as: $(ps -o user= -C tidegate | sort -u)"
echo "conffiles: $(dpkg-query -W -f '${Conffiles}' tidegate | grep -c /etc/)"
systemd-analyze verify --man=no /lib/systemd/system/tidegate.service >&2
for page in man/man1/tidegate-run.1.gz man/man5/tidegate.toml.5.gz \
  bash-completion/completions/tidegate zsh/vendor-completions/_tidegate \
  fish/vendor_completions.d/tidegate.fish; do
  test -s "/usr/share/$page" || echo "no $page"
done

dpkg -r tidegate >&2
echo "stopped: $(answer)"
echo "kept: $(grep -c frontend.web /etc/tidegate/tidegate.toml)"
dpkg -P tidegate >&2
getent passwd tidegate && echo "the user stays"
for path in /etc/tidegate /var/lib/tidegate /var/log/tidegate /usr/bin/tidegate; do
  if test -e "$path"; then echo "$path stays"; fi
done
echo "package: $(dpkg-query -W -f '${Status}' tidegate 2>/dev/null || echo unknown)"
