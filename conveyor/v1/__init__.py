"""Version 1 of the wire contract: stubs that protoc wrote from proto/conveyor/v1/conveyor.proto (`make proto`)."""
