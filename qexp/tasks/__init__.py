"""Lightning modules: each method of quantization is one."""
