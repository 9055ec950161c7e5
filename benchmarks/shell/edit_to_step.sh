#!/bin/sh
# The least that brings an edit to the nodes and runs it: no checks, no clean-up, no way to stop it, no log kept.
#   IMAGE     repository:tag in a registry on this machine      CONTEXT     folder with the Dockerfile and the code
#   REGISTRY  its port, which the nodes reach through ssh -R    SSH_CONFIG  user, key and known hosts
#   NODES     addresses of the nodes, the head first            HEAD        where they meet, with PORT
#   NAME      of the containers                                 NODE_COUNT PROCS
set -eu
docker build --quiet --tag "$IMAGE" "$CONTEXT" >/dev/null
docker push --quiet "$IMAGE" >/dev/null
pids=
for node in $NODES; do
  [ "$node" = "$HEAD" ] && is_host=true || is_host=false
  ssh -F "$SSH_CONFIG" -R "$REGISTRY:127.0.0.1:$REGISTRY" "$node" "
    docker pull --quiet $IMAGE >/dev/null &&
    exec docker run --rm --name $NAME --network host --shm-size 1g $IMAGE \
      torchrun --nnodes $NODE_COUNT --nproc-per-node $PROCS --rdzv-backend c10d --rdzv-endpoint $HEAD:$PORT \
      --rdzv-id $NAME --rdzv-conf is_host=$is_host --local-addr $node train.py" &
  pids="$pids $!"
done
for pid in $pids; do wait "$pid"; done
