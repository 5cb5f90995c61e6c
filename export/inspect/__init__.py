"""What an .onnx file from elsewhere holds, and the model.yaml that it needs: ``python -m export inspect``."""
