"""The science: masks, network, diffusion and samplers. Tensors in, tensors out; no files, engines or logging."""
