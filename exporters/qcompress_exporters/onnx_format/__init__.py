"""The ONNX deployment format."""
