"""Other projects' models on these kernels: one module per project, imported on request only."""
