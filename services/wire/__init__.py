"""What both gRPC hops share: protos to and from the types of services.common, errors to and from google.rpc.Status.

Knows protobuf but not gRPC, so that gateway, decode and client can all use it.
"""
