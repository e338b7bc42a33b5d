"""Shared words: settings, messages, errors, prefix hashes, telemetry. Knows no other part."""
