"""The stages of the pipeline: each reads params.yaml and earlier outputs, and publishes its own output whole."""
