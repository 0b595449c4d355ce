"""The science: masks, network, diffusion and samplers. Tensors in, tensors out; no files, no engines, no logging."""
