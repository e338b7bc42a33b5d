"""The prefill deployment: prompt computation."""
