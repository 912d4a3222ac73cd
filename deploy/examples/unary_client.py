"""Takes a slot, talks to the model server itself, gives the slot back: for services that bypass the edge.

    python unary_client.py 127.0.0.1:7071 small "hello"

The first argument is `admission.listen`, the second a model's name (not an alias).
"""

import json
import sys
import threading
import urllib.request
import uuid

import grpc

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc as pb_grpc

HOLDER = uuid.uuid4().hex  # chosen once per process


def keep(
    stub: pb_grpc.AdmissionServiceStub, renewal: pb.RenewRequest, ttl: float, over: threading.Event
) -> None:
    """Renews until `over`. An admission that was restarted learns of the lease from the renewal."""
    while not over.wait(ttl / 3):
        try:
            stub.Renew(renewal, timeout=ttl / 3, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return  # expired, revoked, or its instance is gone: a long task should stop here


def main(address: str, model: str, text: str) -> None:
    """One completion."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.AdmissionServiceStub(channel)
        request = pb.AcquireRequest(holder_id=HOLDER, request_id=uuid.uuid4().hex, model=model)
        lease = stub.Acquire(request, timeout=120)  # waits in the queue, and starts the model if need be
        renewal = pb.RenewRequest(
            holder_id=HOLDER, lease_id=lease.lease_id, model=model, instance_id=lease.instance_id
        )
        done = threading.Event()
        threading.Thread(target=keep, args=(stub, renewal, lease.lease_ttl_ms / 1000, done)).start()
        used = {}
        try:
            body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 50}
            url, headers = f"{lease.address}/v1/chat/completions", {"content-type": "application/json"}
            post = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(post, timeout=60) as answer:
                said = json.load(answer)
            used = {name: said["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
            print(said["choices"][0]["message"]["content"])
        finally:
            done.set()
            stub.Release(pb.ReleaseRequest(holder_id=HOLDER, lease_id=lease.lease_id, **used), timeout=5)


if __name__ == "__main__":
    main(*sys.argv[1:4])
