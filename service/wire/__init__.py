"""The doors: gRPC services, and what crosses them."""
