"""Boot a guest in namespaces of its own, next to a small network, and ask from inside what it made of its network.

The network: 192.0.2.0/24 on the first NIC and 198.51.100.0/24 on the second, each with a router (.1) that is a DHCP
server. Two DNS servers know `who.test` by different addresses, so that one sees who was asked.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import HANGS

MACS = ("aa:00:00:00:00:01", "aa:00:00:00:00:02")
OFFERED, SET = "10.1.1.1", "10.53.53.53"  # what the DNS server that DHCP offers says, and the one that is set
LEASES = ("192.0.2.100", "198.51.100.100")

# $1 the tree; $2 how many addresses to wait for; $3 the names of the guest's NICs
WORLD = r"""
set -eu
exec 3>&1 >&2
tree=$1 expected=$2 names=$3
mount -t tmpfs -o mode=755 tmpfs /run
touch /run/net
unshare --net=/run/net true
number=0
for name in $names; do
  ip link add "lan$number" type veth peer name "wan$number"
  ip link set "wan$number" netns /run/net
  nsenter --net=/run/net ip link set "wan$number" name "$name" address "aa:00:00:00:00:0$((number + 1))"
  # the first two as Ganeti sets them for a routed NIC
  sysctl -q "net.ipv4.conf.lan$number.proxy_arp=1" "net.ipv4.conf.lan$number.forwarding=1"
  sysctl -q "net.ipv6.conf.lan$number.accept_dad=0"
  python3 -c "$WHOLE" "lan$number"
  ip link set "lan$number" up
  number=$((number + 1))
done
ip link set lo up
ip link add uplink type veth peer name internet  # a node answers for every address that it would send there
ip link set internet up
ip link set uplink up
ip route add default dev uplink
if [ -n "$names" ]; then
  ip address add 192.0.2.1/24 dev lan0
  ip address add 192.0.2.53/24 dev lan0
  ip address add 203.0.113.1/32 dev lan0
  ip address add 2001:db8::1/64 dev lan0 nodad
  ip route add 203.0.113.9/32 dev lan0
  dhcp='--dhcp-range=192.0.2.100,192.0.2.100 --dhcp-authoritative --dhcp-leasefile=/run/leases'
  case $names in *' '*)
    ip address add 198.51.100.1/24 dev lan1
    dhcp="$dhcp --dhcp-range=198.51.100.100,198.51.100.100" ;;
  esac
  common='--conf-file=/dev/null --no-resolv --no-hosts --bind-interfaces --no-daemon --user=root'
  dnsmasq $common --port=0 --interface='lan*' --no-ping --log-dhcp --log-facility=/run/dhcp.log $dhcp \
    --dhcp-option=6,192.0.2.1 --pid-file=/run/1.pid &
  dnsmasq $common --pid-file=/run/2.pid --listen-address=192.0.2.1 --address=/who.test/10.1.1.1 &
  dnsmasq $common --pid-file=/run/3.pid --listen-address=192.0.2.53 --address=/who.test/10.53.53.53 &
fi
mkdir /run/cgroup
mount -t cgroup2 cgroup2 /run/cgroup
own=$(mktemp -d "/run/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/guest.XXXXXX")  # or guests remove each other's groups
(
  echo 0 >"$own/cgroup.procs"
  exec nsenter --net=/run/net unshare --mount --pid --ipc --uts --cgroup --fork --kill-child \
    bash -euc "$GUEST" guest "$tree" >/run/guest.log 2>&1
) &
unshare=$!
end() {
  kill -KILL $unshare
  wait $unshare || true
  for _ in $(seq 100); do find "$own" -depth -type d -exec rmdir {} + && break; sleep 0.05; done 2>/dev/null
}
trap end EXIT
inside() { nsenter --target "$init" --mount --pid --net --uts --ipc --root --wd -- "$@"; }
init=
for _ in $(seq 600); do
  ps=$(ps --ppid $unshare -o pid=,comm=) || true  # it may have no child yet
  init=$(printf '%s' "$ps" | sed -n 's/ *\([0-9]*\) \(systemd\|init\)$/\1/p')
  case $ps in
    *systemd) [ -S "/proc/$init/root/run/systemd/private" ] && break ;;
    *init) break ;;
  esac
  sleep 0.05
done
state_of() {
  case $ps in *systemd) inside systemctl is-system-running 2>/dev/null || true ;; *) echo running ;; esac
}
settled() {
  addresses=$(inside ip -o address show scope global)
  [ "$(printf '%s' "$addresses" | grep -c inet)" -ge "$expected" ] && ! printf '%s' "$addresses" | grep -q tentative
}
while [ $SECONDS -lt 120 ]; do  # since this shell has begun; a guest takes 2 to 10 where nothing else runs
  state=$(state_of)
  case $state in running | degraded | maintenance) settled && break ;; esac
  sleep 0.1
done
resolved() { [ "$expected" = 0 ] || inside getent ahostsv4 who.test 2>/dev/null | sed -n 's/ .*STREAM.*//p' | grep .; }
for _ in $(seq 20); do
  who=$(resolved) && break
  [ $SECONDS -lt 130 ] || break
  sleep 0.1
done
{
  printf '{"state": "%s", "who": "%s"' "$state" "${who:-}"
  printf ', "addresses": %s' "$(inside ip -j address show)"
  printf ', "routes": %s' "$(inside ip -4 -j route show default)"
  printf ', "routes6": %s}' "$(inside ip -6 -j route show default)"
} >&3
cat /run/dhcp.log || true
inside systemctl list-jobs --no-legend --no-pager || true
inside systemctl list-units --failed --no-legend --plain --no-pager || true
inside cat /etc/resolv.conf || true
inside journalctl --boot --no-pager --output=cat --lines=150 || true
eval "$ASK"
"""
# Sends whole checksums, as a network does: connman 1.41 reads no DHCP offer whose checksum a veth leaves to a card
WHOLE = """
import ctypes, fcntl, socket, struct, sys
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17  # linux/sockios.h, linux/ethtool.h
off = ctypes.create_string_buffer(struct.pack("II", ETHTOOL_STXCSUM, 0))
fcntl.ioctl(socket.socket(), SIOCETHTOOL, struct.pack("16sP", sys.argv[1].encode(), ctypes.addressof(off)))
"""
# What the first process of the guest does before it becomes the guest's init
GUEST = r"""
mount --bind "$1" "$1"
cd "$1"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys  # read-only: nobody waits for udev
mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
for directory in run dev tmp; do mount -t tmpfs -o mode=755 tmpfs $directory; done
for node in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 dev/${node%:*} c 1 ${node#*:}; done
mknod -m 666 dev/tty c 5 0
mknod -m 666 dev/rfkill c 10 242
mkdir -p dev/pts dev/shm dev/net
mknod -m 666 dev/net/tun c 10 200
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
# scripts of sysvinit know nothing of containers, and must not reach the machine
exec env -i container=imageos PATH=/usr/sbin:/usr/bin:/sbin:/bin \
  setpriv --bounding-set -sys_time,-sys_module,-sys_rawio chroot . /sbin/init
"""


@dataclass(frozen=True)
class Seen:
    """The guest's network, as its own programs show it."""

    state: str
    who: str  # the address of who.test
    addresses: dict[str, frozenset[str]]  # with prefix, by MAC: neither link-local nor temporary
    routes: frozenset[tuple[str, str]]  # default routes: gateway (empty: the link) and MAC
    log: str


def boot(tree: Path, names: Sequence[str], expected: int, ask: str = "") -> Seen:
    """Boot the guest in `tree` with NICs called `names`; wait until it has as many addresses as expected.

    `ask`: commands of bash beside the guest, where `inside` starts one of the guest's; what they print ends the log.
    """
    done = subprocess.run(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        + ["--mount-proc", "bash", "-c", WORLD, "world", str(tree), str(expected), " ".join(names)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "GUEST": GUEST, "WHOLE": WHOLE, "ASK": ask},
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    links = {link["ifname"]: link for link in report["addresses"] if "address" in link and link["ifname"] != "lo"}
    macs = {name: link["address"] for name, link in links.items()}
    return Seen(
        report["state"],
        report["who"],
        {macs[name]: frozenset(_global(link)) for name, link in links.items() if macs[name] in MACS},
        frozenset((route.get("gateway", ""), macs[route["dev"]]) for route in report["routes"] + report["routes6"]),
        done.stderr,
    )


def _global(link: dict[str, Any]) -> list[str]:
    return [f"{one['local']}/{one['prefixlen']}" for one in link["addr_info"] if one["scope"] == "global"]
