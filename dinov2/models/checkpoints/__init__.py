"""Models on disk: names of weights, files of weights, and checkpoints of pretraining."""
