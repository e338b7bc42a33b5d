"""What prefill and decode replicas have in common: blocks lent and borrowed, and the report to the registry."""
