"""The decode deployment: owns the sequence, its blocks and its token stream."""
