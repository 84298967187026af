"""Read and write tasks: safetensors bodies, npz and Arrow files, rows of samples, and compressed bodies."""
