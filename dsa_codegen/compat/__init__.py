"""Drop-ins: the functions that engines call, under their names, computed by this package. Each file translates one library.

``flash_mla`` (FlashMLA, sgl-flash-mla), ``deep_gemm`` (DeepGEMM), ``fast_topk`` (SGLang), ``top_k_per_row`` (vLLM). What is
wrong raises InputError, which names the argument as ``dsa_codegen.functions`` does. docs/engines.md says what differs.
"""
