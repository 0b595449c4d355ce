"""`maskdm score` and `maskdm export-images`: the pipeline's scores of any two sets of images."""
