"""Models on the disk: names of weights, files of weights, and checkpoints of pretraining."""
