"""The formats of tasks: safetensors, npz, Arrow, rows, and compressed bodies."""
