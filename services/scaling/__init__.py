"""How many replicas there should be: plain decisions, and the thin part that Ray Serve calls."""
