"""The engine: a PyTorch library that runs DeepSeek-V2/V3 models over paged KV blocks.

It knows no Ray, no Redis, no gRPC and no session.
"""
