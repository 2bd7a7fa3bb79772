"""Where other libraries' models run these kernels: each integration imports its library, and nothing else here does."""
