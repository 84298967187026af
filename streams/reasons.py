"""Why an arrival is refused: every reason that ``Rejected`` carries, in one table."""

REASONS = {
    "bad_id": "the id is empty, too long, or not letters, digits, '.', '_', ':' and '-' after a letter or digit",
    "too_large": "more bytes, samples or numbers than the limits allow",
    "unknown_encoding": "the Content-Encoding is none that is taken, or there are several",
    "bad_compression": "a compressed body is damaged, cut off, followed by more, or lies about its size",
    "expands_too_much": "a compressed body becomes more times larger than the limits allow",
    "unreadable": "the bytes are not of the format that they should be of",
    "missing_tensor": "a tensor, or column, that is needed is not there",
    "unknown_tensor": "there is a tensor, or column, of another name",
    "wrong_dtype": "a tensor's element type is not the one that the run expects",
    "wrong_shape": "a tensor's shape is not the one that the run expects, or two that must agree do not",
    "empty_support": "there is no sample to adapt on",
    "empty_query": "there is no sample to be judged on, nor one that could be held out",
    "not_finite": "there is NaN or infinity, or a target that float32 cannot hold",
    "label_out_of_range": "a label is below 0 or not below ways",
    "conflict": "the id belongs to a task of other bytes",
}
"""What each reason means. They are labels of ``tasks_rejected_total`` and names in dead letters, so they stay."""
