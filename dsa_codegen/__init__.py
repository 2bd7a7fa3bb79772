"""A compiler-style kernel generator for DeepSeek Sparse Attention."""
