"""What leaves Skink: folders for Hugging Face and ONNX Runtime, and the report that goes with them."""
