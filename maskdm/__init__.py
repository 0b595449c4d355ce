"""MaskDM: does masked pretraining of a diffusion model pay, on your data and at equal compute?

Importing the package imports neither torch nor mlflow; the stages import what they use.
"""

__version__ = "0.1.0"
