"""The gateway: owns the turn, from the client's request to the client's stream."""
