"""Name the operator domains of a graph, and the versions that it imports."""

#: Domain of the operators that ONNX itself defines.
STANDARD = ""
#: Domain of ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"
#: Domain of the dialect in which traced graphs are written (`llmc.graph.dialect`).
DIALECT = "llmc"
#: Domain of the markers around layers, which exist only while tracing.
TRACE = "llmc.trace"
#: Domain of TensorRT's own operators, and its operator that quantizes activations to NVFP4.
TENSORRT = "trt"
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"
#: Domains of compiled operators: as served; with products in float32; with products, KV cache and attention
#: in float32.
COMPILED, COMPILED_PRODUCTS, COMPILED_EXACT = "llmc.compiled", "llmc.compiled.products", "llmc.compiled.exact"

#: Standard opset of a traced graph.
OPSET = 21
#: Standard opset that introduced an operator, for operators that passes create and traced graphs cannot have.
SINCE = {"RMSNormalization": 23, "RotaryEmbedding": 23, "TensorScatter": 24}
#: Version of every domain other than the standard one.
VERSION = 1
