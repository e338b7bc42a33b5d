"""antiphon: DeepSeek-architecture models for multi-turn chat on Ray Serve. README.md says where to start reading."""
