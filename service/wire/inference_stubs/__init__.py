"""What protoc makes of the Open Inference Protocol, for the server alone."""
