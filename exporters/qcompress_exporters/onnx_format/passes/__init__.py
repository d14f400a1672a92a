"""Passes over the ONNX graph of a program, one per file; those that onnx_ir has are taken from there."""
