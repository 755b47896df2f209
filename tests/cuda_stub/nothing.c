// libcurand.so.10 and libcufft.so.12 of the stub: ONNX Runtime and onnxruntime-genai link with them and call nothing.
typedef int nothing;
