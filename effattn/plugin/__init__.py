"""What `import effattn` adds to transformers: a quantization method, a model type and names of
attention."""
