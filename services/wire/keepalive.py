"""How soon a peer that is silent counts as lost, between the processes of a cluster.

A process that is stopped, or a machine that is gone, closes no connection: only unanswered pings tell. gRPC's own
threads answer them, so a process that computes is not taken for one that is lost.
"""

from __future__ import annotations

PING_INTERVAL_MS = 4_000
PING_TIMEOUT_MS = 6_000

# Who calls pings while a call runs; who serves pings too, so that the turns of a lost gateway end.
INTERNAL_CLIENT = (
    ("grpc.keepalive_time_ms", PING_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),  # a minute by default, whatever the timeout of keepalive is
    ("grpc.http2.max_pings_without_data", 0),  # a prompt may be computed for long
)
INTERNAL_SERVER = (
    ("grpc.keepalive_time_ms", PING_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),  # a minute by default, whatever the timeout of keepalive is
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_INTERVAL_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
)
