# Boots systemd in the files of this host, under an overlay that takes every change, and runs a
# script there. tests/package.rs calls it in namespaces of its own. It changes nothing of the host.
#
#   root.sh WORK PACKAGE SCRIPT    WORK: an empty directory; SCRIPT: text for sh
set -eu
work=$1 package=$2 script=$3
mount --make-rprivate /
mount -t tmpfs tmpfs "$work"
mkdir "$work/changes" "$work/work" "$work/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/changes,workdir=$work/work" "$work/root"
cd "$work/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for directory in run tmp dev; do
  mount -t tmpfs tmpfs "$directory"
done
chmod 1777 tmp
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty dev/
# The unit of HAProxy mounts it.
touch dev/log
ip link set lo up
# No other service of the host starts.
rm -rf etc/systemd/system/*.wants lib/systemd/system/*.wants
printf '[Unit]\nDefaultDependencies=no\n' >etc/systemd/system/test.target
mkdir -p root/first
cp "$package" root/first/
mkdir old
pivot_root . old
umount -l old
(
  cd /root/first
  until systemctl list-units >/dev/null 2>&1; do sleep 0.05; done
  sh -euc "$script" || echo "the script fails with $?"
  systemctl exit --force
) </dev/null &
exec env container=test /lib/systemd/systemd --unit=test.target --log-target=null
