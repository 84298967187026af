"""The archive: rounds of the history as Zarr groups in a folder or an object store, published by markers."""
