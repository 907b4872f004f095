"""The Open Inference Protocol, which HTTP and gRPC share."""
