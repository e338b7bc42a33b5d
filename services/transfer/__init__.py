"""How KV blocks move between replicas: publish, fetch, release."""
