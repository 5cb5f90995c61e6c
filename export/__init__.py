"""From torch to verified ONNX."""
