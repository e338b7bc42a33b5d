"""Who a conversation is, what was said in it, and which replica holds its KV blocks.

`base` says what a session store does; `redis_store` is the one that a cluster uses, `memory_store` the one of a single
process. `registry` knows the replicas. Nothing outside this package imports redis.
"""
