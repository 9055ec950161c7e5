#!/bin/sh
# The same as edit_to_step.sh, but it returns when the containers have started. RUN_ONLY=1 leaves out build, push and
# pull: the bare `ssh … docker run -d`, below which nothing that uses ssh and Docker can come. Variables as there.
set -eu
pull=
forward=
if [ "${RUN_ONLY:-0}" = 0 ]; then
  docker build --quiet --tag "$IMAGE" "$CONTEXT" >/dev/null
  docker push --quiet "$IMAGE" >/dev/null
  pull="docker pull --quiet $IMAGE >/dev/null &&"
  forward="-R $REGISTRY:127.0.0.1:$REGISTRY"
fi
pids=
for node in $NODES; do
  ssh -F "$SSH_CONFIG" $forward "$node" "$pull exec docker run --detach --name $NAME --network host --shm-size 1g $IMAGE \
    python3 -c pass >/dev/null" &
  pids="$pids $!"
done
for pid in $pids; do wait "$pid"; done
