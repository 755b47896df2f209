"""State what each server does with the quantized experts of a mixture, which are not linear layers to it.

The rows have the evidence of `support_table.py`: a tiny Qwen3-MoE of 4 experts was given to the servers, or
their source was read. A server without a row has none for its linear layers, or experts were not looked into.
"""

from llmc.config import CheckpointFormat
from llmc.servers.support_table import VERSIONS
from llmc.servers.support_terms import Evidence, MatrixKind, Runtime, SchemeSupport, Status

_CT, _GPTQ = CheckpointFormat.COMPRESSED_TENSORS, CheckpointFormat.GPTQ
_AWQ, _MODELOPT = CheckpointFormat.AWQ, CheckpointFormat.MODELOPT
_GPU, _REFUSED, _WRONG = Status.GPU_ONLY, Status.REFUSED, Status.WRONG
_RAN, _LOADED, _SOURCE = Evidence.RAN, Evidence.LOADED, Evidence.SOURCE
_TRANSFORMERS, _VLLM = VERSIONS[Runtime.TRANSFORMERS], VERSIONS[Runtime.VLLM]
_EDGELLM = VERSIONS[Runtime.EDGELLM]
_METHODS = "vllm/model_executor/layers/quantization"
_ON_CPU = "vllm/model_executor/layers/fused_moe/experts/cpu_moe.py"
_NO_KERNEL = "its build for CPUs has no kernel for such experts, and ends while it loads"
_AMX = f"on x86, its kernels for such experts need AMX ({_ON_CPU}); without it, it ends while it loads"
_STACKS = "it does not read experts from the tensors of this format"

_GROUPS = (0, 32, 64, 128)

#: What a server does with the kinds of experts in each format.
EXPERTS: dict[tuple[Runtime, CheckpointFormat], dict[MatrixKind, SchemeSupport]] = {
    (Runtime.TRANSFORMERS, _CT): {
        MatrixKind.INT4: SchemeSupport(Status.SERVED, _RAN, _TRANSFORMERS),
        MatrixKind.FP8_DYNAMIC: SchemeSupport(Status.SERVED, _RAN, _TRANSFORMERS),
        MatrixKind.INT8_DYNAMIC: SchemeSupport(
            _REFUSED, _LOADED, _TRANSFORMERS, "it fails while it converts the names of experts"
        ),
    },
    (Runtime.VLLM, _CT): {
        MatrixKind.INT4: SchemeSupport(_GPU, _LOADED, _VLLM, _AMX, groups=_GROUPS),
        MatrixKind.INT8: SchemeSupport(
            _GPU, _SOURCE, f"{_METHODS}/compressed_tensors", _NO_KERNEL, groups=_GROUPS
        ),
        MatrixKind.INT8_DYNAMIC: SchemeSupport(_GPU, _LOADED, _VLLM, _AMX),
        MatrixKind.INT8_STATIC: SchemeSupport(
            _REFUSED,
            _SOURCE,
            f"{_METHODS}/compressed_tensors/compressed_tensors_moe",
            "Unsupported FusedMoe scheme: it takes int8 experts with activations by token alone",
        ),
        MatrixKind.FP8: SchemeSupport(
            _REFUSED,
            _SOURCE,
            f"{_METHODS}/compressed_tensors/compressed_tensors_moe",
            "Unsupported FusedMoe scheme: it takes fp8 experts with quantized activations alone",
        ),
        MatrixKind.FP8_DYNAMIC: SchemeSupport(_GPU, _LOADED, _VLLM, _NO_KERNEL),
        MatrixKind.FP8_STATIC: SchemeSupport(
            _REFUSED,
            _SOURCE,
            f"{_METHODS}/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe_w8a8_fp8.py",
            "static activations need a scale per tensor for experts",
        ),
        MatrixKind.FP8_TENSOR: SchemeSupport(
            _GPU, _SOURCE, f"{_METHODS}/compressed_tensors/compressed_tensors_moe", _NO_KERNEL
        ),
        MatrixKind.NVFP4: SchemeSupport(
            _GPU, _SOURCE, f"{_METHODS}/compressed_tensors/compressed_tensors_moe", _NO_KERNEL
        ),
        MatrixKind.NVFP4_WEIGHTS: SchemeSupport(
            _GPU, _SOURCE, f"{_METHODS}/compressed_tensors/compressed_tensors_moe", _NO_KERNEL
        ),
    },
    (Runtime.VLLM, _GPTQ): {
        MatrixKind.INT4: SchemeSupport(_GPU, _LOADED, _VLLM, _AMX, groups=_GROUPS),
        MatrixKind.INT8: SchemeSupport(_GPU, _SOURCE, f"{_METHODS}/auto_gptq.py", _NO_KERNEL, groups=_GROUPS),
    },
    (Runtime.VLLM, _AWQ): {
        MatrixKind.INT4: SchemeSupport(_GPU, _LOADED, _VLLM, _AMX, groups=_GROUPS, zero_points=_GPU)
    },
    (Runtime.VLLM, _MODELOPT): {
        MatrixKind.FP8_TENSOR: SchemeSupport(_GPU, _LOADED, _VLLM, _NO_KERNEL),
        MatrixKind.FP8_DYNAMIC: SchemeSupport(
            _REFUSED, _LOADED, _VLLM, "it expects a scale per tensor for experts"
        ),
        MatrixKind.NVFP4: SchemeSupport(_GPU, _LOADED, _VLLM, _NO_KERNEL),
        MatrixKind.NVFP4_WEIGHTS: SchemeSupport(_GPU, _SOURCE, f"{_METHODS}/modelopt.py", _NO_KERNEL),
    },
    (Runtime.EDGELLM, _GPTQ): {MatrixKind.INT4: SchemeSupport(_GPU, _LOADED, _EDGELLM)},
    (Runtime.EDGELLM, _AWQ): {
        MatrixKind.INT4: SchemeSupport(_REFUSED, _LOADED, _EDGELLM, f"its exporter fails: {_STACKS}")
    },
    (Runtime.EDGELLM, _CT): dict.fromkeys(
        (MatrixKind.INT4, MatrixKind.FP8_DYNAMIC, MatrixKind.INT8_DYNAMIC),
        SchemeSupport(_WRONG, _LOADED, _EDGELLM, "it skips their tensors without a word"),
    ),
    (Runtime.EDGELLM, _MODELOPT): {
        MatrixKind.INT4: SchemeSupport(_GPU, _LOADED, _EDGELLM),
        MatrixKind.NVFP4: SchemeSupport(_GPU, _LOADED, _EDGELLM),
        MatrixKind.FP8_TENSOR: SchemeSupport(_REFUSED, _LOADED, _EDGELLM, f"its exporter fails: {_STACKS}"),
        MatrixKind.FP8_DYNAMIC: SchemeSupport(
            _WRONG, _LOADED, _EDGELLM, "it takes scales of outputs for those of inputs"
        ),
    },
}
