"""Sessions and the replica registry, in Redis or in memory."""
