#!/bin/bash
# Entry point of a simulated node.
#   node       prepare, start the engine and sshd, stay until TERM (the container's command)
#   engine     start the engine if it is not running (after a fault)
#   sshd       start sshd if it is not running
#   hosts      write the node's /etc/hosts again (docker rewrites it when a network is connected)
#   host-key   make a new host key and let sshd use it
#   registry   serve images instead of being a node
# Environment: ORCH_AUTHORIZED_KEY (public key of the operator), ORCH_CGROUP_PARENT, ORCH_DEBIAN_HOSTS=1.
set -eu

keys=/home/.host-keys
engine_log=/var/log/dockerd.log

make_host_key() {
  install -d -m 700 "$keys"
  rm -f "$keys"/ssh_host_ed25519_key*
  ssh-keygen -q -t ed25519 -N '' -C "$(hostname)" -f "$keys/ssh_host_ed25519_key"
}

prepare_user() {
  # /home is a volume of its own, so that the node's files outlive a new image: an older one may hold no home yet.
  install -d -m 755 -o orch -g orch /home/orch
  install -d -m 700 -o orch -g orch /home/orch/.ssh
  printf '%s\n' "${ORCH_AUTHORIZED_KEY:-}" > /home/orch/.ssh/authorized_keys
  chown orch:orch /home/orch/.ssh/authorized_keys
  chmod 600 /home/orch/.ssh/authorized_keys
  [ -f "$keys/ssh_host_ed25519_key" ] || make_host_key
  if [ -d /shared ]; then chmod 1777 /shared; fi
}

debian_hosts() {
  [ "${ORCH_DEBIAN_HOSTS:-}" = 1 ] || return 0
  # Debian's installer maps the hostname to 127.0.1.1 and to nothing else. The file is a mount: rewrite, never rename.
  local name rest
  name=$(hostname)
  rest=$(grep -vw "$name" /etc/hosts || true)
  printf '%s\n127.0.1.1\t%s\n' "$rest" "$name" > /etc/hosts
}

nest_cgroups() {
  # cgroup v2 in a private namespace: processes must leave the root before controllers can be handed down.
  [ -f /sys/fs/cgroup/cgroup.controllers ] && [ -z "${ORCH_CGROUP_PARENT:-}" ] || return 0
  mkdir -p /sys/fs/cgroup/init
  xargs -rn1 < /sys/fs/cgroup/cgroup.procs > /sys/fs/cgroup/init/cgroup.procs 2>/dev/null || true
  sed -e 's/ / +/g' -e 's/^/+/' /sys/fs/cgroup/cgroup.controllers > /sys/fs/cgroup/cgroup.subtree_control || true
}

start_engine() {
  pgrep -x dockerd > /dev/null && return 0
  # Pid files of the dead would make the new engine believe in a process that has their number now.
  rm -f /run/docker.pid
  pgrep -x containerd > /dev/null || rm -f /run/docker/containerd/containerd.pid
  if [ -n "${ORCH_CGROUP_PARENT:-}" ]; then
    # Empty cgroups of containers that were killed with their engine; those in use cannot be removed.
    find /sys/fs/cgroup -depth -type d -path "*$ORCH_CGROUP_PARENT/*" -exec rmdir {} + 2>/dev/null || true
    set -- --cgroup-parent "$ORCH_CGROUP_PARENT"
  else
    set --
  fi
  setsid dockerd --storage-driver overlay2 "$@" >> "$engine_log" 2>&1 < /dev/null &
}

start_sshd() {
  install -d -m 755 /run/sshd
  pgrep -f '^/usr/sbin/sshd( |$)|^sshd: /usr/sbin/sshd' > /dev/null || /usr/sbin/sshd
}

serve_node() {
  prepare_user
  debian_hosts
  nest_cgroups
  rm -rf /run/docker /run/containerd  # what a power cut has left; containers did not outlive it
  start_engine
  start_sshd
  # A short goodbye: the engine may end its containers, but a node that is switched off does not wait for them.
  trap 'pkill -TERM -x dockerd || true; timeout 3 sh -c "while pgrep -x dockerd >/dev/null; do sleep 0.1; done"; exit 0' TERM INT
  while :; do sleep 3600 & wait $! || true; done
}

case "${1:-node}" in
  node) serve_node ;;
  engine) start_engine ;;
  sshd) start_sshd ;;
  hosts) debian_hosts ;;
  host-key) make_host_key; pkill -HUP -o -x sshd || start_sshd ;;
  registry) exec docker-registry serve /etc/orch/registry.yml ;;
  *) exec "$@" ;;
esac
