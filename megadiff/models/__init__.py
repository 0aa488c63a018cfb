"""The denoiser: a bidirectional transformer assembled from Megatron-Core parts through `ModuleSpec`."""
