"""Callbacks of a training run: checkpoints and stopping, CSV files, TensorBoard, console output."""
