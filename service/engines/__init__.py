"""What runs a graph: onnxruntime sessions, and the devices that they run on. Must not know sessions or queues."""
