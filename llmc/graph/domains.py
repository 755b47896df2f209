"""The operator domains of a graph, and the versions of them that it imports."""

#: Domain of the operators that ONNX itself defines.
STANDARD = ""
#: Domain of ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"
#: Domain of the dialect that traced graphs are written in (`llmc.graph.dialect`).
DIALECT = "llmc"
#: Domain of the markers around layers, which never leave the trace.
TRACE = "llmc.trace"
#: Domain of TensorRT's own operators, and the one of them that quantizes activations to NVFP4.
TENSORRT = "trt"
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"
#: Domains of compiled operators: as they are served; with products in float32; with the KV cache and
#: attention in float32 too.
COMPILED, COMPILED_PRODUCTS, COMPILED_EXACT = "llmc.compiled", "llmc.compiled.products", "llmc.compiled.exact"

#: Standard opset of a traced graph.
OPSET = 21
#: Standard opset that first has an operator, for those that passes make and a traced graph cannot have.
SINCE = {"RMSNormalization": 23, "RotaryEmbedding": 23, "TensorScatter": 24}
#: Version of every other domain.
VERSION = 1
