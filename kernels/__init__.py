"""Hand-written kernels, a folder for each kind of processor: `cpu` (LLVM IR) and `cuda`."""
