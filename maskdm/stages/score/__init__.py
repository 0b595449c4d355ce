"""`maskdm score` and `maskdm export-images`: two sets of images scored as the pipeline scores samples; PNG files."""
