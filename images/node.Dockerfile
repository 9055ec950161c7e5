# A node of the simulated cluster: what a real node has, sshd and its own Docker engine, and nothing of ours.
# The same image serves as the local registry (docker-registry serve). Built by `orch sim up`.
ARG BASE_IMAGE=debian:trixie-slim
FROM ${BASE_IMAGE}

RUN apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
      ca-certificates docker-cli docker-registry docker.io iproute2 iptables openssh-server procps \
 && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*

# `*` instead of a locked password: sshd refuses locked accounts even when the key is right.
RUN useradd --create-home --uid 1000 --shell /bin/bash --groups docker orch && usermod --password '*' orch

COPY node-sshd.conf /etc/ssh/sshd_config
COPY node-registry.yml /etc/orch/registry.yml
COPY --chmod=755 node-entrypoint.sh /usr/local/bin/node-entrypoint

EXPOSE 22 5000
ENTRYPOINT ["/usr/local/bin/node-entrypoint"]
CMD ["node"]
